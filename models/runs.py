"""Runs one image through all stages of a route: to time it (`run_once`), or to warm every network at start (`warm`)."""

from dataclasses import replace

from torch import Tensor

from giantleap.models.bundle.descriptor import Method
from giantleap.models.device import StageClock
from giantleap.models.generation.items import GenerationItem
from giantleap.models.lua.spec import scaled_size
from giantleap.models.route import Route


def run_once(
    route: Route, item: GenerationItem, scale: float, method: Method = "lua"
) -> tuple[StageClock, Tensor | None]:
    """Run one image through all stages.

    Args:
        item: Its size is that of the base image; `direct` generates `scale` times as large.

    Returns:
        The clock with the time of each stage, and the image as `Route.decode` returns it.
    """
    clock = route.clock()
    if method == "direct":
        item = replace(item, width_px=scaled_size(item.width_px, scale), height_px=scaled_size(item.height_px, scale))
    refine = [] if item.refine is None else [item]
    latents = route.generate_latents(item, clock, method, scale)
    _, (image,) = route.upscale_and_decode(latents, scale, method, "exact", clock, refine)
    return clock, image


def warm(route: Route, width_px: int, height_px: int, steps: int) -> dict[tuple[Method, float], dict[str, float]]:
    """Run every scale of every network once at the shapes of a request of this base size.

    Returns:
        Seconds per stage, by method and scale.
    """
    item = GenerationItem("", "", 0, width_px, height_px, steps, 2.0)
    if not route.role.loads_decoder:
        clock = route.clock()
        route.generate_latents(item, clock)
        return {("direct", 1): clock.stages_s}
    methods: list[Method] = ["lua" if route.lua is not None else "bicubic"]
    if route.pixel is not None:
        methods.append("swinir")
    runs = [(method, scale) for method in methods for scale in route.scales_of(method)]
    runs = [run for run in runs if run != ("swinir", 1)]  # the same as the first method's
    return {(method, scale): run_once(route, item, scale, method)[0].stages_s for method, scale in runs}
