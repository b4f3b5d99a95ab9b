"""What a run tells while it goes on: lines of JSON, sheets of pictures, TensorBoard. `training/run.py` writes it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from giantleap.training.curriculum import ConfigError
from giantleap.training.data.pairs_store import replace_file

LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class Log:
    """`log.jsonl`, sample sheets, and TensorBoard's own files where asked for.

    Args:
        out: Directory of the run.
        board: TensorBoard's writer; None for no such files.
    """

    out: Path
    board: Any

    def write(self, line: Mapping[str, Any], volatile: Mapping[str, float]) -> None:
        """Adds a line; `volatile` values differ from run to run."""
        with (self.out / LOG_FILE).open("a") as file:
            file.write(json.dumps({**line, **volatile}) + "\n")
        if self.board is not None:
            for name, value in {**line, **volatile}.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, line["step"])
            self.board.flush()

    def write_sheet(self, step: int, sheet: Tensor) -> None:
        levels = ((sheet + 1.0) * 127.5).round().byte()
        Image.fromarray(levels.permute(1, 2, 0).numpy()).save(self.out / "samples" / f"step-{step:09d}.png")
        if self.board is not None:
            self.board.add_image("held_out", levels, step)


def open_log(out: Path, done: int, tensorboard: bool) -> Log:
    """The log of a run that starts, or goes on.

    Args:
        out: Directory of the run.
        done: Updates that are in the checkpoint; lines of later ones, from before a kill, are dropped.
        tensorboard: Needs the extra `train`.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """
    path = out / LOG_FILE
    (out / "samples").mkdir(parents=True, exist_ok=True)
    before = path.read_text().splitlines() if path.exists() else []
    replace_file(path, "".join(f"{line}\n" for line in before if _is_until(line, done)).encode())
    return Log(out, _open_board(out / "tensorboard", done) if tensorboard else None)


def _is_until(line: str, done: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= done
    except ValueError:  # the last line of a killed process may be cut
        return False


def _open_board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError('tensorboard = true needs it installed: pip install "giantleap[train]"') from error
    return SummaryWriter(str(folder), purge_step=done + 1)
