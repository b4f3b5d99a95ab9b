"""Checks where a webhook may go, against server-side request forgery: at the request and again at each connect.

A name may resolve to a public address during the check and to 127.0.0.1 a moment later. So `CheckedBackend` connects to
the address that it checked, while the Host header and the name that TLS verifies stay those of the URL.
`giantleap.service.webhooks.sender` sends through it.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpcore

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
SocketOption = httpcore.SOCKET_OPTION

_RESOLVE_S = 5.0
_MAX_URL_CHARS = 2048
_URL = re.compile(r"[!-~]+")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?\.?")
# Networks whose addresses contain an IPv4 address: mapped and translated IPv4 (RFC 4291, 6052, 8215), Teredo, 6to4.
_WRAPPING = [
    ipaddress.IPv6Network(text)
    for text in ("::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")
]


class TargetRefused(ValueError):
    """A URL to which no webhook is sent; the message has the reason and never the URL."""


@dataclass(frozen=True, slots=True)
class Target:
    """The parts of a URL, parsed once: the check and the connection use the same."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Host and port, as in the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"


def read_target(url: str) -> Target:
    """The parts of a URL.

    Raises:
        TargetRefused: The URL is not plain http or https, or names a user.
    """
    if len(url) > _MAX_URL_CHARS or not _URL.fullmatch(url) or "\\" in url:
        raise TargetRefused(f"is not a URL of at most {_MAX_URL_CHARS} printable ASCII characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise TargetRefused("is not a URL that can be read") from None
    if parts.scheme not in ("http", "https"):
        raise TargetRefused("is neither http nor https")
    if "@" in parts.netloc:
        raise TargetRefused("names a user; receivers check the signature instead")
    if parts.fragment:
        raise TargetRefused("has a fragment, which is never sent")
    host = parts.hostname or ""
    named = _is_ipv6(host) if "[" in parts.netloc else _HOST.fullmatch(host)
    if not named or port == 0:
        raise TargetRefused("has no host and port that can be read")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path)


def is_public(address: str) -> bool:
    """Whether an address is public: not loopback, private, link-local, CGNAT, multicast or metadata.

    IPv6 addresses that contain an IPv4 address are never public.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and (
        parsed.scope_id is not None or parsed.is_site_local or any(parsed in network for network in _WRAPPING)
    ):
        return False
    special = parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified or parsed.is_loopback
    return parsed.is_global and not special


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, as the system resolves it."""
    entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in entries]


def is_listed(host: str, hosts: Sequence[str]) -> bool:
    """Whether `hosts` has this host, or a domain of it as `.example.org`; an empty list allows every host."""
    name = host.lower().removesuffix(".")
    return not hosts or any(name.endswith(item) if item.startswith(".") else name == item for item in hosts)


async def find_addresses(
    host: str, port: int, allow_private: bool, resolve: Resolve = resolve, hosts: Sequence[str] = ()
) -> list[str]:
    """The addresses of a host to which a webhook may be sent.

    Args:
        host: Name or address.
        port: Of the target.
        allow_private: Also allow addresses that are not public.
        resolve: Called only for a host that is allowed.
        hosts: The hosts that are allowed (`is_listed`).

    Raises:
        TargetRefused: The host is not allowed, does not resolve, or has an address that is not public.
    """
    if not is_listed(host, hosts):
        raise TargetRefused("has a host that is not on the list of this service")
    try:
        async with asyncio.timeout(_RESOLVE_S):
            addresses = list(dict.fromkeys(await resolve(host, port)))
    except (OSError, UnicodeError, TimeoutError):
        raise TargetRefused("has a host that does not resolve") from None
    if not addresses:
        raise TargetRefused("has a host that does not resolve")
    if not allow_private and not all(map(is_public, addresses)):
        raise TargetRefused("resolves to an address that is not public")
    return addresses


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that it has just checked, never to a name."""

    def __init__(
        self,
        allow_private: bool,
        resolve: Resolve = resolve,
        inner: httpcore.AsyncNetworkBackend | None = None,
        hosts: Sequence[str] = (),
    ) -> None:
        self._hosts = hosts
        self._allow_private = allow_private
        self._resolve = resolve
        self._inner = httpcore.AnyIOBackend() if inner is None else inner

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connects to the first address of the host that answers.

        Raises:
            TargetRefused: As `find_addresses`.
            httpcore.ConnectError: No address answers.
            httpcore.ConnectTimeout: No address answers in time.
        """
        failure: Exception = httpcore.ConnectError("no address")
        for address in await find_addresses(host, port, self._allow_private, self._resolve, self._hosts):
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def sleep(self, seconds: float) -> None:
        """As the backend that it wraps."""
        await self._inner.sleep(seconds)


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
