"""The Redis server of a deployment: whether this process may use it, and whether it may lose accepted jobs."""

import logging

from giantleap.service.errors import NotReady
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.client import SyncRedis, open_redis
from giantleap.service.jobqueue.faults import REDIS_UNAVAILABLE, name_fault, to_bad_configuration
from giantleap.service.jobqueue.replies import ServerReply
from giantleap.service.jobqueue.runner import ScriptRunner
from giantleap.service.settings import Settings

_PROBE_S = 2.0
_LOG = logging.getLogger(__name__)


def find_warnings(server: ServerReply) -> tuple[str, ...]:
    """Warnings about a working server that may lose accepted jobs."""
    warnings = []
    if server.maxmemory_policy not in (None, "noeviction"):
        warnings.append(
            f"Redis evicts keys when its memory is full (maxmemory-policy {server.maxmemory_policy}): accepted jobs "
            "can vanish; set maxmemory-policy noeviction"
        )
    if server.aof_enabled is False:
        warnings.append("Redis has no append-only file: its restart loses accepted jobs; set appendonly yes")
    return tuple(warnings)


def check_url(url: str, settings: Settings) -> None:
    """`check_server` with a client of its own, which does not wait for a server that is away.

    Raises:
        BadConfiguration: The URL cannot be read, or as `check_server`.
    """
    try:
        with open_redis(url, max_outage_s=0, timeout_s=_PROBE_S) as client:
            check_server(client, settings)
    except NotReady as error:
        _LOG.warning("%s", error.detail)


def check_server(client: SyncRedis, settings: Settings) -> None:
    """Checks login, database and permissions, and logs what `find_warnings` finds. A server that is away may come back.

    Raises:
        BadConfiguration: The server refuses what this process needs, and a retry cannot help.
    """
    try:
        server = ScriptRunner(client, settings).run(scripts.READ_SERVER)
    except REDIS_UNAVAILABLE as error:
        if (wrong := to_bad_configuration(error)) is not None:
            raise wrong from None
        _LOG.warning("Redis does not answer yet (%s)", name_fault(error))
        return
    for warning in find_warnings(server):
        _LOG.warning("%s", warning)
