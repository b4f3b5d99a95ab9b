"""Optimizer, averages and budget of the trainings: Muon for weight matrices, AdamW for the rest, EMA.

Muon replaces a matrix update by the nearest orthogonal matrix; on these tiny networks it reached in minutes what AdamW
did not reach in hours (`docs/lab/vae.md`). `training/pocket/state.py` stores the state between runs.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

# Quintic Newton-Schulz coefficients of K. Jordan, "Muon" (2024): steepest slope at zero, singular values to 0.7..1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def to_orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of matrices [n, rows, columns] towards one.

    Five quintic Newton-Schulz steps (K. Jordan et al., "Muon: an optimizer for hidden layers", 2024). The iteration
    runs on the small Gram matrix, of which all factors are polynomials; that is 3 times faster on a CPU.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    gram = x @ x.transpose(1, 2)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    product = identity.expand_as(gram)
    for _ in range(steps):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    result: Tensor = product @ x
    return result.transpose(1, 2) if tall else result


def to_orthogonal_bfloat16(matrices: Tensor, steps: int = 5) -> Tensor:
    """Do the same in bfloat16, one matrix at a time: 2 to 4 times faster on a CPU with avx512_bf16.

    The Gram matrix alone would lose too many digits, so this iterates on the matrix itself.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    results = []
    for matrix in matrices.transpose(1, 2) if tall else matrices:
        x = (matrix / (matrix.norm() + 1e-7)).bfloat16()
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        results.append(x.float())
    result = torch.stack(results)
    return result.transpose(1, 2) if tall else result


class Muon(Optimizer):
    """Orthogonalized momentum for weights of two or more dimensions (convolutions as [out, in * k * k])."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, is_bfloat16: bool = False
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})
        self.orthogonalize = to_orthogonal_bfloat16 if is_bfloat16 else to_orthogonal

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight; weights of one shape are orthogonalized together."""
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    same_shape[weight.flatten(1).shape].append(weight)
            for shape, weights in same_shape.items():
                updates = [self._momentum(weight, group["momentum"]) for weight in weights]
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for weight, update in zip(weights, self.orthogonalize(torch.stack(updates)), strict=True):
                    weight.sub_(update.view(weight.shape), alpha=scale)

    def _momentum(self, weight: nn.Parameter, momentum: float) -> Tensor:
        """Return the Nesterov momentum of the gradient as a matrix."""
        grad = weight.grad
        assert grad is not None
        state = self.state[weight]
        if "buffer" not in state:
            state["buffer"] = torch.zeros_like(grad)
        buffer = state["buffer"]
        buffer.mul_(momentum).add_(grad, alpha=1.0 - momentum)
        return grad.lerp(buffer, momentum).flatten(1)


class MuonAdamW:
    """Muon for matrices, AdamW for biases, norms and named exceptions."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        muon_lr: float,
        adam_lr: float,
        adam_names: tuple[str, ...] = (),
        is_bfloat16: bool = False,
    ) -> None:
        """Split the parameters.

        Args:
            named: Output of `Module.named_parameters`; frozen parameters are ignored.
            muon_lr: Peak rate of the matrices.
            adam_lr: Peak rate of the rest.
            adam_names: Parameters whose name contains one of these use AdamW (embeddings, first and last layers).
            is_bfloat16: Precision of Muon's matrix products.
        """
        trained = [(name, weight) for name, weight in named if weight.requires_grad]
        matrix = [w for n, w in trained if w.ndim >= 2 and not any(part in n for part in adam_names)]
        chosen = {id(weight) for weight in matrix}
        rest = [weight for _, weight in trained if id(weight) not in chosen]
        self.weights = [weight for _, weight in trained]
        self.peaks = (muon_lr, adam_lr)
        self.parts: tuple[Optimizer, ...] = (
            Muon(matrix, muon_lr, is_bfloat16=is_bfloat16),
            AdamW(rest, adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        )

    def step(self, rate: float, clip: float = 1.0) -> float:
        """Clip, update with the peak rates times `rate`, clear gradients; return the norm before clipping."""
        norm = float(nn.utils.clip_grad_norm_(self.weights, clip))
        for part, peak in zip(self.parts, self.peaks, strict=True):
            for group in part.param_groups:
                group["lr"] = peak * rate
            part.step()
            part.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> list[dict[str, object]]:
        """Return the states of both optimizers."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        """Load the states of both optimizers."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Ema:
    """Exponential moving average of a network's floating-point weights."""

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Update the average; the first steps use a smaller decay, so that the start is forgotten."""
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1.0 - decay)
            else:
                self.weights[name].copy_(value)

    def copy_to(self, network: nn.Module) -> None:
        """Copy the average into a network."""
        network.load_state_dict(self.weights)


@dataclass(frozen=True)
class Budget:
    """Length of a run: a number of steps (reproducible) or minutes of training time."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"a budget is steps or minutes, got steps={self.steps}, minutes={self.minutes}; give one")

    def __str__(self) -> str:
        """As the option `--length` takes it."""
        return str(self.steps) if self.minutes is None else f"{self.minutes:g}m"

    def progress(self, step: int, spent_s: float) -> float:
        """Return 0 at the start and 1 or more when the budget is spent."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return spent_s / (60.0 * self.minutes)


def cosine_rate(progress: float, step: int, warmup_steps: int = 50) -> float:
    """Return the share of the peak rate: linear warm-up, then a cosine to zero at progress 1."""
    warm = min(1.0, (step + 1) / warmup_steps)
    return warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
