"""What the files of a job say of how they were made, and who signs it; `giantleap.models.provenance` writes it."""

import json
from dataclasses import asdict
from typing import Final

from giantleap.models.provenance.manifest import ManifestSigner, ProvenanceError
from giantleap.models.provenance.xmp import Origin
from giantleap.service.errors import BadConfiguration
from giantleap.service.jobs.job import GenerateParams, JobParams
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
    """What makes this image again, as JSON in ASCII, which XML can hold whatever the prompt is."""
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
