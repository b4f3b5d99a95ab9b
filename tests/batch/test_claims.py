"""One process at a time works on a shard, whatever stops, dies or freezes."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from giantleap.batch.claims import FOLDER, Claim, Claims, State
from giantleap.batch.store import Store
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
