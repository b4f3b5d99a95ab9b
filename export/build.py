"""Exports a bundle to a directory of artifacts that agree with PyTorch.

`export_bundle` writes into a hidden directory beside the target and moves it there only after every comparison has
passed. `check_directory` compares again on the present machine. `export/graphs.py` traces, `export/onnx_files.py`,
`export/aoti.py` and `export/tensorrt_plans.py` write, `export/parity.py` compares.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from giantleap.export.aoti import write_aoti
from giantleap.export.float16_range import check_float16_range
from giantleap.export.graphs import DTYPES, DecoderGraph, LuaGraph, trace
from giantleap.export.machine import read_machine, read_versions
from giantleap.export.manifest import (
    FILE,
    INPUT,
    OUTPUTS,
    ArtifactError,
    ArtifactRecord,
    Manifest,
    Part,
    Precision,
    artifact_name,
    bundle_weights,
    check_manifest,
    export_command,
    read_manifest,
    vae_directory,
)
from giantleap.export.onnx_files import OPSETS, write_onnx
from giantleap.export.parity import choose_cases, compare, sample_latents
from giantleap.export.tensorrt_plans import PlanOptions, build_plan, plan_profiles, trtexec_line
from giantleap.models.bundle.bundle import Bundle, check_files
from giantleap.models.bundle.digests import file_hash
from giantleap.models.device import on_device
from giantleap.models.engines.artifacts import open_runner
from giantleap.models.engines.base import Artifact, ArtifactEngineName, EngineError, Profile, Runner
from giantleap.models.engines.tensorrt_runtime import load_tensorrt
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import Lua
from giantleap.models.vae.autoencoder import choose_vae_dtype, read_vae_model
from giantleap.models.vae.decode import decode_plain


@dataclass(frozen=True, slots=True)
class Request:
    """What to export.

    Args:
        bundle: The bundle.
        engine: The engine that will run the artifacts.
        precision: What the networks compute in; input and output stay float32.
        directory: Target; it must be new, empty or hold an earlier export.
        scales: Of LUA; empty for all.
        parts: LUA, the decoder (ONNX only), or both.
        device: Runs the comparison; for AOTI and TensorRT the artifacts are for it.
        plan: Options of TensorRT.
    """

    bundle: Bundle
    engine: ArtifactEngineName
    precision: Precision
    directory: Path
    scales: Sequence[int] = ()
    parts: Sequence[Part] = ("lua",)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    plan: PlanOptions = field(default_factory=PlanOptions)


@dataclass(frozen=True, slots=True)
class Reference:
    """The networks that artifacts are compared with, in float32 on one device.

    Args:
        lua: None if it is not exported.
        vae: The bundle's VAE.
        statistics: Mean and standard deviation of raw latents, each [channels].
        device: Where they are.
    """

    lua: Lua | None
    vae: Any
    statistics: tuple[Tensor, Tensor]
    device: torch.device

    def runner(self, part: Part, scale: int | None) -> Runner:
        """The function that an artifact must agree with.

        Raises:
            ArtifactError: The network is not there.
        """
        if part == "decoder" and self.vae is not None:
            return self.decode
        lua = self.lua
        if part == "lua" and lua is not None and scale is not None:
            return lambda latent: lua.core(latent, scale)
        raise ArtifactError(f"there is no network to compare {part} with")

    def decode(self, latent: Tensor) -> Tensor:
        """Shape: [batch, channels, h, w] -> [batch, 3, stride * h, stride * w]."""
        return decode_plain(self.vae, latent)


Show = Callable[[str], AbstractContextManager[object]]
"""Shows that a named step runs while its block does; steps take up to minutes."""


def show_nothing(step: str) -> AbstractContextManager[object]:
    """A `Show` that shows nothing."""
    return nullcontext()


def export_bundle(
    request: Request, report: Callable[[str], object] = lambda line: None, show: Show = show_nothing
) -> Manifest:
    """Export, compare and write the manifest.

    It replaces an earlier export in the directory only on success; otherwise it changes nothing.

    Args:
        request: What to export.
        report: Called with a line for each artifact.
        show: Shows each step.

    Raises:
        ArtifactError: Something is missing, the request contradicts itself, or an artifact differs from PyTorch.
        EngineError: The engine's library or a GPU is missing.
        BundleError: The bundle's files differ from their digests.
        CheckpointError: The LUA weights cannot be read.
    """
    with show("reading the bundle"):
        scales = _check_request(request)
        reference = open_reference(request.bundle, request.parts, request.device)
    if reference.lua is not None and reference.lua.spec.head == "liif":
        raise ArtifactError(
            f"bundle {request.bundle.name} has a LIIF head, which is not exported: engine torch runs it"
        )
    jobs: list[tuple[Part, int | None]] = [("lua", scale) for scale in scales]
    jobs += [("decoder", None)] if "decoder" in request.parts else []
    with new_directory(request.directory) as folder, on_device(request.device):
        artifacts = []
        for part, scale in jobs:
            artifacts.append(_export_part(request, reference, folder, part, scale, show))
            report(describe(artifacts[-1]))
        manifest = Manifest(
            format=2,
            bundle=request.bundle.name,
            engine=request.engine,
            precision=request.precision,
            latent_space=request.bundle.latent_space.name,
            spec={} if reference.lua is None else json.loads(reference.lua.spec.to_json()),
            weights=bundle_weights(request.bundle, request.parts),
            compatibility=request.plan.compatibility,
            machine=read_machine(request.device),
            versions=read_versions(),
            command=export_command(
                request.directory, request.bundle, request.engine, request.precision, scales, request.parts
            ),
            artifacts=tuple(artifacts),
        )
        (folder / FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def check_directory(
    directory: Path,
    bundle: Bundle,
    device: torch.device,
    report: Callable[[str], object] = lambda line: None,
    show: Show = show_nothing,
) -> Manifest:
    """Check the manifest against bundle and machine, and compare every artifact with PyTorch again.

    Raises:
        ArtifactError: The first difference, with the command that builds anew.
        BundleError, CheckpointError: As `export_bundle`.
    """
    check_files(bundle)
    manifest = check_manifest(directory, bundle, engine=read_manifest(directory).engine, machine=read_machine(device))
    reference = open_reference(bundle, manifest.parts, device)
    for record in manifest.artifacts:
        cases = choose_cases(record.side_multiple, record.profiles)
        try:
            with on_device(device), show(f"{record.file}: comparing with PyTorch"):
                run = open_runner(manifest.engine, record.locate(directory), device)
                parity = _compare(reference, record.part, record.scale, record.precision, run, cases)
        except EngineError as error:
            raise ArtifactError(f"{record.file}: {error}; build it with: {manifest.command}") from error
        report(describe(record.model_copy(update={"parity": parity})))
    return manifest


def open_reference(bundle: Bundle, parts: Sequence[Part], device: torch.device) -> Reference:
    """Load what a comparison needs: LUA, and the VAE for the decoded image.

    Raises:
        ArtifactError: The bundle lacks a part.
        BundleError, CheckpointError: As `export_bundle`.
    """
    lua = None
    if "lua" in parts and bundle.lua is not None:
        lua = read_lua(bundle.lua, device)
        bundle.check_lua(lua.spec)
    vae_directory(bundle)  # raises if the VAE is on the hub
    vae = read_vae_model(bundle, device, torch.float32).eval()
    return Reference(lua, vae, _statistics(bundle, lua), device)


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """An empty directory that replaces `directory` if the block succeeds, and is deleted if it fails.

    Raises:
        ArtifactError: `directory` holds something that is not an export.
    """
    if directory.exists() and not (
        directory.is_dir() and (not any(directory.iterdir()) or (directory / FILE).is_file())
    ):
        raise ArtifactError(f"{directory} holds something other than an export; choose another directory")
    directory.absolute().parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=directory.absolute().parent, prefix=f".{directory.name}."))
    try:
        yield fresh
        fresh.chmod(0o755)  # mkdtemp gives 0700
        if directory.exists():
            old = fresh.with_name(fresh.name + ".old")
            directory.rename(old)
            fresh.rename(directory)
            shutil.rmtree(old)
        else:
            fresh.rename(directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def describe(artifact: ArtifactRecord) -> str:
    """One line with an artifact's difference from PyTorch."""
    parity = artifact.parity
    image = "" if parity.psnr_db is None else f", decoded image {parity.psnr_db:.1f} dB"
    errors = f"max error {parity.max_error:.1e}, mean {parity.mean_error:.1e}"
    return f"{artifact.file}: {errors}{image}, {len(parity.cases)} shapes on {parity.device}"


def _check_request(request: Request) -> tuple[int, ...]:
    """The scales to export."""
    bundle, parts = request.bundle, request.parts
    if not parts:
        raise ArtifactError("nothing to export: name a part (lua or decoder)")
    if "decoder" in parts and request.engine != "onnx":
        raise ArtifactError(
            f"engine {request.engine}: the decoder exports to onnx only; use --engine onnx, or drop --part decoder"
        )
    bundle_weights(bundle, parts)  # raises if the bundle lacks a part
    check_files(bundle)
    if "lua" not in parts:
        if request.scales:
            raise ArtifactError("scales apply to the part lua, which is not exported")
        return ()
    known = bundle.scales_of("lua")[1:]
    unknown = [scale for scale in request.scales if scale not in known]
    if unknown:
        raise ArtifactError(f"scale {unknown[0]}: bundle {bundle.name} has heads for scales {known}; choose from these")
    if request.engine == "tensorrt":
        load_tensorrt(request.device)
    return tuple(sorted(set(request.scales))) or tuple(map(int, known))


def _export_part(
    request: Request, reference: Reference, folder: Path, part: Part, scale: int | None, show: Show
) -> ArtifactRecord:
    engine, space = request.engine, request.bundle.latent_space
    precision = _part_precision(part, request.precision, reference)
    if precision == "fp16" and reference.lua is not None and scale is not None:
        sides = [2 * reference.lua.spec.window, 3 * reference.lua.spec.window]
        latents = sample_latents((1, space.channels, sides[0], sides[1]), *reference.statistics, seed=0)
        check_float16_range(reference.lua, scale, latents.to(request.device))
    graph, unit = _graph(reference, scale, precision)
    # An ONNX graph is traced on the CPU; compiled code is for the device.
    traced_on = request.device if engine == "aoti" else torch.device("cpu")
    path = folder / artifact_name(engine, part, scale)
    with show(f"{path.name}: tracing"):
        program = trace(graph.to(traced_on), space.channels, unit, fused_attention=engine == "aoti")
    profiles = plan_profiles(unit, request.plan.max_batch) if engine == "tensorrt" else ()
    with show(f"{path.name}: writing"):
        if engine == "onnx":
            written = write_onnx(program, path, OUTPUTS[part], precision)
        elif engine == "aoti":
            written = write_aoti(program, path)
        else:
            written = (_write_plan(request, program, path, profiles),)
    try:
        with show(f"{path.name}: comparing with PyTorch"):
            run = open_runner(engine, Artifact(path, INPUT, OUTPUTS[part], profiles), request.device)
            parity = _compare(reference, part, scale, precision, run, choose_cases(unit, profiles))
    except EngineError as error:
        raise ArtifactError(f"{path.name}: {error}") from error
    return ArtifactRecord(
        part=part,
        scale=scale,
        file=path.name,
        files={path.name: file_hash(path) for path in written},
        precision=precision,
        input=INPUT,
        output=OUTPUTS[part],
        channels=space.channels,
        side_multiple=unit,
        output_stride=space.stride_px if scale is None else scale,
        opset=None if engine == "aoti" else OPSETS[precision],
        profiles=profiles,
        parity=parity,
        trtexec=_trtexec(request, part, scale, unit, precision),
    )


def _graph(reference: Reference, scale: int | None, precision: Precision) -> tuple[torch.nn.Module, int]:
    """The module to trace and the unit of its sides: LUA at a scale, or the decoder without a scale."""
    if reference.lua is not None and scale is not None:
        return LuaGraph(reference.lua, scale, precision), reference.lua.spec.window
    return DecoderGraph(reference.vae, DTYPES[precision]), 1


def _trtexec(request: Request, part: Part, scale: int | None, unit: int, precision: Precision) -> str | None:
    """The `trtexec` command that builds a plan of the graph elsewhere; None for compiled code."""
    if part != "lua" or request.engine == "aoti":
        return None
    return trtexec_line(
        artifact_name("onnx", part, scale),
        artifact_name("tensorrt", part, scale),
        request.bundle.latent_space.channels,
        plan_profiles(unit, request.plan.max_batch),
        precision,
        request.plan,
    )


def _write_plan(request: Request, program: Any, path: Path, profiles: Sequence[Profile]) -> Path:
    trt = load_tensorrt(request.device)
    with tempfile.TemporaryDirectory() as scratch:
        graph = write_onnx(program, Path(scratch) / path.with_suffix(".onnx").name, OUTPUTS["lua"], request.precision)[
            0
        ]
        channels = request.bundle.latent_space.channels
        path.write_bytes(build_plan(trt, graph, channels, profiles, request.precision, request.plan))
    return path


def _compare(
    reference: Reference,
    part: Part,
    scale: int | None,
    precision: Precision,
    run: Runner,
    cases: Sequence[tuple[int, int, int]],
) -> Any:
    to_image: Runner = reference.decode if part == "lua" else lambda image: image
    expected = reference.runner(part, scale)
    return compare(part, precision, run, expected, to_image, cases, reference.statistics, reference.device)


def _part_precision(part: Part, requested: Precision, reference: Reference) -> Precision:
    """For a decoder, a precision in which its VAE does not overflow (`choose_vae_dtype`)."""
    if part == "lua":
        return requested
    config = reference.vae.config
    channels = config.get("latent_channels") or config["z_dim"]
    chosen = choose_vae_dtype(config.get("force_upcast"), channels, DTYPES[requested])
    return next(name for name, dtype in DTYPES.items() if dtype == chosen)


def _statistics(bundle: Bundle, lua: Lua | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation per raw channel: LUA's own, else those of the latent space."""
    space = bundle.latent_space
    if lua is not None and lua.spec.latent_norm:
        return lua.latent_mean.detach().cpu(), lua.latent_std.detach().cpu()
    if space.mean is not None and space.std is not None and len(space.mean) == space.channels:
        return torch.tensor(space.mean), torch.tensor(space.std)
    return torch.full((space.channels,), space.shift), torch.full((space.channels,), 1 / space.scale)
