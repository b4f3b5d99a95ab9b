"""The decision about one more request: by what is known of the queue, how old that is, and who has passed already."""

import pytest

from giantleap.service.jobqueue.admission.slots import CONTENTION_S, STATE_S, STATISTICS_S, Decision, Slots

LIMIT = 6
NOW_S = 1000.0


def slots_of(jobs: int, permits: int = 0) -> Slots:
    """What is known when the queue, which has been full, was read at `NOW_S`."""
    slots = Slots(LIMIT, permits)
    slots.record_state(LIMIT, NOW_S, 0)
    slots.record_state(jobs, NOW_S, 0)
    return slots


@pytest.mark.parametrize(
    ("permits", "answer"), [(0, Decision.ADMIT), (LIMIT - 1, Decision.ADMIT), (LIMIT, Decision.WAIT)]
)
def test_without_contention_the_limit_bounds_the_permits(permits: int, answer: Decision) -> None:
    assert Slots(LIMIT, permits).decide(NOW_S, 0) is answer


@pytest.mark.parametrize(
    ("jobs", "permits", "answer"),
    [
        (LIMIT, 0, Decision.REFUSE),
        (LIMIT + 3, 0, Decision.REFUSE),
        (LIMIT, 2, Decision.REFUSE),
        (LIMIT - 1, 0, Decision.ADMIT),
        (LIMIT - 1, 1, Decision.WAIT),
        (LIMIT - 2, 1, Decision.ADMIT),
        (0, LIMIT - 1, Decision.ADMIT),
        (0, LIMIT, Decision.WAIT),
    ],
)
def test_under_contention_the_free_slots_decide_and_a_permit_refuses_nobody(
    jobs: int, permits: int, answer: Decision
) -> None:
    assert slots_of(jobs, permits).decide(NOW_S, 0) is answer


def test_a_finished_job_frees_a_slot() -> None:
    slots = slots_of(LIMIT)
    assert [slots.decide(NOW_S, ended) for ended in (0, 1)] == [Decision.REFUSE, Decision.ADMIT]


def test_a_state_counts_for_fifty_milliseconds() -> None:
    slots = slots_of(LIMIT)
    assert STATE_S == 0.05
    assert slots.decide(NOW_S + 0.049, 0) is Decision.REFUSE
    assert slots.decide(NOW_S + 0.051, 0) is Decision.REFRESH
    assert not slots.needs_refresh(NOW_S + 0.024) and slots.needs_refresh(NOW_S + 0.026)


def test_contention_ends_after_a_second_without_a_full_queue() -> None:
    slots = slots_of(LIMIT)
    slots.record_state(LIMIT - 1, NOW_S + CONTENTION_S - 0.01, 0)
    assert slots.decide(NOW_S + CONTENTION_S + 0.01, 0) is Decision.ADMIT
    assert not slots.is_contended(NOW_S + CONTENTION_S + 0.01)


def test_waiting_requests_are_contention() -> None:
    slots = Slots(LIMIT)
    slots.record_contention(NOW_S)
    assert slots.decide(NOW_S, 0) is Decision.REFRESH


def test_the_reply_to_a_job_renews_the_state_but_not_for_ever_without_the_statistics() -> None:
    slots = slots_of(LIMIT)
    slots.record_jobs(LIMIT, NOW_S + STATISTICS_S - 0.01, 0)
    assert slots.decide(NOW_S + STATISTICS_S, 0) is Decision.REFUSE
    assert slots.needs_refresh(NOW_S + STATISTICS_S), "the time of the refusal is old"
    slots.record_jobs(LIMIT, NOW_S + STATISTICS_S + 0.2, 0)
    assert slots.decide(NOW_S + STATISTICS_S + 0.2, 0) is Decision.REFRESH


def test_a_first_full_queue_is_read_before_anyone_is_refused() -> None:
    slots = Slots(LIMIT)
    slots.record_jobs(LIMIT, NOW_S, 0)
    assert slots.decide(NOW_S, 0) is Decision.REFRESH


def test_nothing_is_known_of_a_queue_that_cannot_be_read() -> None:
    slots = slots_of(LIMIT)
    slots.open()
    assert slots.decide(NOW_S, 0) is Decision.ADMIT
