"""TensorRT as far as it goes without a GPU: ranges of shapes, what the builder receives and may return.

`FakeTensorRt` stands for the module and records its calls. The last test builds a real plan where there is
a GPU with TensorRT.
"""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from giantleap.export.build import Request, export_bundle
from giantleap.export.manifest import ArtifactError
from giantleap.export.tensorrt_plans import (
    SIDES,
    PlanOptions,
    build_plan,
    plan_profiles,
    trtexec_line,
)
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.engines.base import EngineError, Profile, choose_profile
from tests.tiny_bundle import write_tiny_bundle


class FakeTensorRt:
    """What `build_plan` uses of the module, and the calls it received.

    Args:
        shape: Of the parsed network's input.
        reads: Whether the parser understands the graph.
        builds: Whether the builder succeeds.
        takes_cache: Whether a timing cache of an earlier build is accepted.
    """

    class Logger:
        WARNING = 2

        def __init__(self, level: int) -> None:
            self.level = level

    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    BuilderFlag = SimpleNamespace(REFIT="refit", TF32="tf32")
    HardwareCompatibilityLevel = SimpleNamespace(NONE=0, AMPERE_PLUS=1, SAME_COMPUTE_CAPABILITY=2)

    def __init__(
        self,
        shape: tuple[int, ...] = (-1, 16, -1, -1),
        reads: bool = True,
        builds: bool = True,
        takes_cache: bool = True,
        takes_profiles: bool = True,
    ) -> None:
        self.shape, self.reads, self.builds = shape, reads, builds
        self.takes_cache, self.takes_profiles = takes_cache, takes_profiles
        self.calls: dict[str, Any] = {"cleared": [], "profiles": [], "caches": []}
        self.inputs = ["latent"]

    def Builder(self, logger: Any) -> Any:
        return SimpleNamespace(
            create_network=self._network,
            create_builder_config=lambda: _Config(self),
            create_optimization_profile=lambda: SimpleNamespace(
                set_shape=lambda *shapes: self.calls["profiles"].append(shapes)
            ),
            build_serialized_network=lambda network, config: b"plan" if self.builds else None,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        return SimpleNamespace(
            parse_from_file=lambda name: self.calls.update(graph=name) or self.reads,
            num_errors=2,
            get_error=lambda index: SimpleNamespace(desc=lambda: f"error {index}"),
        )

    def _network(self, flags: int) -> Any:
        self.calls["flags"] = flags
        inputs = [SimpleNamespace(name=name, shape=self.shape) for name in self.inputs]
        return SimpleNamespace(num_inputs=len(inputs), get_input=lambda index: inputs[index])


class _Config:
    def __init__(self, fake: FakeTensorRt) -> None:
        self.fake = fake
        self.hardware_compatibility_level: int | None = None
        fake.calls["config"] = self

    def set_memory_pool_limit(self, pool: str, size_bytes: int) -> None:
        self.fake.calls["pool"] = (pool, size_bytes)

    def clear_flag(self, flag: str) -> None:
        self.fake.calls["cleared"].append(flag)

    def add_optimization_profile(self, profile: Any) -> int:
        return len(self.fake.calls["profiles"]) - 1 if self.fake.takes_profiles else -1

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.fake.calls["caches"].append(cache)
        return self.fake.takes_cache or cache == b""

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"cache of this build")


def build(fake: FakeTensorRt, options: PlanOptions | None = None, precision: Any = "bf16") -> bytes:
    profiles = plan_profiles(8, 4)
    return build_plan(fake, Path("lua_x2.onnx"), 16, profiles, precision, options or PlanOptions())


def test_profiles_reach_from_one_window_to_each_side() -> None:
    profiles = plan_profiles(8, max_batch=4)
    assert [profile.name for profile in profiles] == ["64", "128", "256"]
    assert profiles[1] == Profile("128", (1, 8, 8), (1, 128, 128), (4, 128, 128))
    assert SIDES == (64, 128, 256)


def test_sides_of_profiles_are_whole_windows() -> None:
    assert [profile.name for profile in plan_profiles(16, 1, (24, 64))] == ["32", "64"]
    for profile in plan_profiles(12, 1):
        assert all(side % 12 == 0 for side in (*profile.min_shape[1:], *profile.opt_shape[1:], *profile.max_shape[1:]))
    assert len(plan_profiles(16, 1, (60, 64))) == 1, "two sides that round to one window grid are one profile"
    for batch, sides in ((0, SIDES), (1, ()), (1, (0,))):
        with pytest.raises(ArtifactError, match="at least 1"):
            plan_profiles(8, batch, sides)


def test_the_smallest_profile_that_holds_a_shape_is_chosen() -> None:
    profiles = plan_profiles(8, max_batch=4)
    chosen = [
        choose_profile(profiles, shape) for shape in ((1, 8, 8), (4, 64, 64), (1, 64, 72), (1, 128, 8), (2, 256, 136))
    ]
    assert chosen == [0, 0, 1, 1, 2]
    for shape in ((5, 8, 8), (1, 264, 8), (1, 8, 4)):
        with pytest.raises(EngineError, match=r"no profile holds a batch of .*; the largest is \(4, 256, 256\)"):
            choose_profile(profiles, shape)


def test_the_builder_gets_every_option() -> None:
    fake = FakeTensorRt()
    options = PlanOptions(max_batch=4, workspace_bytes=2**30, compatibility="ampere_plus")
    assert build(fake, options) == b"plan"
    assert fake.calls["flags"] == 1 << FakeTensorRt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert fake.calls["graph"] == "lua_x2.onnx"
    assert fake.calls["pool"] == ("workspace", 2**30)
    assert fake.calls["config"].hardware_compatibility_level == FakeTensorRt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert fake.calls["cleared"] == ["refit"], "nothing may ask for weights that can be changed"
    assert fake.calls["profiles"][2] == ("latent", (1, 16, 8, 8), (1, 16, 256, 256), (4, 16, 256, 256))
    assert fake.calls["caches"] == [], "no timing cache without a file for it"


def test_float32_excludes_tf32() -> None:
    fake = FakeTensorRt()
    build(fake, precision="fp32")
    assert fake.calls["cleared"] == ["refit", "tf32"]


def test_the_timing_cache_is_kept_between_builds(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "timing.cache"
    options = PlanOptions(timing_cache=path)
    first, second, other_gpu = FakeTensorRt(), FakeTensorRt(), FakeTensorRt(takes_cache=False)
    build(first, options)
    assert first.calls["caches"] == [b""] and path.read_bytes() == b"cache of this build"
    build(second, options)
    assert second.calls["caches"] == [b"cache of this build"]
    build(other_gpu, options)
    assert other_gpu.calls["caches"] == [b"cache of this build", b""], "that of another GPU makes way for a new one"
    assert [each.name for each in path.parent.iterdir()] == ["timing.cache"]


def test_errors_of_tensorrt_are_reported() -> None:
    with pytest.raises(ArtifactError, match=r"cannot read lua_x2\.onnx: error 0; error 1"):
        build(FakeTensorRt(reads=False))
    with pytest.raises(ArtifactError, match=r"could not build a plan of lua_x2\.onnx"):
        build(FakeTensorRt(builds=False))
    with pytest.raises(ArtifactError, match="refuses profile 64"):
        build(FakeTensorRt(takes_profiles=False))
    with pytest.raises(ArtifactError, match=r"sees an input of \(2, 16, -1, -1\); expected \(-1, 16, -1, -1\)"):
        build(FakeTensorRt(shape=(2, 16, -1, -1)))
    other = FakeTensorRt()
    other.inputs = ["latent", "mask"]
    with pytest.raises(ArtifactError, match=r"sees the inputs \['latent', 'mask'\]"):
        build(other)


def test_the_same_plan_can_be_built_by_trtexec() -> None:
    options = PlanOptions(4, 2**30, "ampere_plus", Path("cache dir") / "timing")
    words = shlex.split(trtexec_line("lua_x2.onnx", "lua_x2.plan", 16, plan_profiles(8, 4), "fp32", options))
    assert words[:3] == ["trtexec", "--onnx=lua_x2.onnx", "--saveEngine=lua_x2.plan"]
    assert {"--stronglyTyped", "--noTF32", "--memPoolSize=workspace:1024M"} <= set(words)
    assert {"--hardwareCompatibilityLevel=ampere+", "--timingCacheFile=cache dir/timing"} <= set(words)
    start = words.index("--profile=1")
    assert words[start + 1 : start + 4] == [
        "--minShapes=latent:1x16x8x8",
        "--optShapes=latent:1x16x128x128",
        "--maxShapes=latent:4x16x128x128",
    ]
    plain = trtexec_line("a", "b", 16, plan_profiles(8, 4), "bf16", PlanOptions())
    assert "TF32" not in plain and "Compatibility" not in plain and "timing" not in plain


def test_without_the_library_or_a_gpu_nothing_is_built_and_nothing_is_left(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "tiny")
    request = Request(read_bundle(tmp_path / "tiny"), "tensorrt", "bf16", tmp_path / "out", device=torch.device("cpu"))
    with pytest.raises(EngineError, match="tensorrt runs on a GPU; the device is cpu"):
        export_bundle(request)
    assert [each.name for each in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_plan_agrees_with_pytorch_on_this_gpu(tmp_path: Path, precision: Any) -> None:
    write_tiny_bundle(tmp_path / "tiny")
    options = PlanOptions(max_batch=2, timing_cache=tmp_path / "timing.cache")
    request = Request(
        read_bundle(tmp_path / "tiny"),
        "tensorrt",
        precision,
        tmp_path / "out",
        (2,),
        ("lua",),
        torch.device("cuda:0"),
        options,
    )
    manifest = export_bundle(request)
    assert manifest.artifacts[0].parity.device == "cuda" and options.timing_cache is not None
    assert options.timing_cache.is_file() and manifest.machine.compute_capability is not None
