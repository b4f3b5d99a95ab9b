"""Reads the files of an upload: the body itself, or those of a multipart form."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
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
    async with open_form(request, 1, max_fields) as form:
        files = [value for value in form.values() if isinstance(value, UploadFile)]
        if len(files) != 1:
            raise MalformedRequest(f"the form holds {len(files)} files; send one")
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        return await files[0].read(), files[0].content_type, fields


@asynccontextmanager
async def open_form(request: Request, max_files: int, max_fields: int) -> AsyncIterator[FormData]:
    """The multipart form of a body.

    Raises:
        MalformedRequest: It is broken, or holds more files or fields.
    """
    try:
        async with request.form(max_files=max_files, max_fields=max_fields) as form:
            yield form
    except HTTPException as error:
        files = "one file" if max_files == 1 else f"at most {max_files} files"
        raise MalformedRequest(f"the form cannot be read; send {files}, and options as fields") from error
