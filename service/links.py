"""The URLs that clients receive: paths below the root path of a proxy, signed where the settings have a secret.

A signed URL needs no API key until it expires: a page can show it in `<img>` or open it as `EventSource`, which send no
key. The signature covers the path, the query and the expiry, so the URL opens one result or one stream of events and
nothing else. `giantleap.service.api.middleware.authentication` checks it.
"""

import hashlib
import hmac
import time
from dataclasses import dataclass

from giantleap.service.settings import Settings

_NAMES = (b"expires", b"signature")


@dataclass(frozen=True, slots=True)
class UrlSigner:
    """Signs URLs with a key, and checks them.

    Attributes:
        key: The key.
        ttl_s: How long a URL is valid.
    """

    key: bytes
    ttl_s: int

    def sign(self, target: str, now_s: float) -> str:
        """The target (a path as routes declare it, with its query) with its expiry and signature."""
        expires_s = int(now_s) + self.ttl_s
        separator = "&" if "?" in target else "?"
        return f"{target}{separator}expires={expires_s}&signature={self._digest(target, str(expires_s))}"

    def take_signature(self, path: str, query: bytes) -> tuple[bytes, bool | None]:
        """The query without expiry and signature, and whether they are valid; None where there are none."""
        parts = [part.partition(b"=") for part in query.split(b"&")]
        signed = [part for part in parts if part[0] in _NAMES]
        if not signed:
            return query, None
        plain = b"&".join(b"".join(part) for part in parts if part[0] not in _NAMES)
        values = {name: value.decode("latin-1") for name, _, value in signed}
        expires, signature = (values.get(name, "") for name in _NAMES)
        target = path + (f"?{plain.decode('latin-1')}" if plain else "")
        genuine = hmac.compare_digest(self._digest(target, expires).encode(), signature.encode())
        return plain, genuine and len(signed) == len(_NAMES) and time.time() < int(expires)

    def _digest(self, target: str, expires: str) -> str:
        message = f"giantleap url 1\n{target}\n{expires}"
        return hmac.new(self.key, message.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True)
class Links:
    """The URLs of jobs as a client sees them: paths on the same host.

    Attributes:
        root_path: Path below which a proxy publishes the API.
        signer: Signs the URLs of results and events; None: they are plain.
        now_s: When their time to live starts, seconds since 1970.
    """

    root_path: str
    signer: UrlSigner | None
    now_s: float

    def job(self, job_id: str) -> str:
        """The job itself, which always needs the key of its owner."""
        return f"{self.root_path}/jobs/{job_id}"

    def events(self, job_id: str) -> str:
        """Its progress."""
        return self._sign(f"/jobs/{job_id}/events")

    def result(self, job_id: str, index: int) -> str:
        """A file that it made."""
        return self._sign(f"/jobs/{job_id}/result?index={index}")

    def image(self, job_id: str, index: int) -> str:
        """The same file by the path of the OpenAI protocol."""
        return self._sign(f"/v1/images/{job_id}/content?index={index}")

    def _sign(self, target: str) -> str:
        return self.root_path + (target if self.signer is None else self.signer.sign(target, self.now_s))


def open_signer(settings: Settings) -> UrlSigner | None:
    """The signer of the settings; None: URLs are not signed."""
    secret = settings.url_secret
    return None if secret is None else UrlSigner(secret.get_secret_value().encode(), settings.url_ttl_s)
