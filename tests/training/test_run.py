"""A run: the same weights however it was stopped, the same curve however it was shared, nothing lost if it diverges."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.lua.checkpoints import read_lua
from giantleap.training import run as run_module
from giantleap.training.checkpoint import TrainingStateError, checkpoints_in, read_checkpoint
from giantleap.training.curriculum import loss_terms
from giantleap.training.data.frozen_vae import read_vae
from giantleap.training.data.pairs_store import PairsStore
from giantleap.training.data.prepare import PrepareConfig, prepare
from giantleap.training.evaluation.held_out import evaluate
from giantleap.training.run import DistributedContext, DivergedError, train
from giantleap.training.run_config import PAPER, ConfigError, RunConfig, StageName, read_config
from tests.training.killed import Killed
from tests.training.pictures import write_pictures

CPU = torch.device("cpu")
PLACE = DistributedContext(CPU)
LUA_SPEC = {"embed_dim": 12, "depths": [2], "num_heads": 2, "window": 4, "num_feat": 8}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tiny_bundle_dir: Path) -> Path:
    """Pairs of 8 pictures of 2 tiles of 64 px each."""
    folder = tmp_path_factory.mktemp("training")
    write_pictures(folder / "pictures", 8, 128, 64)
    prepare(PrepareConfig(folder / "pictures", tiny_bundle_dir, folder / "pairs", 64, 64, pictures_per_shard=3), CPU)
    return folder / "pairs"


def config_of(bundle: Path, pairs: Path, **changes: Any) -> RunConfig:
    stages = [
        {"name": "I", "steps": 4, "effective_batch": 4, "micro_batch": 2},
        {"name": "II", "steps": 4, "effective_batch": 2, "micro_batch": 1},
        {"name": "III", "steps": 5, "effective_batch": 2, "micro_batch": 1},
    ]
    values: dict[str, Any] = {
        "bundle": bundle,
        "pairs": pairs,
        "lua": {"spec": LUA_SPEC},
        "stages": stages,
        "held_out_tiles": 2,
        "precision": "float32",
        "log_every": 1,
        "evaluate_every": 100,
        "save_every": 2,
    }
    return RunConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def whole(pairs: Path, tiny_bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(config_of(tiny_bundle_dir, pairs), out, PLACE)
    return out


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_bits(found: Path, expected: Path) -> None:
    """Of all tensors; the header of a safetensors file has no fixed order."""
    one, two = load_file(found), load_file(expected)
    assert one.keys() == two.keys()
    assert [name for name, value in one.items() if not torch.equal(value, two[name])] == []


def losses_of(out: Path) -> list[float]:
    return [line["loss"] for line in log_of(out) if "loss" in line]


def test_a_run_goes_through_all_stages(whole: Path) -> None:
    lines = [line for line in log_of(whole) if "loss" in line]
    assert [line["stage"] for line in lines] == ["I"] * 4 + ["II"] * 4 + ["III"] * 5
    assert {"x2_latent_l1", "x2_latent_fft", "x4_latent_l1", "x4_latent_fft"} < lines[0].keys()
    assert {"x2_pixel_ds", "x4_pixel_hf", "x2_latent_l1"} < lines[4].keys()
    assert {"x2_pixel_l1", "x4_pixel_fft", "x2_eagle"} < lines[8].keys() and "x2_latent_l1" not in lines[8]
    for stage, random_steps in ((lines[:4], 2), (lines[4:8], 2), (lines[8:], 2)):
        heads = [len({key[:2] for key in line if key.startswith("x")}) for line in stage]
        assert heads == [2] * (len(stage) - random_steps) + [1] * random_steps
    assert [line["rate"] for line in lines[:4]] == pytest.approx([2e-4, 2e-4, 1e-4, 5e-5])
    assert lines[8]["rate"] == 2e-4
    net = read_lua(whole / "lua.safetensors")
    assert net.spec.channels == 16 and net.spec.scales == (2, 4)
    for name in ("lua-stage-1-I", "lua-stage-2-II", "lua-stage-3-III"):
        assert (whole / f"{name}.safetensors").is_file()
    assert len(list((whole / "samples").glob("*.png"))) == 3
    assert len(checkpoints_in(whole / "checkpoints")) == 2
    assert not [path for path in whole.rglob("*") if path.suffix in (".pt", ".pth", ".pkl")]


def test_average_weights_are_written_and_differ_from_the_last_ones(whole: Path) -> None:
    checkpoint = read_checkpoint(checkpoints_in(whole / "checkpoints")[-1])
    written = load_file(whole / "lua.safetensors")
    assert all(torch.equal(value, checkpoint.tensors[f"ema.{name}"]) for name, value in written.items())
    assert any(not torch.equal(value, checkpoint.tensors[f"net.{name}"]) for name, value in written.items())


@pytest.mark.parametrize("stops", [(1, 3), (4,), (5, 8, 12)])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    stops: tuple[int, ...], whole: Path, pairs: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_bundle_dir, pairs)
    for stop in stops:
        train(config, tmp_path / "run", PLACE, resume=True, stop_after=stop)
    train(config, tmp_path / "run", PLACE, resume=True)
    assert_same_bits(tmp_path / "run" / "lua.safetensors", whole / "lua.safetensors")
    ends = [read_checkpoint(checkpoints_in(out / "checkpoints")[-1]) for out in (whole, tmp_path / "run")]
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    assert all(torch.equal(value, ends[1].tensors[name]) for name, value in ends[0].tensors.items())
    assert losses_of(tmp_path / "run") == losses_of(whole)


def test_a_run_with_muon_a_cosine_and_a_linear_skip_ends_with_the_same_bits(
    pairs: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    stages = [
        {"name": "linear", "steps": 3, "effective_batch": 2, "micro_batch": 2},
        {"name": "square", "steps": 3, "effective_batch": 2, "micro_batch": 1},
    ]
    optimizer = {"kind": "muon", "rate": 0.005, "schedule": "cosine", "ema_warmup": True}
    lua = {"spec": {**LUA_SPEC, "linear_skip": True, "latent_norm": True}}
    config = config_of(tiny_bundle_dir, pairs, stages=stages, optimizer=optimizer, lua=lua)
    train(config, tmp_path / "whole", PLACE)
    train(config, tmp_path / "parts", PLACE, stop_after=2)
    train(config, tmp_path / "parts", PLACE, stop_after=5, resume=True)
    train(config, tmp_path / "parts", PLACE, resume=True)
    assert_same_bits(tmp_path / "parts/lua.safetensors", tmp_path / "whole/lua.safetensors")
    tensors = read_checkpoint(checkpoints_in(tmp_path / "whole/checkpoints")[-1]).tensors
    assert any(name.startswith("muon.layers.") for name in tensors)
    assert any(name.startswith("adam.skips.") for name in tensors)
    trained = read_lua(tmp_path / "whole/lua.safetensors")
    assert trained.spec.linear_skip


@pytest.mark.parametrize("at", [1, 7, 10])
def test_a_run_killed_between_updates_loses_only_what_was_not_saved(
    at: int, whole: Path, pairs: Path, tiny_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, calls = config_of(tiny_bundle_dir, pairs), 0

    def average_or_die(*arguments: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls > at:
            raise Killed
        return before(*arguments)

    before = run_module._average
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_average", average_or_die)
        with pytest.raises(Killed):
            train(config, tmp_path / "run", PLACE)
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')  # a line that the kill cut off
    train(config, tmp_path / "run", PLACE, resume=True)
    assert_same_bits(tmp_path / "run" / "lua.safetensors", whole / "lua.safetensors")
    assert losses_of(tmp_path / "run") == losses_of(whole)


def test_random_numbers_of_an_update_do_not_depend_on_what_was_run_before(
    pairs: Path, tiny_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(*arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        return {name: term * torch.rand(()) for name, term in before(*arguments, **named).items()}

    before = loss_terms
    monkeypatch.setattr(run_module, "loss_terms", disturb)
    config = config_of(tiny_bundle_dir, pairs, evaluate_every=1)
    train(config, tmp_path / "whole", PLACE, stop_after=3)
    train(config, tmp_path / "parts", PLACE, stop_after=2)
    torch.manual_seed(12345)
    train(config, tmp_path / "parts", PLACE, resume=True, stop_after=3)
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_was_killed_at_random_goes_on_to_the_same_weights(
    whole: Path, pairs: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    write_toml(tmp_path / "run.toml", config_of(tiny_bundle_dir, pairs))
    command = [sys.executable, "-m", "giantleap", "train", "run", "--config", str(tmp_path / "run.toml")]
    command += ["--out", str(tmp_path / "run"), "--device", "cpu", "--resume"]
    random = Random(0)
    for _ in range(3):
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        begun_s, seen = time.monotonic(), len(checkpoints_in(tmp_path / "run" / "checkpoints"))
        wait_s = random.uniform(0.0, 2.0)
        while time.monotonic() - begun_s < 120 and process.poll() is None:
            time.sleep(0.05)
            if (
                len(checkpoints_in(tmp_path / "run" / "checkpoints")) > seen
                or (tmp_path / "run" / "log.jsonl").exists()
            ):
                time.sleep(wait_s)
                break
        process.kill()
        process.wait()
    subprocess.run(command, check=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert_same_bits(tmp_path / "run" / "lua.safetensors", whole / "lua.safetensors")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    pairs: Path, tiny_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, calls = config_of(tiny_bundle_dir, pairs), 0

    def break_at_the_sixth(*arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        terms = before(*arguments, **named)
        return terms if calls < 15 else {name: term * torch.nan for name, term in terms.items()}

    before = loss_terms
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "loss_terms", break_at_the_sixth)
        with pytest.raises(DivergedError, match=r"last good checkpoint is .*step-"):
            train(config, tmp_path / "run", PLACE)
    last = checkpoints_in(tmp_path / "run" / "checkpoints")[-1]
    assert all(bool(torch.isfinite(value).all()) for value in read_checkpoint(last).tensors.values())
    assert not (tmp_path / "run" / "lua.safetensors").exists()
    train(config, tmp_path / "run", PLACE, resume=True)
    assert (tmp_path / "run" / "lua.safetensors").is_file()


@pytest.mark.parametrize(("stage", "beta_2"), [("I", 0.995), ("III", 0.99)])
@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_the_gradient_is_clipped_by_its_global_norm_and_adam_has_the_betas_of_the_stage(
    stage: str, beta_2: float, clip: float, pairs: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    stages = [{"name": stage, "steps": 2, "effective_batch": 2, "micro_batch": 1}]
    config = config_of(tiny_bundle_dir, pairs, stages=stages, optimizer={"clip": clip})
    state = read_checkpoint(train(config, tmp_path / "run", PLACE, stop_after=1)).tensors
    means = torch.cat([v.flatten() for k, v in state.items() if k.startswith("adam.") and k.endswith("exp_avg")])
    squares = torch.cat([v.flatten() for k, v in state.items() if k.startswith("adam.") and k.endswith("exp_avg_sq")])
    gradient = means / 0.1  # after one update Adam's mean is 1 - beta_1 of the gradient
    assert float(gradient.norm()) == pytest.approx(min(clip, log_of(tmp_path / "run")[0]["gradient_norm"]), rel=1e-3)
    assert float(squares.sum() / gradient.square().sum()) == pytest.approx(1 - beta_2, rel=1e-3)


def test_the_average_follows_with_its_decay(pairs: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    stages = [{"name": "I", "steps": 2, "effective_batch": 2, "micro_batch": 1}]
    config = config_of(tiny_bundle_dir, pairs, stages=stages, optimizer={"ema_decay": 0.9, "rate": 1e-2})
    start = run_module._build(config, read_bundle(tiny_bundle_dir), PairsStore.open(pairs)).state_dict()
    state = read_checkpoint(train(config, tmp_path / "run", PLACE, stop_after=1)).tensors
    for name, value in start.items():
        expected = 0.9 * value + 0.1 * state[f"net.{name}"]
        assert torch.allclose(state[f"ema.{name}"], expected, atol=1e-6), name


def test_a_run_refuses_what_would_mix_two_runs(whole: Path, pairs: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    config = config_of(tiny_bundle_dir, pairs)
    with pytest.raises(TrainingStateError, match="holds a run"):
        train(config, whole, PLACE)
    with pytest.raises(TrainingStateError, match="seed"):
        train(config_of(tiny_bundle_dir, pairs, seed=1), whole, PLACE, resume=True)
    with pytest.raises(ConfigError, match="none is left"):
        train(config_of(tiny_bundle_dir, pairs, held_out_tiles=16), tmp_path / "run", PLACE)
    with pytest.raises(ConfigError, match="no multiple of micro_batch 2 times 3 processes"):
        train(config, tmp_path / "run", replace(PLACE, world_size=3))


def test_a_damaged_checkpoint_is_refused(whole: Path, tmp_path: Path) -> None:
    source = checkpoints_in(whole / "checkpoints")[-1]
    (tmp_path / "cut.safetensors").write_bytes(source.read_bytes()[:-7])
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("cut", "other", "absent"):
        with pytest.raises(TrainingStateError):
            read_checkpoint(tmp_path / f"{name}.safetensors")


def test_accumulated_parts_make_the_update_of_one_batch(pairs: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    curves = []
    for micro in (4, 1):
        stages = [{"name": name, "steps": 3, "effective_batch": 4, "micro_batch": micro} for name in ("I", "III")]
        out = tmp_path / str(micro)
        train(config_of(tiny_bundle_dir, pairs, stages=stages), out, PLACE)
        curves.append(losses_of(out))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize("stage", ["I", "II", "III"])
def test_nothing_is_clamped_before_a_loss(stage: StageName, pairs: Path, tiny_bundle_dir: Path) -> None:
    """Latents far from 0 and pictures beyond white: a clamp anywhere would leave no gradient."""
    config, store = config_of(tiny_bundle_dir, pairs), PairsStore.open(pairs)
    bundle = read_bundle(tiny_bundle_dir)
    vae = read_vae(bundle, CPU, torch.float32)
    vae.model.decoder.conv_out.bias.fill_(50.0)
    net = run_module._build(config, bundle, store)
    for head in net.heads.values():
        torch.nn.init.constant_(head.get_parameter("conv_last.bias"), 50.0)
    sums = run_module._backward(config, PAPER[stage], net, vae, store.read([0, 1]), (2, 4), 1)
    assert float(sums["loss"]) > 0
    for name, weight in net.named_parameters():
        assert weight.grad is not None and bool((weight.grad != 0).any()), name


def test_mixed_precision_trains_and_keeps_its_weights_in_float32(
    pairs: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    stages = [{"name": "II", "steps": 2, "effective_batch": 1, "micro_batch": 1}]
    train(config_of(tiny_bundle_dir, pairs, stages=stages, precision="bfloat16"), tmp_path / "run", PLACE)
    assert {value.dtype for value in load_file(tmp_path / "run" / "lua.safetensors").values()} == {torch.float32}
    assert all(loss > 0 for loss in losses_of(tmp_path / "run"))


def test_training_lowers_the_loss_on_tiles_that_were_held_out(
    pairs: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    batch = {"effective_batch": 4, "micro_batch": 4, "random_head_share": 0.0}
    stages = [{"name": "I", "steps": steps, **batch} for steps in (1, 30)]
    optimizer = {"rate": 3e-3, "ema_warmup": True}
    config = config_of(tiny_bundle_dir, pairs, stages=stages, optimizer=optimizer, log_every=20, save_every=60)
    train(config, tmp_path / "run", PLACE)
    scores = [line for line in log_of(tmp_path / "run") if "x2_held_out_latent_l1" in line]
    assert [line["step"] for line in scores] == [1, 31]
    for scale in (2, 4):
        assert scores[-1][f"x{scale}_held_out_latent_l1"] < 0.9 * scores[0][f"x{scale}_held_out_latent_l1"]


def test_evaluation_of_the_target_itself(pairs: Path, tiny_bundle_dir: Path) -> None:
    vae = read_vae(read_bundle(tiny_bundle_dir), CPU, torch.float32)
    net = read_lua(tiny_bundle_dir / "lua.safetensors")
    scores, sheet = evaluate(net, vae, PairsStore.open(pairs), [14, 15])
    assert sheet.shape == (3, 2 * 64, 5 * 64) and float(sheet.abs().max()) <= 1.0
    assert set(scores) == {
        f"x{scale}_held_out_{name}" for scale in (2, 4) for name in ("latent_l1", "psnr_db", "gain_db")
    }


def test_any_seed_runs_and_on_a_gpu_losses_in_float32_take_no_tf32(
    pairs: Path, tiny_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, seen = run_module._update, []

    def looking(*arguments: Any) -> dict[str, float]:
        seen.append(torch.backends.cudnn.allow_tf32)
        return update(*arguments)

    monkeypatch.setattr(run_module, "_update", looking)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled
    train(config_of(tiny_bundle_dir, pairs, seed=2**63 - 1), tmp_path / "out", PLACE, stop_after=1)
    assert seen == [False] and (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled) == before


def test_tensorboard_files_are_written_on_request(pairs: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    stages = [{"name": "I", "steps": 1, "effective_batch": 1, "micro_batch": 1}]
    train(config_of(tiny_bundle_dir, pairs, stages=stages, tensorboard=True), tmp_path / "run", PLACE)
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"gradient_norm" in events.read_bytes() and b"held_out" in events.read_bytes()


def write_toml(path: Path, config: RunConfig) -> None:
    stages = "".join(
        f'[[stages]]\nname = "{s.name}"\nsteps = {s.steps}\neffective_batch = {s.effective_batch}\n'
        f"micro_batch = {s.micro_batch}\n"
        for s in config.stages
    )
    path.write_text(
        f'bundle = "{config.bundle}"\npairs = "{config.pairs}"\nprecision = "float32"\nheld_out_tiles = 2\n'
        f"log_every = 1\nsave_every = 2\n[lua.spec]\n"
        + "".join(f"{key} = {value}\n" for key, value in LUA_SPEC.items())
        + stages
    )


def test_processes_share_the_tiles_of_one_update(pairs: Path, tiny_bundle_dir: Path) -> None:
    config, store = config_of(tiny_bundle_dir, pairs), PairsStore.open(pairs)
    whole, *shares = (
        run_module._read_share(config, store, place, 14, 3).latents[1]
        for place in (PLACE, replace(PLACE, world_size=2), replace(PLACE, rank=1, world_size=2))
    )
    assert len(whole) == 4 and torch.equal(torch.cat(shares), whole)


@pytest.mark.slow
def test_two_processes_have_the_curve_of_one_with_twice_the_batch(
    pairs: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    stages = [
        {"name": name, "steps": steps, "effective_batch": 4, "micro_batch": 2}
        for name, steps in (("I", 4), ("II", 2), ("III", 3))
    ]
    config = config_of(tiny_bundle_dir, pairs, stages=stages)
    write_toml(tmp_path / "run.toml", config)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "giantleap", "train", "run", "--config", str(tmp_path / "run.toml"), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    twice = [{**stage, "micro_batch": 4} for stage in stages]
    train(config_of(tiny_bundle_dir, pairs, stages=twice), tmp_path / "one", PLACE)
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(one) == len(two) == 9
    assert two == pytest.approx(one, abs=1e-4)
    ends = [load_file(tmp_path / name / "lua.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(value, ends[1][name], atol=1e-5) for name, value in ends[0].items())


def test_a_file_is_read_with_the_paper_for_what_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'bundle = "../bundle"\npairs = "/pairs"\n[lua]\npreset = "medium"\n'
        '[[stages]]\nname = "III"\nsteps = 10\nweights = {pixel_l1 = 1.0}\n'
    )
    config = read_config(path)
    assert config.bundle == tmp_path / "../bundle" and config.pairs == Path("/pairs")
    (stage,) = config.stages
    assert stage.betas == (0.9, 0.99) and stage.effective_batch == 32 and stage.weights.eagle == 0.0


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "bundle: is required"),
        ('bundle = "a"\npairs = "b"\nlua = {}', "exactly one of preset"),
        ('bundle = "a"\npairs = "b"\nlua = {preset = "medium"}\nsede = 1', "sede"),
        ('bundle = "a"\npairs = "b"\nlua = {preset = "medium"}\n[[stages]]\nname = "IV"', "stages"),
        ("bundle = ", "not TOML at end of document; correct it there"),
    ],
)
def test_a_wrong_file_is_refused_with_its_key(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=fault):
        read_config(tmp_path / "run.toml")


@pytest.fixture(autouse=True)
def _no_processes_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
