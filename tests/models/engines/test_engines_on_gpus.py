"""What an engine asks of a GPU, desk-checked with fakes: all of it on its own device of several, never on the first."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.engines.aoti_runtime import open_package
from giantleap.models.engines.artifacts import ArtifactEngine
from giantleap.models.engines.base import Artifact, EngineError, Profile
from giantleap.models.engines.compiled import CompileEngine
from giantleap.models.engines.onnx_runtime import choose_provider, run_bound
from giantleap.models.engines.packed_lua import PackedLua
from giantleap.models.engines.tensorrt_runtime import PlanRunner
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from tests.models.fake_gpu import FakeCuda, FakeTensorRt

CPU, SECOND = torch.device("cpu"), torch.device("cuda:1")
SPEC = LuaSpec(4, 12, (2,), 2, window=4, num_feat=8, scales=(2,))
PROFILES = (Profile("8", (1, 4, 4), (1, 8, 8), (2, 8, 8)), Profile("16", (1, 4, 4), (1, 16, 16), (2, 16, 16)))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def enlarge(latent: Tensor) -> Tensor:
    return F.interpolate(latent, scale_factor=2.0, mode="nearest") + 1.0


def test_a_graph_is_captured_on_its_own_gpu_and_bothers_no_other_thread(cuda: FakeCuda) -> None:
    engine = CompileEngine(PackedLua(Lua(SPEC).eval(), torch.float32, packed=False), SECOND)
    ran_on: list[torch.device] = []

    def compiled(latent: Tensor, grids: object) -> Tensor:
        ran_on.append(cuda.device)
        return enlarge(latent)

    engine._compiled[2] = compiled
    latent = torch.randn(3, 4, 8, 8)
    with torch.inference_mode(), torch.cuda.device(SECOND):
        answer = engine._replay(latent, 2)
    assert torch.equal(answer, enlarge(latent)), "what was captured, for the batch as it came"
    ((device, stream, mode, _),) = cuda.captures
    assert device == stream.device == SECOND and mode == "thread_local"
    assert set(ran_on) == {SECOND} and cuda.device == torch.device("cuda:0")


def test_graphs_of_all_sizes_share_their_memory(cuda: FakeCuda) -> None:
    engine = CompileEngine(PackedLua(Lua(SPEC).eval(), torch.float32, packed=False), SECOND)
    engine._compiled[2] = lambda latent, grids: enlarge(latent)
    with torch.inference_mode():
        for shape in ((1, 4, 4, 4), (3, 4, 8, 8), (4, 4, 8, 8), (1, 4, 4, 4)):
            engine._replay(torch.randn(shape), 2)
    assert len(cuda.captures) == 2, "batches of 3 and 4 are one graph"
    assert len({(stream.name, pool) for _, stream, _, pool in cuda.captures}) == 1
    assert cuda.captures[0][3] is not None


def test_a_compiled_engine_makes_its_gpu_the_current_one(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CompileEngine(PackedLua(Lua(SPEC).eval(), torch.float32, packed=False), SECOND)
    monkeypatch.setattr(Tensor, "to", lambda tensor, device, dtype: tensor)
    seen: list[torch.device] = []

    def replay(latent: Tensor, scale: float) -> Tensor:
        seen.append(cuda.device)
        return enlarge(latent)

    monkeypatch.setattr(engine, "_replay", replay)
    engine.run(torch.randn(1, 4, 4, 4), 2)
    assert seen == [SECOND]


def test_a_package_is_loaded_onto_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[int] = []
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path, device_index: devices.append(device_index))
    for device in (SECOND, torch.device("cuda"), CPU):
        open_package(Artifact(Path("lua_x2.pt2"), "latent", "enlarged"), device)
    assert devices == [1, 0, -1], "-1 is what the loader takes for a CPU"


def test_artifacts_are_opened_and_run_on_their_gpu(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[torch.device] = []

    def load(path: str, device_index: int) -> Any:
        seen.append(cuda.device)
        return run

    def run(latent: Tensor) -> Tensor:
        seen.append(cuda.device)
        return enlarge(latent)

    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    engine = ArtifactEngine.open("aoti", SPEC, {2: Artifact(tmp_path / "lua_x2.pt2", "latent", "enlarged")}, SECOND)
    monkeypatch.setattr(Tensor, "to", lambda tensor, device, dtype: tensor)
    engine.run(torch.randn(1, 4, 4, 4), 2)
    assert seen == [SECOND, SECOND] and cuda.device == torch.device("cuda:0")


def test_onnxruntime_takes_its_gpu_and_keeps_float32_whole() -> None:
    assert choose_provider(SECOND) == [("CUDAExecutionProvider", {"device_id": 1, "use_tf32": 0})]
    assert choose_provider(CPU) == ["CPUExecutionProvider"]


def test_onnxruntime_runs_from_and_to_the_memory_of_the_tensors(tiny_onnx_dir: Path) -> None:
    artifact = Artifact(tiny_onnx_dir / "lua_x2.onnx", "latent", "enlarged")
    session = onnxruntime.InferenceSession(str(artifact.path), providers=choose_provider(CPU))
    latent = torch.randn(2, 16, 4, 8)
    (expected,) = session.run(None, {"latent": latent.numpy()})
    assert torch.equal(run_bound(session, artifact, latent), torch.from_numpy(expected))


@pytest.fixture
def plan(tmp_path: Path) -> Artifact:
    (tmp_path / "lua_x2.plan").write_bytes(b"plan")
    return Artifact(tmp_path / "lua_x2.plan", "latent", "enlarged", PROFILES)


def test_a_plan_answers_in_the_profile_of_each_size(cuda: FakeCuda, plan: Artifact) -> None:
    trt = FakeTensorRt(cuda, enlarge, len(PROFILES))
    runner = PlanRunner(trt, plan, SECOND)
    for shape in ((1, 4, 8, 8), (2, 4, 4, 8), (1, 4, 8, 16), (2, 4, 16, 16), (1, 4, 4, 4)):
        latent = torch.randn(shape)
        assert torch.equal(runner(latent), enlarge(latent))
    assert [context.profile for context in trt.contexts] == [0, 1], "one context for each profile, kept"
    assert [len(context.runs) for context in trt.contexts] == [3, 2]
    for context in trt.contexts:
        assert {device for device, _, _ in context.runs} == {SECOND}
        assert {stream for _, stream, _ in context.runs} == {runner._stream.cuda_stream}
    stream: Any = runner._stream
    assert "default" in stream.waits and stream.name in cuda.stream.waits


def test_a_batch_above_the_profiles_runs_in_parts(cuda: FakeCuda, plan: Artifact) -> None:
    trt = FakeTensorRt(cuda, enlarge, len(PROFILES))
    latent = torch.randn(5, 4, 8, 8)
    assert torch.equal(PlanRunner(trt, plan, SECOND)(latent), enlarge(latent))
    assert [shape[0] for _, _, shape in trt.contexts[0].runs] == [2, 2, 1]
    with pytest.raises(ValueError, match="no profile"):
        PlanRunner(trt, plan, SECOND)(torch.randn(1, 4, 20, 4))


def test_contexts_of_a_plan_are_made_on_its_gpu(
    cuda: FakeCuda, plan: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = FakeTensorRt(cuda, enlarge, len(PROFILES))
    monkeypatch.setattr("giantleap.models.engines.tensorrt_runtime.load_tensorrt", lambda device: trt)
    engine = ArtifactEngine.open("tensorrt", SPEC, {2: plan}, SECOND)
    monkeypatch.setattr(Tensor, "to", lambda tensor, device, dtype: tensor)
    latent = torch.randn(2, 4, 7, 5)
    assert engine.run(latent, 2).shape == (2, 4, 14, 10)
    assert [context.made_on for context in trt.contexts] == [SECOND]


def test_a_plan_of_another_gpu_or_with_other_profiles_is_refused(cuda: FakeCuda, plan: Artifact) -> None:
    with pytest.raises(EngineError, match="has 1 profiles; its manifest names 2"):
        PlanRunner(FakeTensorRt(cuda, enlarge, 1), plan, SECOND)
    plan.path.write_bytes(b"of another GPU")
    with pytest.raises(EngineError, match="another GPU or version"):
        PlanRunner(FakeTensorRt(cuda, enlarge, 2), plan, SECOND)
