"""Files of a repository on the Hugging Face hub: which there are at a commit, and how one comes here whole.

An interrupted file goes on at the byte where it stopped. That is why the two requests it takes are made here:
huggingface_hub 2.4 starts a file anew, and one of these models has up to ten gigabytes. `models/bundle/pull.py` says
which files a bundle needs.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
from huggingface_hub import get_token

PUBLIC_HUB = "https://huggingface.co"
TRIES = 6
PART = ".part"


class HubError(RuntimeError):
    """The hub does not give what was asked for; the message says what to do."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a snapshot; the hub knows the SHA-256 of large files only."""

    name: str
    size_bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class HubSnapshot:
    """The files of a repository at one commit, by name."""

    hub_id: str
    commit: str
    files: Mapping[str, HubFile]


class Hub:
    """The hub, with the access token of this machine where there is one (`HF_TOKEN`, or `hf auth login`); close it.

    Args:
        endpoint: Its address; the setting of the hub's own tools is `HF_ENDPOINT`.
        first_delay_s: Before the second try of a broken transfer; doubles with each further one.
    """

    def __init__(self, endpoint: str = PUBLIC_HUB, first_delay_s: float = 1.0) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._first_delay_s = first_delay_s
        self._client = httpx.Client(follow_redirects=True, timeout=60)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def snapshot(self, hub_id: str, revision: str) -> HubSnapshot:
        """What a repository holds at a revision, which becomes a commit.

        Raises:
            HubError: There is no such repository or revision, or the hub cannot be reached.
        """
        url = f"{self._endpoint}/api/models/{hub_id}/revision/{quote(revision, safe='')}"
        try:
            answer = self._client.get(url, params={"blobs": "true"}, headers=_headers())
        except httpx.TransportError as error:
            raise HubError(f"{hub_id}: {self._endpoint} cannot be reached ({type(error).__name__})") from error
        if answer.status_code != 200:
            raise HubError(_refusal(hub_id, revision, answer.status_code))
        try:
            content = answer.json()
            files = [
                HubFile(each["rfilename"], int(each["size"]), (each.get("lfs") or {}).get("sha256"))
                for each in content["siblings"]
            ]
            return HubSnapshot(hub_id, str(content["sha"]), {file.name: file for file in files})
        except (ValueError, KeyError, TypeError) as error:
            raise HubError(f"{hub_id}: {self._endpoint} does not answer as a Hugging Face hub does") from error

    def fetch(self, snapshot: HubSnapshot, name: str, path: Path, on_bytes: Callable[[int], object]) -> str:
        """Bring one file here and check it.

        Args:
            snapshot: Where it is.
            name: Its name there.
            path: Where it goes; until it is whole its bytes are in `<path>.part`, where a later call goes on.
            on_bytes: Called with the number of bytes that came, those of an earlier call included.

        Returns:
            Its SHA-256.

        Raises:
            HubError: The transfer breaks off again and again without getting further, is refused, or the content is
                not what the hub names.

        Effects: makes the directory of `path`; `path` is there whole or not at all.
        """
        file = snapshot.files[name]
        part = path.with_name(path.name + PART)
        part.parent.mkdir(parents=True, exist_ok=True)
        on_bytes(_size_bytes(part))
        self._fetch_all(snapshot, file, part, on_bytes)
        with part.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if file.sha256 not in (None, digest):
            part.unlink()
            raise HubError(f"{snapshot.hub_id}: {name} has sha256 {digest}; the hub names {file.sha256}")
        part.replace(path)
        return digest

    def _fetch_all(self, snapshot: HubSnapshot, file: HubFile, part: Path, on_bytes: Callable[[int], object]) -> None:
        """Tries again after a break, up to `TRIES` times without getting further."""
        failures, furthest = 0, _size_bytes(part)
        while True:
            try:
                self._fetch_rest(snapshot, file, part, on_bytes)
                return
            except httpx.TransportError as error:
                failures = failures + 1 if _size_bytes(part) <= furthest else 1
                furthest = max(furthest, _size_bytes(part))
                if failures == TRIES:
                    raise HubError(
                        f"{snapshot.hub_id}: {file.name}: the transfer broke off {TRIES} times "
                        f"({type(error).__name__}); run the same command again to go on"
                    ) from error
            time.sleep(self._first_delay_s * 2 ** (failures - 1))

    def _fetch_rest(self, snapshot: HubSnapshot, file: HubFile, part: Path, on_bytes: Callable[[int], object]) -> None:
        start = _size_bytes(part)
        if start == file.size_bytes and part.exists():
            return
        if start > file.size_bytes:  # of another file, or a server that sent too much
            part.unlink()
            on_bytes(-start)
            start = 0
        url = f"{self._endpoint}/{snapshot.hub_id}/resolve/{snapshot.commit}/{quote(file.name)}"
        headers = _headers()
        if start:
            headers["Range"] = f"bytes={start}-"
        with self._client.stream("GET", url, headers=headers) as answer:
            if answer.status_code == 429 or answer.status_code >= 500:
                raise httpx.RemoteProtocolError(f"status {answer.status_code}")
            if answer.status_code not in (200, 206):
                raise HubError(_refusal(snapshot.hub_id, snapshot.commit, answer.status_code, file.name))
            goes_on = answer.status_code == 206
            if start and not goes_on:
                on_bytes(-start)
            with part.open("ab" if goes_on else "wb") as content:
                for chunk in answer.iter_bytes():
                    content.write(chunk)
                    on_bytes(len(chunk))
        if _size_bytes(part) != file.size_bytes:
            raise httpx.RemoteProtocolError(f"{file.name}: {_size_bytes(part)} of {file.size_bytes} bytes came")


def _headers() -> dict[str, str]:
    headers = {"Accept-Encoding": "identity", "User-Agent": "giantleap"}
    if token := get_token():
        headers["Authorization"] = f"Bearer {token}"  # httpx drops it where the hub redirects to another host
    return headers


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _refusal(hub_id: str, revision: str, status: int | None, name: str = "") -> str:
    what = f"{hub_id}: {name}" if name else hub_id
    if status in (401, 403):
        return (
            f"{what}: the hub refuses access: agree to the license on its page of {hub_id}, then set HF_TOKEN or run "
            "`hf auth login`; where that was done, there is no such model"
        )
    if status == 404:
        return f"{what}: the hub has no such model, file or revision {revision}"
    return f"{what}: the hub answers with status {status}"
