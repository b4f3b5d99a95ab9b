"""Lists the weight files below a directory with their digests, the content of `[files]` in `bundle.toml`."""

import hashlib
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".onnx", ".gguf")


def weight_files(directory: Path) -> list[Path]:
    """Files with a suffix of weights, without hidden ones, which are incomplete."""
    paths = (path for path in directory.rglob("*") if path.suffix.lower() in WEIGHT_SUFFIXES and path.is_file())
    return sorted(path for path in paths if not path.name.startswith("."))


def file_hash(path: Path) -> str:
    """SHA-256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every weight file below a directory, by its path there."""
    return {path.relative_to(directory).as_posix(): file_hash(path) for path in weight_files(directory)}
