"""How the optional packages of an extra are installed: the project is on no package index."""


def install_hint(extra: str) -> str:
    """The command that installs an extra, for messages about a package that is missing."""
    return f"in the checkout of Giantleap run: pip install '.[{extra}]'"
