"""Finds a bundle by its directory or its name, for every command, setting and run file that takes one.

A pulled bundle comes before the shipped descriptor of that name. No torch is imported.
"""

from collections.abc import Sequence
from pathlib import Path

from giantleap.models.bundle.bundle import DESCRIPTOR, Bundle, BundleError, read_bundle

SHIPPED = Path(__file__).resolve().parents[2] / "bundles"
PULLED = "bundles"  # below the data directory of the settings


def find_bundle(name: str | Path, pulled: Path | None = None, beside: Path = Path()) -> Path:
    """The directory of a bundle.

    Args:
        name: Its directory, or its name alone.
        pulled: Directory of the pulled bundles.
        beside: Where a relative directory starts.

    Returns:
        A directory with a descriptor; for a path of several parts the path itself, which `read_bundle` checks.

    Raises:
        BundleError: No bundle has this name.
    """
    directory = beside / name
    if is_bundle(directory) or not is_name(name):
        return directory
    for place in (pulled, SHIPPED):
        if place is not None and is_bundle(place / name):
            return place / name
    known = ", ".join(path.name for path in list_bundles(pulled))
    raise BundleError(
        f"{name}: no directory with {DESCRIPTOR} and no known bundle; give a directory or one of {known}; "
        "`giantleap bundle pull` fetches those on the hub"
    )


def load_bundle(name_or_directory: str | Path) -> Bundle:
    """Read a bundle by its directory, or a shipped one by its name.

    Raises:
        BundleError: There is no such bundle, or it cannot be read (`read_bundle`).
    """
    return read_bundle(find_bundle(name_or_directory))


def list_bundles(pulled: Path | None = None) -> Sequence[Path]:
    """Directories of the pulled bundles and of the shipped ones that were not pulled, by name."""
    directories = {
        path.parent.name: path.parent
        for place in (SHIPPED, pulled)
        if place is not None
        for path in place.glob(f"*/{DESCRIPTOR}")
    }
    return [directories[name] for name in sorted(directories)]


def is_name(name: str | Path) -> bool:
    """Whether a bundle is given by a name, which has no separator, and not by a path."""
    return str(name) not in ("", ".", "..") and "/" not in str(name) and not Path(name).is_absolute()


def is_bundle(directory: Path) -> bool:
    """Whether a directory has a descriptor."""
    try:
        return (directory / DESCRIPTOR).is_file()
    except OSError:  # a name that is too long for a file, or behind a directory that may not be read
        return False
