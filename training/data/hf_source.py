"""Read the rows of a Hugging Face data set as encoded pictures for `training/data/prepare.py`, in order.

The library `datasets` (extra `train`) locates and caches the data but does not decode it: a damaged picture affects
only its row, and digests are those of the stored bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from giantleap.models.messages import install_hint
from giantleap.training.data.pairs_store import PairsError

ROWS_AT_ONCE = 1024  # rows whose sizes are read at once
SAVED = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes


@dataclass(frozen=True)
class HubSource:
    """A selection of rows of a data set.

    Attributes:
        name: Name on the hub, or a directory: output of `save_to_disk`, parquet files, or pictures.
        split: Split; a slice such as "train[:1000]" is allowed except for `save_to_disk` output.
        column: Column of the pictures.
        config: Configuration of a data set that has several.
        revision: Commit, tag or branch on the hub.
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
        """Return the picture's encoded bytes.

        Raises:
            OSError: The row has no picture, or its file cannot be read.
        """
        cell = self.rows[self.row][self.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise FileNotFoundError(0, "the row holds no picture")
        content: bytes | None = cell["bytes"]
        return Path(cell["path"]).read_bytes() if content is None else content


def list_rows(source: HubSource) -> list[RowSource]:
    """List one source per row, in order; `datasets` downloads or converts into its cache where needed.

    Raises:
        PairsError: `datasets` is not installed; the data set, split or column does not exist; the column has no
            pictures; or a picture is a file that is not on this machine.
    """
    try:
        import datasets
    except ImportError as error:
        raise PairsError(f"a Hugging Face data set needs the package datasets: {install_hint('train')}") from error
    try:
        rows = _open(datasets, source)
    except PairsError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PairsError(
            f"data set {source.name}, split {source.split}: it cannot be opened ({type(error).__name__}); check name, "
            "split and --hf-config, and the access to the hub"
        ) from error
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
    """Open the rows, from `save_to_disk` files where the directory has them."""
    if not any((Path(source.name) / name).is_file() for name in SAVED):
        return datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    if source.config is not None or source.revision is not None:
        raise PairsError(f"data set {source.name}: what save_to_disk wrote has neither configurations nor revisions")
    saved = datasets.load_from_disk(source.name)
    if isinstance(saved, datasets.Dataset):
        saved = {str(saved.split or "train"): saved}  # a split that was saved alone
    if source.split not in saved:
        raise PairsError(f"data set {source.name}: no such split; it has {', '.join(saved)}")
    return saved[source.split]


def row_sizes(rows: Any, source: HubSource) -> Iterator[int]:
    """Return the size in bytes of each row's picture without reading it; 0 where there is none.

    Raises:
        PairsError: A picture is a file that is not on this machine.
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
        return 0  # an empty row counts as damaged
    if "://" in path:
        raise PairsError(f"data set {source.name}: {path} is not a file of this machine; save the data set with it")
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0  # a missing file: `read_picture` reports it
