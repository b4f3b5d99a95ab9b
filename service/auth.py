"""API keys: the file that lists them, who a request comes from, and what that caller may do.

A key is 256 random bits, so its plain SHA-256 is safe to keep: guessing takes 2^255 tries, salt and a slow hash
defend passwords that people choose (NIST SP 800-63B, 5.1.1.2: they are needed below 112 bits of entropy).
`giantleap.service.api.middleware.authentication` asks for the key of each request; `giantleap.service.api.submission`
says whose jobs a caller may see.
"""

import hashlib
import hmac
import ipaddress
import logging
import secrets
import stat
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from giantleap.service.errors import BadConfiguration, Forbidden
from giantleap.service.settings import Settings

log = logging.getLogger(__name__)

KEY_PREFIX = "gl_"
OPEN_PATHS: Final = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"})
"""Paths that need no key. Every other path does: a new route is closed until it is listed here."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_LONGEST_KEY_CHARS = 512
_LARGEST_FILE_BYTES = 4 << 20
_LOOK_EVERY_S = 2.0


class Scope(StrEnum):
    """What a key may do: draw, enlarge and decode, see and cancel the jobs of every key, read the metrics."""

    GENERATE = "generate"
    UPSCALE = "upscale"
    ADMIN = "admin"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the name that its jobs carry, and its limits, None where it has none.

    Without arguments: everybody, where the service runs without keys.
    """

    name: str = ""
    scopes: frozenset[Scope] = frozenset(Scope)
    requests_per_minute: int | None = None
    max_jobs: int | None = None

    def sees(self, owner: str) -> bool:
        """Whether jobs of this owner exist for the caller."""
        return Scope.ADMIN in self.scopes or owner == self.name


ANONYMOUS = Caller()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One entry of the file: the digest of a key, and who it stands for."""

    sha256: bytes
    caller: Caller


class KeysFileError(BadConfiguration):
    """The file of API keys cannot be used; the message says where it is wrong."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[list[Annotated[Scope, Field(strict=False)]], Field(min_length=1)]
    requests_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_jobs: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    key: Annotated[list[_Entry], Field(min_length=1)]


def require_scope(caller: Caller, scope: Scope) -> None:
    """Raises:
    Forbidden: the caller's key lacks it.
    """
    if scope not in caller.scopes:
        raise Forbidden(f"this needs a key with the scope {scope}", scope=scope)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file. Several keys of one name are one caller: that is how a key is replaced without a gap.

    Effects: logs a warning where others than the file's owner may read it.

    Raises:
        KeysFileError: it cannot be read, is not TOML, has an unknown field, a bad value, no key or one key twice.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            text = file.read(_LARGEST_FILE_BYTES + 1)
        if len(text) > _LARGEST_FILE_BYTES:
            raise KeysFileError(f"{path} has more than {_LARGEST_FILE_BYTES} bytes")
        entries = _File.model_validate(tomllib.loads(text.decode())).key
    except OSError as error:
        raise KeysFileError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KeysFileError(f"{path} is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise KeysFileError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        wrong = ", ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise KeysFileError(f"{path}: {wrong}") from error
    if len({entry.sha256 for entry in entries}) != len(entries):
        raise KeysFileError(f"{path} holds one sha256 twice; each key stands once")
    if mode & 0o077:
        log.warning("%s has mode %03o; only its owner needs to read it: chmod 600", path, mode)
    return tuple(ApiKey(bytes.fromhex(entry.sha256), _to_caller(entry)) for entry in entries)


def _to_caller(entry: _Entry) -> Caller:
    return Caller(entry.name, frozenset(entry.scopes), entry.requests_per_minute, entry.max_jobs)


def find_caller(keys: Iterable[ApiKey], presented: str) -> Caller | None:
    """Whose key this is. Every entry is compared, each in a time that does not depend on where they differ."""
    digest = hashlib.sha256(presented.encode(errors="surrogateescape")).digest()
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key.caller
    return found


def new_key() -> tuple[str, str]:
    """A fresh key of 256 random bits, and its SHA-256 as the file holds it."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """The keys of a file as it is now: looked at every two seconds while requests come, read again when it changed."""

    def __init__(self, path: Path, keys: tuple[ApiKey, ...], stamp: "_Stamp | None") -> None:
        self._path = path
        self._keys = keys
        self._stamp = stamp
        self._look_at_s = time.monotonic() + _LOOK_EVERY_S

    @classmethod
    def open(cls, path: Path) -> "KeyRing":
        """Raises:
        KeysFileError: as `read_keys`.
        """
        stamp = _stamp(path)  # before the reading: what changes meanwhile is then seen as changed
        return cls(path, read_keys(path), stamp)

    def find(self, presented: str) -> Caller | None:
        """Whose key this is, None where it is nobody's.

        Effects: may read the file again. One that became wrong is logged and the keys from before stay.
        """
        if time.monotonic() >= self._look_at_s:
            self._look_at_s = time.monotonic() + _LOOK_EVERY_S
            self._look()
        return find_caller(self._keys, presented) if 0 < len(presented) <= _LONGEST_KEY_CHARS else None

    def _look(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
            log.info("%d API keys read again from %s", len(self._keys), self._path)
        except KeysFileError as error:
            log.error("API keys not read again, those from before stay: %s", error)


_Stamp = tuple[int, int, int]


def _stamp(path: Path) -> _Stamp | None:
    """What changes with the file: written anew, or another one put in its place. None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def open_keys(settings: Settings) -> KeyRing | None:
    """The keys that the settings name; None: the service is open to everybody who reaches it.

    Raises:
        KeysFileError: as `read_keys`.
    """
    return None if settings.api_keys_file is None else KeyRing.open(settings.api_keys_file)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def presented_keys(headers: Sequence[tuple[bytes, bytes]]) -> set[str]:
    """The keys that a request's headers hold: `Authorization: Bearer KEY` and `X-API-Key: KEY`."""
    found = set()
    for name, value in headers:
        text = value.decode("latin-1").strip()
        if name == b"x-api-key":
            found.add(text)
        elif name == b"authorization":
            scheme, _, key = text.partition(" ")
            found.add(key.strip() if scheme.lower() == "bearer" else "")
    return found


def check_auth_config(settings: Settings) -> None:
    """What `giantleap serve` and `giantleap api` do first: see that the keys can be read, or say that there are none.

    Raises:
        KeysFileError: as `read_keys`.
    """
    if settings.api_keys_file is not None:
        read_keys(settings.api_keys_file)
    elif not _is_loopback(settings.host):
        log.warning(
            "listening on %s without API keys: everybody who reaches it may use it; set GIANTLEAP_API_KEYS_FILE",
            settings.host,
        )
