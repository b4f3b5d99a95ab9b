"""Where `giantleap jobs` and `giantleap status` look for the service when no URL is given."""

import pytest

from giantleap.cli.jobs import to_local_url


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("192.0.2.7", "http://192.0.2.7:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_the_url_is_that_of_the_address_which_the_service_listens_on(host: str, url: str) -> None:
    assert to_local_url(host, 8000) == url
