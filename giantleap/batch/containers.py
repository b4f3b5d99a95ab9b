"""Rows of the files that hold many: lines of prompts, WebDataset tars and parquet. All take an open binary file."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from typing import Any, BinaryIO, Final

from giantleap.batch.rows import PROMPT_FIELDS, Row
from giantleap.batch.store import BatchError
from giantleap.models.messages import install_hint

_BODY_COLUMNS: Final = ("latent", "image")
_TAR_BODIES: Final = ("safetensors", "npy", "png", "jpg", "jpeg", "webp")
_PARQUET_BATCH: Final = 64


def read_lines(file: BinaryIO, name: str, rows: range, is_json: bool) -> Iterator[Row]:
    """A prompt per line, or a JSON object with `prompt`, and optionally `key` and `PROMPT_FIELDS`; no empty lines."""
    for index, line in enumerate(islice(file, rows.start, rows.stop), rows.start):
        if not line.strip():
            continue
        key = f"{name}-{index:06d}"
        try:
            text = line.decode()
            yield to_row(key, json.loads(text)) if is_json else Row(key, prompt=text.strip())
        except ValueError:
            kind = "a JSON object" if is_json else "UTF-8 text"
            yield Row(key, error=f"line {index + 1} is not {kind}; correct it")


def read_tar(file: BinaryIO, name: str) -> Iterator[Row]:
    """A WebDataset tar: files of one name up to the first dot are a row: a latent or an image, else `txt` or `json`."""
    try:
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            members = (each for each in archive if each.isfile())
            for key, sample in groupby(members, key=lambda each: _split(each.name)[0]):
                files = {_split(each.name)[1]: _content(archive, each) for each in sample}
                yield _to_sample(f"{name}/{key}", files)
    except (tarfile.TarError, EOFError, OSError) as error:
        yield Row(f"{name}/damaged", error=f"the tar cannot be read to its end ({type(error).__name__}); make it again")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "a regular file"
    return file.read()


def _split(path: str) -> tuple[str, str]:
    folder, slash, name = path.removeprefix("./").rpartition("/")
    stem, _, end = name.partition(".")
    return f"{folder}{slash}{stem}", end.lower()


def _to_sample(key: str, files: Mapping[str, bytes]) -> Row:
    try:
        fields = json.loads(files.get("json", b"{}"))
        if (body := next((files[end] for end in _TAR_BODIES if end in files), None)) is not None:
            return to_row(key, {"image": body, **fields, "key": None})
        text = {"prompt": files["txt"].decode().strip()} if "txt" in files else {}
        return to_row(key, {**fields, **text, "key": None})
    except (ValueError, TypeError):
        return Row(key, error="its .txt is not UTF-8 text or its .json no object; correct it")


def count_parquet(file: BinaryIO, path: str) -> int:
    """How many rows a parquet file has.

    Raises:
        BatchError: It is damaged, or pyarrow is not installed.
    """
    parquet = _import_parquet()
    try:
        return int(parquet.ParquetFile(file).metadata.num_rows)
    except (ValueError, OSError) as error:
        raise BatchError(f"{path}: no parquet file, or a damaged one; make it again") from error


def read_parquet(file: BinaryIO, name: str, rows: range, _: bool) -> Iterator[Row]:
    """Rows with a column `latent`, `image` (files as bytes, or as structs with `bytes`) or `prompt`."""
    try:
        opened = _import_parquet().ParquetFile(file)
        for index, values in _read_columns(opened, rows):
            yield to_row(f"{name}-{index:06d}", values)
    except (ValueError, OSError) as error:
        reason = f"rows {rows.start} to {rows.stop} cannot be read ({type(error).__name__}); make the file again"
        yield Row(f"{name}-{rows.start:06d}-damaged", error=reason)


def _read_columns(opened: Any, rows: range) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The columns that a row may have, from the row groups that hold these rows."""
    wanted = {"key", "prompt", *_BODY_COLUMNS, *PROMPT_FIELDS}
    columns = [column for column in opened.schema_arrow.names if column in wanted]
    start = 0
    for group in range(opened.num_row_groups):
        stop = start + opened.metadata.row_group(group).num_rows
        if start < rows.stop and stop > rows.start:
            batches = opened.iter_batches(_PARQUET_BATCH, row_groups=[group], columns=columns)
            values = (each for batch in batches for each in batch.to_pylist())
            yield from (pair for pair in enumerate(values, start) if pair[0] in rows)
        start = stop


def to_row(key: str, values: Any) -> Row:
    """A row from named values; others than those that a row may have are left alone."""
    if not isinstance(values, dict):
        return Row(key, error="is no JSON object; give one with a prompt")
    key = key if values.get("key") is None else str(values["key"])
    fields = {name: values[name] for name in PROMPT_FIELDS if name in values}
    body = next((values[name] for name in _BODY_COLUMNS if values.get(name) is not None), None)
    body = body.get("bytes") if isinstance(body, dict) else body
    if isinstance(body, bytes):
        return Row(key, body=body, fields=fields)
    if body is None and isinstance(values.get("prompt"), str):
        return Row(key, prompt=values["prompt"], fields=fields)
    return Row(key, error="has no prompt (text) and no latent or image (a file as bytes); name the columns so")


def _import_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise BatchError(f"parquet needs pyarrow: {install_hint('batch')}") from error
    return parquet
