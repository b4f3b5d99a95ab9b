"""The outcome of each row: JSON lines in the output, one file per claim of a shard, written by its owner only."""

import json
from dataclasses import asdict, dataclass, field
from typing import Final

from giantleap.batch.store import Store

FOLDER: Final = "_batch/manifest"


@dataclass(frozen=True, slots=True)
class Entry:
    """The outcome of a row: an output or an error.

    Attributes:
        key: Of the row.
        output: Name of the file in the output.
        seed: None where nothing random was done.
        sha256: Of the file.
        seconds: Share of the row in the time of its batch.
        error: What was wrong, what was expected.
    """

    key: str
    output: str | None = None
    seed: int | None = None
    sha256: str | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass
class Manifest:
    """The entries of one writer; the file is rewritten as a whole, so that no line is ever cut off."""

    store: Store
    name: str
    entries: list[Entry] = field(default_factory=list)

    def add(self, entries: list[Entry]) -> None:
        """Add entries and write the file."""
        self.entries += entries
        lines = [json.dumps(asdict(entry)) + "\n" for entry in self.entries]
        self.store.write(f"{FOLDER}/{self.name}.jsonl", "".join(lines).encode())


def read_entries(store: Store, prefix: str = "") -> dict[str, Entry]:
    """The entry of each row by key, from all manifests whose name starts so; an output replaces an error."""
    entries: dict[str, Entry] = {}
    for name in sorted(store.names(FOLDER)):
        content = store.read(f"{FOLDER}/{name}") if name.startswith(prefix) else None
        for line in (content or b"").splitlines():
            entry = Entry(**json.loads(line))
            if entry.error is None or entry.key not in entries:
                entries[entry.key] = entry
    return entries
