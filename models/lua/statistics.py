"""Statistics of the latents of a training, per channel, as JSON in the header of a LUA's weights.

`training/guard_statistics.py` measures them, `models/lua/clamp.py` bounds outputs by them. It imports no torch, so that
the API process can check a bundle.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open

STATISTICS_KEY = "giantleap.latent_statistics"


class StatisticsError(ValueError):
    """Statistics that are missing, damaged, or of other channels than the weights."""


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics per channel over the pairs of a training, in the units of raw latents.

    Args:
        mean: Of the large latents.
        std: Of the large latents.
        residual_rms: By scale, of the large latent minus the bicubic enlargement of the small one.
        tiles: Number of measured pairs.

    Raises:
        StatisticsError: Lengths differ, a value is not finite, or a deviation is negative.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    residual_rms: Mapping[int, tuple[float, ...]]
    tiles: int

    def __post_init__(self) -> None:
        spreads = [self.std, *self.residual_rms.values()]
        if not self.mean or any(len(spread) != len(self.mean) for spread in spreads):
            raise StatisticsError(f"latent statistics of {len(self.mean)}, {[len(s) for s in spreads]} channels")
        if not all(math.isfinite(value) for values in (self.mean, *spreads) for value in values):
            raise StatisticsError("latent statistics hold a value that is not finite")
        if min(value for spread in spreads for value in spread) < 0.0:
            raise StatisticsError("latent statistics hold a negative deviation")

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return len(self.mean)

    def to_json(self) -> str:
        """The statistics as one line, for a header."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the output of `to_json`.

        Raises:
            StatisticsError: The text is something else.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            residual = {int(scale): tuple(map(float, values)) for scale, values in values["residual_rms"].items()}
            mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
            return cls(mean, std, residual, int(values["tiles"]))
        except StatisticsError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise StatisticsError(f"no latent statistics: {text:.80}") from error


def read_statistics(path: Path) -> LatentStatistics:
    """Read the statistics from the header of a weight file of ours.

    Raises:
        StatisticsError: The file is of another format or damaged, or its header has none.
    """
    if path.suffix.lower() != ".safetensors":
        raise StatisticsError(f"{path}: only .safetensors weights carry latent statistics")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise StatisticsError(f"{path}: damaged or no safetensors file: {error}") from error
    if STATISTICS_KEY not in header:
        raise StatisticsError(
            f"{path}: its header has no latent statistics; `giantleap train statistics` measures and adds them"
        )
    return LatentStatistics.from_json(header[STATISTICS_KEY])
