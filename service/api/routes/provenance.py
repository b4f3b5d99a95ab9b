"""POST /verify: what an image carries of how it was made."""

import asyncio

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from giantleap.models.provenance.manifest import ManifestState
from giantleap.service.api.dependencies import AppStateDep
from giantleap.service.api.openapi import IMAGE_TYPES, describe_responses, file_content
from giantleap.service.api.uploads import read_upload
from giantleap.service.errors import InvalidFields
from giantleap.service.jobs.media_types import FORM_TYPE
from giantleap.service.jobs.verification import ImageMarks, verify_image

router = APIRouter(tags=["service"])

_FORM = {
    "type": "object",
    "properties": {"image": {"type": "string", "format": "binary"}},
    "required": ["image"],
}


class XmpBody(BaseModel):
    """The content of the XMP packet, which anyone can write or remove."""

    digital_source_type: str | None = Field(description="IPTC digital source type, a URL.")
    creator_tool: str | None = Field(description="Program that made the image.")
    parameters: str | None = Field(description="Prompt, seed and other parameters, if the request embedded them.")


class ManifestBody(BaseModel):
    """The content of the C2PA manifest."""

    state: ManifestState = Field(
        description="none: there is no manifest; valid: signature and file match; trusted: valid, and on the "
        "trust list here; invalid; remote: elsewhere, not fetched; not_checked: c2pa-python is not installed."
    )
    signed_by: str | None = Field(description="Owner and issuer of the certificate.")
    generator: str | None = Field(description="Program that wrote the manifest.")
    digital_source_type: str | None = Field(description="IPTC digital source type, signed.")
    problems: list[str] = Field(description="C2PA status codes of what does not match.")


class WatermarkBody(BaseModel):
    """The watermark in the pixels, which anyone can embed."""

    number: int = Field(description="GIANTLEAP_WATERMARK of the service that made the image.")
    score: float = Field(description="Score of the match, in standard deviations above chance.")


class VerifyBody(BaseModel):
    """The provenance marks of an image."""

    generated: bool = Field(
        description="Whether a mark says that a model made the image, at least in part; false: not known."
    )
    xmp: XmpBody = Field(description="XMP packet.")
    manifest: ManifestBody = Field(description="C2PA manifest.")
    watermark: WatermarkBody | None = Field(description="Watermark; null: none was found.")


@router.post(
    "/verify",
    responses=describe_responses({}, 400, 413, 415, 422),
    openapi_extra={
        "requestBody": {"required": True, "content": file_content(*IMAGE_TYPES) | {FORM_TYPE: {"schema": _FORM}}}
    },
)
async def post_verify(request: Request, state: AppStateDep) -> VerifyBody:
    """Read the provenance marks of a PNG, JPEG or WebP image. Nothing is stored."""
    body, content_type, fields = await read_upload(request, max_fields=1)
    if fields:
        raise InvalidFields(*((name[:64], "is not known here; send the image alone") for name in fields))
    return to_verify_body(await asyncio.to_thread(verify_image, body, content_type, state.settings.max_image_px))


def to_verify_body(marks: ImageMarks) -> VerifyBody:
    """The marks as JSON."""
    xmp, manifest, mark = marks.xmp, marks.manifest, marks.watermark
    return VerifyBody(
        generated=marks.generated,
        xmp=XmpBody(
            digital_source_type=xmp.digital_source_type, creator_tool=xmp.creator_tool, parameters=xmp.parameters
        ),
        manifest=ManifestBody(
            state=manifest.state,
            signed_by=manifest.signed_by,
            generator=manifest.generator,
            digital_source_type=manifest.digital_source_type,
            problems=list(manifest.problems),
        ),
        watermark=None if mark is None else WatermarkBody(number=mark.number, score=mark.score),
    )
