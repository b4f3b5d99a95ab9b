"""The rows of a Hugging Face data set as pictures for `training/data/prepare.py`: encoded bytes, in the order of the
rows.

The library `datasets` finds and keeps the data; nothing is decoded by it, so that a damaged picture costs its row alone
and digests are those of the bytes as they are stored. It is in the extra `train`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from giantleap.training.data.pairs_store import PairsError

ROWS_AT_ONCE = 1024  # of which the sizes are read
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a directory


@dataclass(frozen=True)
class HubSource:
    """Which rows of which data set.

    Args:
        name: Of a data set on the hub; or a directory that `save_to_disk` wrote, or one with parquet files or pictures.
        split: Of the data set; parts such as "train[:1000]" too, but for what `save_to_disk` wrote.
        column: Holds the pictures.
        config: Of a data set that has several.
        revision: Of one on the hub: a commit, a tag or a branch.
    """

    name: str
    split: str = "train"
    column: str = "image"
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class RowSource:
    """The picture of one row."""

    name: str
    rows: Any
    row: int
    column: str
    size_bytes: int

    def read(self) -> bytes:
        """The picture as it is stored.

        Raises:
            OSError: The row holds none, or the file that it names cannot be read.
        """
        cell = self.rows[self.row][self.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise FileNotFoundError(0, "the row holds no picture")
        content: bytes | None = cell["bytes"]
        return Path(cell["path"]).read_bytes() if content is None else content


def list_rows(source: HubSource) -> list[RowSource]:
    """A picture for each row, in the order of the rows.

    Raises:
        PairsError: `datasets` is not installed, the data set, its split or column is not there, the column holds no
            pictures, or a picture lies in a file elsewhere that is not of this machine.

    Effects:
        A data set that is not on disk in the library's own form is downloaded or converted into its cache.
    """
    try:
        import datasets
    except ImportError as error:
        raise PairsError('a Hugging Face data set needs its library: pip install "giantleap[train]"') from error
    try:
        rows = _open(datasets, source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PairsError(f"data set {source.name}, split {source.split}: {error}") from error
    feature = rows.features.get(source.column)
    if feature is None:
        raise PairsError(f"data set {source.name} has no column {source.column}; it has {', '.join(rows.column_names)}")
    if not isinstance(feature, datasets.Image):
        raise PairsError(f"data set {source.name}: column {source.column} holds {feature}, and no pictures")
    rows = rows.select_columns([source.column]).cast_column(source.column, datasets.Image(decode=False))
    label = f"{Path(source.name).name}/{source.split}"
    sizes = enumerate(row_sizes(rows, source))
    return [RowSource(f"{label}/{row}", rows, row, source.column, size_bytes) for row, size_bytes in sizes]


def _open(datasets: Any, source: HubSource) -> Any:
    """The rows, from the library's own files where the directory has them."""
    if not any((Path(source.name) / name).is_file() for name in SAVED):
        return datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    if source.config is not None or source.revision is not None:
        raise ValueError("what save_to_disk wrote has neither configurations nor revisions")
    saved = datasets.load_from_disk(source.name)
    if isinstance(saved, datasets.Dataset):
        saved = {str(saved.split or "train"): saved}  # a split that was saved alone keeps its name, if it has one
    if source.split not in saved:
        raise ValueError(f"no such split; it has {', '.join(saved)}")
    return saved[source.split]


def row_sizes(rows: Any, source: HubSource) -> Iterator[int]:
    """The length of each row's picture in bytes, without reading it; 0 where there is none.

    Args:
        rows: Of the data set, whose column holds pictures that are not decoded.
        source: What they are called.

    Raises:
        PairsError: A picture lies in a file that is not of this machine.
    """
    import pyarrow.compute

    tables = rows.with_format("arrow")
    for start in range(0, len(rows), ROWS_AT_ONCE):
        cells = tables[start : start + ROWS_AT_ONCE][source.column].combine_chunks()
        lengths = pyarrow.compute.binary_length(cells.field("bytes")).to_pylist()
        for length, path in zip(lengths, cells.field("path").to_pylist(), strict=True):
            yield length if length is not None else _file_size(path, source)


def _file_size(path: str | None, source: HubSource) -> int:
    if path is None:
        return 0  # an empty row, which counts as damaged
    if "://" in path:
        raise PairsError(f"data set {source.name}: {path} is not a file of this machine; save the data set with it")
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0  # as a file that is gone: read_picture says so
