"""Sends the Lua scripts to Redis, for asyncio (API processes) and for threads (workers).

Large blobs do not pass through a script, because Lua would copy them. Commands in front of the script store a blob
under a temporary key; the script renames the key, or deletes it if it refuses the job. If the connection breaks before
the script runs, the key expires. Both go in one pipeline, which costs one sync of the disk.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from redis.exceptions import NoScriptError

from giantleap.service.jobqueue.client import AsyncRedis, SyncRedis
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.scripts import LuaScript, to_config
from giantleap.service.settings import Settings

UPLOAD_TTL_MS = 60_000
NO_ARGUMENTS: Mapping[str, object] = MappingProxyType({})

Reply = TypeVar("Reply")
Command = tuple[Any, ...]


def upload_input(key: str, body: bytes) -> list[Command]:
    """The commands that put an input under a temporary key."""
    return [("SET", key, body, "PX", UPLOAD_TTL_MS)]


def upload_results(key: str, blobs: Sequence[bytes]) -> list[Command]:
    """The commands that put results into a hash under a temporary key, by index.

    The hash starts with an empty field, which the script deletes: so it has a time to live before its first blob.
    """
    fields = [part for index, blob in enumerate(blobs) for part in (index, blob)]
    return [("HSET", key, "", ""), ("PEXPIRE", key, UPLOAD_TTL_MS), ("HSET", key, *fields)]


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """KEYS[1] and ARGV[1] of every script: the values of a deployment."""

    tag: str
    config: str

    @classmethod
    def from_settings(cls, settings: Settings) -> "ScriptCall":
        """The tag and the settings of a deployment."""
        return cls(Keys(settings.key_prefix).tag, to_config(settings))

    def to_command(self, script: LuaScript[Any], arguments: Mapping[str, object], value: str | bytes | None) -> Command:
        """The command that runs a script."""
        named = json.dumps({name: argument for name, argument in arguments.items() if argument is not None})
        return ("EVALSHA", script.sha, 1, self.tag, self.config, named, *(() if value is None else (value,)))


class AsyncScriptRunner:
    """Runs scripts from one event loop."""

    def __init__(self, client: AsyncRedis, settings: Settings) -> None:
        self._client = client
        self._call = ScriptCall.from_settings(settings)

    async def run(
        self,
        script: LuaScript[Reply],
        arguments: Mapping[str, object] = NO_ARGUMENTS,
        *,
        before: Sequence[Command] = (),
        value: str | bytes | None = None,
    ) -> Reply:
        """Sends a script, after the commands of `before`, and validates its reply.

        Args:
            script: One of `giantleap.service.jobqueue.scripts`.
            arguments: ARGV[2]; those that are None are left out.
            before: Commands that go to Redis in front of it.
            value: ARGV[3].

        Raises:
            redis.RedisError: The first error among the replies.
        """
        command = self._call.to_command(script, arguments, value)
        while True:
            try:
                return script.parse(await self._send([*before, command]))
            except NoScriptError:  # a new server, or one that took over
                await self._client.script_load(script.text)

    async def _send(self, commands: Sequence[Command]) -> Any:
        if len(commands) == 1:
            return await self._client.execute_command(*commands[0])
        pipe = self._client.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        return last_reply(await pipe.execute(raise_on_error=False))


class ScriptRunner:
    """Runs scripts from any thread."""

    def __init__(self, client: SyncRedis, settings: Settings) -> None:
        self._client = client
        self._call = ScriptCall.from_settings(settings)

    def run(
        self,
        script: LuaScript[Reply],
        arguments: Mapping[str, object] = NO_ARGUMENTS,
        *,
        before: Sequence[Command] = (),
        value: str | bytes | None = None,
    ) -> Reply:
        """As `AsyncScriptRunner.run`. A script is refused at its first write, so that nothing was written."""
        command = self._call.to_command(script, arguments, value)
        while True:
            try:
                return script.parse(self._send([*before, command]))
            except NoScriptError:
                self._client.script_load(script.text)

    def _send(self, commands: Sequence[Command]) -> Any:
        if len(commands) == 1:
            return self._client.execute_command(*commands[0])
        pipe = self._client.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        return last_reply(pipe.execute(raise_on_error=False))


def last_reply(replies: Sequence[Any]) -> Any:
    """The last reply, unless one is an error. redis-py itself would put the command, blob and all, into the error."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies[-1]
