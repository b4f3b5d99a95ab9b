"""The whole state of a run in one file: safetensors, with JSON in its header. Nothing is ever unpickled.

Weights, average weights and the moments of the optimizer are tensors; the step, from which rates, order of tiles, heads
and random numbers follow (`training/curriculum.py`), and what the run was made of are JSON. `training/run.py` uses it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from giantleap.models.atomic_file import replace_file
from giantleap.training.optim import Ema
from giantleap.training.stage_optimizer import StageOptimizer

FORMAT = 1
HEADER = "giantleap.training"


class TrainingStateError(ValueError):
    """A checkpoint that is missing, damaged, or of another run."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file says of itself: updates done, the run that it belongs to, all its tensors."""

    step: int
    origin: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a run, the oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def write_checkpoint(
    folder: Path, step: int, origin: Mapping[str, Any], net: nn.Module, ema: Ema, optimizer: StageOptimizer, keep: int
) -> Path:
    """Writes a checkpoint by renaming a finished file, then removes all but the last `keep`.

    Args:
        step: Updates done.
        origin: What a run that goes on from here must have in common with this one.

    Raises:
        TrainingStateError: A weight is not finite; nothing was written or removed.
    """
    tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.weights.items()}
    tensors |= optimizer.tensors()
    tensors |= {"rng.cpu": torch.get_rng_state()}
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise TrainingStateError(f"step {step}: {name} is not finite; no checkpoint was written")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.safetensors"
    header = {HEADER: json.dumps({"format": FORMAT, "step": step, "origin": origin})}
    # Copies: a weight and its average start as equal values, and safetensors refuses tensors that share memory.
    replace_file(path, save({name: value.detach().cpu().clone() for name, value in tensors.items()}, header))
    for old in checkpoints_in(folder)[:-keep]:
        old.unlink()
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a file that `write_checkpoint` wrote.

    Raises:
        TrainingStateError: It is missing or damaged, or is no checkpoint of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise TrainingStateError(f"{path}: missing or damaged; delete it to resume from an older one") from error
    if header.get("format") != FORMAT:
        raise TrainingStateError(f"{path}: no training checkpoint of format {FORMAT}")
    return Checkpoint(header["step"], header["origin"], tensors)


def restore(checkpoint: Checkpoint, net: nn.Module, ema: Ema, optimizer: StageOptimizer | None) -> None:
    """Puts the state back in place.

    Args:
        optimizer: None where the next update begins a stage, whose optimizer starts afresh.

    Raises:
        TrainingStateError: The tensors are not those of this network.
    """
    try:
        net.load_state_dict(_part(checkpoint.tensors, "net."))
    except RuntimeError as error:
        raise TrainingStateError("the checkpoint is of another network; start a new run elsewhere") from error
    device = next(net.parameters()).device
    ema.weights = {name: value.to(device) for name, value in _part(checkpoint.tensors, "ema.").items()}
    torch.set_rng_state(checkpoint.tensors["rng.cpu"])
    if optimizer is not None:
        optimizer.load(checkpoint.tensors)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
