"""Which claimed jobs run together: a pure function from claims to batches, each one pass through one route.

Jobs of a batch have equal tensor shapes, and their output fits the budget in latent pixels. The reasons are in
`docs/decisions/0005-one-batch-one-route.md`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from giantleap.models.adapters.files import AdapterUse
from giantleap.models.generation.refinement import Refinement
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobs.devices import DeviceKind
from giantleap.service.jobs.grid import LatentGrid, count_items, output_latent_px
from giantleap.service.jobs.job import GenerateParams, JobParams

BatchKey = tuple[str | int | float | Refinement | tuple[AdapterUse, ...] | None, ...]


@dataclass(slots=True)
class _OpenBatch:
    key: BatchKey
    claims: list[Claim] = field(default_factory=list)
    items: int = 0
    latent_px: int = 0


def batch_key(bundle: str, params: JobParams, grid: LatentGrid, is_generated: bool = False) -> BatchKey:
    """What jobs of one batch have in common.

    Always bundle, scale, method, decode, refine pass and LoRAs. To generate: the final size, which with the scale gives
    the base size, the steps, the guidance, the strength and the kind of images; once base latents are generated only
    the size. To upscale: the size of the latent padded to the window, so that sizes that differ by less than a window
    run together, the kind of output, and whether the input is an image.
    """
    loras = params.loras if isinstance(params, GenerateParams) else ()
    shared = (params.kind, bundle, params.scale, params.method, params.decode, params.refine, loras)
    if isinstance(params, GenerateParams) and is_generated:
        return ("generated", *shared, params.width_px, params.height_px)
    if isinstance(params, GenerateParams):
        start = (params.strength, params.mask, params.images)
        return (*shared, params.width_px, params.height_px, params.steps, params.guidance_scale, *start)
    size = (grid.padded(params.latent_width), grid.padded(params.latent_height))
    return (*shared, *size, params.output, params.image_width_px is not None)


def plan_batch(
    claims: Sequence[Claim], grids: Mapping[str, LatentGrid], budget_items: int, budget_latent_px: int
) -> list[list[Claim]]:
    """Group claims into batches.

    First come, first served: a claim joins the earliest batch of its key that has room, else it opens a new one;
    batches are in the order of their first claims. A job over the budget gets its own batch, which runs in slices.

    Args:
        claims: In the order of the queue.
        grids: Per bundle.
        budget_items: Maximum images in one batch.
        budget_latent_px: Maximum latent pixels after upscaling in one batch.

    Returns:
        Batches that hold each claim exactly once.
    """
    batches: list[_OpenBatch] = []
    for claim in claims:
        params, grid = claim.job.params, grids[claim.job.bundle]
        key, items = batch_key(claim.job.bundle, params, grid, claim.base_latents is not None), count_items(params)
        latent_px = items * output_latent_px(params, grid)
        for batch in batches:
            fits = batch.items + items <= budget_items and batch.latent_px + latent_px <= budget_latent_px
            if batch.key == key and fits:
                break
        else:
            batch = _OpenBatch(key)
            batches.append(batch)
        batch.claims.append(claim)
        batch.items += items
        batch.latent_px += latent_px
    return [batch.claims for batch in batches]


def items_together(kind: DeviceKind, waiting: int, batch_items: int) -> int:
    """How many images of several jobs run together: on a CPU one, unless a full claim waits.

    There a batch gains a few percent per image (`python -m benchmarks.batching`) and all its jobs end with the last, so
    it pays only at full load.

    Args:
        kind: Of the worker's device.
        waiting: Jobs that were claimed at once.
        batch_items: The setting, and most jobs of one claim.
    """
    return 1 if kind == "cpu" and waiting < batch_items else batch_items


def slice_items(item_latent_px: int, budget_items: int, budget_latent_px: int) -> int:
    """How many items of this size run at once; at least one."""
    return max(1, min(budget_items, budget_latent_px // max(1, item_latent_px)))
