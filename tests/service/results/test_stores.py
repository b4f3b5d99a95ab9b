"""Both stores hold whole objects, list what has expired and delete it; their faults are typed and hold no secret."""

import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from giantleap.service.errors import BadConfiguration, StoreUnavailable
from giantleap.service.results.concurrent import AsyncResultStore
from giantleap.service.results.files import FileStore
from giantleap.service.results.keys import new_keys
from giantleap.service.results.s3 import S3ResultStore
from giantleap.service.results.store import ResultStore, check_store, open_store
from giantleap.service.settings import Settings, read_settings
from tests.s3_server import BUCKET, S3Server, fetch

PREFIX = "test-results"


@pytest.fixture(params=["file", "s3"])
def store_settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    url = (tmp_path / "with space %20").as_uri()
    if request.param == "s3":
        request.getfixturevalue("s3")
        url = f"s3://{BUCKET}/{tmp_path.name}/sub"
    return read_settings(result_store=url, key_prefix=PREFIX)


@pytest.fixture
def store(store_settings: Settings) -> ResultStore:
    opened = open_store(store_settings)
    assert opened is not None
    return opened


def make_key(lifetime_s: float = 3600, now_s: float | None = None, number: int = 1) -> list[str]:
    return new_keys(PREFIX, "job-1", "result", number, lifetime_s, time.time() if now_s is None else now_s)


def test_what_was_put_is_read_whole_until_it_is_deleted(store: ResultStore) -> None:
    content = os.urandom(6_000_000)
    [key] = make_key()
    assert store.get(key) is None
    store.put(key, content, "image/png")
    assert store.get(key) == content
    store.delete([key])
    store.delete([key])
    assert store.get(key) is None


def test_only_what_has_expired_is_listed(store: ResultStore) -> None:
    now_s = time.time()
    old, new = make_key(60, now_s - 3600, number=3), make_key(60, now_s)
    for key in (*old, *new):
        store.put(key, b"x", "image/png")
    assert sorted(key for batch in store.list_expired(PREFIX, now_s) for key in batch) == old
    assert list(store.list_expired("other", now_s)) == []
    store.delete(old)
    store.prune(PREFIX, now_s)
    assert list(store.list_expired(PREFIX, now_s)) == []
    assert store.get(new[0]) == b"x"


@pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/passwd", "test-results/../x", "x", ""])
def test_a_path_is_no_key(store: ResultStore, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.get(key),
        lambda: store.put(key, b"x", "image/png"),
        lambda: store.delete([key]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no key"):
            call()


def test_a_store_that_works_passes_the_check_and_keeps_nothing_of_it(store: ResultStore) -> None:
    check_store(store)
    store.ping()
    assert list(store.list_expired(PREFIX, time.time() + 7200)) == []


@pytest.mark.anyio
async def test_the_form_for_asyncio_returns_and_raises_as_the_store(store: ResultStore) -> None:
    files = AsyncResultStore(store, max_bytes=1000)
    [key] = make_key()
    await files.put(key, b"x", "image/png")
    assert await files.get(key) == b"x"
    with pytest.raises(ValueError, match="no key"):
        await files.get("x")
    files.close()


@pytest.mark.anyio
async def test_a_store_that_hangs_is_unavailable_in_time(tmp_path: Path) -> None:
    files, released = AsyncResultStore(FileStore(tmp_path, PREFIX), max_bytes=1000), threading.Event()
    with pytest.raises(StoreUnavailable, match="has not answered") as caught:
        await files.call(0.05, released.wait)
    assert caught.value.status == 503 and caught.value.retry_after_s
    released.set()
    files.close()


def test_redis_is_no_store_of_files() -> None:
    assert open_store(read_settings(result_store="redis")) is None
    assert open_store(read_settings()) is None
    check_store(None)


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3://UPPER", "s3://key:secret@bucket", "s3://bucket/../x", "file://x", "file:///", "/x", "gs://b", ""],
)
def test_a_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="result_store"):
        read_settings(result_store=url)


def test_presigned_urls_need_s3(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set result_store to s3"):
        read_settings(result_store=tmp_path.as_uri(), result_urls="presigned")


def test_a_file_is_for_its_owner_and_what_is_half_written_has_another_name(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "root", PREFIX)
    [key] = make_key()
    part = tmp_path / "root" / f"{key}.part"
    store.put(key, b"x", "image/png")
    assert (tmp_path / "root").stat().st_mode & 0o077 == 0
    part.write_bytes(b"half")
    with pytest.raises(StoreUnavailable):
        store.put(key, b"y", "image/png")  # of a process that has the same key, which none has
    assert store.get(key) == b"x"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """The limit of a file's size stands for the disk's: the write fails in its middle with an error of the system."""
    store = FileStore(tmp_path, PREFIX)
    [key] = make_key()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StoreUnavailable, match="File too large") as caught:
            store.put(key, b"x" * 100_000, "image/png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.retryable and caught.value.retry_after_s
    assert store.get(key) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_device_without_room_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / PREFIX).symlink_to("/dev/full")
    with pytest.raises((StoreUnavailable, BadConfiguration)):
        check_store(FileStore(tmp_path, PREFIX))


def test_a_directory_that_is_a_file_is_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadConfiguration, match=r"result_store: .*file.* cannot be written"):
        check_store(FileStore(tmp_path / "file", PREFIX))


def test_a_directory_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="cannot be written"):
        FileStore(tmp_path / "gone", PREFIX).ping()


def test_a_presigned_url_opens_one_object_with_its_type_by_one_method(s3: S3Server) -> None:
    store = S3ResultStore(BUCKET, "signed", PREFIX)
    [key] = make_key()
    store.put(key, b"picture", "image/webp")
    answer = fetch(store.sign(key, "GET", 60))
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"picture", "image/webp")
    assert fetch(store.sign(key, "HEAD", 60), "HEAD").status_code == 200
    assert fetch(store.sign(key, "GET", 60).partition("?")[0]).status_code == 403


@pytest.mark.parametrize(
    ("name", "value", "expected", "kind"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong-and-secret", "secret key is wrong", BadConfiguration),
        ("AWS_ACCESS_KEY_ID", "nobody-and-secret", "access key is unknown", BadConfiguration),
        ("AWS_ENDPOINT", "http://127.0.0.1:1", "no answer", StoreUnavailable),
    ],
)
def test_what_is_wrong_with_s3_is_one_line_without_a_secret(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str, kind: type[Exception]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(kind, match=expected) as caught:
        check_store(S3ResultStore(BUCKET, "", PREFIX))
    assert "secret" not in str(caught.value).replace("secret key", "") and "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_server_of_s3_killed_in_the_middle_of_uploads_has_them_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server(tmp_path / "s3")
    server.set_environment(monkeypatch)
    try:
        server.start()
        store, content = S3ResultStore(BUCKET, "killed", PREFIX), os.urandom(4_000_000)
        safe, failed, started = [], [], threading.Event()

        def upload() -> None:
            for key in make_key(number=200):
                started.set()
                try:
                    store.put(key, content, "image/png")
                except StoreUnavailable:
                    failed.append(key)
                    return
                safe.append(key)

        uploads = threading.Thread(target=upload)
        uploads.start()
        started.wait()
        while len(safe) < 3:
            time.sleep(0.01)
        server.kill()
        uploads.join()
        server.start()
        assert failed, "the last upload met a dead server"
        assert all(store.get(key) == content for key in safe)
        assert store.get(failed[0]) in (None, content)
    finally:
        server.kill()
