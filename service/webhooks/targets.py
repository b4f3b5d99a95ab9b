"""Where a webhook may go: its URL is read, its host checked and resolved at the request, and once more at each connect.

A name may resolve to a public address while it is checked and to 127.0.0.1 a moment later, so the connection is made
to the very address that was checked (`CheckedBackend`), while the Host header and the name that TLS verifies stay those
of the URL. `giantleap.service.webhooks.sender` sends through it.
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
_LONGEST_URL_CHARS = 2048
_URL = re.compile(r"[!-~]+")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?\.?")
# Addresses that carry another one inside: mapped and translated IPv4 (RFC 4291, 6052, 8215), Teredo, 6to4.
_WRAPPING = [
    ipaddress.IPv6Network(text)
    for text in ("::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")
]


class TargetRefused(ValueError):
    """A URL that no webhook is sent to; the text names the reason and never the URL."""


@dataclass(frozen=True, slots=True)
class Target:
    """The parts of a webhook's URL as they are used for connecting: there is no second reading of it."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"


def read_target(url: str) -> Target:
    """The parts of a URL.

    Raises:
        TargetRefused: it is not plain http or https, or names a user.
    """
    if len(url) > _LONGEST_URL_CHARS or not _URL.fullmatch(url) or "\\" in url:
        raise TargetRefused(f"is not a URL of at most {_LONGEST_URL_CHARS} printable ASCII characters")
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
    """Whether an address is one of the open network: none of loopback, private, link-local, CGNAT, multicast, metadata.

    An IPv6 address that wraps an IPv4 one is refused whatever it wraps.
    """
    try:
        read = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(read, ipaddress.IPv6Address) and (
        read.scope_id is not None or read.is_site_local or any(read in network for network in _WRAPPING)
    ):
        return False
    return read.is_global and not (read.is_multicast or read.is_reserved or read.is_unspecified or read.is_loopback)


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, as the system resolves it."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_listed(host: str, hosts: Sequence[str]) -> bool:
    """Whether a host is one of `hosts`, or below one that begins with a dot; any is where there are none."""
    name = host.lower().removesuffix(".")
    return not hosts or any(name.endswith(each) if each.startswith(".") else name == each for each in hosts)


async def find_addresses(
    host: str, port: int, allow_private: bool, resolve: Resolve = resolve, hosts: Sequence[str] = ()
) -> list[str]:
    """The addresses that a webhook may be sent to.

    Args:
        allow_private: Also those that are not public.
        resolve: Asked only for a host that is allowed.
        hosts: The only ones that are allowed (`is_listed`).

    Raises:
        TargetRefused: the host is not allowed, does not resolve, or one of its addresses is not public.
    """
    if not is_listed(host, hosts):
        raise TargetRefused("has a host that is not on the list of this service")
    try:
        async with asyncio.timeout(_RESOLVE_S):
            found = list(dict.fromkeys(await resolve(host, port)))
    except (OSError, UnicodeError, TimeoutError):
        raise TargetRefused("has a host that does not resolve") from None
    if not found:
        raise TargetRefused("has a host that does not resolve")
    if not allow_private and not all(map(is_public, found)):
        raise TargetRefused("resolves to an address that is not public")
    return found


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to an address that was checked a moment ago, never to a name."""

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
        """Raises:
        TargetRefused: as `find_addresses`.
        httpcore.ConnectError, httpcore.ConnectTimeout: none of the addresses answers.
        """
        failure: Exception = httpcore.ConnectError("no address")
        for address in await find_addresses(host, port, self._allow_private, self._resolve, self._hosts):
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
