"""The three-stage curriculum of arXiv 2511.10629 as values, and what follows from them by arithmetic alone.

`PAPER` holds the published weights, betas, lengths and batches; a run may override any of them (`StageConfig`). Rates,
heads and batches of a step are pure functions of the configuration, the stage and the step, so a run that was stopped
needs no more than its step to go on with the same ones. `training/run.py` runs it; losses are in `training/losses.py`.
"""

import math
import tomllib
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from giantleap.models.lua.spec import LuaSpec, preset
from giantleap.training.losses import (
    HighPass,
    downsampled_l1,
    eagle,
    fourier_l1,
    high_frequency_l1,
    l1,
    log_square,
    visible_error,
)

StageName = Literal["I", "II", "III", "linear", "square"]
Precision = Literal["float32", "bfloat16"]


SQUARE_FLOOR = 3e-4  # 41 dB; at 31 dB smooth pictures are left with a mottle (docs/lab/lua-training.md)


class ConfigError(ValueError):
    """A training configuration that cannot be run; the message says which key and why."""


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageWeights(_Values):
    """The weight of each loss; one of weight 0 is not computed.

    Ref: arXiv 2511.10629, A.1: alpha_1 = latent_l1 and beta_1 = latent_fft of stage I (Eq. 16); alpha_2, beta_2,
    gamma_2 = pixel_ds and delta_2 = pixel_hf of stage II (Eq. 17); alpha_3 = pixel_l1, beta_3 = pixel_fft and
    gamma_3 = eagle of stage III (Eq. 18). pixel_square and linear_square are ours: the logarithm of the square error of
    the decoded picture, and of its linear approximation (`training/picture_map.py`), which costs one convolution.
    """

    latent_l1: float = Field(default=0.0, ge=0.0)
    latent_fft: float = Field(default=0.0, ge=0.0)
    pixel_ds: float = Field(default=0.0, ge=0.0)
    pixel_hf: float = Field(default=0.0, ge=0.0)
    pixel_l1: float = Field(default=0.0, ge=0.0)
    pixel_fft: float = Field(default=0.0, ge=0.0)
    eagle: float = Field(default=0.0, ge=0.0)
    pixel_square: float = Field(default=0.0, ge=0.0)
    linear_square: float = Field(default=0.0, ge=0.0)

    @property
    def decodes(self) -> bool:
        """Whether a loss looks at decoded pictures."""
        pixels = (self.pixel_ds, self.pixel_hf, self.pixel_l1, self.pixel_fft, self.pixel_square, self.eagle)
        return max(pixels) > 0.0

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if not self.decodes and max(self.latent_l1, self.latent_fft, self.linear_square) == 0.0:
            raise ValueError("at least one loss must have a weight above 0")
        return self


class StageConfig(_Values):
    """One stage.

    Args:
        name: Of the stage, in the paper or of `OWN`; what is not given is taken from it.
        weights: All of them: those not named are 0.
        steps: Updates of the weights.
        betas: Of Adam.
        effective_batch: Tiles in one update, over all processes and accumulated parts.
        micro_batch: Tiles that one process holds at a time.
        random_head_share: Last part of the stage, in which each update trains one head, drawn with equal chances.
    """

    name: StageName
    weights: StageWeights
    steps: int = Field(ge=1)
    betas: tuple[float, float]
    effective_batch: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    random_head_share: float = Field(default=0.4, ge=0.0, le=1.0)

    def micro_batches(self, world_size: int) -> int:
        """Parts of one update that each of so many processes runs.

        Raises:
            ConfigError: The effective batch cannot be shared evenly.
        """
        parts, rest = divmod(self.effective_batch, self.micro_batch * world_size)
        if rest or not parts:
            raise ConfigError(
                f"stage {self.name}: effective_batch {self.effective_batch} is no multiple of micro_batch "
                f"{self.micro_batch} times {world_size} processes"
            )
        return parts


def _stage(name: StageName, micro: int, effective: int, beta_2: float, **weights: float) -> StageConfig:
    return StageConfig(
        name=name,
        weights=StageWeights(**weights),
        steps=125_000,
        betas=(0.9, beta_2),
        effective_batch=effective,
        micro_batch=micro,
    )


PAPER: Mapping[StageName, StageConfig] = MappingProxyType(
    {
        "I": _stage("I", 64, 2048, 0.995, latent_l1=1.0, latent_fft=0.1),
        "II": _stage("II", 8, 32, 0.995, latent_l1=1.0, latent_fft=0.1, pixel_ds=0.1, pixel_hf=0.05),
        "III": _stage("III", 8, 32, 0.99, pixel_l1=10.0, pixel_fft=1.0, eagle=5e-5),
    }
)
"""Ref: arXiv 2511.10629, A.1 (weights), A.2 (betas, steps, batches), A.4 (the last 50,000 of 125,000 steps)."""


OWN: Mapping[StageName, StageConfig] = MappingProxyType(
    {
        "linear": _stage("linear", 8, 8, 0.99, linear_square=1.0).model_copy(update={"steps": 4000}),
        "square": _stage("square", 4, 4, 0.99, pixel_square=1.0).model_copy(update={"steps": 1000}),
    }
)
"""Stages that the paper does not have: the error that a decibel measures, first through a linear decoder."""


def _with_defaults(value: Any) -> Any:
    stages = {**PAPER, **OWN}
    if isinstance(value, dict) and value.get("name") in stages:
        return {**stages[value["name"]].model_dump(), **value}
    return value


class OptimizerConfig(_Values):
    """What all stages share.

    Args:
        kind: "adam" as in the paper, or "muon": Muon (`training/optim.py`) for the matrices of the backbone and the
            inner layers of the heads, Adam for everything else.
        rate: Of Adam or of Muon, at its greatest.
        adam_share: With "muon", the rate of Adam over that of Muon.
        skip_share: The rate of a linear skip, over `rate`: it starts at its least-squares fit, which full Adam steps,
            of one size for all of its many small weights, would undo.
        schedule: "milestones", or "cosine" from the rate down to 0 at the end of each stage.
        milestones: Parts of a stage after which the rate is multiplied by `decay`.
        warmup_steps: Updates over which the rate of a stage rises from 0. The paper's A.2 has none; its 4.1 speaks of
            a short one in stage III.
        clip: Greatest global L2 norm of the gradient.
        ema_decay: Of the average weights, which are evaluated and written.
        ema_warmup: Whether the average follows faster at first (at most (1 + n) / (10 + n) after n updates); for runs
            of fewer than some thousand updates, which the paper's decay alone would hardly leave the start.

    Ref: arXiv 2511.10629, A.2.
    """

    kind: Literal["adam", "muon"] = "adam"
    rate: float = Field(default=2e-4, gt=0.0)
    adam_share: float = Field(default=0.1, gt=0.0)
    skip_share: float = Field(default=0.005, gt=0.0)
    schedule: Literal["milestones", "cosine"] = "milestones"
    milestones: tuple[float, ...] = (0.5, 0.75, 0.9)
    decay: float = Field(default=0.5, gt=0.0, le=1.0)
    warmup_steps: int = Field(default=0, ge=0)
    clip: float = Field(default=0.4, gt=0.0)
    ema_decay: float = Field(default=0.999, ge=0.0, lt=1.0)
    ema_warmup: bool = False


class LuaConfig(_Values):
    """Which network: a preset, a shape of its own (`spec`, the fields of LuaSpec), or weights to go on from."""

    preset: str | None = None
    spec: dict[str, Any] | None = None
    start: Path | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(each is not None for each in (self.preset, self.spec, self.start)) != 1:
            raise ValueError("give exactly one of preset, spec and start")
        return self

    def to_spec(self, channels: int) -> LuaSpec:
        """The shape of a network that starts afresh, for latents of so many channels.

        Raises:
            ConfigError: There is no such preset, or the fields make no network.
        """
        try:
            if self.preset is not None:
                return preset(self.preset, channels)
            fields: dict[str, Any] = {
                name: tuple(v) if isinstance(v, list) else v for name, v in (self.spec or {}).items()
            }
            return LuaSpec(channels=channels, **fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"lua: {error}") from error


class RunConfig(_Values):
    """A whole run, as its TOML file says.

    Args:
        bundle: Directory of the bundle whose VAE made the pairs.
        pairs: Directory that `giantleap train prepare` wrote.
        held_out_tiles: Last tiles of the pairs, which are evaluated and never trained on.
        seed: Of the start, the order of the tiles and the heads.
        precision: Of the network; losses and weights are float32.
        deterministic: On a GPU, only operations that repeat to the bit; slower. A CPU repeats in any case.
        checkpoints: Whether the decoder's feature maps are computed twice instead of kept.
        eagle_filter: "paper" (Eq. 20) or "reference" (that of the published EAGLE code).
        ds_factor: 2 for both scales (A.1), or "scale" for 2 and 4 (section 3.3).
        square_floor: Square error, in [-1, 1], below which pictures count less in `pixel_square` and `linear_square`.
        log_every, evaluate_every, save_every: In updates.
        keep: Checkpoints kept.
    """

    bundle: Path
    pairs: Path
    lua: LuaConfig
    stages: tuple[Annotated[StageConfig, BeforeValidator(_with_defaults)], ...] = (
        PAPER["I"],
        PAPER["II"],
        PAPER["III"],
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    held_out_tiles: int = Field(default=8, ge=0)
    seed: int = Field(default=0, ge=0)
    precision: Precision = "bfloat16"
    deterministic: bool = False
    checkpoints: bool = True
    eagle_filter: HighPass = "paper"
    ds_factor: Literal[2, "scale"] = 2
    square_floor: float = Field(default=SQUARE_FLOOR, gt=0.0)
    log_every: int = Field(default=100, ge=1)
    evaluate_every: int = Field(default=5000, ge=1)
    save_every: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)
    tensorboard: bool = False

    @property
    def total_steps(self) -> int:
        """Updates of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[int, int]:
        """Index of the stage that update number `step` (from 0) of the run belongs to, and its number in the stage."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise ValueError("the run has no such step")


def read_config(path: Path) -> RunConfig:
    """Reads a TOML file; paths in it are relative to its directory.

    Raises:
        ConfigError: It is missing or not TOML, or a key is unknown, missing or out of range.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for table, keys in ((values, ("bundle", "pairs")), (values.get("lua", {}), ("start",))):
        for key in keys:
            if isinstance(table, dict) and isinstance(table.get(key), str):
                table[key] = path.parent / table[key]
    return check_config(values, str(path))


def check_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """The run that these values describe; `where` they stand is for the message.

    Raises:
        ConfigError: A key is unknown, missing or out of range.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(lines)}") from error


def rate_at(optimizer: OptimizerConfig, steps: int, step: int) -> float:
    """The rate of update number `step` (from 0) of a stage: a cosine, or that of torch's MultiStepLR without its state.

    Ref: arXiv 2511.10629, A.2 (62,500, 93,750 and 112,500 of 125,000 steps, factor 0.5).
    """
    warm = min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
    if optimizer.schedule == "cosine":
        return optimizer.rate * warm * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    passed = sum(step >= round(part * steps) for part in optimizer.milestones)
    return optimizer.rate * warm * optimizer.decay**passed


def scales_at(stage: StageConfig, scales: tuple[int, ...], seed: int, stage_index: int, step: int) -> tuple[int, ...]:
    """The heads that an update trains: all of them, then in the last part of the stage one at random.

    The same in every process, and whatever was run before.

    Ref: arXiv 2511.10629, A.4.
    """
    if step < stage.steps - round(stage.random_head_share * stage.steps):
        return scales
    return (scales[int(np.random.default_rng((seed, 1, stage_index, step)).integers(len(scales)))],)


def tiles_at(count: int, batch: int, seed: int, stage_index: int, step: int) -> list[int]:
    """The tiles of one update, over all processes: the next `batch` of an endless row of shuffled decks.

    Every tile comes once per deck; the place in the row follows from the step alone.
    """
    if count < 1:
        raise ConfigError("there is no tile to train on")
    places = range(step * batch, (step + 1) * batch)
    decks = sorted({place // count for place in places})
    orders = {deck: _shuffle(count, seed, stage_index, deck) for deck in decks}
    return [int(orders[place // count][place % count]) for place in places]


@lru_cache(maxsize=4)
def _shuffle(count: int, seed: int, stage_index: int, deck: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, 2, stage_index, deck)).permutation(count)


def loss_terms(
    weights: StageWeights,
    upscaled: Tensor,
    large: Tensor,
    decoded: Tensor | None,
    target: Tensor | None,
    *,
    ds_factor: int = 2,
    eagle_filter: HighPass = "paper",
    picture_map: Tensor | None = None,
    square_floor: float = SQUARE_FLOOR,
) -> dict[str, Tensor]:
    """The terms of one head's loss, each already weighted; their sum is the loss.

    Args:
        weights: Of the stage.
        upscaled: The network's output.
        large: The latent of the large picture.
        decoded: The enlarged latent, decoded with a gradient; needed where `weights.decodes`.
        target: The large latent, decoded.
        picture_map: Of `fit_picture_map`; needed where `weights.linear_square` is above 0.
        square_floor: Of `log_square`.

    **Shape** upscaled and large [batch, channels, h, w]; decoded and target [batch, 3, height_px, width_px]; scalars.

    **Ref** arXiv 2511.10629, Eq. 16 to 18.

    **Raises** ValueError: a picture is missing that a weight asks for.
    """
    terms: dict[str, Tensor] = {}
    if weights.latent_l1:
        terms["latent_l1"] = weights.latent_l1 * l1(upscaled, large)
    if weights.latent_fft:
        terms["latent_fft"] = weights.latent_fft * fourier_l1(upscaled, large)
    if weights.linear_square:
        if picture_map is None:
            raise ValueError("linear_square needs the linear map of the decoder, and none was given")
        mapped = F.conv2d(upscaled - large, picture_map, padding=picture_map.shape[-1] // 2)
        terms["linear_square"] = weights.linear_square * log_square(mapped, square_floor)
    if not weights.decodes:
        return terms
    if decoded is None or target is None:
        raise ValueError("these weights compare pictures, and no decoded pictures were given")
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "pixel_ds": partial(downsampled_l1, factor=ds_factor),
        "pixel_hf": high_frequency_l1,
        "pixel_l1": l1,
        "pixel_fft": fourier_l1,
        "eagle": partial(eagle, high_pass=eagle_filter),
        "pixel_square": lambda prediction, target: log_square(visible_error(prediction, target), square_floor),
    }
    for name, loss in losses.items():
        weight = getattr(weights, name)
        if weight:
            terms[name] = weight * loss(decoded, target)
    return terms


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of weighted terms."""
    return torch.stack(list(terms.values())).sum()
