"""When to look at an image that is being generated, and the clean latent that a step stands for.

Between two steps a latent holds noise. The image that the network sees in it is the clean latent of the step: what the
scheduler returns beside the next latent, or what its numbers say.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

PreviewCallback = Callable[[int, int, Tensor], object]
"""Called with the index of an item, the step that is done, and the clean raw latent [channels, h, w]."""


def preview_steps(previews: int, steps: int) -> tuple[int, ...]:
    """The steps, counted from 1, after which to look: evenly spread, never the last one, whose image follows."""
    places = (round(number * steps / (previews + 1)) for number in range(1, previews + 1))
    return tuple(dict.fromkeys(step for step in places if 0 < step < steps))


def to_clean(scheduler: Any, arguments: Mapping[str, Any], made: Any) -> Tensor | None:
    """The clean latent of a step that the scheduler has made; None for a scheduler that does not tell.

    Args:
        scheduler: After the step.
        arguments: Of its `step`, by name.
        made: What the step returned.
    """
    sample, output = arguments["sample"], arguments["model_output"]
    name = type(scheduler).__name__
    outputs = getattr(scheduler, "model_outputs", None)
    if outputs and isinstance(outputs[-1], Tensor) and _keeps_clean(scheduler.config):
        return outputs[-1]
    if name.startswith("FlowMatchEuler"):
        sigma = scheduler.sigmas[scheduler.step_index - 1].to(sample.device)
        clean: Tensor = sample - sigma * output
        return clean
    for field in ("pred_original_sample", "denoised"):
        found = getattr(made, field, None)
        if isinstance(found, Tensor):
            return found
    if name == "SCMScheduler" and isinstance(made, tuple):  # its latents are that much smaller until the end
        return made[1] / scheduler.config.sigma_data  # type: ignore[no-any-return]
    if isinstance(made, tuple) and len(made) > 1 and name not in _OTHER_SECOND and isinstance(made[1], Tensor):
        return made[1]
    return _from_noise(scheduler, arguments) if hasattr(scheduler, "alphas_cumprod") else None


_OTHER_SECOND = frozenset({"TCDScheduler"})  # whose second result holds noise again


def _keeps_clean(config: Mapping[str, Any]) -> bool:
    """Whether a multistep solver keeps clean latents: DPM-Solver++ and UniPC by default do."""
    return str(config.get("algorithm_type", "")).endswith("dpmsolver++") or bool(config.get("predict_x0"))


def _from_noise(scheduler: Any, arguments: Mapping[str, Any]) -> Tensor:
    """From a schedule of noise (arXiv 2010.02502, equation 9)."""
    sample, output = arguments["sample"], arguments["model_output"]
    alpha = scheduler.alphas_cumprod.to(sample.device)[int(arguments["timestep"])]
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    clean: Tensor = {
        "epsilon": lambda: (sample - noise * output) / signal,
        "v_prediction": lambda: signal * sample - noise * output,
        "sample": lambda: output,
    }[scheduler.config.prediction_type]()
    return clean
