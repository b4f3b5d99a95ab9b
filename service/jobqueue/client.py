"""Redis clients from a URL: one server, a master behind sentinels, or a cluster; for threads and for asyncio.

| form | connects to |
|---|---|
| `redis://`, `rediss://`, `unix://` as redis-py reads them | one server |
| `redis+sentinel://[user:password@]host[:26379],host/service[/db]` | the master of that name, found at each connect |
| `redis+cluster://[user:password@]host[:6379],host` | the nodes of a cluster |

`rediss+sentinel://` and `rediss+cluster://` use TLS. User and password are those of the data servers; credentials of
the sentinels are `?sentinel_username=` and `?sentinel_password=`. With TLS, `?ssl_ca_certs=FILE` names an authority.
No error of this module holds a URL.
"""

import asyncio
import os
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelConnectionPool
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from giantleap.service.errors import BadConfiguration, NotReady
from giantleap.service.jobqueue.faults import REDIS_UNAVAILABLE, to_bad_configuration, to_not_ready

SyncRedis = redis.Redis | redis.RedisCluster
AsyncRedis = redis.asyncio.Redis | redis.asyncio.RedisCluster
Value = TypeVar("Value")

COMMAND_S = 5.0
"""How long a request waits for a command without a blob."""

_FORMS = "redis://, rediss://, unix://, redis+sentinel://host:26379,host/service/db or redis+cluster://host:6379,host"
_MAX_OUTAGE_S, _PAUSE_S = 120.0, 0.5
_CANCEL_AGAIN_S = 0.1
_SENTINEL_PORT, _SERVER_PORT = 26379, 6379
# A sentinel that does not answer costs this once; redis-py then asks the next one first.
_SENTINEL_TIMEOUT_S = 1.0
_TIMEOUT_S, _CONNECT_S = 10.0, 5.0
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
# Others would change the replies, or are no options of redis-py, which then fails at its first connection.
_PARAMETERS = frozenset(
    {
        *("client_name", "db", "health_check_interval", "max_connections", "password", "protocol", "socket_keepalive"),
        *("socket_connect_timeout", "socket_timeout", "ssl_ca_path", "ssl_cert_reqs", "ssl_check_hostname", "username"),
        *_TLS_FILES,
    }
)


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of a URL. redis-py itself reads the URL of a `server`."""

    kind: Literal["server", "sentinel", "cluster"]
    url: str = field(repr=False)
    tls: bool = False
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    db: int = 0
    login: dict[str, str] = field(default_factory=dict, repr=False)
    sentinel_login: dict[str, str] = field(default_factory=dict, repr=False)
    tls_files: dict[str, str] = field(default_factory=dict, repr=False)


def read_address(url: str) -> Address:
    """The parts of a URL; opens nothing.

    Raises:
        BadConfiguration: The URL has none of these forms. The message holds no part of it but the scheme.
    """
    scheme, _, rest = url.partition("://")
    if not rest:
        raise BadConfiguration(f"the Redis URL has no scheme; allowed is {_FORMS}")
    if scheme in ("redis", "rediss", "unix"):
        _check_parameters(url, scheme)
        return Address("server", url, tls=scheme == "rediss")
    transport, _, kind = scheme.partition("+")
    if transport not in ("redis", "rediss") or kind not in ("sentinel", "cluster"):
        raise BadConfiguration(f"the Redis URL has the scheme {scheme[:24]!r}; allowed is {_FORMS}")
    try:
        return _read_several(url, kind, transport == "rediss")
    except ValueError as error:
        raise BadConfiguration(f"the Redis URL of the form {scheme}:// cannot be read: {error}; see {_FORMS}") from None


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # whose text may hold the password
        raise BadConfiguration(
            f"the Redis URL cannot be read; percent-encode special characters of user and password; allowed is {_FORMS}"
        ) from None


def _check_parameters(url: str, scheme: str) -> None:
    parts = _split(url)
    query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    if unknown := sorted(query.keys() - _PARAMETERS):
        raise BadConfiguration(
            f"the Redis URL has the parameter {unknown[0][:32]!r}; allowed are {', '.join(sorted(_PARAMETERS))}"
        )
    db = query.get("db", "" if scheme == "unix" else parts.path.strip("/"))
    if db and not db.isdecimal():
        raise BadConfiguration("the database in the Redis URL is not a number; write redis://host:6379/0")
    _check_files(query)


def _check_files(query: Mapping[str, str]) -> None:
    for name in _TLS_FILES:
        if name in query and not os.access(query[name], os.R_OK):
            raise BadConfiguration(f"{name} in the Redis URL names a file that cannot be read; correct its path")


def _read_several(url: str, kind: str, tls: bool) -> Address:
    parts = _split(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    names = ("username", "password")
    login = {name: unquote(value) for name, value in zip(names, credentials.split(":", 1), strict=False) if value}
    query = {name: values[-1] for name, values in _parse_query(parts.query).items()}
    path = [unquote(part) for part in parts.path.split("/") if part]
    tls_files = {name: query.pop(name) for name in _TLS_FILES if tls and name in query}
    _check_files(tls_files)
    if kind == "cluster":
        if query or path not in ([], ["0"]):
            raise ValueError(f"a cluster has database 0 only and no parameters but, with TLS, {', '.join(_TLS_FILES)}")
        return Address("cluster", url, tls, _read_hosts(hosts, _SERVER_PORT), login=login, tls_files=tls_files)
    unknown = set(query) - {f"sentinel_{name}" for name in names}
    if unknown or not 1 <= len(path) <= 2:
        raise ValueError("after the hosts come /service and maybe /db, then only sentinel_username and _password")
    if len(path) == 2 and not path[1].isdecimal():
        raise ValueError("the database is not a number")
    db = int(path[1]) if len(path) == 2 else 0
    sentinel_login = {name.removeprefix("sentinel_"): value for name, value in query.items()}
    where = _read_hosts(hosts, _SENTINEL_PORT)
    return Address("sentinel", url, tls, where, path[0], db, login, sentinel_login, tls_files)


def _parse_query(text: str) -> dict[str, list[str]]:
    try:
        return parse_qs(text, strict_parsing=bool(text))
    except ValueError:  # whose text may hold the password
        raise ValueError("its parameters are not of the form ?name=value&name=value") from None


def _read_hosts(text: str, default_port: int) -> tuple[tuple[str, int], ...]:
    hosts = []
    for part in text.split(","):
        try:
            read = urlsplit(f"//{part}")
            port = read.port or default_port
        except ValueError:
            raise ValueError("a host is not of the form name:port, with a port from 1 to 65535") from None
        if not read.hostname:
            raise ValueError("a host is missing")
        hosts.append((read.hostname, port))
    return tuple(hosts)


class _SentinelPool(SentinelConnectionPool):
    """Closes its connections to the sentinels too, which redis-py leaves open."""

    def close(self) -> None:
        super().close()
        for sentinel in self.sentinel_manager.sentinels:
            sentinel.close()


class _AsyncSentinelPool(AsyncSentinelConnectionPool):
    """As `_SentinelPool`, for asyncio."""

    async def aclose(self) -> None:
        await super().aclose()
        for sentinel in self.sentinel_manager.sentinels:
            await sentinel.aclose()


def open_redis(
    url: str,
    max_outage_s: float = _MAX_OUTAGE_S,
    timeout_s: float = _TIMEOUT_S,
    stop: threading.Event | None = None,
) -> SyncRedis:
    """A client for threads. It tries again where a connection broke, but waits once for a server that hangs.

    Effects: reads the nodes of a cluster at once; any other client connects with its first command.

    Args:
        url: Where Redis is.
        max_outage_s: How long to wait for a node of a cluster.
        timeout_s: How long to wait for a reply.
        stop: Ends the wait for a cluster.

    Raises:
        BadConfiguration: The URL cannot be read, or the cluster refuses the login.
        NotReady: No node of a cluster answered for `max_outage_s`, or until the stop.
    """
    address = read_address(url)
    retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 2, (redis.ConnectionError,))
    options: dict[str, Any] = {**_timeouts(url, timeout_s), **address.login, **address.tls_files, "retry": retry}
    if address.kind == "cluster":
        return _open_cluster(address, options, max_outage_s, stop or threading.Event())
    options["retry_on_error"] = [redis.ConnectionError]
    if address.kind == "sentinel":
        sentinel = Sentinel(address.hosts, sentinel_kwargs=_sentinel_options(address, Retry(NoBackoff(), 0)))
        options |= {"db": address.db, "ssl": address.tls, "connection_pool_class": _SentinelPool}
        master: redis.Redis = sentinel.master_for(address.service, **options)
        return master
    try:
        return redis.Redis.from_url(url, **options)
    except ValueError:
        raise BadConfiguration(f"the Redis URL cannot be read; allowed is {_FORMS}") from None


def _timeouts(url: str, timeout_s: float) -> dict[str, Any]:
    """Timeouts of every connection; redis-py refuses keep-alive for Unix sockets."""
    timeouts: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": min(_CONNECT_S, timeout_s)}
    return timeouts if url.startswith("unix") else {**timeouts, "socket_keepalive": True}


def _open_cluster(
    address: Address, options: dict[str, Any], max_outage_s: float, stop: threading.Event
) -> redis.RedisCluster:
    deadline_s = time.monotonic() + max_outage_s
    while True:
        nodes = [redis.cluster.ClusterNode(host, port) for host, port in address.hosts]
        try:
            return redis.RedisCluster(startup_nodes=nodes, ssl=address.tls, **options)
        except REDIS_UNAVAILABLE as error:
            if (wrong := to_bad_configuration(error)) is not None:
                raise wrong from None
            if time.monotonic() >= deadline_s or stop.wait(_PAUSE_S):
                raise NotReady(f"no node of the Redis cluster answered for {max_outage_s:.0f} s") from error


def open_async_redis(url: str) -> AsyncRedis:
    """A client for asyncio, with room for one connection per event reader. It connects with its first command.

    Callers bound the time of a command with its retries (`JobProducer`).

    Raises:
        BadConfiguration: The URL cannot be read.
    """
    address = read_address(url)
    retry = AsyncRetry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), 4)
    options: dict[str, Any] = {**_timeouts(url, _TIMEOUT_S), **address.login, **address.tls_files, "retry": retry}
    options["max_connections"] = 10_000
    if address.kind == "cluster":
        nodes = [redis.asyncio.cluster.ClusterNode(host, port) for host, port in address.hosts]
        return redis.asyncio.RedisCluster(startup_nodes=nodes, ssl=address.tls, **options)
    options["retry_on_error"] = [redis.ConnectionError, redis.TimeoutError]
    if address.kind == "sentinel":
        sentinel = AsyncSentinel(address.hosts, sentinel_kwargs=_sentinel_options(address, AsyncRetry(NoBackoff(), 0)))
        options |= {"db": address.db, "ssl": address.tls, "connection_pool_class": _AsyncSentinelPool}
        master: redis.asyncio.Redis = sentinel.master_for(address.service, **options)
        return master
    try:
        return redis.asyncio.Redis.from_url(url, **options)
    except ValueError:
        raise BadConfiguration(f"the Redis URL cannot be read; allowed is {_FORMS}") from None


def _sentinel_options(address: Address, retry: Retry | AsyncRetry) -> dict[str, Any]:
    times = {"socket_timeout": _SENTINEL_TIMEOUT_S, "socket_connect_timeout": _SENTINEL_TIMEOUT_S}
    return {**times, **address.sentinel_login, **address.tls_files, "ssl": address.tls, "retry": retry}


def check_client(client: SyncRedis | AsyncRedis) -> float:
    """Checks a client and returns the seconds for which a command may block on it, half of its socket timeout.

    Raises:
        ValueError: The client decodes replies, but blobs are bytes.
    """
    options = client.get_connection_kwargs()
    if options.get("decode_responses"):
        raise ValueError("decode_responses is set; blobs are bytes: open the client without it")
    return float(options.get("socket_timeout") or 10.0) / 2


async def cancel_tasks(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until they have ended.

    redis-py 8.1 swallows a cancellation that meets it while it connects, so one call of `cancel` may not be enough.
    """
    while unfinished := [task for task in tasks if not task.done()]:
        for task in unfinished:
            task.cancel()
        await asyncio.wait(unfinished, timeout=_CANCEL_AGAIN_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # asyncio logs exceptions that are never retrieved


async def await_reply(command: Coroutine[Any, Any, Value], within_s: float = COMMAND_S) -> Value:
    """The reply of a command to Redis.

    It runs in a task of its own, because a timeout's cancellation may be swallowed (see `cancel_tasks`).

    Raises:
        NotReady: Redis is unavailable, refuses, or has not answered in time.
    """
    task = asyncio.create_task(command)
    try:
        await asyncio.wait([task], timeout=within_s)
        if not task.done():
            raise NotReady(
                f"Redis has not answered for {within_s:.0f} s; it hangs or is overloaded: try again soon.",
                retry_after_s=1,
            )
        return task.result()
    except REDIS_UNAVAILABLE as error:
        raise to_not_ready(error) from error
    finally:
        if not task.done():
            task.add_done_callback(_retrieve)
            task.cancel()


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Retrieve the exception of an abandoned task, which asyncio would log otherwise."""
    if not task.cancelled():
        task.exception()
