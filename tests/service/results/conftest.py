"""Settings whose results lie in files, and in S3."""

from pathlib import Path

import pytest

from giantleap.service.settings import Settings, read_settings
from tests.s3_server import BUCKET


@pytest.fixture(params=["file", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path, key_prefix: str) -> str:
    """The URL of each kind of store, empty."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://{BUCKET}/{key_prefix}/sub"
    return (tmp_path / "with space %20").as_uri()


@pytest.fixture
def settings(redis_url: str, key_prefix: str, store_url: str) -> Settings:
    """Settings of one test, as everywhere, with a store."""
    return read_settings(
        redis_url=redis_url,
        key_prefix=key_prefix,
        result_store=store_url,
        visibility_timeout_s=5.0,
        retry_backoff_s=0.1,
        job_ttl_s=60,
    )
