"""Which images a bundle takes to edit, and what to say where it does not. Nothing here imports torch."""

from collections.abc import Callable, Sequence

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.descriptor import INPAINTING, REFERENCES, takes_mask
from giantleap.service.jobs.job import GenerateParams
from giantleap.service.jobs.refining import Check
from giantleap.service.jobs.requests import GenerateRequest


def supports_mask(bundle: Bundle) -> bool:
    """Whether the pipeline supports a mask; True for one on the hub, which is not known."""
    kind = bundle.pipeline_class
    return kind is None or takes_mask(kind, bundle.latent_space.channels)


def max_references(bundle: Bundle) -> int:
    """Maximum number of reference images of the pipeline; 0 for one on the hub, which is not known."""
    return REFERENCES.get(bundle.pipeline_class or "", 0)


def edit_checks(
    request: GenerateRequest, params: GenerateParams, bundle: Bundle, others: Sequence[Bundle] = ()
) -> tuple[Check, ...]:
    """Faults of image fields that the bundle or other fields exclude.

    Args:
        request: Of the client.
        params: What was planned for it.
        bundle: That the job names.
        others: The bundles that requests may name, to say which of them can.
    """
    starts, width_px, height_px = params.strength is not None, *params.base_size_px
    max_px, max_images = INPAINTING.get(bundle.pipeline_class or ""), max_references(bundle)
    return (
        (request.strength is not None and not starts, "strength", "needs an init_image, which is missing"),
        (
            starts and not params.mask and not bundle.supports_init_image,
            "init_image",
            f"is not supported by the pipeline of bundle {bundle.name}, which starts from noise; "
            f"{_able(others, lambda b: b.supports_init_image)}",
        ),
        (params.mask and not starts, "mask", "needs the init_image that it belongs to, which is missing"),
        (
            params.mask and not supports_mask(bundle),
            "mask",
            f"is not supported by the pipeline of bundle {bundle.name}; {_able(others, supports_mask)}",
        ),
        (
            params.mask and max_px is not None and width_px * height_px > max_px,
            "mask",
            f"goes with a base image of at most {max_px} pixels here; {width_px}x{height_px} are more",
        ),
        (
            params.images > 0 and max_images == 0,
            "images",
            f"are not supported by the pipeline of bundle {bundle.name}; "
            f"{_able(others, max_references)}; or start from one as init_image",
        ),
        (
            params.images > max_images > 0,
            "images",
            f"are {params.images}; bundle {bundle.name} takes at most {max_images}",
        ),
        (params.images > 0 and starts, "images", "exclude an init_image; leave one of them out"),
        (
            params.refine is not None and (params.mask or params.images > 0),
            "refine",
            "samples the whole image again without its mask or images; leave it out",
        ),
    )


def _able(bundles: Sequence[Bundle], can: Callable[[Bundle], bool | int]) -> str:
    names = [bundle.name for bundle in bundles if can(bundle)]
    return f"bundles that can: {', '.join(names)}" if names else "no bundle that is served here can"
