"""The Lua scripts of the queue: loaded from `lua/`, with the type of their reply. Each change of a job is one of them.

A script is atomic: it happens whole or not at all. Its arguments are

- KEYS[1], the hash tag. Scripts build all key names from it (`giantleap.service.jobqueue.keys`), so that in a Cluster
  every key lies in one slot;
- ARGV[1], the settings as JSON (`to_config`);
- ARGV[2], the named arguments of the call as one JSON object;
- ARGV[3], where the head of the script names one, a value that is stored as it is.

The reply is one JSON document or nothing. `giantleap.service.jobqueue.runner` sends the scripts.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from giantleap.service.jobqueue import replies
from giantleap.service.settings import Settings

Reply = TypeVar("Reply")

_RETRY_DELAY_CAP_S = 300.0
# Entries of the list of an owner's jobs and how long it outlives the last job added.
_LIST_ENTRIES = 1000
_LIST_TTL_S = 86_400
# Deliveries that wait for their receivers; further ones go to the dead list.
_WEBHOOK_LIMIT = 10_000
_WEBHOOK_TTL_S = 86_400
# Previews of one job that are stored at once, and for how long after the last one.
_PREVIEW_LIMIT = 64
_PREVIEW_TTL_S = 60
_LUA = resources.files(__package__) / "lua"


@dataclass(frozen=True, slots=True)
class LuaScript(Generic[Reply]):
    """A script and its reply."""

    name: str
    text: str = field(repr=False)
    sha: str
    reply: TypeAdapter[Reply] = field(repr=False)

    def parse(self, reply: bytes | None) -> Reply:
        """Validates a reply.

        Raises:
            ValueError: the reply is not of the type. The message holds no value: values can be prompts.
        """
        try:
            return self.reply.validate_json(b"null" if reply is None else reply)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['type']}" for e in error.errors(include_input=False)
            )
            raise ValueError(f"the reply of {self.name}.lua is not valid: {faults}") from None


def resolve(name: str) -> str:
    """The text of `lua/<name>.lua`, with each `-- @include x` replaced by `lua/includes/x.lua`, each file once."""
    included: set[str] = set()

    def expand(path: str) -> str:
        lines = []
        for line in (_LUA / f"{path}.lua").read_text(encoding="utf-8").splitlines(keepends=True):
            include = line.removeprefix("-- @include ").strip()
            if not line.startswith("-- @include "):
                lines.append(line)
            elif include not in included:
                included.add(include)
                lines.append(expand(f"includes/{include}"))
        return "".join(lines)

    return expand(name)


def to_script(name: str, text: str, reply: Any) -> LuaScript[Any]:
    """A script from its text and the type of its reply."""
    return LuaScript(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), TypeAdapter(reply))


def _load(name: str, reply: Any) -> LuaScript[Any]:
    return to_script(name, resolve(name), reply)


# What the API runs.
ENQUEUE: LuaScript[replies.EnqueueReply] = _load("enqueue", replies.EnqueueReply)
ACQUIRE_RATE_LIMIT: LuaScript[replies.RateLimitReply] = _load("acquire_rate_limit", replies.RateLimitReply)
GET_JOB: LuaScript[replies.StoredJob | None] = _load("get_job", replies.StoredJob | None)
CANCEL_JOB: LuaScript[replies.StoredJob | None] = _load("cancel_job", replies.StoredJob | None)
DELETE_JOB: LuaScript[replies.DeleteReply] = _load("delete_job", replies.DeleteReply)
LIST_DEAD_LETTERS: LuaScript[replies.DeadLettersReply] = _load("list_dead_letters", replies.DeadLettersReply)
DROP_DEAD_LETTER: LuaScript[replies.DroppedReply] = _load("drop_dead_letter", replies.DroppedReply)
END_OVERDUE_JOBS: LuaScript[None] = _load("end_overdue_jobs", None)
LIST_JOBS: LuaScript[replies.ListReply] = _load("list_jobs", replies.ListReply)
READ_STATS: LuaScript[replies.StatsReply] = _load("read_stats", replies.StatsReply)
READ_SERVER: LuaScript[replies.ServerReply] = _load("read_server", replies.ServerReply)
LIST_DEVICES: LuaScript[replies.DevicesReply] = _load("list_devices", replies.DevicesReply)
SWEEP: LuaScript[replies.SweepReply] = _load("sweep", replies.SweepReply)

# What a worker runs.
REGISTER_WORKER: LuaScript[None] = _load("register_worker", None)
UNREGISTER_WORKER: LuaScript[None] = _load("unregister_worker", None)
CLAIM: LuaScript[replies.ClaimReply] = _load("claim", replies.ClaimReply)
FIND_STOPPED: LuaScript[replies.IdsReply] = _load("find_stopped", replies.IdsReply)
RENEW: LuaScript[replies.IdsReply] = _load("renew", replies.IdsReply)
EMIT: LuaScript[None] = _load("emit", None)
EMIT_PREVIEW: LuaScript[None] = _load("emit_preview", None)
COMPLETE: LuaScript[replies.SettleReply] = _load("complete", replies.SettleReply)
TRANSFER: LuaScript[replies.SettleReply] = _load("transfer", replies.SettleReply)
FAIL: LuaScript[replies.SettleReply] = _load("fail", replies.SettleReply)
CANCEL: LuaScript[replies.SettleReply] = _load("cancel", replies.SettleReply)
RELEASE: LuaScript[replies.SettleReply] = _load("release", replies.SettleReply)

# What the sender of webhooks runs.
TAKE_WEBHOOKS: LuaScript[replies.WebhooksReply] = _load("take_webhooks", replies.WebhooksReply)
SETTLE_WEBHOOK: LuaScript[None] = _load("settle_webhook", None)


def to_config(settings: Settings) -> str:
    """The settings that scripts read, as the JSON of ARGV[1]."""
    return json.dumps(
        {
            "queue_limit": settings.queue_limit,
            "queue_limit_latent_px": settings.queue_limit_latent_px or 0,
            "ttl_ms": settings.job_ttl_s * 1000,
            "idempotency_ttl_ms": settings.idempotency_ttl_s * 1000,
            "budget_bytes": settings.blob_budget_bytes,
            "event_limit": settings.event_limit,
            "preview_limit": _PREVIEW_LIMIT,
            "preview_ttl_ms": _PREVIEW_TTL_S * 1000,
            "visibility_ms": int(settings.visibility_timeout_s * 1000),
            "max_deliveries": settings.max_deliveries,
            "backoff_ms": int(settings.retry_backoff_s * 1000),
            "backoff_cap_ms": int(_RETRY_DELAY_CAP_S * 1000),
            "list_limit": max(_LIST_ENTRIES, settings.queue_limit),
            "list_ttl_ms": (_LIST_TTL_S + settings.job_ttl_s) * 1000,
            "webhook_limit": _WEBHOOK_LIMIT,
            "webhook_ttl_ms": _WEBHOOK_TTL_S * 1000,
        }
    )


def main() -> None:
    """Writes every script with its includes resolved to a directory, for luacheck."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for file in _LUA.iterdir():
        if file.is_file():
            name = file.name.removesuffix(".lua")
            (directory / file.name).write_text(resolve(name), encoding="utf-8")


if __name__ == "__main__":
    main()
