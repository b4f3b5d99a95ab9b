"""A worker process without a model, for tests that kill it: runs each job as its parameters say until it is killed.

`python fake_worker.py <url> <prefix> <visibility s> [<role>]`; a job's `negative_prompt` names the work and `steps`
its milliseconds; `hold` goes on until the key `<prefix>-go` is there. Each start and end of work is noted in the list
`<prefix>-log` as `<what> <job id> <pid>`.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time

import redis

from giantleap.models.worker_role import WorkerRole
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.job import GenerateParams, ResultFile
from giantleap.service.settings import read_settings


def work(kind: str, seconds: float, hold_s: float) -> None:
    """Spends the time asleep, computing in Python, or in C calls that hold the GIL; or kills its own process."""
    end_s = time.monotonic() + seconds
    if kind == "sleep":
        time.sleep(seconds)
    elif kind == "compute":
        while time.monotonic() < end_s:
            sum(range(1000))
    elif kind == "hold-gil":
        libc = ctypes.PyDLL(None)
        while time.monotonic() < end_s:
            libc.usleep(int(hold_s * 1e6))
    elif kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        raise ValueError(f"unknown work {kind!r}")


def main(url: str, prefix: str, visibility_s: float, role: WorkerRole = WorkerRole.ALL) -> None:
    settings = read_settings(
        key_prefix=prefix, visibility_timeout_s=visibility_s, retry_backoff_s=0.1, job_ttl_s=600, queue_limit=100_000
    )
    client = open_redis(url)
    worker = JobConsumer(client, settings, ["pocket"], "fake", role=role)
    worker.open()

    def note(what: str, job_id: str) -> None:
        while True:  # Redis may be killed and started again meanwhile, however long that takes
            with contextlib.suppress(redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
                client.rpush(f"{prefix}-log", f"{what} {job_id} {os.getpid()}")
                return
            time.sleep(0.05)

    while True:
        for claim in worker.claim(1, 0.5):
            assert isinstance(claim.job.params, GenerateParams)
            note("start", claim.job.id)
            if claim.job.params.negative_prompt == "hold":
                while not client.exists(f"{prefix}-go"):
                    time.sleep(0.02)
            else:
                work(claim.job.params.negative_prompt, claim.job.params.steps / 1000, hold_s=visibility_s / 6)
            result = f"{claim.job.id} by {os.getpid()}".encode()
            if role is WorkerRole.GENERATE:
                if worker.transfer(claim, result, {"generate": 1.0}, []):
                    note("handed", claim.job.id)
            elif worker.complete(claim, [(ResultFile("text/plain", len(result)), result)], {}, []):
                note("end", claim.job.id)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), *map(WorkerRole, sys.argv[4:]))
