"""Trains with several single-threaded processes on one machine, which beats threads as soon as cores are shared.

With two threads and one busy neighbour a convolution's backward pass waits at every barrier (2.6 s a step instead
of 0.46 s, `docs/lab/vae.md`); processes meet only once a step. `training/pocket/vae.py` uses it.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn


@dataclass(frozen=True)
class Peers:
    """One of `count` processes that hold equal weights and see different batches."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the logs and checkpoints."""
        return self.rank == 0

    def average_gradients(self, weights: Sequence[nn.Parameter], spent_s: float) -> float:
        """Replaces each gradient by the mean over the peers; returns the first peer's clock, equal for all.

        The shared clock lets every peer stop at the same step when the budget is given in minutes.
        """
        if self.count == 1:
            return spent_s
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        clock = torch.tensor([spent_s * self.count if self.is_first else 0.0])
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), clock])
        dist.all_reduce(flat)
        flat /= self.count
        parts = flat[:-1].split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))
        return float(flat[-1])


def _start(rank: int, count: int, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    try:
        work(Peers(rank, count), *arguments)
    finally:
        dist.destroy_process_group()


def run_peers(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Calls `work(peers, *arguments)` in `count` processes of one thread each and waits for all of them."""
    if count == 1:
        torch.set_num_threads(1)
        work(Peers(), *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        spawn(_start, (count, meeting, work, arguments), nprocs=count)
