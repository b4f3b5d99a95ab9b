"""Whether each accepted job ended exactly once: by the records, the workers' journal and what is left in Redis."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from giantleap.service.jobqueue.keys import Keys
from tests.chaos.files import StoredFiles, is_whole
from tests.chaos.harness import Note


@dataclass(frozen=True)
class Verdict:
    """Ids of jobs that did not end as they must, by fault; `leaks` are keys and counters that should be empty."""

    lost: tuple[str, ...]
    failed: tuple[str, ...]
    not_one_done: tuple[str, ...]
    not_one_result: tuple[str, ...]
    accepted_twice: tuple[str, ...]
    unexplained: tuple[str, ...]
    strangers: tuple[str, ...]
    leaks: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        return not any(vars(self).values())


def judge(
    client: redis.Redis,
    prefix: str,
    accepted: Sequence[str],
    notes: Iterable[Note],
    killed_pids: Sequence[int],
    files: StoredFiles | None = None,
) -> Verdict:
    """Compares what was promised with what is there; `files` is the result store of the run."""
    keys = Keys(prefix)
    notes = list(notes)
    records = _read(client, [keys.job(job_id) for job_id in accepted])
    ends = Counter(note.job_id for note in notes if note.what == "accepted")
    # A worker killed between the queue's answer and its note: it was ending just the start that the record names.
    dying = {(note.job_id, note.delivery) for note in notes if note.what == "ending" and note.pid in killed_pids}
    found = {key.decode().rpartition(":")[2] for key in client.scan_iter(keys.job("*"), count=1000)}
    ended = [job_id for job_id, record in zip(accepted, records, strict=True) if record]
    by_id = dict(zip(accepted, records, strict=True))
    return Verdict(
        lost=tuple(job_id for job_id in accepted if not by_id[job_id]),
        failed=tuple(job_id for job_id in ended if by_id[job_id][b"state"] != b"succeeded"),
        not_one_done=tuple(job_id for job_id in ended if _done_events(client, keys, job_id) != 1),
        not_one_result=tuple(
            job_id for job_id in ended if not _is_own_result(client, keys, job_id, by_id[job_id], files)
        ),
        accepted_twice=tuple(job_id for job_id, number in ends.items() if number > 1),
        unexplained=tuple(
            job_id for job_id in ended if not ends[job_id] and (job_id, int(by_id[job_id][b"deliveries"])) not in dying
        ),
        strangers=tuple(sorted(found - set(accepted))),
        leaks=tuple(_find_leaks(client, keys)),
    )


def _read(client: redis.Redis, names: Sequence[str]) -> list[dict[bytes, bytes]]:
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hgetall(name)
        return list(pipe.execute())


def _done_events(client: redis.Redis, keys: Keys, job_id: str) -> int:
    events: Any = client.xrange(keys.events(job_id))
    return sum(fields[b"name"] == b"done" for _, fields in events)


def _is_own_result(
    client: redis.Redis, keys: Keys, job_id: str, record: dict[bytes, bytes], files: StoredFiles | None
) -> bool:
    """One whole result, which names this job and the start that the record counts as its last."""
    results: Any = client.hgetall(keys.result(job_id))
    named = json.loads(record.get(b"results", b"[]"))
    if len(named) != 1:
        return False
    if files is not None:
        content = files.read(named[0]["key"])
        results = {b"0": content.partition(b"\n")[0]} if content and is_whole(content) and not results else {}
    if list(results) != [b"0"]:
        return False
    named_id, delivery, _ = results[b"0"].decode().split()
    return bool(named_id == job_id and delivery == record[b"deliveries"].decode())


def _find_leaks(client: redis.Redis, keys: Keys) -> Iterable[str]:
    """What a queue without a live job must not hold."""
    sizes: dict[object, Callable[[Any], int]] = {
        b"set": client.scard, b"zset": client.zcard, b"list": client.llen, b"hash": client.hlen
    }  # fmt: skip
    live = ("running", "delayed", "deadlines", "queued:", "live:", "input:")
    for name in client.scan_iter(f"{keys.tag}:*", count=1000):
        kind, short = client.type(name), name.decode().removeprefix(f"{keys.tag}:")
        if short.startswith("stream:") and (client.xlen(name) or client.xpending(name, "workers")["pending"]):
            yield f"{short}: messages"
        if short.startswith(live) and (kind == b"string" or sizes[kind](name)):
            yield f"{short}: not empty"
    held = sum(len(blob) for key in client.scan_iter(keys.result("*"), count=1000) for blob in client.hvals(key))
    counted = int(client.get(f"{keys.tag}:blob_bytes") or 0)
    if held != counted:
        yield f"blob_bytes: {counted} counted, {held} held"
    if int(client.get(f"{keys.tag}:queued_px") or 0):
        yield "queued_px: not 0"
    if client.xlen(keys.dead):
        yield "dead: not empty"
