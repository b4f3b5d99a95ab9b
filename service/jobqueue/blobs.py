"""Blobs go to Redis in front of the script that takes them in, not through it: a script copies all of its arguments.

A blob waits under a name of its own. The script gives it the name that it keeps, or drops it where it refuses, so that
limits and budget stay exact; what no script has met, because a connection was cut, expires by itself. Both are sent in
one go and cost one sync of the disk.
"""

from collections.abc import Sequence
from typing import Any

import redis
from redis.commands.core import AsyncScript, Script

from giantleap.service.jobqueue.client import AsyncRedis, SyncRedis

UPLOAD_TTL_MS = 60_000


async def run_with_input(
    client: AsyncRedis, script: AsyncScript, upload: str, body: bytes, keys: Sequence[str], args: Sequence[str | bytes]
) -> Any:
    """Puts a body under the name `upload`, then runs the script; its reply.

    Raises:
        redis.RedisError: what Redis said of the body, else of the script.
    """
    while True:
        pipe = client.pipeline(transaction=False)
        pipe.execute_command("SET", upload, body, "PX", UPLOAD_TTL_MS)
        pipe.execute_command("EVALSHA", script.sha, len(keys), *keys, *args)
        try:
            return _last(await pipe.execute(raise_on_error=False))
        except redis.exceptions.NoScriptError:  # a server that took over
            await client.script_load(script.script)


def run_with_results(
    client: SyncRedis, script: Script, upload: str, blobs: Sequence[bytes], keys: Sequence[str], args: Sequence[str]
) -> Any:
    """Puts blobs into a hash under the name `upload`, by index, then runs the script; its reply.

    The hash begins with an empty field, which the script takes out: so it has its time to live before its first blob.

    Raises:
        redis.RedisError: what Redis said of the blobs, else of the script; `redis.ConnectionError` where the script
            replies -2, for they did not arrive whole.
    """
    fields = [part for index, blob in enumerate(blobs) for part in (index, blob)]
    while True:
        pipe = client.pipeline(transaction=False)
        pipe.execute_command("HSET", upload, "", "")
        pipe.execute_command("PEXPIRE", upload, UPLOAD_TTL_MS)
        pipe.execute_command("HSET", upload, *fields)
        pipe.execute_command("EVALSHA", script.sha, len(keys), *keys, *args)
        try:
            code = _last(pipe.execute(raise_on_error=False))
        except redis.exceptions.NoScriptError:
            client.script_load(script.script)
            continue
        if code == -2:
            raise redis.ConnectionError("the results did not arrive whole")
        return code


def _last(replies: Sequence[Any]) -> Any:
    """The last reply, unless one is an error. redis-py itself would put the command, blob and all, into the error."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies[-1]
