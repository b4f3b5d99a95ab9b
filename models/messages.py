"""Texts of error messages that several packages share, in place of those of libraries."""

import re


def install_hint(extra: str) -> str:
    """The command that installs an extra, for messages about a package that is missing; no package index has it."""
    return f"in the checkout of Giantleap run: pip install '.[{extra}]'"


def toml_fault(error: ValueError) -> str:
    """Why text is not TOML, with the place; the text itself, which may be a secret, is no part of it.

    Args:
        error: Of tomllib, or of decoding UTF-8.
    """
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}; save it as UTF-8"
    place = re.search(r"line \d+, column \d+|end of document", str(error))
    return f"not TOML at {place[0]}; correct it there" if place else "not TOML; correct it"
