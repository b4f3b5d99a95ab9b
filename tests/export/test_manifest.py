"""Artifacts of other weights, another engine or another machine are refused, with the command that builds them."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from giantleap.export.manifest import (
    FILE,
    ArtifactError,
    ArtifactRecord,
    Case,
    Machine,
    Manifest,
    Parity,
    bundle_weights,
    check_machine,
    check_manifest,
    read_manifest,
)
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.digests import file_hash
from giantleap.models.engines.base import Profile
from tests.tiny_bundle import write_tiny_bundle

GPU = Machine(
    platform="linux-x86_64",
    device="cuda",
    cpu_capability="AVX512",
    gpu="NVIDIA H200",
    compute_capability="9.0",
    torch="2.13.0",
    tensorrt="10.13.0",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    write_tiny_bundle(directory)
    return read_bundle(directory)


def artifact(directory: Path, name: str = "lua_x2.onnx", scale: int | None = 2) -> ArtifactRecord:
    """One whose graph is a file of a few bytes: nothing here runs it."""
    (directory / name).write_bytes(name.encode())
    case = Case(batch=1, latent_height=8, latent_width=8, max_error=1e-6, mean_error=1e-7, reference_rms=1.0)
    parity = Parity(
        max_error=1e-6,
        mean_error=1e-7,
        allowed_error=1e-4,
        psnr_db=None,
        allowed_psnr_db=None,
        device="cpu",
        cases=(case,),
    )
    return ArtifactRecord(
        part="decoder" if scale is None else "lua",
        scale=scale,
        file=name,
        files={name: file_hash(directory / name)},
        precision="fp32",
        input="latent",
        output="enlarged",
        channels=16,
        side_multiple=4,
        output_stride=2,
        opset=20,
        profiles=(Profile("64", (1, 4, 4), (1, 64, 64), (8, 64, 64)),),
        parity=parity,
        trtexec=None,
    )


def written(directory: Path, bundle: Bundle, /, **changes: object) -> Manifest:
    """The manifest of a directory with the scales 2 and 4, as changed."""
    values = {
        "format": 2,
        "bundle": bundle.name,
        "engine": "onnx",
        "precision": "fp32",
        "latent_space": bundle.latent_space.name,
        "spec": {},
        "weights": bundle_weights(bundle, ("lua",)),
        "compatibility": "none",
        "machine": GPU,
        "versions": {"torch": "2.13.0"},
        "command": "giantleap export",
        "artifacts": (artifact(directory), artifact(directory, "lua_x4.onnx", 4)),
    }
    manifest = Manifest.model_validate(values | changes)
    (directory / FILE).write_text(manifest.to_json())
    return manifest


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path, bundle: Bundle) -> None:
    manifest = written(tmp_path, bundle)
    assert read_manifest(tmp_path) == manifest
    assert check_manifest(tmp_path, bundle, engine="onnx", precision="fp32", scales=(2, 4)) == manifest
    assert manifest.scales == (2, 4) and manifest.parts == ("lua",)
    chosen = manifest.get("lua", 4)
    assert chosen is not None and chosen.file == "lua_x4.onnx" and manifest.get("decoder") is None


def test_the_error_names_the_command_that_builds_the_requested_artifact(tmp_path: Path, bundle: Bundle) -> None:
    written(tmp_path, bundle)
    with pytest.raises(ArtifactError, match="artifacts of engine onnx; expected tensorrt") as caught:
        check_manifest(tmp_path, bundle, engine="tensorrt", precision="bf16", scales=(2,), decoder=True)
    words = shlex.split(str(caught.value).split("build it with: ")[1])
    assert (
        words
        == (
            f"giantleap export --bundle {bundle.directory} --engine tensorrt --precision bf16 --scale 2 "
            f"--part lua --part decoder --out {tmp_path}"
        ).split()
    )


@pytest.mark.parametrize("name", ["other.onnx", "../lua_x2.onnx", "/etc/passwd"])
def test_what_an_engine_opens_is_among_the_files_with_a_digest(tmp_path: Path, bundle: Bundle, name: str) -> None:
    opened = artifact(tmp_path).model_copy(update={"file": name})
    (tmp_path / "other.onnx").write_bytes(b"never looked at")
    written(tmp_path, bundle, artifacts=(opened,))
    with pytest.raises(ArtifactError, match="has no digest in the manifest"):
        check_manifest(tmp_path, bundle, engine="onnx")


def test_a_directory_without_or_with_a_damaged_manifest_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing; build it with: giantleap export"):
        check_manifest(tmp_path, bundle, engine="onnx")
    manifest = written(tmp_path, bundle)
    for damaged in (
        "{",
        json.dumps({"format": 2}),
        json.dumps(manifest.model_dump() | {"format": 1}),
        json.dumps(manifest.model_dump() | {"artifacts": []}),
        json.dumps(manifest.model_dump() | {"more": 1}),
    ):
        (tmp_path / FILE).write_text(damaged)
        with pytest.raises(ArtifactError, match="damaged or of another version"):
            check_manifest(tmp_path, bundle, engine="onnx")
    (tmp_path / FILE).write_bytes(b"\xff\xfe{")
    with pytest.raises(ArtifactError, match="damaged"):
        check_manifest(tmp_path, bundle, engine="onnx")


@pytest.mark.parametrize(
    ("changes", "requested", "reason"),
    [
        ({"bundle": "other"}, {}, "artifacts of bundle other; this is bundle tiny"),
        ({}, {"precision": "fp16"}, "artifacts of precision fp32; expected fp16"),
        ({"weights": {"lua.safetensors": "0" * 64}}, {}, "made from lua.safetensors with sha256 000000000000"),
        ({"weights": {}}, {}, "made from lua.safetensors with sha256 none"),
        ({}, {"scales": (2, 8)}, "lua_x8.onnx was not exported"),
        ({}, {"decoder": True}, "decoder.onnx was not exported"),
    ],
)
def test_artifacts_of_something_else_are_refused(
    tmp_path: Path, bundle: Bundle, changes: dict[str, object], requested: dict[str, object], reason: str
) -> None:
    written(tmp_path, bundle, **changes)
    with pytest.raises(ArtifactError, match=reason):
        check_manifest(tmp_path, bundle, engine="onnx", **requested)  # type: ignore[arg-type]


def test_a_decoder_belongs_to_the_weights_and_the_settings_of_its_vae(tmp_path: Path, bundle: Bundle) -> None:
    weights = bundle_weights(bundle, ("decoder",))
    assert set(weights) == {"pipeline/vae/config.json", "pipeline/vae/diffusion_pytorch_model.safetensors"}
    for name in weights:
        artifacts = (artifact(tmp_path, "decoder.onnx", None),)
        written(tmp_path, bundle, artifacts=artifacts, weights=weights | {name: "1" * 64})
        with pytest.raises(ArtifactError, match=f"made from {name} with sha256 111111111111"):
            check_manifest(tmp_path, bundle, engine="onnx", decoder=True)


def test_a_file_that_changed_or_vanished_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    written(tmp_path, bundle)
    (tmp_path / "lua_x4.onnx").write_bytes(b"lua_x4.onnX")
    with pytest.raises(ArtifactError, match=r"lua_x4\.onnx is damaged: sha256"):
        check_manifest(tmp_path, bundle, engine="onnx")
    (tmp_path / "lua_x4.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"lua_x4\.onnx is missing"):
        check_manifest(tmp_path, bundle, engine="onnx")


def test_a_manifest_reaches_no_file_outside_its_directory(tmp_path: Path, bundle: Bundle) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    outside = artifact(tmp_path)
    one = artifact(inner).model_copy(update={"files": {"../lua_x2.onnx": outside.files["lua_x2.onnx"]}})
    written(inner, bundle, artifacts=(one,))
    with pytest.raises(ArtifactError, match="is missing"):
        check_manifest(inner, bundle, engine="onnx")


def test_compiled_code_for_another_device_is_built_anew_for_this_one(tmp_path: Path, bundle: Bundle) -> None:
    written(tmp_path, bundle, engine="aoti")
    here = Machine(platform=GPU.platform, device="cpu", cpu_capability="AVX512", torch=GPU.torch)
    with pytest.raises(ArtifactError, match=r"for device cuda; this machine has cpu; build it with: .* --device cpu$"):
        check_manifest(tmp_path, bundle, engine="aoti", machine=here)


def test_an_onnx_graph_runs_on_any_machine(tmp_path: Path, bundle: Bundle) -> None:
    written(tmp_path, bundle)
    other = Machine(platform="darwin-arm64", device="cpu")
    check_manifest(tmp_path, bundle, engine="onnx", machine=other)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tensorrt": "11.0.0"}, "built for tensorrt 10.13.0; this machine has 11.0.0"),
        ({"tensorrt": None}, "built for tensorrt 10.13.0; this machine has None"),
        ({"gpu": "NVIDIA H100"}, "built for gpu NVIDIA H200; this machine has NVIDIA H100"),
        ({"compute_capability": "8.9"}, "built for compute_capability 9.0; this machine has 8.9"),
        ({"device": "cpu"}, "built for device cuda; this machine has cpu"),
    ],
)
def test_a_plan_runs_only_on_its_gpu_and_tensorrt(
    tmp_path: Path, bundle: Bundle, change: dict[str, object], reason: str
) -> None:
    written(tmp_path, bundle, engine="tensorrt")
    check_manifest(tmp_path, bundle, engine="tensorrt", machine=GPU)
    with pytest.raises(ArtifactError, match=reason):
        check_manifest(tmp_path, bundle, engine="tensorrt", machine=GPU.model_copy(update=change))


def test_compatible_plans_run_on_more_gpus(tmp_path: Path, bundle: Bundle) -> None:
    h100 = GPU.model_copy(update={"gpu": "NVIDIA H100"})
    l40s = GPU.model_copy(update={"gpu": "NVIDIA L40S", "compute_capability": "8.9"})
    t4 = GPU.model_copy(update={"gpu": "NVIDIA T4", "compute_capability": "7.5"})
    b200 = GPU.model_copy(update={"gpu": "NVIDIA B200", "compute_capability": "10.0"})
    same = written(tmp_path, bundle, engine="tensorrt", compatibility="same_compute_capability")
    check_machine(same, h100)
    with pytest.raises(ArtifactError, match="compute_capability"):
        check_machine(same, l40s)
    wide = written(tmp_path, bundle, engine="tensorrt", compatibility="ampere_plus")
    for machine in (h100, l40s, b200):
        check_machine(wide, machine)
    with pytest.raises(ArtifactError, match=r"8\.0 and above; this machine has 7\.5"):
        check_machine(wide, t4)


def test_compiled_code_runs_only_on_its_processor_and_torch(tmp_path: Path, bundle: Bundle) -> None:
    cpu = Machine(platform="linux-x86_64", device="cpu", cpu_capability="AVX512", torch="2.13.0")
    manifest = written(tmp_path, bundle, engine="aoti", machine=cpu)
    check_machine(manifest, cpu.model_copy(update={"tensorrt": "10.13.0"}))
    for change in ({"cpu_capability": "AVX2"}, {"torch": "2.12.0"}, {"platform": "linux-aarch64"}, {"device": "cuda"}):
        with pytest.raises(ArtifactError, match=f"aoti artifact built for {next(iter(change))}"):
            check_machine(manifest, cpu.model_copy(update=change))


def test_a_profile_holds_what_lies_between_its_corners() -> None:
    profile = Profile("64", (1, 8, 8), (1, 64, 64), (4, 64, 64))
    assert profile.holds((1, 8, 64)) and profile.holds((4, 64, 64))
    assert not any(map(profile.holds, ((5, 64, 64), (1, 72, 64), (1, 64, 72), (1, 4, 8))))


def test_the_check_needs_no_torch() -> None:
    code = "import sys, giantleap.export.manifest; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
