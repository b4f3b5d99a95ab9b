"""Reads Redis as the service does, and checks its persistence and free memory."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import redis

from giantleap.service.doctor.address import to_clock_finding
from giantleap.service.doctor.findings import Finding, fail, ok, skipped, warn
from giantleap.service.errors import BadConfiguration, NotReady
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.client import SyncRedis, open_redis
from giantleap.service.jobqueue.faults import REDIS_UNAVAILABLE, name_fault, to_bad_configuration
from giantleap.service.jobqueue.replies import ServerReply, StatsReply
from giantleap.service.jobqueue.runner import ScriptRunner
from giantleap.service.settings import Settings

_TIMEOUT_S: Final = 5.0
_FULL: Final = 0.95
_NEARLY_FULL: Final = 0.8
_OLDEST_MAJOR: Final = 7


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """Facts about a server.

    Args:
        server: How it is and treats its data.
        stats: The queue.
        devices: Of the live workers, JSON.
        appendfsync: Its setting; None: the user may not read it.
        now_s: Its clock.
        sent_s: When that was asked for, by this machine's clock.
        received_s: When it came.
    """

    server: ServerReply
    stats: StatsReply
    devices: tuple[str, ...]
    appendfsync: str | None
    now_s: float
    sent_s: float
    received_s: float


def read_redis(url: str, settings: Settings) -> RedisFacts | Finding:
    """The facts, or why there are none. It writes only what each scrape of the metrics writes."""
    try:
        with open_redis(url, max_outage_s=0, timeout_s=_TIMEOUT_S) as client:
            runner = ScriptRunner(client, settings)
            server = runner.run(scripts.READ_SERVER)
            if server.role == "slave":
                return fail(
                    "redis", "this is a replica, which takes no jobs", "name the master, or use redis+sentinel://"
                )
            sent_s = time.time()
            now_s = _read_time(client)
            received_s = time.time()
            return RedisFacts(
                server=server,
                stats=runner.run(scripts.READ_STATS),
                devices=runner.run(scripts.LIST_DEVICES).devices,
                appendfsync=_read_appendfsync(client),
                now_s=now_s,
                sent_s=sent_s,
                received_s=received_s,
            )
    except (BadConfiguration, NotReady) as error:
        return fail("redis", error.detail, "correct --redis-url")
    except REDIS_UNAVAILABLE as error:
        wrong = to_bad_configuration(error)
        if wrong is not None:
            found, _, advice = wrong.detail.partition("; ")
            return fail("redis", found, advice or "correct --redis-url")
        return fail("redis", f"Redis does not answer ({name_fault(error)})", "start it, or correct --redis-url")


def _read_time(client: SyncRedis) -> float:
    nodes = {"target_nodes": client.get_default_node()} if isinstance(client, redis.RedisCluster) else {}
    seconds, microseconds = client.time(**nodes)
    return int(seconds) + int(microseconds) / 1e6


def _read_appendfsync(client: SyncRedis) -> str | None:
    """None where the user may not read it: the least access list does not grant CONFIG GET."""
    nodes = {"target_nodes": client.get_default_node()} if isinstance(client, redis.RedisCluster) else {}
    try:
        values: dict[Any, Any] = client.config_get("appendfsync", **nodes)
    except redis.ResponseError:
        return None
    return next((_to_text(value) for value in values.values()), None)


def _to_text(value: str | bytes) -> str:
    """A value of a client that may decode."""
    return value.decode() if isinstance(value, bytes) else value


def check_redis(facts: RedisFacts, blob_budget_bytes: int) -> Iterator[Finding]:
    """Everything about a server that works."""
    server = facts.server
    yield check_server_version(server)
    yield check_policy(server)
    yield from check_persistence(server, facts.appendfsync)
    yield check_room(server, blob_budget_bytes)
    yield to_clock_finding("redis clock", "the clock of Redis", facts.now_s, facts.sent_s, facts.received_s)


def check_server_version(server: ServerReply) -> Finding:
    """Whether the server is new enough."""
    if server.redis_version is None:
        return _skip_info("redis", "the version of Redis")
    major = server.redis_version.partition(".")[0]
    if major.isdecimal() and int(major) < _OLDEST_MAJOR:
        return fail("redis", f"Redis answers, but is {server.redis_version}", "use Redis 7.0 or newer, or Valkey")
    return ok("redis", f"Redis answers as a master of version {server.redis_version}")


def check_policy(server: ServerReply) -> Finding:
    """Whether a full server refuses, in place of dropping jobs."""
    if server.maxmemory_policy is None:
        return _skip_info("eviction", "maxmemory-policy")
    if server.maxmemory_policy != "noeviction":
        return fail(
            "eviction",
            f"Redis drops accepted jobs when it is full: maxmemory-policy {server.maxmemory_policy}",
            "set maxmemory-policy noeviction",
        )
    return ok("eviction", "a full Redis refuses jobs and drops none: maxmemory-policy noeviction")


def check_persistence(server: ServerReply, appendfsync: str | None) -> Iterator[Finding]:
    """Whether accepted jobs are on disk."""
    if server.aof_enabled is None:
        yield _skip_info("append file", "appendonly")
        return
    if not server.aof_enabled:
        yield fail("append file", "a restart of Redis loses accepted jobs: appendonly no", "set appendonly yes")
        return
    if server.aof_last_write_status not in (None, "ok"):
        yield fail("append file", "the last write to the append-only file failed", "free disk space on Redis' host")
        return
    yield ok("append file", "accepted jobs survive a restart of Redis: appendonly yes")
    if appendfsync is None:
        yield skipped("fsync", "the user of Redis may not read appendfsync", "grant +config|get to the doctor's user")
    elif appendfsync == "always":
        yield ok("fsync", "accepted jobs survive a power cut: appendfsync always")
    else:
        lost = "about a second of" if appendfsync == "everysec" else "many"
        judge = warn if appendfsync == "everysec" else fail
        yield judge("fsync", f"a power cut loses {lost} jobs: appendfsync {appendfsync}", "set appendfsync always")


def check_room(server: ServerReply, blob_budget_bytes: int) -> Finding:
    """Whether the server has memory left, and for the results that the service may keep."""
    if server.used_memory is None:
        return _skip_info("memory", "the memory of Redis")
    limit, name = server.maxmemory or 0, "maxmemory"
    if limit == 0:
        limit, name = server.total_system_memory or 0, "the memory of its machine"
    if limit == 0:
        return _skip_info("memory", "the memory of Redis' machine")
    advice = "raise maxmemory, or lower GIANTLEAP_BLOB_BUDGET_BYTES and GIANTLEAP_JOB_TTL_S"
    found = f"Redis uses {_mib(server.used_memory)} of {_mib(limit)} MiB, {name}"
    share = server.used_memory / limit
    if share >= _FULL:
        return fail("memory", f"{found}: it refuses jobs", advice)
    if share >= _NEARLY_FULL:
        return warn("memory", f"{found}: nearly full", advice)
    if blob_budget_bytes >= limit:
        return warn("memory", f"{found}, less than the {_mib(blob_budget_bytes)} MiB of results it may hold", advice)
    return ok("memory", found)


def _skip_info(check: str, what: str) -> Finding:
    return skipped(check, f"the user of Redis may not read {what}", "grant +info")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f}"
