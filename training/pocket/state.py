"""A training run: its steps within a budget, its log, and its state, which a stopped run continues from.

The state (weights, EMA, optimizer, step, time spent and random states) is one file, written atomically and read with
`torch.load(weights_only=True)`. `training/pocket/autoencoder.py` shows the use.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from giantleap.models.atomic_file import replacing
from giantleap.training.optim import Budget, Ema, MuonAdamW


@dataclass
class TrainState:
    """What changes while a run goes on."""

    network: nn.Module
    optimizer: MuonAdamW
    ema: Ema
    rng: np.random.Generator
    step: int = 0
    spent_s: float = 0.0
    saved_s: float = 0.0
    _last_tick_s: float = field(default_factory=time.monotonic)

    def tick(self) -> None:
        """Count one finished step and its time."""
        now_s = time.monotonic()
        self.spent_s += now_s - self._last_tick_s
        self._last_tick_s = now_s
        self.step += 1

    def progress(self, budget: Budget) -> float:
        """Share of the budget that is spent."""
        return budget.progress(self.step, self.spent_s)

    def is_due(self, budget: Budget, every_s: float) -> bool:
        """Whether it is time to write: so long after the last time, and at the end."""
        return self.spent_s - self.saved_s > every_s or self.progress(budget) >= 1.0

    def write(self, path: Path) -> None:
        """Write the state; a crash half-way leaves the previous file whole."""
        self.saved_s = self.spent_s
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "network": self.network.state_dict(),
            "ema": self.ema.weights,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent_s": self.spent_s,
            "numpy_rng": json.dumps(self.rng.bit_generator.state),
            "torch_rng": torch.get_rng_state(),
        }
        with replacing(path) as file:
            torch.save(content, file)

    def read(self, path: Path) -> None:
        """Restore the state in place.

        Raises:
            FileNotFoundError: There is nothing to resume from.
        """
        content = torch.load(path, weights_only=True, map_location="cpu")
        self.network.load_state_dict(content["network"])
        self.ema.weights = content["ema"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.spent_s = content["step"], content["spent_s"]
        self.saved_s = self.spent_s
        self.rng.bit_generator.state = json.loads(content["numpy_rng"])
        torch.set_rng_state(content["torch_rng"])
        self._last_tick_s = time.monotonic()


def smoothed(before: float, value: float) -> float:
    """A loss averaged over some fifty steps, for the log; the first value where `before` is NaN."""
    return value if math.isnan(before) else 0.98 * before + 0.02 * value


def train_steps(state: TrainState, budget: Budget) -> Iterator[float]:
    """Yield the progress before each step until the budget is spent."""
    while (progress := state.progress(budget)) < 1.0:
        yield progress


def write_log(out: Path, state: TrainState, scores: dict[str, float]) -> None:
    """Append one line to `log.jsonl` and print it."""
    line = {"step": state.step, "spent_s": round(state.spent_s, 1), **{k: round(v, 4) for k, v in scores.items()}}
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    tqdm.write(json.dumps(line))
