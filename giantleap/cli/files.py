"""Files that commands read and write: `-` is standard input or output, and outputs are checked before the work."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from giantleap.cli.errors import to_line
from giantleap.cli.options import stop, to_message
from giantleap.models.adapters.files import SUFFIX, AdapterError, AdapterUse, read_file
from giantleap.models.bundle.bundle import Bundle
from giantleap.service.errors import GiantleapError
from giantleap.service.jobs.bundles import ServedBundle, choose_loras, with_loras
from giantleap.service.jobs.requests import LoraRequest
from giantleap.service.settings import Settings

if TYPE_CHECKING:
    from giantleap.models.pixels.image_formats import ImageFormat

STANDARD: Final = Path("-")
LATENT: Final = ".safetensors"
IMAGE_FORMATS: "Final[Mapping[str, ImageFormat]]" = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        help="LoRA: a .safetensors file, or a name in GIANTLEAP_LORA_DIR; NAME:0.8 sets its weight; repeatable."
    ),
]


def read_input(path: Path) -> bytes:
    """The content of a file, or standard input for `-`; one that cannot be read ends the command."""
    try:
        return sys.stdin.buffer.read() if path == STANDARD else path.read_bytes()
    except OSError as error:
        stop(to_line(error))


def write_output(path: Path, content: bytes) -> None:
    """Write a file, or standard output for `-`."""
    if path == STANDARD:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        path.write_bytes(content)


def image_format(out: Path) -> "ImageFormat":
    """The format that the name of an image says, PNG for `-`; another name ends the command."""
    if out == STANDARD:
        return "png"
    if out.suffix.lower() not in IMAGE_FORMATS:
        stop(f"{out}: unknown image format; the name must end in one of {', '.join(IMAGE_FORMATS)}")
    return IMAGE_FORMATS[out.suffix.lower()]


def check_output_file(path: Path | None) -> None:
    """End the command if a file cannot be written there."""
    if path is None:
        return
    if path == STANDARD:
        if sys.stdout.isatty():
            stop("-: standard output is a terminal; redirect it to a file or another program")
        return
    try:
        if path.is_dir():
            stop(f"{path}: it is a directory; name a file")
        if not path.parent.is_dir():
            stop(f"{path}: there is no directory {path.parent}; create it with: mkdir -p {path.parent}")
        _check_writable(path if path.exists() else path.parent, path)
    except OSError as error:  # for example a name that is too long
        stop(to_line(error))


def check_output_directory(path: Path) -> None:
    """End the command if files cannot be written into a directory, which need not exist yet."""
    try:
        place = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        if not place.is_dir():
            stop(f"{path}: {place} is no directory; name another one")
        _check_writable(place, path)
    except OSError as error:
        stop(to_line(error))


def check_input_files(*paths: Path | None) -> None:
    """End the command if one of the files is missing."""
    for path in paths:
        if path is not None and path != STANDARD and not path.is_file():
            stop(f"{path}: there is no such file; check the path")


def check_input_directories(*paths: Path | None) -> None:
    """End the command if one of the directories is missing."""
    for path in paths:
        if path is not None and not path.is_dir():
            stop(f"{path}: there is no such directory; check the path")


def _check_writable(place: Path, path: Path) -> None:
    if not os.access(place, os.W_OK):
        stop(f"{path}: {place} cannot be written to; change its permissions or name another path")


@dataclass(frozen=True, slots=True)
class LocalLoras:
    """The LoRAs of a command, and the paths of their files by name."""

    uses: tuple[AdapterUse, ...] = ()
    paths: tuple[tuple[str, Path], ...] = ()


def read_loras(options: Sequence[str] | None, bundle: Bundle, settings: Settings) -> LocalLoras:
    """The files of the options; one that is missing, no LoRA, or for another model ends the command."""
    if not options:
        return LocalLoras()
    parts = [re.fullmatch(r"(.+?)(?::(-?[0-9.]+))?", option, re.DOTALL) for option in options]
    try:
        named = [(_to_path(part[1], settings), float(part[2] or 1)) for part in parts if part is not None]
        files = [read_file(path) for path, _ in named]
        requests = [LoraRequest(name=file.name, weight=named[index][1]) for index, file in enumerate(files)]
        served = with_loras(ServedBundle(bundle, None), {file.name: file for file in files})
        uses = choose_loras(requests, served)
    except (ValueError, GiantleapError) as error:
        stop(f"--lora: {to_message(error)}")
    return LocalLoras(uses, tuple((file.name, path) for file, (path, _) in zip(files, named, strict=True)))


def _to_path(text: str, settings: Settings) -> Path:
    if text.endswith(SUFFIX):
        return Path(text)
    if settings.lora_dir is None:
        raise AdapterError(f"{text[:80]}: name a {SUFFIX} file, or set GIANTLEAP_LORA_DIR")
    return settings.lora_dir / f"{text}{SUFFIX}"
