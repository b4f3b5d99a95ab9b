"""One process at a time works on a shard, whatever stops, dies or freezes."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from giantleap.batch.claims import FOLDER, Claim, Claims, State
from giantleap.batch.store import Store
from tests.batch.conftest import Loaded
from tests.waiting import wait_until

SHARDS = ("a", "b", "c")
LEASE_S = 60.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def _let_die(tmp_path: Path, claim: Claim) -> None:
    """Make a claim look as if it was not renewed for longer than the lease."""
    os.utime(tmp_path / FOLDER / claim.name, (0, 0))


def test_each_shard_is_claimed_once_by_many_at_the_same_time(store: Store) -> None:
    shards, together = [f"s{index}" for index in range(20)], threading.Barrier(4)

    def take_all(_: int) -> list[Claim]:
        claims, taken = Claims(store, LEASE_S), []
        together.wait()
        while (claim := claims.take(shards)) is not None:
            taken.append(claim)
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [claim for each in pool.map(take_all, range(4)) for claim in each]
    assert sorted(claim.shard for claim in taken) == sorted(shards) and {claim.number for claim in taken} == {0}


def test_a_claim_of_a_dead_process_is_taken_once_and_lost_to_its_owner(store: Store, tmp_path: Path) -> None:
    owner, other, third = (Claims(store, LEASE_S) for _ in range(3))
    claim = owner.take(SHARDS[:1])
    assert claim is not None and owner.is_held(claim) and other.take(SHARDS[:1]) is None
    _let_die(tmp_path, claim)
    assert other.take(SHARDS[:1]) == Claim("a", 1) and third.take(SHARDS[:1]) is None
    assert not owner.is_held(claim)
    owner.end(claim, State.DONE)
    assert third.states(SHARDS) == {"a": State.HELD, "b": State.FREE, "c": State.FREE}, "a late end changes nothing"


def test_a_claim_is_renewed_while_its_owner_works(store: Store, tmp_path: Path) -> None:
    claims = Claims(store, lease_s=0.4)
    claim = claims.take(SHARDS[:1])
    assert claim is not None
    _let_die(tmp_path, claim)
    with claims.renewing(claim):
        wait_until(lambda: (tmp_path / FOLDER / claim.name).stat().st_mtime > 0, "the renewal")


def test_how_a_claim_ended_says_whether_the_shard_is_free(store: Store) -> None:
    claims = Claims(store, LEASE_S)
    for shard, state in zip(SHARDS, (State.FREE, State.DONE, State.FAILED), strict=True):
        claim = claims.take([shard])
        assert claim is not None
        claims.end(claim, state)
    assert claims.take(SHARDS) == Claim("a", 1) and claims.take(SHARDS) is None
    later = Claims(store, LEASE_S)
    assert later.take(SHARDS) == Claim("c", 1), "failed before it started"


@pytest.mark.parametrize("url", ["{}", "memory://store-{}"])
def test_a_file_is_created_by_one_and_replaced_by_any(tmp_path: Path, url: str) -> None:
    store = Store(url.format(tmp_path))
    assert store.read("x/y") is None and store.names("x") == [] and store.modified_s("x/y") is None
    assert store.create("x/y", b"1") and not store.create("x/y", b"2") and store.read("x/y") == b"1"
    store.write("x/y", b"3")
    assert store.read("x/y") == b"3" and store.names("x") == ["y"] and store.modified_s("x/y")
    store.delete("x/y")
    assert store.names("x") == []


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a place in a bucket of a local S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    httpx.put(f"http://{host}:{port}/bucket").raise_for_status()
    yield "s3://bucket/out"
    server.stop()


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # of the libraries of S3
def test_claims_and_outputs_work_on_s3(loaded: Loaded, latents: Path, tmp_path: Path, bucket: str) -> None:
    store = Store(bucket)
    first, second = Claims(store, LEASE_S), Claims(store, LEASE_S)
    claim = first.take(SHARDS[:1])
    assert claim == Claim("a", 0) and second.take(SHARDS[:1]) is None and first.is_held(claim)
    first.end(claim, State.FREE)
    assert second.take(SHARDS[:1]) == Claim("a", 1) and not first.is_held(claim)
    local, remote = loaded.run(latents, tmp_path / "out"), loaded.run(latents, bucket)
    assert {key: entry.sha256 for key, entry in remote.items()} == {key: entry.sha256 for key, entry in local.items()}
    assert sorted(store.names("_batch/manifest")) and (store.read("000.png") or b"").startswith(b"\x89PNG")
    assert set(loaded.run(f"{bucket}/*.png", tmp_path / "again")) == set(local)
