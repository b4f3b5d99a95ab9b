"""The sampling passes of each method: at which size the network runs how often. Nothing here imports torch."""

from dataclasses import dataclass

from giantleap.models.bundle.descriptor import Method

_DEPTH = 0.6  # of LSRNA, arXiv 2503.18446: the last 30 of 50 steps


@dataclass(frozen=True, slots=True)
class Stage:
    """Steps at one size.

    Args:
        steps: Indices of the schedule.
        growth: Of the sides over the base size.
        guidance: Of the guidance over the requested one.
    """

    steps: range
    growth: float
    guidance: float


def plan_stages(steps: int, scale: float, raises_guidance: bool = True) -> tuple[Stage, ...]:
    """The stages of a scale: one for 1, two up to 2, three above; x = i / (stages - 1) places stage i.

    The guidance ends at 6 and 10 times the requested one, 30 and 50 at the authors' 5, if it is raised at all.

    Raises:
        ValueError: There are fewer steps than stages.
    """
    count = 1 if scale <= 1 else 2 if scale <= 2 else 3
    if steps < count:
        raise ValueError(f"rectifiedhr at scale {scale:g} needs at least {count} steps; found {steps}")
    if count == 1:
        return (Stage(range(steps), 1.0, 1.0),)
    first, most = (0.6, 6.0) if count == 2 else (0.8, 10.0)
    guidance = most if raises_guidance else 1.0
    places = [index / (count - 1) for index in range(count)]
    # One step at least for each stage, also in short runs.
    ends = [
        min(max(int(steps * (first + (1 - first) * place**0.5) + 1e-9), index + 1), steps - count + 1 + index)
        for index, place in enumerate(places)
    ]
    return tuple(
        Stage(range(start, end), 1 + (scale - 1) * place, 1 + (guidance - 1) * place**0.5)
        for start, end, place in zip([0, *ends], ends, places, strict=False)
    )


def first_step(steps: int) -> int:
    """The step at which the enlarged latent enters: 20 of 50.

    Raises:
        ValueError: There are too few steps to leave one for it.
    """
    depth = int(_DEPTH * steps + 1e-9)
    if depth < 1:
        raise ValueError(f"lsrna needs at least 2 steps; found {steps}")
    return steps - depth


def undilated_from(scale: float, steps: int) -> int:
    """The first step of ScaleCrafter without any dilation."""
    return int((0.7 if scale > 2 else 0.6) * steps + 1e-9)


def network_pixel_steps(method: Method, scale: float, steps: int, final_px: int) -> int:
    """Pixels that the network sees while it generates one image, summed over all steps.

    Windows count wherever they overlap, as large as the base image: the base model's own size where that is square. A
    step with guidance, which some networks run twice, counts once.

    Args:
        method: How the image becomes large.
        scale: Of its sides over those of the base image.
        steps: Denoising steps.
        final_px: Pixels of the final image.
    """
    base_px = final_px / scale**2
    if method in ("direct", "hidiffusion"):
        return final_px * steps
    if method == "scalecrafter":
        return final_px * (steps + (undilated_from(scale, steps) if scale > 2 else 0))
    if method == "rectifiedhr":
        return round(sum(base_px * stage.growth**2 * len(stage.steps) for stage in plan_stages(steps, scale)))
    if method == "demofusion":
        return round(base_px * steps * (1 + sum(map(_views, range(2, int(scale) + 1)))))
    if method == "lsrna" and scale > 1:
        return round(base_px * (steps + (steps - first_step(steps)) * _views(int(scale))))
    return round(base_px * steps)


def _views(factor: int) -> int:
    """Network calls in one step of a DemoFusion phase: windows half a window apart, and strided copies."""
    windows, copies = (2 * factor - 1) ** 2, factor**2
    return windows + copies
