"""Keys of stored objects: their time is that of their lifetime, and nothing else may become a path."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from giantleap.service.results.keys import check_key, is_expired, job_of, new_keys

NOW_S = 1_795_284_206.5


def expiry_of(key: str) -> str:
    return key.split("/")[1]


@pytest.mark.parametrize("lifetime_s", [1, 59, 60, 3600, 86_400, 30 * 86_400])
def test_a_key_expires_after_its_lifetime_and_at_most_a_sixtieth_or_a_second_later(lifetime_s: int) -> None:
    [key] = new_keys("giantleap", "job", "result", 1, lifetime_s, NOW_S)
    assert not is_expired(expiry_of(key), NOW_S + lifetime_s)
    assert is_expired(expiry_of(key), NOW_S + lifetime_s + max(1, lifetime_s / 60))


def test_two_deliveries_of_a_job_never_write_the_same_object() -> None:
    job_id = str(uuid.uuid4())
    first, second = (set(new_keys("giantleap", job_id, "result", 4, 60, NOW_S)) for _ in range(2))
    assert len(first | second) == 8
    assert {job_of(key) for key in first | second} == {job_id}


@pytest.mark.parametrize("job_id", ["../../etc/passwd", "a/b", "", "a\0", "a.b", "é", "a\n"])
def test_an_id_that_would_leave_its_folder_is_refused(job_id: str) -> None:
    with pytest.raises(ValueError, match="no key"):
        new_keys("giantleap", job_id, "result", 1, 60, NOW_S)


@given(st.text(max_size=80))
def test_no_other_text_is_a_key(text: str) -> None:
    with pytest.raises(ValueError, match="no key"):
        check_key(text)


@pytest.mark.parametrize("end", [".part", "/../x", "\n", "/", "%2e"])
def test_a_key_with_something_at_its_end_is_none(end: str) -> None:
    [key] = new_keys("giantleap", "job", "input", 1, 60, NOW_S)
    assert check_key(key) == key
    with pytest.raises(ValueError, match="no key"):
        check_key(key + end)


@pytest.mark.parametrize("name", ["", "results", "20261399T000000Z", "20261130", "../x"])
def test_a_folder_of_another_kind_never_expires(name: str) -> None:
    assert not is_expired(name, 1e12)
