"""The decision about one more request: by what is known of the queue, how old that is, and who has passed already."""

import pytest

from giantleap.service.jobqueue.admission.places import CROWD_S, STATE_S, STATISTICS_S, Answer, Places

LIMIT = 6
NOW_S = 1000.0


def places_of(jobs: int, tickets: int = 0) -> Places:
    """What is known when the queue, which has been full, was read at `NOW_S`."""
    places = Places(LIMIT, tickets)
    places.put_state(LIMIT, NOW_S, 0)
    places.put_state(jobs, NOW_S, 0)
    return places


@pytest.mark.parametrize(("tickets", "answer"), [(0, Answer.ADMIT), (LIMIT - 1, Answer.ADMIT), (LIMIT, Answer.WAIT)])
def test_without_a_crowd_as_many_pass_at_once_as_the_queue_takes(tickets: int, answer: Answer) -> None:
    assert Places(LIMIT, tickets).decide(NOW_S, 0) is answer


@pytest.mark.parametrize(
    ("jobs", "tickets", "answer"),
    [
        (LIMIT, 0, Answer.REFUSE),
        (LIMIT + 3, 0, Answer.REFUSE),
        (LIMIT, 2, Answer.REFUSE),
        (LIMIT - 1, 0, Answer.ADMIT),
        (LIMIT - 1, 1, Answer.WAIT),
        (LIMIT - 2, 1, Answer.ADMIT),
        (0, LIMIT - 1, Answer.ADMIT),
        (0, LIMIT, Answer.WAIT),
    ],
)
def test_in_a_crowd_the_free_places_decide_and_a_ticket_refuses_nobody(jobs: int, tickets: int, answer: Answer) -> None:
    assert places_of(jobs, tickets).decide(NOW_S, 0) is answer


def test_a_job_that_ends_frees_a_place() -> None:
    places = places_of(LIMIT)
    assert [places.decide(NOW_S, ended) for ended in (0, 1)] == [Answer.REFUSE, Answer.ADMIT]


def test_a_state_counts_for_fifty_milliseconds() -> None:
    places = places_of(LIMIT)
    assert STATE_S == 0.05
    assert places.decide(NOW_S + 0.049, 0) is Answer.REFUSE
    assert places.decide(NOW_S + 0.051, 0) is Answer.READ
    assert not places.is_aging(NOW_S + 0.024) and places.is_aging(NOW_S + 0.026)


def test_a_crowd_has_gone_when_the_queue_was_not_full_for_a_second() -> None:
    places = places_of(LIMIT)
    places.put_state(LIMIT - 1, NOW_S + CROWD_S - 0.01, 0)
    assert places.decide(NOW_S + CROWD_S + 0.01, 0) is Answer.ADMIT
    assert not places.is_crowded(NOW_S + CROWD_S + 0.01)


def test_requests_that_wait_are_a_crowd_too() -> None:
    places = Places(LIMIT)
    places.put_crowd(NOW_S)
    assert places.decide(NOW_S, 0) is Answer.READ


def test_the_reply_to_a_job_renews_the_state_but_not_for_ever_without_the_statistics() -> None:
    places = places_of(LIMIT)
    places.put_jobs(LIMIT, NOW_S + STATISTICS_S - 0.01, 0)
    assert places.decide(NOW_S + STATISTICS_S, 0) is Answer.REFUSE
    assert places.is_aging(NOW_S + STATISTICS_S), "the time of the refusal is old"
    places.put_jobs(LIMIT, NOW_S + STATISTICS_S + 0.2, 0)
    assert places.decide(NOW_S + STATISTICS_S + 0.2, 0) is Answer.READ


def test_a_first_full_queue_is_read_before_anyone_is_refused() -> None:
    places = Places(LIMIT)
    places.put_jobs(LIMIT, NOW_S, 0)
    assert places.decide(NOW_S, 0) is Answer.READ


def test_nothing_is_known_of_a_queue_that_cannot_be_read() -> None:
    places = places_of(LIMIT)
    places.open()
    assert places.decide(NOW_S, 0) is Answer.ADMIT
