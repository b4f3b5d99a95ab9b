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
    """What an XMP packet says; anyone can write and remove one."""

    digital_source_type: str | None = Field(description="IPTC's URL of how the image was made.")
    creator_tool: str | None = Field(description="The program that made it.")
    parameters: str | None = Field(description="Prompt, seed and so on, where the request asked for them.")


class ManifestBody(BaseModel):
    """What a C2PA manifest says."""

    state: ManifestState = Field(
        description="none; valid: signature and file match; trusted: and a list here has the certificate; invalid; "
        "remote: elsewhere, not fetched; not_checked: no c2pa-python here."
    )
    signed_by: str | None = Field(description="Owner and issuer of the certificate.")
    generator: str | None = Field(description="What wrote the manifest.")
    digital_source_type: str | None = Field(description="As of XMP, and signed.")
    problems: list[str] = Field(description="C2PA's codes of what does not match.")


class WatermarkBody(BaseModel):
    """A mark that was found in the pixels; anyone can put one in."""

    number: int = Field(description="GIANTLEAP_WATERMARK of the service that drew the image.")
    score: float = Field(description="Standard deviations above chance.")


class VerifyBody(BaseModel):
    """What an image carries of how it was made."""

    generated: bool = Field(description="A mark says that a model made it, at least in part; false: nothing is known.")
    xmp: XmpBody = Field(description="Its XMP packet.")
    manifest: ManifestBody = Field(description="Its C2PA manifest.")
    watermark: WatermarkBody | None = Field(description="The mark in its pixels; null: none was found.")


@router.post(
    "/verify",
    responses=describe_responses({}, 400, 413, 415, 422),
    openapi_extra={
        "requestBody": {"required": True, "content": file_content(*IMAGE_TYPES) | {FORM_TYPE: {"schema": _FORM}}}
    },
)
async def post_verify(request: Request, state: AppStateDep) -> VerifyBody:
    """Say what a PNG, JPEG or WebP carries of how it was made. Nothing is stored."""
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
