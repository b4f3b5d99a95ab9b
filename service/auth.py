"""API keys: the file that lists them, and the callers that they identify with their scopes and limits.

A key is 256 random bits, so its plain SHA-256 is safe to store: guessing takes 2^255 tries. Salt and a slow hash
protect passwords that people choose (NIST SP 800-63B, 5.1.1.2: they are needed below 112 bits of entropy).
`giantleap.service.api.middleware.authentication` checks the key of each request.
"""

import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import stat
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from giantleap.models.messages import toml_fault
from giantleap.service.errors import BadConfiguration, Forbidden, field_errors
from giantleap.service.settings import Settings

log = logging.getLogger(__name__)

KEY_PREFIX = "gl_"
UI_PATH: Final = "/ui"
DOCS_PATH: Final = "/docs"
OPEN_PATHS: Final = frozenset(
    {"/livez", "/readyz", "/health", "/version", "/v2/health/live", "/v2/health/ready", "/openapi.json"}
    | {"/", UI_PATH, DOCS_PATH}
)
"""Paths that need no key. Every other path does: a new route is closed until it is listed here."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_MAX_KEY_CHARS = 512
_MAX_FILE_BYTES = 4 << 20
_CHECK_EVERY_S = 2.0


class Scope(StrEnum):
    """What a key may do: make /generate jobs, make /upscale jobs, see and cancel every job, read metrics, workers."""

    GENERATE = "generate"
    UPSCALE = "upscale"
    ADMIN = "admin"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner of a request: the name that its jobs carry, its scopes, and its limits (None: no limit).

    Without arguments: the one caller of a service without keys.
    """

    name: str = ""
    scopes: frozenset[Scope] = frozenset(Scope)
    requests_per_minute: int | None = None
    max_jobs: int | None = None
    megapixel_steps_per_minute: int | None = None

    def sees(self, owner: str) -> bool:
        """Whether the caller may see and cancel the jobs of an owner."""
        return Scope.ADMIN in self.scopes or owner == self.name


ANONYMOUS = Caller()
URL_HOLDER: Final = Caller(scopes=frozenset({Scope.ADMIN}))
"""The caller with a signed URL, of any owner: the signature covers the path, so it gives access to nothing else."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One entry of the file: the digest of a key, and its caller."""

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
    megapixel_steps_per_minute: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    key: Annotated[list[_Entry], Field(min_length=1)]


def require_scope(caller: Caller, scope: Scope) -> None:
    """Check that a caller's key has a scope.

    Raises:
        Forbidden: It does not.
    """
    if scope not in caller.scopes:
        raise Forbidden(f"the key lacks the scope {scope}; use a key that has it", scope=scope)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read a file of keys. Several keys of one name are one caller, so that a key can be rotated without a gap.

    Logs a warning where others than the owner of the file may read it.

    Raises:
        KeysFileError: It cannot be read, is not TOML, has an unknown field, a bad value, no key or one key twice.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            text = file.read(_MAX_FILE_BYTES + 1)
        if len(text) > _MAX_FILE_BYTES:
            raise KeysFileError(f"{path} is too large; a key file may have at most {_MAX_FILE_BYTES} bytes")
        entries = _File.model_validate(tomllib.loads(text.decode("utf-8-sig"))).key
    except OSError as error:
        raise KeysFileError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KeysFileError(f"{path}: {toml_fault(error)}") from error
    except ValidationError as error:
        faults = ", ".join(f"{name}: {reason}" for name, reason in field_errors(error.errors(include_input=False)))
        raise KeysFileError(f"{path}: {faults}") from error
    if len({entry.sha256 for entry in entries}) != len(entries):
        raise KeysFileError(f"{path} lists one sha256 twice; list each key once")
    if mode & 0o077:
        log.warning("%s has mode %03o; others than its owner can read it: chmod 600", path, mode)
    return tuple(ApiKey(bytes.fromhex(entry.sha256), _to_caller(entry)) for entry in entries)


def add_entry(path: Path, entry: str) -> None:
    """Add an entry to a file of keys, or make the file; only its owner may read it then.

    Raises:
        KeysFileError: The file is not valid; it stays as it is.
        OSError: It cannot be written.
    """
    if path.exists() and path.stat().st_size:
        read_keys(path)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    target = path.resolve()  # a link stays one
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # of mode 0600
    draft = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{before.rstrip()}\n\n{entry}".lstrip())
            file.flush()
            os.fsync(file.fileno())
        read_keys(draft)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _to_caller(entry: _Entry) -> Caller:
    return Caller(
        entry.name,
        frozenset(entry.scopes),
        entry.requests_per_minute,
        entry.max_jobs,
        entry.megapixel_steps_per_minute,
    )


def find_caller(keys: Iterable[ApiKey], presented: str) -> Caller | None:
    """The caller of a key, or None. Compares every entry in constant time, so that timing reveals nothing."""
    digest = hashlib.sha256(presented.encode(errors="surrogateescape")).digest()
    caller = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            caller = key.caller
    return caller


def new_key() -> tuple[str, str]:
    """A new key of 256 random bits, and its SHA-256 as the file lists it."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """The keys of a file, which is checked for changes every two seconds while requests come."""

    def __init__(self, path: Path, keys: tuple[ApiKey, ...], stamp: "_Stamp | None") -> None:
        self._path = path
        self._keys = keys
        self._stamp = stamp
        self._next_check_s = time.monotonic() + _CHECK_EVERY_S

    @classmethod
    def open(cls, path: Path) -> "KeyRing":
        """Read the keys of a file.

        Raises:
            KeysFileError: As `read_keys`.
        """
        stamp = _stamp(path)  # taken before reading, so that a change meanwhile is noticed later
        return cls(path, read_keys(path), stamp)

    def find(self, presented: str) -> Caller | None:
        """The caller of a key, or None.

        May read the file again; if the file has become invalid, this is logged and the previous keys stay valid.
        """
        if time.monotonic() >= self._next_check_s:
            self._next_check_s = time.monotonic() + _CHECK_EVERY_S
            self._reload_if_changed()
        return find_caller(self._keys, presented) if 0 < len(presented) <= _MAX_KEY_CHARS else None

    def _reload_if_changed(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
            log.info("%d API keys reloaded from %s", len(self._keys), self._path)
        except KeysFileError as error:
            log.error("API keys not reloaded, the previous ones stay valid: %s", error)


_Stamp = tuple[int, int, int]


def _stamp(path: Path) -> _Stamp | None:
    """Changes when the file is written or replaced; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def open_keys(settings: Settings) -> KeyRing | None:
    """The keys of the settings; None: the service runs without keys.

    Raises:
        KeysFileError: As `read_keys`.
    """
    return None if settings.api_keys_file is None else KeyRing.open(settings.api_keys_file)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def presented_keys(headers: Sequence[tuple[bytes, bytes]]) -> set[str]:
    """The possible keys in a request's headers: `Authorization: Bearer KEY` and `X-API-Key: KEY`.

    Other schemes of Authorization are those of proxies.
    """
    presented = set()
    for name, value in headers:
        text = value.decode("latin-1").strip()
        if name == b"x-api-key":
            presented.add(text)
        elif name == b"authorization":
            scheme, _, key = text.partition(" ")
            presented.add(key.strip() if scheme.lower() == "bearer" else "")
    return presented - {""}


def check_auth_config(settings: Settings) -> None:
    """Check at start that the keys can be read; warn where there are none and the address is not loopback.

    Raises:
        KeysFileError: As `read_keys`.
    """
    if settings.api_keys_file is not None:
        read_keys(settings.api_keys_file)
    elif not is_loopback(settings.host):
        log.warning(
            "listening on %s without API keys: anyone who can connect may use it; set GIANTLEAP_API_KEYS_FILE",
            settings.host,
        )
