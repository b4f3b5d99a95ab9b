"""Limits of the files of a job, their provenance, and its signer.

`giantleap.models.pixels.images` and `giantleap.models.provenance` write them.
"""

import json
from dataclasses import asdict
from typing import Final

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.pixels.image_formats import LOSSY, MAX_SIDE_PX
from giantleap.models.provenance.manifest import ManifestSigner, ProvenanceError
from giantleap.models.provenance.xmp import Origin
from giantleap.service.errors import BadConfiguration
from giantleap.service.jobs.capacity import to_workload
from giantleap.service.jobs.job import GenerateParams, JobParams
from giantleap.service.jobs.refining import Check
from giantleap.service.jobs.requests import UpscaleQuery
from giantleap.service.settings import Settings

MAX_PARAMETERS_BYTES: Final = 60_000
"""Of the parameters in a file: a JPEG holds 65,502 bytes of XMP."""


def open_manifest_signer(settings: Settings) -> ManifestSigner | None:
    """The signer of the settings, tried out; None where they name no certificate.

    Raises:
        BadConfiguration: Its certificate and key cannot sign.
    """
    if settings.c2pa_cert is None or settings.c2pa_key is None:
        return None
    try:
        return ManifestSigner.open(settings.c2pa_cert, settings.c2pa_key)
    except ProvenanceError as error:
        raise BadConfiguration(str(error)) from error


def to_origin(params: JobParams, bundle: str, seed: int | None) -> Origin:
    """The origin of one image of a job.

    Args:
        params: Of the job.
        bundle: Name of its bundle.
        seed: Of this image; None for an upscale.
    """
    if not isinstance(params, GenerateParams):
        return Origin(from_image=params.image_width_px is not None)
    return Origin(params.from_image, to_parameters(params, bundle, seed) if params.embed_parameters else None)


def to_parameters(params: GenerateParams, bundle: str, seed: int | None) -> str:
    """The parameters that reproduce this image, as JSON in ASCII, which XML can hold for any prompt."""
    values = {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "seed": seed,
        "steps": params.steps,
        "guidance_scale": params.guidance_scale,
        "strength": params.strength,
        "width": params.width_px,
        "height": params.height_px,
        "scale": params.scale,
        "method": params.method,
        "refine": None if params.refine is None else asdict(params.refine),
        "loras": {each.name: each.weight for each in params.loras} or None,
        "bundle": bundle,
    }
    return json.dumps({name: value for name, value in values.items() if value not in (None, "")})


def file_checks(params: JobParams, bundle: Bundle) -> tuple[Check, ...]:
    """Check that the file format supports the size of the image and the file options."""
    work, name = to_workload(params, bundle), params.output_format
    longest_px, max_px = max(work.width_px, work.height_px), MAX_SIDE_PX[name]
    others = ", ".join(each for each, side_px in MAX_SIDE_PX.items() if longest_px <= side_px)
    text = ""
    if isinstance(params, GenerateParams) and params.embed_parameters:
        text = to_parameters(params, bundle.name, params.seed)
    return (
        (
            work.decode is not None and longest_px > max_px,
            "output_format",
            f"is {name}, which holds sides up to {max_px} px; an image of {work.width_px}x{work.height_px} "
            f"px needs one of {others}",
        ),
        (
            work.decode is not None and params.file.quality is not None and name not in LOSSY,
            "quality",
            f"applies to {' and '.join(LOSSY)}; a {name} keeps every pixel: leave it out, or send output_format",
        ),
        (
            len(text) > MAX_PARAMETERS_BYTES,
            "embed_parameters",
            f"needs prompts of at most {MAX_PARAMETERS_BYTES} bytes as JSON; leave it out",
        ),
    )


def no_file_options(query: UpscaleQuery) -> tuple[Check, ...]:
    """A latent is stored as it is: the options of image files do not go with it."""
    is_latent, reason = query.output == "latent", "applies to images; leave it out with output=latent"
    return tuple(
        (is_latent and value is not None, name, reason)
        for name, value in (("compression", query.compression), ("quality", query.quality))
    )
