"""Muon, the split, EMA, the budget, and a run that goes on where it stopped."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from giantleap.training.optim import Budget, Ema, MuonAdamW, cosine_rate, to_orthogonal
from giantleap.training.pocket.state import TrainState


def make_state(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.SiLU(), nn.Conv2d(8, 2, 1))
    optimizer = MuonAdamW(network.named_parameters(), 0.02, 1e-3, ("3.",))
    return TrainState(network, optimizer, Ema(network, 0.9), np.random.default_rng(seed))


def train(state: TrainState, steps: int) -> float:
    loss = torch.tensor(0.0)
    for _ in range(steps):
        x = torch.from_numpy(state.rng.standard_normal((2, 3, 8, 8))).float()
        loss = (state.network(x) - x.mean()).square().mean()
        torch.autograd.backward(loss)
        state.optimizer.step(1.0)
        state.ema.update(state.network, state.step)
        state.tick()
    return float(loss.detach())


@pytest.mark.parametrize("shape", [(4, 8, 72), (2, 40, 9), (1, 16, 16)])
def test_orthogonal_matrices_have_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(to_orthogonal(matrices))
    assert float(values.max()) < 1.3
    assert float(values.median()) > 0.6


def test_matrices_go_to_muon_and_the_rest_to_adam() -> None:
    muon, adam = make_state().optimizer.parts
    assert [tuple(w.shape) for w in muon.param_groups[0]["params"]] == [(8, 3, 3, 3)]
    assert len(adam.param_groups[0]["params"]) == 5


def test_frozen_weights_are_left_out() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[0].requires_grad_(False)
    assert len(MuonAdamW(network.named_parameters(), 0.1, 0.1).weights) == 2


def test_training_lowers_the_loss() -> None:
    state = make_state()
    first = train(state, 1)
    assert train(state, 60) < 0.5 * first


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, stopped, resumed = make_state(), make_state(), make_state(seed=9)
    train(whole, 8)
    train(stopped, 5)
    stopped.write(tmp_path / "state.pt")
    resumed.read(tmp_path / "state.pt")
    train(resumed, 3)
    assert resumed.step == 8
    assert resumed.spent_s > stopped.spent_s
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=0, atol=0)
        torch.testing.assert_close(resumed.ema.weights[name], whole.ema.weights[name], rtol=0, atol=0)


def test_resuming_from_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make_state().read(tmp_path / "state.pt")


def test_average_follows_slowly() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    ema = Ema(network, decay=0.9)
    nn.init.ones_(network.weight)
    ema.update(network, step=10_000)
    assert float(ema.weights["weight"]) == pytest.approx(0.1, abs=1e-6)
    assert network.weight.item() == 1.0


def test_budget_is_steps_or_minutes() -> None:
    assert Budget(steps=10).progress(5, 1e9) == 0.5
    assert Budget(minutes=2.0).progress(10**9, 60.0) == 0.5
    for steps, minutes in ((None, None), (1, 1.0)):
        with pytest.raises(ValueError, match="give one"):
            Budget(steps, minutes)


def test_rate_warms_up_and_falls_to_zero() -> None:
    assert cosine_rate(0.0, 0) == pytest.approx(0.02)
    assert cosine_rate(0.5, 1000) == pytest.approx(0.5)
    assert cosine_rate(1.3, 1000) == pytest.approx(0.0)
