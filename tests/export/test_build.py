"""From the command to artifacts that run: any batch and size, no PyTorch in them, and nothing where it failed."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from giantleap.cli.main import app
from giantleap.export.build import Request, check_directory, export_bundle, new_directory, open_reference
from giantleap.export.graphs import trace
from giantleap.export.manifest import FILE, ArtifactError, check_manifest, read_manifest
from giantleap.export.onnx_files import REFUSED_OPERATORS, check_graph, write_onnx
from giantleap.models.bundle.bundle import Bundle, BundleError, read_bundle, write_bundle
from giantleap.models.bundle.digests import file_hashes
from giantleap.models.engines.base import Artifact
from giantleap.models.engines.onnx_runtime import open_graph
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import Lua, pad_to_window
from tests.tiny_bundle import WINDOW

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle(tiny_bundle_dir: Path) -> Bundle:
    return read_bundle(tiny_bundle_dir)


@pytest.fixture(scope="module")
def exported(tiny_onnx_dir: Path) -> Path:
    return tiny_onnx_dir


@pytest.fixture(scope="module")
def net(bundle: Bundle) -> Lua:
    assert bundle.lua is not None
    return read_lua(bundle.lua)


def file_contents(directory: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in directory.iterdir()}


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_the_command_leaves_one_graph_per_head_and_a_manifest(bundle: Bundle, exported: Path) -> None:
    output = exported.with_suffix(".txt").read_text()
    for name in ("lua_x2.onnx", "lua_x4.onnx", "decoder.onnx"):
        assert f"{name}: max error" in output
    assert "initializer" not in output, "what the exporter's own packages log stays out of the command's output"
    assert sorted(each.name for each in exported.iterdir()) == ["decoder.onnx", "lua_x2.onnx", "lua_x4.onnx", FILE]
    manifest = check_manifest(exported, bundle, engine="onnx", precision="fp32", scales=(2, 4), decoder=True)
    assert manifest.scales == (2, 4) and manifest.spec["window"] == WINDOW
    for artifact in manifest.artifacts:
        assert artifact.parity.max_error <= 1e-4 and len(artifact.parity.cases) >= 4
        assert artifact.parity.psnr_db is not None and artifact.parity.psnr_db >= 60
        assert artifact.opset == 20
    lua = manifest.get("lua", 2)
    assert lua is not None and lua.trtexec is not None and "--onnx=lua_x2.onnx" in lua.trtexec
    assert {"torch", "onnx", "onnxruntime", "onnxscript"} <= set(manifest.versions)
    assert not [each for each in exported.parent.iterdir() if each.name.startswith(".")], "no scratch is left"


@pytest.mark.parametrize("scale", [2, 4])
def test_lua_graphs_agree_with_pytorch_at_every_batch_and_size(exported: Path, net: Lua, scale: int) -> None:
    run = session(exported / f"lua_x{scale}.onnx")
    for batch, (rows, columns) in itertools.product((1, 3, 8), ((1, 1), (2, 3), (5, 8))):
        latent = torch.randn(batch, net.spec.channels, rows * WINDOW, columns * WINDOW)
        with torch.inference_mode():
            expected = net.core(latent, scale).numpy()
        (found,) = run.run(["enlarged"], {"latent": latent.numpy()})
        assert np.abs(found - expected).max() <= 1e-4


def test_graphs_are_checked_standard_and_hold_no_control_flow(exported: Path) -> None:
    for path in exported.glob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(str(path)).graph
        assert not {node.op_type for node in graph.node} & REFUSED_OPERATORS
        assert {node.domain for node in graph.node} <= {"", "ai.onnx"}


def test_upscale_and_decode_run_without_pytorch(bundle: Bundle, exported: Path, net: Lua, tmp_path: Path) -> None:
    latent = torch.randn(1, net.spec.channels, 6, 5)
    padded = pad_to_window(latent, WINDOW).numpy()
    np.save(tmp_path / "latent.npy", padded)
    code = f"""
import sys, numpy, onnxruntime
from pathlib import Path
folder, out = Path({str(exported)!r}), Path({str(tmp_path)!r})
def run(name, value):
    session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
    return session.run(None, {{"latent": value}})[0]
large = run("lua_x2.onnx", numpy.load(out / "latent.npy"))[..., :12, :10]
numpy.save(out / "image.npy", run("decoder.onnx", large))
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    image = torch.from_numpy(np.load(tmp_path / "image.npy"))
    reference = open_reference(bundle, ("lua", "decoder"), CPU)
    with torch.inference_mode():
        expected = reference.decode(net(latent, 2))
    assert image.shape == expected.shape == (1, 3, 96, 80)
    assert (image - expected).abs().max() < 1e-4


def test_the_check_passes_and_then_finds_damage(bundle: Bundle, exported: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(exported, copied)
    words = ["export", "check", str(copied), "--bundle", str(bundle.directory), "--device", "cpu"]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0 and "lua_x4.onnx: max error" in answer.output
    content = (copied / "lua_x4.onnx").read_bytes()
    (copied / "lua_x4.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 2
    assert "lua_x4.onnx is damaged" in answer.output and "build it with: giantleap export" in answer.output


def test_the_check_compares_anew(bundle: Bundle, exported: Path, tmp_path: Path) -> None:
    """A graph of other weights, under a manifest that says that all is well."""
    copied = tmp_path / "copy"
    shutil.copytree(exported, copied)
    values = json.loads((copied / FILE).read_text())
    first, second = (values["artifacts"][index] for index in (0, 1))
    (copied / "lua_x2.onnx").write_bytes((copied / "lua_x4.onnx").read_bytes())
    first["files"]["lua_x2.onnx"] = second["files"]["lua_x4.onnx"]
    (copied / FILE).write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=r"lua_x2\.onnx: at batch 1, .* the artifact returns .*; build it with"):
        check_directory(copied, bundle, CPU)


def test_a_failed_comparison_leaves_what_was_there(bundle: Bundle, exported: Path, tmp_path: Path) -> None:
    """Pixels of a million, whose rounding alone is larger than any error that is allowed."""
    directory, target = tmp_path / "bright", tmp_path / "out"
    shutil.copytree(bundle.directory, directory)
    weights = directory / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    values = load_file(weights)
    values["decoder.conv_out.weight"] *= 1e6
    save_file(values, weights, metadata={"format": "pt"})
    write_bundle(directory, bundle.descriptor.model_copy(update={"files": file_hashes(directory)}))
    shutil.copytree(exported, target)
    before = file_contents(target)
    with pytest.raises(ArtifactError, match=r"^decoder\.onnx: differs from PyTorch by .*; allowed are 1\.00e-03"):
        export_bundle(Request(read_bundle(directory), "onnx", "fp32", target, parts=("decoder",)))
    assert file_contents(target) == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bright", "out"]


def test_a_bundle_with_other_files_than_it_lists_is_not_exported(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.directory, tmp_path / "tiny")
    with (tmp_path / "tiny" / "lua.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"lua\.safetensors"):
        export_bundle(Request(Bundle(tmp_path / "tiny", bundle.descriptor), "onnx", "fp32", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--scale", "8"], "scale 8: bundle tiny has heads for scales (2, 4)"),
        (["--engine", "aoti", "--part", "decoder"], "the decoder exports to onnx only"),
        (["--part", "decoder", "--scale", "2"], "scales apply to the part lua"),
        (["--engine", "tensorrt"], "giantleap: "),
        (["--part", "vae"], "unknown part vae; choose from lua, decoder"),
    ],
)
def test_a_wrong_request_is_one_line_and_no_directory(
    bundle: Bundle, tmp_path: Path, words: list[str], reason: str
) -> None:
    out = tmp_path / "out"
    base = ["export", "--bundle", str(bundle.directory), "--device", "cpu", "--out", str(out)]
    answer = CliRunner().invoke(app, [*base, *words])
    assert answer.exit_code == 2 and reason in answer.output
    assert len(answer.output.strip().splitlines()) == 1 and not out.exists()


def test_a_directory_takes_its_place_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), new_directory(target) as folder:
        (folder / "part").touch()
        raise RuntimeError
    assert [*target.parent.iterdir()] == []
    for name in (FILE, "other"):
        with new_directory(target) as folder:
            (folder / FILE).touch()
            (folder / name).touch()
        assert {each.name for each in target.iterdir()} == {FILE, name}
    assert [each.name for each in target.parent.iterdir()] == ["out"] and target.stat().st_mode & 0o777 == 0o755


def test_a_directory_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    for target in (tmp_path / "photos", tmp_path / "photos" / "one.jpg"):
        with pytest.raises(ArtifactError, match="other than an export"), new_directory(target):
            raise AssertionError("unreachable")
    assert (tmp_path / "photos" / "one.jpg").exists()


class Convolution(nn.Module):
    """A graph that is traced in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.layer(latent)
        return answer


def test_large_weights_go_beside_the_graph_and_belong_to_it(tmp_path: Path) -> None:
    graph, path = Convolution().eval(), tmp_path / "lua_x2.onnx"
    files = write_onnx(trace(graph, 4, 8), path, "enlarged", inline_limit_bytes=0)
    assert [each.name for each in files] == ["lua_x2.onnx", "lua_x2.onnx.data"] and all(
        each.is_file() for each in files
    )
    run, latent = open_graph(Artifact(path, "latent", "enlarged"), CPU), torch.randn(1, 4, 8, 24)
    with torch.inference_mode():
        assert (run(latent) - graph(latent)).abs().max() < 1e-5


def test_a_graph_with_a_constant_size_or_control_flow_is_refused() -> None:
    def graph(sizes: list[int | str], operator: str = "Relu") -> onnx.GraphProto:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name in ("latent", "enlarged")]
        node = helper.make_node(operator, ["latent"], ["enlarged"])
        return helper.make_graph([node], "graph", values[:1], values[1:])

    check_graph(graph(["batch", 4, "height", "width"]), "g.onnx")
    wrong: list[list[int | str]] = [["batch", 4, 8, "width"], [2, 4, "height", "width"], ["batch", 4, "height"]]
    for sizes in wrong:
        with pytest.raises(
            ArtifactError, match=r"g\.onnx: latent has the shape .*; batch, height and width must be dynamic"
        ):
            check_graph(graph(sizes), "g.onnx")
    with pytest.raises(ArtifactError, match="holds the operators NonZero"):
        check_graph(graph(["batch", 4, "height", "width"], "NonZero"), "g.onnx")


def test_a_program_that_fixes_its_batch_does_not_get_as_far_as_a_file() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, latent: torch.Tensor) -> torch.Tensor:
            batch = int(latent.shape[0])
            return self.weight * latent.view(2, *latent.shape[1:]) if batch == 2 else latent

    with pytest.raises((RuntimeError, ValueError)):
        trace(Fixed(), 4, 4)


def test_manifests_of_both_directories_name_the_command(exported: Path) -> None:
    command = read_manifest(exported).command
    assert command.startswith("giantleap export --bundle ") and command.endswith(f"--out {exported}")
    assert "--scale 2 --scale 4 --part lua --part decoder" in command
