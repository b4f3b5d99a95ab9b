"""The optimizer of one stage of a run: Adam as in the paper, or Muon for matrices beside Adam for the rest."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from giantleap.training.optim import Muon
from giantleap.training.run_config import OptimizerConfig, StageConfig

# What Muon leaves to Adam: the layers next to the latents, and tables of biases.
ADAM_NAMES = ("conv_first", "conv_last", "relative_position_bias_table")
SKIPS = "skips."


@dataclass(frozen=True)
class OptimizerPart:
    """One torch optimizer.

    Args:
        name: Of its tensors in a checkpoint.
        optimizer: As torch has it.
        share: Its rate over that of the schedule.
        weights: What it trains, by their names in the network.
    """

    name: str
    optimizer: Optimizer
    share: float
    weights: Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class StageOptimizer:
    """Every trained weight belongs to one part."""

    parts: tuple[OptimizerPart, ...]

    def zero_grad(self) -> None:
        """Clears all gradients."""
        for part in self.parts:
            part.optimizer.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """Updates all weights."""
        for part in self.parts:
            for group in part.optimizer.param_groups:
                group["lr"] = rate * part.share
            part.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """The state of every weight, as `<part>.<weight>.<key>`."""
        return {
            f"{part.name}.{name}.{key}": value
            for part in self.parts
            for name, weight in part.weights.items()
            for key, value in part.optimizer.state.get(weight, {}).items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave; others are ignored. Counters stay on the CPU, as torch keeps them."""
        for part in self.parts:
            for name, weight in part.weights.items():
                prefix = f"{part.name}.{name}."
                state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                if state:
                    moved = {key: value if key == "step" else value.to(weight) for key, value in state.items()}
                    part.optimizer.state[weight] = moved


def build_optimizer(config: OptimizerConfig, stage: StageConfig, net: nn.Module) -> StageOptimizer:
    """A fresh optimizer for all weights that are not frozen."""
    named = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
    skips = {name: weight for name, weight in named.items() if name.startswith(SKIPS)}
    matrices = {
        name: weight
        for name, weight in named.items()
        if config.kind == "muon" and weight.ndim >= 2 and not any(part in name for part in (*ADAM_NAMES, SKIPS))
    }
    rest = {name: weight for name, weight in named.items() if name not in matrices and name not in skips}
    parts = []
    if matrices:
        parts.append(OptimizerPart("muon", Muon(matrices.values(), lr=0.0), 1.0, matrices))
    share = config.adam_share if config.kind == "muon" else 1.0
    for weights, rate_share in ((rest, share), (skips, config.skip_share)):
        if weights:
            adam = Adam(weights.values(), lr=0.0, betas=stage.betas, weight_decay=0.0)
            parts.append(OptimizerPart("adam", adam, rate_share, weights))
    return StageOptimizer(tuple(parts))
