"""Which claimed jobs run together: a pure function from claims to batches, each one pass through one route.

A batch shares everything that fixes the shape of the work, and its output fits the budget in latent pixels. What runs
a batch is `giantleap.service.worker.loop`; why batches look so is in `docs/decisions/0005-one-batch-one-route.md`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobs.grid import LatentGrid, count_items, output_latent_px
from giantleap.service.jobs.job import GenerateParams, JobParams

BatchKey = tuple[str | int | float | None, ...]


@dataclass(slots=True)
class _OpenBatch:
    key: BatchKey
    claims: list[Claim] = field(default_factory=list)
    items: int = 0
    latent_px: int = 0


def batch_key(bundle: str, params: JobParams, grid: LatentGrid, drawn: bool = False) -> BatchKey:
    """What jobs of one batch have in common.

    Always bundle, scale, method and decode. Drawing: the final size, which with the scale gives the base size, the
    steps, the guidance and how far it keeps to a given image; of what is drawn only the size still counts. Upscaling:
    the size of the latent padded to the window, so that sizes which differ by less than a window still run together,
    what comes out, and whether images go in.
    """
    shared = (params.kind, bundle, params.scale, params.method, params.decode)
    if isinstance(params, GenerateParams) and drawn:
        return ("drawn", *shared, params.width_px, params.height_px)
    if isinstance(params, GenerateParams):
        return (*shared, params.width_px, params.height_px, params.steps, params.guidance_scale, params.strength)
    size = (grid.padded(params.latent_width), grid.padded(params.latent_height))
    return (*shared, *size, params.output, params.image_width_px is not None)


def plan_batch(
    claims: Sequence[Claim], grids: Mapping[str, LatentGrid], budget_items: int, budget_latent_px: int
) -> list[list[Claim]]:
    """Group claims into batches.

    First come, first served: a claim joins the earliest batch of its key that has room, else it opens a batch; batches
    run in the order of their first claims. A job larger than the budget gets a batch of its own, which the worker runs
    in slices.

    Args:
        claims: In the order in which they were claimed.
        grids: Per bundle.
        budget_items: Most images in one batch.
        budget_latent_px: Most latent pixels after upscaling in one batch.

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


def slice_items(item_latent_px: int, budget_items: int, budget_latent_px: int) -> int:
    """How many items of this size may run at once; at least one."""
    return max(1, min(budget_items, budget_latent_px // max(1, item_latent_px)))
