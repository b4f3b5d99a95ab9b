"""Engines answer as the network does, at any batch and size, and one that cannot run says why in one line."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from giantleap.export.aoti import write_aoti
from giantleap.export.graphs import LuaGraph, trace
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.engines.aoti_runtime import open_package
from giantleap.models.engines.artifacts import ArtifactEngine
from giantleap.models.engines.base import Artifact, Engine, EngineError, Profile, choose_profile
from giantleap.models.engines.compiled import _MAX_COMPILED, CompileEngine, fill_batch, require_compiler
from giantleap.models.engines.eager import TorchEngine
from giantleap.models.engines.factory import open_engine
from giantleap.models.engines.onnx_runtime import load_onnxruntime, open_graph
from giantleap.models.engines.tensorrt_runtime import load_tensorrt
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import Lua

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
SHAPES = [(1, 4, 4), (2, 9, 13), (3, 5, 16)]


@pytest.fixture(scope="module")
def net(tiny_bundle_dir: Path) -> Lua:
    path = read_bundle(tiny_bundle_dir).lua
    assert path is not None
    return read_lua(path)


@pytest.fixture
def graphs(tiny_onnx_dir: Path) -> dict[int, Artifact]:
    return {scale: Artifact(tiny_onnx_dir / f"lua_x{scale}.onnx", "latent", "enlarged") for scale in (2, 4)}


def assert_answers_as(engine: Engine, net: Lua, bound: float, scales: tuple[int, ...] = (2, 4)) -> None:
    for scale in scales:
        for batch, height, width in SHAPES:
            latent = torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(height))
            with torch.no_grad():
                expected: Tensor = net(latent, scale)
            found = engine.run(latent, scale)
            assert found.shape == expected.shape and found.dtype == torch.float32
            assert (found - expected).abs().max() <= bound * expected.abs().max()


def test_torch_answers_as_the_network(net: Lua) -> None:
    assert_answers_as(open_engine("torch", net, CPU, torch.float32), net, 2e-5)


def test_torch_in_bfloat16_is_close(net: Lua) -> None:
    engine = open_engine("torch", net, CPU, torch.bfloat16)
    assert_answers_as(engine, net, 0.03)
    latent = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        assert not torch.equal(engine.run(latent, 2), net(latent, 2)), "it did compute in bfloat16"


def test_torch_runs_a_plain_network_in_its_dtype(net: Lua) -> None:
    engine = TorchEngine(net, CPU, torch.bfloat16)
    assert not engine.is_packed
    assert_answers_as(engine, net, 0.03)


def test_onnx_answers_as_the_network(net: Lua, graphs: dict[int, Artifact]) -> None:
    engine = open_engine("onnx", net, CPU, torch.float32, graphs)
    assert engine.name == "onnx" and engine.spec == net.spec
    assert_answers_as(engine, net, 2e-5)


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_what_the_network_refuses_every_engine_refuses(net: Lua, graphs: dict[int, Artifact], name: Any) -> None:
    engine = open_engine(name, net, CPU, torch.float32, graphs)
    for shape, scale in (((1, 3, 8, 8), 2), ((16, 8, 8), 2), ((1, 16, 8, 8), 3)):
        with pytest.raises(ValueError, match="LUA"):
            engine.run(torch.zeros(shape), scale)


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_a_closed_engine_runs_no_more(net: Lua, graphs: dict[int, Artifact], name: Any) -> None:
    engine = open_engine(name, net, CPU, torch.float32, graphs)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(torch.zeros(1, 16, 4, 4), 2)


@pytest.mark.parametrize("name", ["onnx", "tensorrt", "aoti"])
def test_an_artifact_is_needed_for_every_scale(net: Lua, graphs: dict[int, Artifact], name: Any) -> None:
    with pytest.raises(EngineError, match="x4"):
        open_engine(name, net, CPU, torch.float32, {2: graphs[2]})


def test_onnx_needs_the_provider_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert load_onnxruntime(CPU) is onnxruntime
    with pytest.raises(EngineError, match="CUDAExecutionProvider"):
        load_onnxruntime(GPU)


def test_onnx_started_on_another_provider_is_an_error(
    monkeypatch: pytest.MonkeyPatch, graphs: dict[int, Artifact]
) -> None:
    started = onnxruntime.InferenceSession

    class Elsewhere(started):  # type: ignore[misc,valid-type]
        def get_providers(self) -> list[str]:
            return ["AzureExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Elsewhere)
    with pytest.raises(EngineError, match="AzureExecutionProvider"):
        open_graph(graphs[2], CPU)


def test_onnx_refuses_a_damaged_file_and_one_of_other_names(tmp_path: Path, graphs: dict[int, Artifact]) -> None:
    damaged = tmp_path / "lua_x2.onnx"
    damaged.write_bytes(graphs[2].path.read_bytes()[:1000])
    with pytest.raises(EngineError, match="cannot load"):
        open_graph(Artifact(damaged, "latent", "enlarged"), CPU)
    with pytest.raises(EngineError, match="expected latent and image"):
        open_graph(Artifact(graphs[2].path, "latent", "image"), CPU)


@pytest.mark.parametrize(
    ("package", "load", "device"), [("onnxruntime", load_onnxruntime, CPU), ("tensorrt", load_tensorrt, GPU)]
)
def test_a_missing_library_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, package: str, load: Any, device: torch.device
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=rf"{package}.*pip install '\.\["):
        load(device)


def test_tensorrt_is_for_a_gpu(net: Lua, graphs: dict[int, Artifact]) -> None:
    with pytest.raises(EngineError, match="GPU"):
        open_engine("tensorrt", net, CPU, torch.float32, graphs)


def test_the_first_profile_that_holds_a_shape_is_chosen() -> None:
    profiles = [
        Profile("64", (1, 8, 8), (1, 64, 64), (2, 64, 64)),
        Profile("128", (1, 8, 8), (1, 128, 128), (2, 128, 128)),
    ]
    assert [choose_profile(profiles, shape) for shape in ((1, 8, 8), (2, 64, 64), (1, 64, 72), (2, 128, 8))] == [
        0,
        0,
        1,
        1,
    ]
    for shape in ((3, 8, 8), (1, 8, 136), (1, 4, 8)):
        with pytest.raises(EngineError, match=r"no profile holds a batch of .*; the largest is \(2, 128, 128\)"):
            choose_profile(profiles, shape)


def test_a_damaged_package_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lua_x2.pt2"
    path.write_bytes(b"no package")
    with pytest.raises(EngineError, match=r"lua_x2\.pt2"):
        open_package(Artifact(path, "latent", "enlarged"), CPU)


@pytest.mark.parametrize(("batch", "filled"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_a_batch_is_filled_up_with_its_last_latent(batch: int, filled: int) -> None:
    latents = torch.arange(batch).float().view(-1, 1, 1, 1).expand(-1, 2, 3, 3)
    found = fill_batch(latents)
    assert found.shape == (filled, 2, 3, 3)
    assert torch.equal(found[:batch], latents) and bool((found[batch:] == batch - 1).all())


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, net: Lua) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="triton"):
        require_compiler(GPU)

    def none_found() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none_found)
    with pytest.raises(EngineError, match=r"C\+\+"):
        open_engine("torch-compile", net, CPU, torch.float32)


def test_what_cannot_be_compiled_is_no_silent_detour(net: Lua, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def compiled(core: Any, fullgraph: bool) -> Any:
        assert fullgraph, "else torch goes on without the compiler past a limit of 8, or where it cannot follow"

        def run(*arguments: Any) -> Any:
            limits.append(torch._dynamo.config.recompile_limit)
            return core(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr("giantleap.models.engines.compiled.require_compiler", lambda device: None)
    assert_answers_as(CompileEngine.open(net, CPU, torch.float32), net, 2e-5)
    assert set(limits) == {_MAX_COMPILED} and torch._dynamo.config.recompile_limit < _MAX_COMPILED


@pytest.mark.compiler
def test_compiled_answers_as_the_network(net: Lua, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CompileEngine.open(net, CPU, torch.float32)
    assert_answers_as(engine, net, 2e-5)
    monkeypatch.setattr("giantleap.models.engines.compiled._MAX_COMPILED", 1)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        engine.run(torch.zeros(2, 16, 4, 4), 2)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(torch.zeros(1, 16, 4, 4), 2)


@pytest.mark.compiler
def test_aoti_answers_as_the_network(net: Lua, tmp_path: Path) -> None:
    artifacts = {}
    for scale in (2, 4):
        path = tmp_path / f"lua_x{scale}.pt2"
        write_aoti(trace(LuaGraph(net, scale, "fp32"), 16, net.spec.window, fused_attention=True), path)
        artifacts[scale] = Artifact(path, "latent", "enlarged")
    assert_answers_as(ArtifactEngine.open("aoti", net.spec, artifacts, CPU), net, 2e-5)
