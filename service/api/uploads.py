"""Reads the file of an upload: the body itself, or the one file of a multipart form."""

from collections.abc import Mapping

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from giantleap.service.errors import MalformedRequest
from giantleap.service.jobs.media_types import FORM_TYPE, read_media_type


async def read_upload(request: Request, max_fields: int) -> tuple[bytes, str | None, Mapping[str, str]]:
    """The body and its type; of a multipart form, those of its one file, whatever its field is called, and the others.

    Raises:
        MalformedRequest: The form is broken, or does not hold exactly one file.
    """
    content_type = request.headers.get("content-type")
    if read_media_type(content_type) != FORM_TYPE:
        return await request.body(), content_type, {}
    try:
        async with request.form(max_files=1, max_fields=max_fields) as form:
            files = [value for value in form.values() if isinstance(value, UploadFile)]
            if len(files) != 1:
                raise MalformedRequest(f"the form holds {len(files)} files; send one")
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            return await files[0].read(), files[0].content_type, fields
    except HTTPException as error:
        raise MalformedRequest("the form cannot be read; send one file, and options as fields") from error
