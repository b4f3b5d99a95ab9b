"""TensorRT: builds a plan from an ONNX graph for ranges of shapes, and runs it. `tensorrt` is imported only here.

Networks are strongly typed: the graph's own types decide the precision, the builder chooses only kernels. What has
run on hardware and what has not is said in docs/export.md.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from giantleap.export.manifest import INPUT, ArtifactError, Compatibility, Precision, Profile

SIDES = (64, 128, 256)  # of a latent: 512, 1024 and 2048 px at a stride of 8
_LEVELS: dict[Compatibility, tuple[str, str]] = {  # the member of the API, and the word of trtexec
    "none": ("NONE", "none"),
    "same_compute_capability": ("SAME_COMPUTE_CAPABILITY", "sameComputeCapability"),
    "ampere_plus": ("AMPERE_PLUS", "ampere+"),
}


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How plans are built.

    Args:
        max_batch: Largest batch of every profile.
        workspace_bytes: What kernels may use beside weights and activations.
        compatibility: "none" is fastest and runs on this GPU model alone.
        timing_cache: A file that remembers the speed of kernels between builds; None for no memory.
    """

    max_batch: int = 8
    workspace_bytes: int = 4 * 2**30
    compatibility: Compatibility = "none"
    timing_cache: Path | None = None


def plan_profiles(window: int, max_batch: int, sides: Sequence[int] = SIDES) -> tuple[Profile, ...]:
    """A profile per side, named by it: from one window up to a square of that side, tuned for the square and batch 1.

    Ranges overlap at the bottom, so that a latent of any shape runs in the first profile whose side is not exceeded.

    Raises:
        ArtifactError: No batch, or no side.
    """
    if max_batch < 1 or not sides or min(sides) < 1:
        raise ArtifactError(f"profiles need a batch and sides of at least 1; found batch {max_batch}, sides {sides}")
    rounded = sorted({-(-side // window) * window for side in sides})
    return tuple(
        Profile(name=str(side), least=(1, window, window), best=(1, side, side), most=(max_batch, side, side))
        for side in rounded
    )


def choose_profile(profiles: Sequence[Profile], batch: int, height: int, width: int) -> int:
    """Index of the first profile that holds a shape.

    Raises:
        ArtifactError: None does; the message names the largest.
    """
    for index, profile in enumerate(profiles):
        if profile.holds(batch, height, width):
            return index
    raise ArtifactError(
        f"no profile holds a batch of {batch} latents of {height}x{width}; most are {profiles[-1].most}"
    )


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
            ("min", profile.least),
            ("opt", profile.best),
            ("max", profile.most),
        ):
            words.append(f"--{word}Shapes={INPUT}:{batch}x{channels}x{height}x{width}")
    return shlex.join(words)


def load_tensorrt() -> Any:
    """The module `tensorrt`.

    Raises:
        ArtifactError: It is not installed, or this machine has no GPU.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise ArtifactError("the package tensorrt is missing; install it with: pip install 'giantleap[gpu]'") from error
    if not torch.cuda.is_available():
        raise ArtifactError("TensorRT builds on the GPU that it is to run on; this machine has none")
    return tensorrt


def build_plan(
    trt: Any,
    graph: Path,
    channels: int,
    profiles: Sequence[Profile],
    precision: Precision,
    options: PlanOptions,
) -> bytes:
    """Builds the plan of an ONNX graph, for the GPU at hand.

    Args:
        trt: The module `tensorrt`, 10.13 or newer.
        graph: From `giantleap.export.onnx_files.write_onnx`; its types are those of the plan.
        channels: Of its input.
        profiles: From `plan_profiles`.
        precision: Of the graph; float32 is kept from TF32, which has 10 bits of mantissa.
        options: See there.

    Raises:
        ArtifactError: The parser or the builder refuses; with what they say.

    **Effects** replaces the timing cache's file.
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
    config.clear_flag(trt.BuilderFlag.REFIT)  # a plan whose weights can be changed is slower
    if precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    for profile in profiles:
        shapes = [(batch, channels, height, width) for batch, height, width in _corners(profile)]
        asked = builder.create_optimization_profile()
        asked.set_shape(INPUT, *shapes)
        if config.add_optimization_profile(asked) < 0:
            raise ArtifactError(f"TensorRT refuses profile {profile.name}: {shapes}")
    _set_timing_cache(config, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ArtifactError(f"TensorRT could not build a plan of {graph.name}; its log above says why")
    _keep_timing_cache(config, options.timing_cache)
    return bytes(plan)


def open_plan(trt: Any, path: Path, profiles: Sequence[Profile], output: str) -> Callable[[Tensor], Tensor]:
    """A function that runs a plan on tensors of the current GPU, in the first profile that holds their shape.

    Raises:
        ArtifactError: The plan is not for this GPU or this version of TensorRT.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ArtifactError(f"TensorRT cannot load {path}; it was built for another GPU or version")
    context = engine.create_execution_context()

    def run(latent: Tensor) -> Tensor:
        stream = torch.cuda.current_stream(latent.device)
        latent = latent.contiguous()
        batch, _, height, width = latent.shape
        context.set_optimization_profile_async(choose_profile(profiles, batch, height, width), stream.cuda_stream)
        if not context.set_input_shape(INPUT, tuple(latent.shape)):
            raise ArtifactError(f"{path.name} does not take the shape {list(latent.shape)}")
        answer = torch.empty(tuple(context.get_tensor_shape(output)), dtype=torch.float32, device=latent.device)
        context.set_tensor_address(INPUT, latent.data_ptr())
        context.set_tensor_address(output, answer.data_ptr())
        if not context.execute_async_v3(stream.cuda_stream):
            raise ArtifactError(f"TensorRT failed in {path.name}")
        stream.synchronize()
        return answer

    # The runtime must outlive what it made, and Python sees no reason to keep it.
    run.keep = (runtime, engine)  # type: ignore[attr-defined]
    return run


def _corners(profile: Profile) -> tuple[tuple[int, int, int], ...]:
    return profile.least, profile.best, profile.most


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
    kept = path.read_bytes() if path.is_file() else b""
    # A cache of another GPU or version is refused; then this build starts a new one.
    if not config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _keep_timing_cache(config: Any, path: Path | None) -> None:
    cache = None if path is None else config.get_timing_cache()
    if path is None or cache is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(bytes(cache.serialize()))
    fresh.replace(path)
