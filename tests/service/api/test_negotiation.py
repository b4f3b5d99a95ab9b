"""What a client asks of the answer is read from Accept and Prefer as their standards say."""

import pytest

from giantleap.service.api.negotiation import choose_media_type, read_preference
from giantleap.service.errors import MalformedRequest, NotAcceptable

JSON, PNG, JPEG, WEBP = "application/json", "image/png", "image/jpeg", "image/webp"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, JSON),
        ("*/*", JSON),
        (JSON, JSON),
        ("application/*", JSON),
        ("image/*", PNG),
        ("IMAGE/PNG", PNG),
        ("image/webp", WEBP),
        ("image/jpeg;q=0.5, image/webp;q=0.9", WEBP),
        ("image/*, application/json", JSON),
        ("image/*, application/json;q=0.9", PNG),
        ("image/*;q=0.5, image/jpeg", JPEG),
        ("image/*, image/png;q=0", JPEG),
        ("text/html, application/json;q=0.1", JSON),
        (BROWSER, WEBP),
    ],
)
def test_best_quality_wins_and_json_on_a_tie(accept: str | None, chosen: str) -> None:
    assert choose_media_type(accept, (PNG, JPEG, WEBP)) == chosen


@pytest.mark.parametrize("accept", ["text/html", "image/png;q=0", "image/gif", "image/png;q=nan", "image/png;q=x", ","])
def test_nothing_acceptable_is_reported(accept: str) -> None:
    with pytest.raises(NotAcceptable):
        choose_media_type(accept, (PNG,))


@pytest.mark.parametrize(
    ("prefer", "wait_s", "applied"),
    [
        (None, None, None),
        ("handling=lenient", None, None),
        ("respond-async", 0, "respond-async"),
        ("Respond-Async", 0, "respond-async"),
        ("wait=10", 10, "wait=10"),
        ('wait="10"', 10, "wait=10"),
        ("respond-async, wait=5", 5, "wait=5"),
        ("wait=0", 0, "respond-async"),
        ("wait=1000", 300, "wait=300"),
        ("wait=5, wait=10", 5, "wait=5"),
    ],
)
def test_preference_is_read_and_echoed(prefer: str | None, wait_s: float | None, applied: str | None) -> None:
    preference = read_preference(prefer, max_wait_s=300)
    assert preference.wait_s == wait_s
    assert preference.applied == applied


@pytest.mark.parametrize("prefer", ["wait", "wait=", "wait=-1", "wait=1.5", "wait=nan", "wait=²", "wait=9999999999"])
def test_wait_without_a_whole_number_is_malformed(prefer: str) -> None:
    with pytest.raises(MalformedRequest):
        read_preference(prefer, max_wait_s=300)
