"""Measure the statistics of the latent clamp (`models/lua/clamp.py`) over pairs of latents."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.spec import SPEC_KEY
from giantleap.models.lua.statistics import STATISTICS_KEY, LatentStatistics, StatisticsError
from giantleap.training.data.pairs_store import PairsStore

TILES = 2048  # determines the deviations to about one percent


def guard_statistics(store: PairsStore, scales: Sequence[int], tiles: int = TILES) -> LatentStatistics:
    """Measure over evenly spaced tiles of a store."""
    chosen = torch.linspace(0, len(store) - 1, min(tiles, len(store))).round().long().tolist()
    return measure_statistics((store.read([tile], (1, *scales)) for tile in chosen), scales)


@torch.no_grad()
def measure_statistics(batches: Iterable[Mapping[int, Tensor]], scales: Sequence[int]) -> LatentStatistics:
    """Measure over batches of pairs [tiles, channels, h / level, w / level] by level (1 large, 2 and 4 small).

    Raises:
        StatisticsError: There are no pairs, or a latent is not finite.
    """
    count, tiles = 0, 0
    sums: dict[str, Tensor] = {}

    def add(name: str, values: Tensor) -> None:
        # double precision, because the square of a mean is subtracted from a mean of squares
        total = values.double().sum(dim=(0, 2, 3))
        sums[name] = sums.get(name, torch.zeros_like(total)) + total

    for batch in batches:
        large = batch[1].double()
        add("values", large)
        add("squares", large.square())
        for scale in scales:
            base = F.interpolate(batch[scale].float(), scale_factor=float(scale), mode="bicubic")
            add(f"residual_{scale}", (large - base).square())
        count += large.numel() // large.shape[1]
        tiles += len(large)
    means = {name: total / count for name, total in sums.items()}
    mean = means.get("values", torch.zeros(0))
    variance = means.get("squares", torch.zeros(0)) - mean.square()
    residual = {scale: to_values(means[f"residual_{scale}"].sqrt()) for scale in scales if means}
    return LatentStatistics(to_values(mean), to_values(variance.clamp(min=0.0).sqrt()), residual, tiles)


def add_statistics(weights: Path, store: PairsStore, out: Path) -> LatentStatistics:
    """Write weights of any known layout in our format, with statistics of these pairs in the header.

    `out` may be the input file. Other header entries of our format are kept.

    Raises:
        CheckpointError: The weights cannot be read.
        FileNotFoundError: There is no such file.
        StatisticsError: The weights have other channels.
    """
    net = read_lua(weights)
    statistics = guard_statistics(store, net.spec.scales)
    if statistics.channels != net.spec.channels:
        raise StatisticsError(f"{weights}: {net.spec.channels} channels; the pairs have {statistics.channels}")
    header: dict[str, str] = {}
    if weights.suffix.lower() == ".safetensors":
        with safe_open(weights, framework="numpy") as file:
            header = dict(file.metadata() or {})
    other_entries = {key: value for key, value in header.items() if key != SPEC_KEY}
    write_lua(out, net, {**other_entries, STATISTICS_KEY: statistics.to_json()})
    return statistics


def to_values(vector: Tensor) -> tuple[float, ...]:
    """Round to six digits."""
    return tuple(float(f"{value:.6g}") for value in vector.tolist())
