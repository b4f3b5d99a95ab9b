"""A training run as values: its TOML file, and the three-stage curriculum of arXiv 2511.10629.

`PAPER` holds the published weights, betas, lengths and batches; a run may override any of them (`StageConfig`). No
torch is imported, so that a command line with a mistake ends at once. `training/curriculum.py` derives the updates.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.bundle.names import find_bundle
from giantleap.models.constraints import explain
from giantleap.models.lua.spec import WEIGHT_SUFFIXES, LuaSpec, preset
from giantleap.models.messages import toml_fault

StageName = Literal["I", "II", "III", "linear", "square"]
Precision = Literal["float32", "bfloat16"]
HighPass = Literal["paper", "reference"]

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
        """Number of micro-batches per update in each process.

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
        """The spec of an untrained network for latents of this many channels.

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


def read_config(path: Path, pulled: Path | None = None) -> RunConfig:
    """Reads a TOML file; paths in it are relative to its directory.

    Args:
        path: The file.
        pulled: Directory of the pulled bundles, which the file may name as it may name the shipped ones.

    Raises:
        ConfigError: It is missing or not TOML, or a key is unknown, missing or out of range.
        BundleError: It names a bundle that there is not.
    """
    config, beside = check_config(read_toml(path), str(path)), path.parent
    start = None if config.lua.start is None else _find_weights(config.lua.start, pulled, beside)
    found = {
        "bundle": find_bundle(config.bundle, pulled, beside),
        "pairs": beside / config.pairs,
        "lua": config.lua.model_copy(update={"start": start}),
    }
    return config.model_copy(update=found)


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: It is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: it cannot be read; give a run file (docs/training.md)") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {toml_fault(error)}") from error


def _find_weights(start: Path, pulled: Path | None, beside: Path) -> Path:
    """The file of weights that `lua.start` names, itself or by its bundle."""
    if (beside / start).suffix in WEIGHT_SUFFIXES:
        return beside / start
    bundle = read_bundle(find_bundle(start, pulled, beside))
    if bundle.lua is None:
        raise ConfigError(f"lua.start: {bundle.unavailable_reason('lua')}")
    return bundle.lua


def check_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """The run that these values describe; `where` they stand is for the message.

    Raises:
        ConfigError: A key is unknown, missing or out of range.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc'])) or 'file'}: {explain(item)}" for item in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(lines)}") from error
