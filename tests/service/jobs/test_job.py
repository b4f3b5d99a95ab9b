"""A job's JSON form: what was written is read back, also by a newer version; equal requests have equal digests."""

import json
from dataclasses import replace

import pytest

from giantleap.service.jobs.job import FINAL_STATES, Job, JobParams, JobState, Priority, Webhook
from tests.service.fakes import GENERATE, UPSCALE


def make_job(params: JobParams, **changes: object) -> Job:
    job = Job("id", "tiny", priority=Priority.LOW, created_at_s=1.5, params=params, warnings=("a warning",))
    return replace(job, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [GENERATE, replace(GENERATE, scale=1.5, strength=0.5), UPSCALE])
def test_a_job_is_read_back_as_it_was_written(params: JobParams) -> None:
    job = make_job(params, owner="alice", webhook=Webhook("https://example.org", ("failed",)))
    again = Job.from_json(job.to_json())
    assert again == job and type(again.params.scale) is type(params.scale)


def test_fields_that_an_older_version_did_not_write_take_their_defaults() -> None:
    text = json.loads(make_job(GENERATE).to_json())
    del text["latent_px"], text["owner"], text["webhook"], text["params"]["decode"]
    assert Job.from_json(json.dumps(text)) == make_job(GENERATE)


@pytest.mark.parametrize("part", ["job", "params"])
def test_a_job_with_fields_of_a_newer_version_is_refused_without_its_values(part: str) -> None:
    text = json.loads(make_job(GENERATE).to_json())
    (text if part == "job" else text["params"])["newer"] = "secret"
    with pytest.raises(ValueError, match="newer") as refused:
        Job.from_json(json.dumps(text))
    assert "secret" not in str(refused.value) and GENERATE.prompt not in str(refused.value)


def test_the_digest_is_that_of_the_request_and_its_owner() -> None:
    job = make_job(GENERATE)
    assert replace(job, id="other", created_at_s=2.0, traceparent="t").payload_sha256() == job.payload_sha256()
    others = [
        replace(job, owner="bob"),
        replace(job, params=replace(GENERATE, seed=2)),
        replace(job, webhook=Webhook("https://example.org", FINAL_STATES)),
    ]
    assert len({other.payload_sha256() for other in (job, *others)}) == 4


def test_the_final_states_are_those_in_which_a_job_has_ended() -> None:
    assert {state for state in JobState if state.final} == set(FINAL_STATES)
