"""Log a training run: JSON lines, sample sheets, TensorBoard. Used by `training/run.py`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from giantleap.models.atomic_file import replace_file
from giantleap.models.messages import install_hint
from giantleap.training.run_config import ConfigError

LOG_FILE = "log.jsonl"
_PSNR, _GAIN = "_held_out_psnr_db", "_held_out_gain_db"


@dataclass(frozen=True)
class Log:
    """`log.jsonl`, sample sheets, and optional TensorBoard files.

    Args:
        out: Directory of the run.
        board: TensorBoard writer, or None.
    """

    out: Path
    board: Any

    def write(self, line: Mapping[str, Any], volatile: Mapping[str, float]) -> None:
        """Append a line; `volatile` values differ between runs."""
        with (self.out / LOG_FILE).open("a") as file:
            file.write(json.dumps({**line, **volatile}) + "\n")
        if self.board is not None:
            for name, value in {**line, **volatile}.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, line["step"])
            self.board.flush()

    def write_sheet(self, step: int, sheet: Tensor) -> None:
        """Write a sample sheet [3, height_px, width_px] in [-1, 1]."""
        levels = ((sheet + 1.0) * 127.5).round().byte()
        Image.fromarray(levels.permute(1, 2, 0).numpy()).save(self.out / "samples" / f"step-{step:09d}.png")
        if self.board is not None:
            self.board.add_image("held_out", levels, step)


def open_log(out: Path, done: int, tensorboard: bool) -> Log:
    """Open the log of a new or resumed run.

    Args:
        out: Directory of the run.
        done: Updates in the checkpoint; lines of later updates are dropped.
        tensorboard: Whether to write TensorBoard files; needs the extra `train`.

    Raises:
        ConfigError: TensorBoard is requested but not installed.
    """
    path = out / LOG_FILE
    (out / "samples").mkdir(parents=True, exist_ok=True)
    before = path.read_text().splitlines() if path.exists() else []
    replace_file(path, "".join(f"{line}\n" for line in before if _is_until(line, done)).encode())
    return Log(out, _open_board(out / "tensorboard", done) if tensorboard else None)


def read_last_scores(out: Path) -> dict[str, tuple[float, float]]:
    """PSNR in dB and its gain over decode-then-bicubic by scale ("x2"), of the last evaluation; empty without one."""
    scores: dict[str, tuple[float, float]] = {}
    for line in map(json.loads, (out / LOG_FILE).read_text(encoding="utf-8").splitlines()):
        if found := [name.removesuffix(_PSNR) for name in line if name.endswith(_PSNR)]:
            scores = {scale: (line[f"{scale}{_PSNR}"], line[f"{scale}{_GAIN}"]) for scale in found}
    return scores


def _is_until(line: str, done: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= done
    except ValueError:  # the last line of a killed process may be incomplete
        return False


def _open_board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(f"tensorboard = true needs the package tensorboard: {install_hint('train')}") from error
    return SummaryWriter(str(folder), purge_step=done + 1)
