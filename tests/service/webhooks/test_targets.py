"""Which URLs a webhook is sent to: every way into the own network that is known is refused, at the check and later."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpcore
import pytest

from giantleap.service.webhooks.targets import (
    CheckedBackend,
    Target,
    TargetRefused,
    find_addresses,
    is_listed,
    is_public,
    read_target,
)

PUBLIC = ("8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001:831::200e")
CLOSED = (
    "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1",  # loopback, private
    "169.254.169.254", "169.254.0.1", "fd00:ec2::254", "100.100.100.200",  # metadata, link-local
    "100.64.0.1", "0.0.0.0", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.0.170",
    "::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::",
    "2001:0:53aa:64c::1", "not an address", "",
)  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_taken(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", CLOSED)
def test_other_addresses_are_not(address: str) -> None:
    assert not is_public(address)


def test_a_url_is_read_once_into_its_parts() -> None:
    assert read_target("https://Hooks.example.org/a/b?c=d") == Target("https", "hooks.example.org", 443, "/a/b?c=d")
    assert read_target("http://example.org:8080") == Target("http", "example.org", 8080, "/")
    v6 = read_target("http://[2606:4700::1]:81/x")
    assert (v6.host, v6.authority) == ("2606:4700::1", "[2606:4700::1]:81")
    assert read_target("https://example.org/").authority == "example.org"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/",
        "file:///etc/passwd",
        "gopher://example.org/",
        "//example.org/",
        "example.org",
        "https://",
        "https:///path",
        "https://user@example.org/",
        "https://user:secret@example.org/",
        "https://example.org#@127.0.0.1/",
        "https://example.org\\@127.0.0.1/",
        "https://example.org/ x",
        "https://example.org/\r\nX: y",
        "https://exämple.org/",
        "https://example.org:0/",
        "https://example.org:99999/",
        "https://example.org:x/",
        "https://[::1",
        "https://[v1.x]/",
        "https://exam_ple.org/%00",
        "https://-x-/",
        "https://example.org/" + "a" * 2048,
    ],
)
def test_a_url_that_is_not_plain_is_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(TargetRefused) as refused:
        read_target(url)
    assert url not in str(refused.value) and "secret" not in str(refused.value)


def names(*answers: Sequence[str]) -> Any:
    """A resolver whose answers follow one another, the last one for ever."""
    left = list(answers)

    async def resolve(host: str, port: int) -> Sequence[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve


@pytest.mark.parametrize(
    "found", [("127.0.0.1",), ("8.8.8.8", "10.0.0.1"), ("10.0.0.1", "8.8.8.8"), ("::ffff:127.0.0.1",), ()]
)
async def test_one_address_that_is_not_public_is_enough(found: tuple[str, ...]) -> None:
    with pytest.raises(TargetRefused):
        await find_addresses("example.org", 80, False, names(found))
    if found:
        assert await find_addresses("example.org", 80, True, names(found)) == list(found)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "::1"])
async def test_other_spellings_of_this_machine_are_refused(host: str) -> None:
    with pytest.raises(TargetRefused):
        await find_addresses(host, 80, False)


async def test_a_resolver_that_hangs_or_fails_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(600)
        return ()

    async def fail(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    monkeypatch.setattr("giantleap.service.webhooks.targets._RESOLVE_S", 0.05)
    for resolve in (hang, fail):
        with pytest.raises(TargetRefused, match="does not resolve"):
            await find_addresses("example.org", 80, False, resolve)


class Recorder(httpcore.AsyncNetworkBackend):
    """Records where it is to connect; `gone` addresses do not answer. Streams are empty."""

    def __init__(self, *gone: str) -> None:
        self.gone = gone
        self.connected: list[str] = []
        self.verified: list[str | None] = []

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        self.connected.append(host)
        if host in self.gone:
            raise httpcore.ConnectError("refused")
        return RecordedStream(self)


class RecordedStream(httpcore.AsyncNetworkStream):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

    async def write(self, buffer: bytes, timeout: float | None = None) -> None: ...

    async def aclose(self) -> None: ...

    async def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        self.recorder.verified.append(server_hostname)
        return self

    def get_extra_info(self, info: str) -> Any:
        return None


async def post(backend: httpcore.AsyncNetworkBackend, url: str) -> int:
    async with httpcore.AsyncConnectionPool(network_backend=backend, max_keepalive_connections=0) as pool:
        return (await pool.request("POST", url, content=b"x")).status


async def test_the_connection_goes_to_the_checked_address_and_tls_verifies_the_name() -> None:
    inner = Recorder("8.8.8.8")
    backend = CheckedBackend(False, names(("8.8.8.8", "8.8.4.4")), inner)
    assert await post(backend, "https://hooks.example.org/x") == 200
    assert inner.connected == ["8.8.8.8", "8.8.4.4"], "addresses, never the name; the next one where one is gone"
    assert inner.verified == ["hooks.example.org"]


async def test_a_name_that_moves_into_the_own_network_after_the_check_is_not_connected_to() -> None:
    resolve, inner = names(("8.8.8.8",), ("127.0.0.1",)), Recorder()
    assert await find_addresses("rebind.example.org", 80, False, resolve) == ["8.8.8.8"]
    with pytest.raises(TargetRefused):
        await post(CheckedBackend(False, resolve, inner), "http://rebind.example.org/")
    assert inner.connected == []


@pytest.mark.parametrize(
    ("host", "listed"),
    [
        ("hooks.example.org", True),
        ("Hooks.Example.org.", True),
        ("a.b.example.com", True),
        ("example.com", False),
        ("evilexample.com", False),
        ("x.hooks.example.org", False),
        ("hooks.example.org.evil.net", False),
        ("example.org", False),
        ("8.8.8.8", False),
        ("2606:4700::1", False),
    ],
)
def test_only_hosts_of_the_list_are_allowed(host: str, listed: bool) -> None:
    hosts = ("hooks.example.org", ".example.com")
    assert is_listed(host, hosts) == listed and is_listed(host, ())


async def test_a_host_that_is_not_on_the_list_is_not_even_resolved() -> None:
    resolved: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        resolved.append(host)
        return ("8.8.8.8",)

    inner = Recorder()
    backend = CheckedBackend(True, resolve, inner, ("hooks.example.org",))
    with pytest.raises(TargetRefused, match="not on the list"):
        await post(backend, "http://other.example.org/")
    assert resolved == [] and inner.connected == []
    assert await post(backend, "http://hooks.example.org/") == 200 and inner.connected == ["8.8.8.8"]


async def test_an_address_of_the_own_network_is_refused_although_its_host_is_on_the_list() -> None:
    with pytest.raises(TargetRefused, match="not public"):
        await find_addresses("hooks.example.org", 80, False, names(("10.0.0.1",)), ("hooks.example.org",))
