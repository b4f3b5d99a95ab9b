"""Results as objects of a bucket of S3 or of a compatible server.

Keys, region and endpoint come from the usual environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`,
`AWS_ENDPOINT`, a web identity or the role of the machine), which obstore reads; none of it is a setting or logged.
A put is one request, so that an object is there whole or not at all and no parts of an upload stay behind.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Literal, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from giantleap.service.errors import BadConfiguration, StoreUnavailable
from giantleap.service.results.keys import check_key, is_expired, job_of, new_keys

_FAULTS = (BaseError, OSError)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_BATCH = 1000
_RETRY_S = 5
_PROBE_LIFETIME_S = 60
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_ADVICE = {
    "NoSuchBucket": "the bucket does not exist; create it or correct its name",
    "AccessDenied": "access is denied; grant read, write, list and delete on the bucket",
    "403": "access is denied; grant read, write, list and delete on the bucket",
    "401": "access is denied; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "InvalidAccessKeyId": "the access key is unknown; set AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; set AWS_SECRET_ACCESS_KEY",
    "no credentials": "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
Value = TypeVar("Value")


class S3ResultStore:
    """Objects of one bucket, below a prefix.

    Args:
        bucket: Name of the bucket.
        prefix: Path below which all keys lie; may be empty.
        key_prefix: First part of every key.
    """

    large_input_bytes = 1 << 20

    def __init__(self, bucket: str, prefix: str, key_prefix: str) -> None:
        self._key_prefix = key_prefix
        endpoint = next((os.environ[name] for name in _ENDPOINTS if name in os.environ), "")
        try:
            self._store = S3Store(
                bucket,
                prefix=prefix or None,
                client_options={
                    "allow_http": endpoint.startswith("http://"),
                    "connect_timeout": "5s",
                    "timeout": "60s",
                },
                retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=20)},
            )
        except _FAULTS as error:
            raise BadConfiguration(
                f"result_store: the environment of S3 cannot be used ({type(error).__name__}); check AWS_*"
            ) from error

    def put(self, key: str, content: bytes, content_type: str) -> None:
        """As `ResultStore.put`; the type is that of presigned downloads."""
        attributes = {"Content-Type": content_type}
        _call(lambda: obstore.put(self._store, check_key(key), content, attributes=attributes, use_multipart=False))

    def get(self, key: str) -> bytes | None:
        """As `ResultStore.get`."""
        try:
            return _call(lambda: obstore.get(self._store, check_key(key)).bytes().to_bytes())
        except StoreUnavailable as error:
            if isinstance(error.__cause__, FileNotFoundError) and name_fault(error.__cause__) != "NoSuchBucket":
                return None
            raise

    def delete(self, keys: Sequence[str]) -> None:
        """As `ResultStore.delete`."""
        for key in keys:
            if job_of(key) is None:
                check_key(key)
        if keys:
            _call(lambda: obstore.delete(self._store, keys))

    def list_expired(self, prefix: str, now_s: float) -> Iterator[list[str]]:
        """As `ResultStore.list_expired`."""
        folders = _call(lambda: obstore.list_with_delimiter(self._store, prefix)["common_prefixes"])
        for folder in folders:
            if is_expired(folder.rpartition("/")[2], now_s):
                chunks = obstore.list(self._store, folder, chunk_size=_BATCH)
                while chunk := _call(lambda: next(chunks, None)):  # noqa: B023  # called before the next turn
                    yield [meta["path"] for meta in chunk]

    def prune(self, prefix: str, now_s: float) -> None:
        """As `ResultStore.prune`: a bucket has no folders."""

    def sign(self, key: str, method: Literal["GET", "HEAD"], lifetime_s: float) -> str:
        """A URL that opens an object without credentials, for a while. Sends no request, but may fetch credentials."""
        return _call(lambda: obstore.sign(self._store, method, check_key(key), timedelta(seconds=lifetime_s)))

    def check(self) -> None:
        """As `ResultStore.check`."""
        [key] = new_keys(self._key_prefix, "probe", "result", 1, _PROBE_LIFETIME_S, time.time())
        try:
            self.put(key, b"probe", "text/plain")
            self.delete([key])
            self.ping()
        except StoreUnavailable as error:
            if isinstance(error.__cause__, Exception) and (fault := name_fault(error.__cause__)) in _ADVICE:
                raise BadConfiguration(f"{_ADVICE[fault]} ({fault})") from error
            raise

    def ping(self) -> None:
        """As `ResultStore.ping`."""
        _call(lambda: obstore.list_with_delimiter(self._store, self._key_prefix))


def _call(request: Callable[[], Value]) -> Value:
    try:
        return request()
    except _FAULTS as error:
        raise StoreUnavailable(
            f"the bucket of results cannot be used now ({name_fault(error)}); it must be reachable and allow this "
            "service: try again",
            retry_after_s=_RETRY_S,
        ) from error


def name_fault(error: Exception) -> str:
    """The server's word for an error, such as NoSuchBucket, else its status, else what failed. Holds no data."""
    text = str(error)
    if (found := _CODE.search(text) or _STATUS.search(text)) is not None:
        return found[1]
    return "no credentials" if "credential" in text.lower() else "no answer"
