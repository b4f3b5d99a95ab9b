"""A worker process without a model, to be killed and frozen: it runs jobs asleep and keeps a journal on disk.

`python chaos_worker.py JOURNAL`, settings from the environment. As a worker with a model it claims ahead, and finishes
jobs while it works on others. A job takes two milliseconds a step; one whose seed is
`LONG_SEED` takes `LONG_S` at its first start. The journal has a line `<what> <job> <delivery> <pid> <monotonic s>`
before work (start), before the job is finished (ending) and after the queue's answer (accepted, refused), so that
what a kill left out is known. What is claimed ahead is noted too (ahead). One that only draws hands over, and notes
that (handed); a result store that is away makes the job run again (unstored).
"""

import os
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import StoreUnavailable
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.job import GenerateParams, JobError, ResultFile
from giantleap.service.results.jobs import open_files
from giantleap.service.settings import read_settings
from tests.chaos.files import to_content

LONG_SEED = 424_242
LONG_S = 10.0
MAX_CLAIMS = 3
MAX_FINISHING = 2


def work(claim: Claim) -> None:
    params = claim.job.params
    if not isinstance(params, GenerateParams):
        time.sleep(0.002)
    elif params.seed == LONG_SEED and claim.delivery == 1 and claim.base_latents is None:
        time.sleep(LONG_S)
    else:
        time.sleep(2 * params.steps / 1000)


def main(journal: str) -> None:
    settings = read_settings()
    assert settings.redis_url is not None
    client, files = open_redis(settings.redis_url), open_files(settings)
    consumer = JobConsumer(client, settings, ["paper"], "chaos", role=settings.role, files=files)
    consumer.open()
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(what: str, claim: Claim) -> None:
        """One write of one line: a kill leaves the whole line or none of it."""
        os.write(file, f"{what} {claim.job.id} {claim.delivery} {os.getpid()} {time.monotonic():.6f}\n".encode())

    def finish(claim: Claim) -> None:
        line = f"{claim.job.id} {claim.delivery} {os.getpid()}"
        content = line.encode() if files is None else to_content(line)
        if settings.role is WorkerRole.GENERATE:
            latents = content if isinstance(claim.job.params, GenerateParams) else None
            handed = consumer.transfer(claim, latents, {}, ())
            note("refused" if handed is None else "handed", claim)
            return
        note("ending", claim)
        try:
            ended = consumer.complete(claim, [(ResultFile("image/png", len(content)), content)], {}, ())
        except StoreUnavailable as error:
            state = consumer.fail(claim, JobError(error.code, error.detail, error.retryable))
            note("refused" if state is None else "unstored", claim)
            return
        note("accepted" if ended else "refused", claim)

    finishing: deque[Future[None]] = deque()
    ahead: list[Claim] = []
    with ThreadPoolExecutor(MAX_FINISHING) as pool:
        while True:
            claims, ahead = ahead or consumer.claim(MAX_CLAIMS, 0.5), []
            for claim in filter(consumer.holds, claims):
                if claim is claims[-1]:
                    ahead = consumer.claim_ahead(MAX_CLAIMS)
                    for waiting in ahead:
                        note("ahead", waiting)
                note("start", claim)
                work(claim)
                finishing.append(pool.submit(finish, claim))
                if len(finishing) > MAX_FINISHING:
                    finishing.popleft().result()


if __name__ == "__main__":
    main(sys.argv[1])
