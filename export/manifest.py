"""`manifest.json` of an export directory: what the artifacts were made from, for which machine, and their parity.

`export/build.py` writes it; a worker calls `check_manifest` before it loads anything. No torch is imported. Layout of
an export directory, with the files of one engine:

    manifest.json
    lua_x2.onnx, lua_x4.onnx, decoder.onnx    engine onnx; weights above 64 MiB in NAME.onnx.data beside it
    lua_x2.plan, lua_x4.plan                  engine tensorrt
    lua_x2.pt2, lua_x4.pt2                    engine aoti
"""

import json
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.digests import file_hash
from giantleap.models.constraints import explain
from giantleap.models.engines.base import Artifact, ArtifactEngineName, EngineError, Profile

Precision = Literal["fp32", "fp16", "bf16"]
Part = Literal["lua", "decoder"]
Compatibility = Literal["none", "same_compute_capability", "ampere_plus"]

FILE = "manifest.json"
SUFFIXES: dict[ArtifactEngineName, str] = {"onnx": ".onnx", "tensorrt": ".plan", "aoti": ".pt2"}
INPUT = "latent"
OUTPUTS: dict[Part, str] = {"lua": "enlarged", "decoder": "image"}

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Side = Annotated[int, Field(ge=1)]


class ArtifactError(EngineError):
    """Artifacts that must not be used here; the message says why and which command builds the right ones."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Case(_Section):
    """One comparison with PyTorch: errors are absolute, of raw latents (of pixel values in [-1, 1] for a decoder)."""

    batch: int
    latent_height: int
    latent_width: int
    max_error: float
    mean_error: float
    reference_rms: float


class Parity(_Section):
    """All comparisons of one artifact; `psnr_db` is of the image decoded from its output in one of them."""

    max_error: float
    mean_error: float
    allowed_error: float
    psnr_db: float | None
    allowed_psnr_db: float | None
    device: str
    cases: Annotated[tuple[Case, ...], Field(strict=False)]


class ArtifactRecord(_Section):
    """One graph: `file` is what an engine opens, `files` has every file that belongs to it.

    Input and output are float32 whatever the precision. Sides of the input are multiples of `side_multiple`: the caller
    pads before (`giantleap.models.lua.network.pad_to_window`) and crops after. `precision` is that of the manifest,
    except for a decoder whose VAE would overflow in it.
    """

    part: Part
    scale: int | None
    file: str
    files: dict[str, Digest]
    precision: Precision
    input: str
    output: str
    channels: Side
    side_multiple: Side
    output_stride: Side
    opset: int | None
    profiles: Annotated[tuple[Profile, ...], Field(strict=False)]
    parity: Parity
    trtexec: str | None

    def locate(self, directory: Path) -> Artifact:
        """The artifact in the export directory, as an engine opens it."""
        return Artifact(directory / self.file, self.input, self.output, self.profiles)


class Machine(_Section):
    """What a compiled artifact depends on; `export/machine.py` reads it."""

    platform: str
    device: Literal["cpu", "cuda"]
    cpu_capability: str | None = None
    gpu: str | None = None
    compute_capability: str | None = None
    torch: str | None = None
    tensorrt: str | None = None


class Manifest(_Section):
    """The content of `manifest.json`."""

    format: Literal[2]
    bundle: str
    engine: ArtifactEngineName
    precision: Precision
    latent_space: str
    spec: dict[str, Any]
    weights: dict[str, Digest]
    compatibility: Compatibility
    machine: Machine
    versions: dict[str, str]
    command: str
    artifacts: Annotated[tuple[ArtifactRecord, ...], Field(strict=False, min_length=1)]

    def get(self, part: Part, scale: int | None = None) -> ArtifactRecord | None:
        """The artifact of a part, for LUA of a scale; None if it was not exported."""
        return next((record for record in self.artifacts if (record.part, record.scale) == (part, scale)), None)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that were exported."""
        return tuple(dict.fromkeys(record.part for record in self.artifacts))

    @property
    def scales(self) -> tuple[int, ...]:
        """The scales that LUA was exported for."""
        return tuple(record.scale for record in self.artifacts if record.scale is not None)

    def to_json(self) -> str:
        """The content of `manifest.json`."""
        return json.dumps(self.model_dump(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the output of `to_json`.

        Raises:
            ValueError: It is no JSON, or not of this form.
        """
        return cls.model_validate_json(text, strict=True)


def artifact_name(engine: ArtifactEngineName, part: Part, scale: int | None = None) -> str:
    """The file that an engine opens: `lua_x2.onnx`, `decoder.onnx`."""
    return ("decoder" if part == "decoder" else f"lua_x{scale}") + SUFFIXES[engine]


def export_command(
    directory: Path,
    bundle: Bundle,
    engine: ArtifactEngineName,
    precision: Precision,
    scales: Sequence[int] = (),
    parts: Sequence[Part] = (),
) -> str:
    """The shell command that builds artifacts; without scales or parts, all of them by its defaults."""
    words = ["giantleap", "export", "--bundle", str(bundle.directory), "--engine", engine, "--precision", precision]
    words += [word for scale in scales for word in ("--scale", str(scale))]
    words += [word for part in parts for word in ("--part", part)]
    return shlex.join([*words, "--out", str(directory)])


def bundle_weights(bundle: Bundle, parts: Sequence[Part]) -> dict[str, str]:
    """SHA-256 of the sources of the parts by path in the bundle: weights, and the VAE's configuration.

    Raises:
        ArtifactError: The bundle has no LUA, or its VAE is on the hub.
    """
    weights: dict[str, str] = {}
    lua = bundle.descriptor.lua
    if "lua" in parts:
        if lua is None:
            raise ArtifactError(f"bundle {bundle.name} has no LUA to run: {bundle.unavailable_reason('lua')}")
        weights[lua.file] = lua.sha256
    if "decoder" in parts:
        folder = vae_directory(bundle).relative_to(bundle.directory).as_posix()
        listed = {name: digest for name, digest in bundle.descriptor.files.items() if name.startswith(f"{folder}/")}
        weights |= listed | {f"{folder}/config.json": file_hash(bundle.directory / folder / "config.json")}
    return weights


def vae_directory(bundle: Bundle) -> Path:
    """The directory of the VAE that the bundle decodes with.

    Raises:
        ArtifactError: It is on the hub.
    """
    if bundle.vae_directory is None:
        raise ArtifactError(
            f"bundle {bundle.name}: the VAE is on the hub; fetch it with: giantleap bundle pull {bundle.name}"
        )
    return bundle.vae_directory


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of an export directory.

    Raises:
        ArtifactError: There is none, or it is damaged or of another format.
    """
    path = directory / FILE
    if not path.is_file():
        raise ArtifactError(f"{directory} holds no exported artifacts: {FILE} is missing")
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise ArtifactError(f"{path}: damaged or of another version: {place}: {explain(first)}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: damaged: {error}") from error


def check_manifest(
    directory: Path,
    bundle: Bundle,
    *,
    engine: ArtifactEngineName,
    precision: Precision | None = None,
    scales: Sequence[int] = (),
    decoder: bool = False,
    machine: Machine | None = None,
) -> Manifest:
    """Reject artifacts that are damaged or were made for something else. Reads every file once.

    Args:
        directory: Holds `manifest.json`.
        bundle: The bundle to serve.
        engine: The engine that will run the artifacts.
        precision: Of the artifacts; None for any.
        scales: Required scales.
        decoder: Whether the decoder is required.
        machine: The present machine (`giantleap.export.machine.read_machine`); None skips the comparison with it.

    Raises:
        ArtifactError: One line with the first difference and the command that builds the right artifacts.
    """
    parts: tuple[Part, ...] = ("lua", "decoder") if decoder else ("lua",)
    command = export_command(directory, bundle, engine, precision or "fp32", scales, parts)
    try:
        manifest = read_manifest(directory)
        if precision is None:
            command = export_command(directory, bundle, engine, manifest.precision, scales, parts)
        _check_origin(manifest, bundle, engine, precision)
        _check_parts(manifest, scales, decoder)
        if machine is not None:
            check_machine(manifest, machine)
        _check_files(manifest, directory)
    except ArtifactError as error:
        # The default device of an export is a GPU if there is one.
        device_option = f" --device {machine.device}" if engine == "aoti" and machine is not None else ""
        raise ArtifactError(f"{error}; build it with: {command}{device_option}") from error
    return manifest


def check_machine(manifest: Manifest, machine: Machine) -> None:
    """Reject compiled artifacts of another machine; an ONNX graph runs on any.

    Raises:
        ArtifactError: They differ in what the engine depends on.
    """
    if manifest.engine == "onnx":
        return
    built = manifest.machine
    names = ["platform", "device"]
    if manifest.engine == "aoti":
        names += ["torch", "compute_capability"] if built.device == "cuda" else ["torch", "cpu_capability"]
    else:
        names += ["tensorrt"]
        names += {"none": ["gpu", "compute_capability"], "same_compute_capability": ["compute_capability"]}.get(
            manifest.compatibility, []
        )
        if manifest.compatibility == "ampere_plus" and _capability(machine) < (8, 0):
            raise ArtifactError(
                f"built for compute capability 8.0 and above; this machine has {machine.compute_capability}"
            )
    for name in names:
        was, present = getattr(built, name), getattr(machine, name)
        if was != present:
            raise ArtifactError(f"{manifest.engine} artifact built for {name} {was}; this machine has {present}")


def this_platform() -> str:
    """Operating system and processor family, such as `linux-x86_64`."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


def _capability(machine: Machine) -> tuple[int, ...]:
    return tuple(int(digit) for digit in (machine.compute_capability or "0.0").split("."))


def _check_origin(manifest: Manifest, bundle: Bundle, engine: ArtifactEngineName, precision: Precision | None) -> None:
    if manifest.engine != engine:
        raise ArtifactError(f"artifacts of engine {manifest.engine}; expected {engine}")
    if manifest.bundle != bundle.name:
        raise ArtifactError(f"artifacts of bundle {manifest.bundle}; this is bundle {bundle.name}")
    if precision not in (None, manifest.precision):
        raise ArtifactError(f"artifacts of precision {manifest.precision}; expected {precision}")
    present = bundle_weights(bundle, manifest.parts)
    for name in sorted(present.keys() | manifest.weights.keys()):
        was, now = manifest.weights.get(name, "none"), present.get(name, "none")
        if was != now:
            raise ArtifactError(f"artifacts were made from {name} with sha256 {was[:12]}; the bundle's is {now[:12]}")


def _check_parts(manifest: Manifest, scales: Sequence[int], decoder: bool) -> None:
    missing = [artifact_name(manifest.engine, "lua", s) for s in scales if manifest.get("lua", s) is None]
    if decoder and manifest.get("decoder") is None:
        missing.append(artifact_name(manifest.engine, "decoder"))
    if missing:
        raise ArtifactError(f"{', '.join(missing)} was not exported")


def _check_files(manifest: Manifest, directory: Path) -> None:
    for artifact in manifest.artifacts:
        for name, expected in artifact.files.items():
            path = directory / name
            if path.parent != directory or not path.is_file():
                raise ArtifactError(f"{path} is missing")
            if (digest := file_hash(path)) != expected:
                raise ArtifactError(f"{path} is damaged: sha256 {digest[:12]}, expected {expected[:12]}")
        if artifact.file not in artifact.files:  # it would be opened unchecked, and a .pt2 file is machine code
            raise ArtifactError(f"{directory / artifact.file} has no digest in the manifest")
