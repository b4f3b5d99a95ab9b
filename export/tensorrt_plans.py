"""TensorRT: builds a plan from an ONNX graph for ranges of shapes.

Networks are strongly typed: the graph's types decide the precision, the builder only chooses kernels. docs/export.md
lists what has run on hardware.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from giantleap.export.manifest import INPUT, ArtifactError, Compatibility, Precision
from giantleap.models.engines.base import Profile

SIDES = (64, 128, 256)  # of a latent: 512, 1024 and 2048 px at a stride of 8
_LEVELS: dict[Compatibility, tuple[str, str]] = {  # the member of the API, and the word of trtexec
    "none": ("NONE", "none"),
    "same_compute_capability": ("SAME_COMPUTE_CAPABILITY", "sameComputeCapability"),
    "ampere_plus": ("AMPERE_PLUS", "ampere+"),
}


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of a plan.

    Args:
        max_batch: Largest batch of every profile.
        workspace_bytes: Memory for kernels beside weights and activations.
        compatibility: "none" is fastest and runs on this GPU model only.
        timing_cache: A file with the speed of kernels, shared between builds; None for no cache.
    """

    max_batch: int = 8
    workspace_bytes: int = 4 * 2**30
    compatibility: Compatibility = "none"
    timing_cache: Path | None = None


def plan_profiles(window: int, max_batch: int, sides: Sequence[int] = SIDES) -> tuple[Profile, ...]:
    """One profile per side: from one window up to a square of that side, tuned for the square and batch 1.

    Ranges overlap at the lower end, so that a latent of any shape runs in the first profile whose side it does not
    exceed.

    Raises:
        ArtifactError: There is no batch or no side.
    """
    if max_batch < 1 or not sides or min(sides) < 1:
        raise ArtifactError(f"profiles need a batch and sides of at least 1; found batch {max_batch}, sides {sides}")
    rounded = sorted({-(-side // window) * window for side in sides})
    return tuple(Profile(str(side), (1, window, window), (1, side, side), (max_batch, side, side)) for side in rounded)


def trtexec_line(
    graph: str, plan: str, channels: int, profiles: Sequence[Profile], precision: Precision, options: PlanOptions
) -> str:
    """The command of NVIDIA's own tool that builds the same plan from the same graph."""
    words = ["trtexec", f"--onnx={graph}", f"--saveEngine={plan}", "--stronglyTyped", "--skipInference"]
    words += [f"--memPoolSize=workspace:{options.workspace_bytes // 2**20}M"]
    words += [] if precision != "fp32" else ["--noTF32"]
    if options.compatibility != "none":
        words.append(f"--hardwareCompatibilityLevel={_LEVELS[options.compatibility][1]}")
    if options.timing_cache is not None:
        words.append(f"--timingCacheFile={options.timing_cache}")
    for index, profile in enumerate(profiles):
        words.append(f"--profile={index}")
        for word, (batch, height, width) in (
            ("min", profile.min_shape),
            ("opt", profile.opt_shape),
            ("max", profile.max_shape),
        ):
            words.append(f"--{word}Shapes={INPUT}:{batch}x{channels}x{height}x{width}")
    return shlex.join(words)


def build_plan(
    trt: Any,
    graph: Path,
    channels: int,
    profiles: Sequence[Profile],
    precision: Precision,
    options: PlanOptions,
) -> bytes:
    """Build the plan of an ONNX graph for the present GPU, and update the timing cache.

    Args:
        trt: The module `tensorrt`, 10.13 or newer.
        graph: From `giantleap.export.onnx_files.write_onnx`; its types are those of the plan.
        channels: Of its input.
        profiles: From `plan_profiles`.
        precision: Of the graph; for float32, TF32 is disabled, which has 10 bits of mantissa.
        options: Options of the plan.

    Raises:
        ArtifactError: The parser or the builder fails; with their message.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise ArtifactError(f"TensorRT cannot read {graph.name}: {reasons}")
    _check_input(network, channels)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, _LEVELS[options.compatibility][0])
    config.clear_flag(trt.BuilderFlag.REFIT)  # a refittable plan is slower
    if precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    for profile in profiles:
        shapes = [(batch, channels, height, width) for batch, height, width in _corners(profile)]
        optimization = builder.create_optimization_profile()
        optimization.set_shape(INPUT, *shapes)
        if config.add_optimization_profile(optimization) < 0:
            raise ArtifactError(f"TensorRT refuses profile {profile.name}: {shapes}")
    _set_timing_cache(config, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ArtifactError(f"TensorRT could not build a plan of {graph.name}; its log above says why")
    _keep_timing_cache(config, options.timing_cache)
    return bytes(plan)


def _corners(profile: Profile) -> tuple[tuple[int, int, int], ...]:
    return profile.min_shape, profile.opt_shape, profile.max_shape


def _check_input(network: Any, channels: int) -> None:
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    if names != [INPUT]:
        raise ArtifactError(f"TensorRT sees the inputs {names}; expected [{INPUT!r}]")
    shape = tuple(network.get_input(0).shape)
    if shape != (-1, channels, -1, -1):
        raise ArtifactError(f"TensorRT sees an input of {shape}; expected {(-1, channels, -1, -1)}")


def _set_timing_cache(config: Any, path: Path | None) -> None:
    if path is None:
        return
    cached = path.read_bytes() if path.is_file() else b""
    # TensorRT rejects a cache of another GPU or version; this build then starts a new one.
    if not config.set_timing_cache(config.create_timing_cache(cached), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _keep_timing_cache(config: Any, path: Path | None) -> None:
    cache = None if path is None else config.get_timing_cache()
    if path is None or cache is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(bytes(cache.serialize()))
    fresh.replace(path)
