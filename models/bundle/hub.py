"""Files of a repository on the Hugging Face hub: which there are at a commit, and how one is downloaded.

An interrupted download resumes where it stopped, also in a later run. `huggingface_hub.hf_hub_download` deletes an
unfinished file instead, and one of these models has up to ten gigabytes. `models/bundle/pull.py` chooses the files.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # of httpx or httpx2
from huggingface_hub.file_download import http_get

PUBLIC_HUB = "https://huggingface.co"
PART = ".part"


class HubError(RuntimeError):
    """The hub does not give a repository or a file; the message says what to do."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a snapshot; the hub states the SHA-256 of large files only."""

    name: str
    size_bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class HubSnapshot:
    """The files of a repository at one commit, by name."""

    hub_id: str
    commit: str
    files: Mapping[str, HubFile]


@dataclass(frozen=True, slots=True)
class Hub:
    """The hub, with the access token of this machine if there is one (`HF_TOKEN`, or `hf auth login`).

    Args:
        endpoint: Its address; the hub's own tools take it from `HF_ENDPOINT`.
    """

    endpoint: str = PUBLIC_HUB

    def snapshot(self, hub_id: str, revision: str) -> HubSnapshot:
        """List a repository at a revision and resolve the revision to a commit.

        Raises:
            HubError: There is no such repository or revision, or the hub cannot be reached.
        """
        api = HfApi(endpoint=self.endpoint, library_name="giantleap")
        try:
            info = api.model_info(hub_id, revision=revision, files_metadata=True)
            files = [
                HubFile(file.rfilename, int(file.size or 0), file.lfs.sha256 if file.lfs else None)
                for file in info.siblings or ()
            ]
        except HfHubHTTPError as error:
            raise HubError(_refusal(hub_id, revision, error)) from error
        except (TransportError, OSError) as error:
            raise HubError(
                f"{hub_id}: {self.endpoint} cannot be reached ({type(error).__name__}); check the network, or set "
                "HF_ENDPOINT to a mirror"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HubError(f"{hub_id}: {self.endpoint} does not answer as a Hugging Face hub does") from error
        return HubSnapshot(hub_id, str(info.sha), {file.name: file for file in files})

    def fetch(self, snapshot: HubSnapshot, name: str, path: Path) -> str:
        """Download one file and check its size and digest. A progress bar goes to standard error.

        Args:
            snapshot: The repository.
            name: Of the file in the repository.
            path: Where it goes, replaced in one step. Until the file is complete its bytes are in `<path>.part`, where
                a later call resumes.

        Returns:
            Its SHA-256.

        Raises:
            HubError: The transfer breaks off repeatedly, is refused, or the content differs from the hub's digest.
        """
        file = snapshot.files[name]
        part = path.with_name(path.name + PART)
        part.parent.mkdir(parents=True, exist_ok=True)
        self._download(snapshot, file, part)
        with part.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if file.sha256 not in (None, digest):
            part.unlink()
            raise HubError(f"{snapshot.hub_id}: {name} has sha256 {digest}; the hub states {file.sha256}")
        part.replace(path)
        return digest

    def _download(self, snapshot: HubSnapshot, file: HubFile, part: Path) -> None:
        with part.open("ab") as content:
            if content.tell() > file.size_bytes:  # of another file
                content.truncate(0)
                content.seek(0)
            try:
                http_get(
                    hf_hub_url(snapshot.hub_id, file.name, revision=snapshot.commit, endpoint=self.endpoint),
                    content,
                    resume_size=content.tell(),
                    headers=_headers(),
                    expected_size=file.size_bytes,
                    displayed_filename=file.name,
                )
            except HfHubHTTPError as error:
                if content.tell() == 0:
                    part.unlink()
                raise HubError(_refusal(snapshot.hub_id, snapshot.commit, error, file.name)) from error
            except (TransportError, OSError) as error:
                raise HubError(
                    f"{snapshot.hub_id}: {file.name}: the transfer broke off ({type(error).__name__}); run the same "
                    "command again to resume it"
                ) from error


def _headers() -> dict[str, str]:
    headers = {"Accept-Encoding": "identity"}  # a byte range of compressed content would not resume
    if token := get_token():
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _refusal(hub_id: str, revision: str, error: HfHubHTTPError, name: str = "") -> str:
    source = f"{hub_id}: {name}" if name else hub_id
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"{source}: the hub refuses access: agree to the license on its page of {hub_id}, then set HF_TOKEN or run "
            "`hf auth login`; if you did, there is no such model"
        )
    if status == 404:
        return f"{source}: the hub has no such model, file or revision {revision}"
    return f"{source}: the hub answers with status {status}; run the same command again later"
