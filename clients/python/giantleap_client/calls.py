"""Requests as values: what a job is made from, and the HTTP calls of a job's life."""

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Unpack
from urllib.parse import SplitResult, urlsplit

import httpx

from giantleap_client.options import GenerateOptions, UpscaleOptions
from giantleap_client.payloads import Source, to_body

MAX_CANCEL_AFTER_S = 7 * 86_400
_JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_KEY = re.compile(r"[\x21-\x7e]+")
# What the service's log and proxies' logs must not have: it goes into the body.
_PRIVATE = frozenset({"prompt", "negative_prompt"})


@dataclass(frozen=True, slots=True)
class Request:
    """What to make: the result of `generate_request` or `upscale_request`."""

    content: bytes = field(repr=False)
    content_type: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, about a job unless `job_id` is None."""

    method: str
    path: str
    job_id: str | None
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    content: bytes = field(default=b"", repr=False)


def generate_request(prompt: str, **options: Unpack[GenerateOptions]) -> Request:
    """A request to generate.

    Raises:
        TypeError: An image is of another kind.
        OSError: A file cannot be read.
    """
    body: dict[str, Any] = {"prompt": prompt, **options}
    if "init_image" in options:
        body["init_image"] = _to_base64("init_image", options["init_image"])
    if "mask" in options:
        body["mask"] = _to_base64("mask", options["mask"])
    if "images" in options:
        body["images"] = [_to_base64("images", image) for image in options["images"]]
    return Request(json.dumps(body).encode(), "application/json")


def _to_base64(name: str, source: Source) -> str:
    content, content_type = to_body(source)
    if not content_type.startswith("image/"):
        raise TypeError(f"{name} is a latent; give an image: a path, bytes, a uint8 array or a PIL image")
    return base64.b64encode(content).decode()


def upscale_request(source: Source, **options: Unpack[UpscaleOptions]) -> Request:
    """A latent or an image to enlarge.

    Raises:
        TypeError: The source cannot be sent.
        OSError: The file cannot be read.
    """
    content, content_type = to_body(source)
    params: dict[str, Any] = dict(options)
    if not _PRIVATE & params.keys():
        return Request(content, content_type, params)
    form = httpx.Request("PUT", "http://form", data=params, files={"file": ("file", content, content_type)})
    return Request(form.read(), form.headers["Content-Type"])


def put_call(request: Request, job_id: str, *, wait_s: float = 0.0, cancel_after_s: float | None = None) -> Call:
    """Make the job, or find it where an earlier call made it; wait for its end up to `wait_s`."""
    headers = {"Content-Type": request.content_type, "Accept": "application/json"}
    headers["Prefer"] = "respond-async" if wait_s < 1 else f"wait={math.floor(wait_s)}"
    if cancel_after_s is not None:
        headers["Cancel-After"] = str(min(MAX_CANCEL_AFTER_S, max(1, math.ceil(cancel_after_s))))
    return Call("PUT", f"jobs/{job_id}", job_id, headers, request.params, request.content)


def get_call(job_id: str) -> Call:
    """Read the job."""
    return Call("GET", f"jobs/{job_id}", job_id)


def events_call(job_id: str, last_event_id: str) -> Call:
    """Follow the job's events after one of them, or from the first."""
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    return Call("GET", f"jobs/{job_id}/events", job_id, headers)


def result_call(job_id: str, index: int) -> Call:
    """Read one file of the job."""
    return Call("GET", f"jobs/{job_id}/result", job_id, params={"index": index})


def send_call(method: str, path: str, params: Mapping[str, Any]) -> Call:
    """Any other route.

    Raises:
        ValueError: The path is not one below the address of the service.
    """
    parts = urlsplit(path)
    if parts.scheme or parts.netloc:  # httpx would send the key there
        raise ValueError("the path is an address; give a path of the service, such as models")
    return Call(method, path.lstrip("/"), None, params=params)


def delete_call(job_id: str) -> Call:
    """Delete the job, or cancel it."""
    return Call("DELETE", f"jobs/{job_id}", job_id)


def cancel_call(job_id: str) -> Call:
    """Cancel the job; the service takes a repeat for the same."""
    return Call("POST", f"jobs/{job_id}/cancel", job_id)


def check_job_id(job_id: str) -> str:
    """An id that is one part of a path.

    Raises:
        ValueError: It is not a UUID as the service writes it.
    """
    if not _JOB_ID.fullmatch(job_id):
        raise ValueError("the job_id is not a UUID in lower case, such as str(uuid.uuid4())")
    return job_id


def check_url(url: str) -> str:
    """The address of the service, ending with a slash.

    Raises:
        ValueError: It is not an http address, or holds a user name.
    """
    parts = _split_url(url)
    if parts is None or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise ValueError("the url is not an address of a service; give one such as http://127.0.0.1:8000")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the url holds a user name or a password; give the key as api_key")
    return url.rstrip("/") + "/"


def _split_url(url: str) -> SplitResult | None:
    """Its parts; None where there is no host, or no connection could ever be opened to it."""
    try:
        parts = urlsplit(url)
        host, _ = (parts.hostname or "").encode("idna"), parts.port  # which raises where it is no number
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        return None
    return parts if host else None


def to_headers(api_key: str | None) -> dict[str, str]:
    """The headers of every call.

    Raises:
        ValueError: The key has characters that a header cannot hold.
    """
    if api_key is None:
        return {}
    if not _KEY.fullmatch(api_key):  # httpx would quote it in its error
        raise ValueError("the api_key has characters other than printable ASCII; look for a space or a line end")
    return {"Authorization": f"Bearer {api_key}"}
