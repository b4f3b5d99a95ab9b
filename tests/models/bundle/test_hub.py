"""Files from the hub: whole or not at all, going on after a break, and never other bytes than the hub states."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from giantleap.models.bundle.hub import Hub, HubError, HubSnapshot
from tests.models.fake_hub import FakeHub, serve_hub

CONTENT = hashlib.sha512(b"weights").digest() * 64
FILES = {"unet/model.safetensors": CONTENT, "empty.txt": b""}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # bytes that a break may lose
    with serve_hub({"some/model": dict(FILES)}) as hub:
        yield hub


def fetch(server: FakeHub, path: Path, name: str = "unet/model.safetensors") -> str:
    hub = Hub(server.endpoint)
    return hub.fetch(hub.snapshot("some/model", "main"), name, path)


def snapshot(endpoint: str, hub_id: str = "some/model", revision: str = "main") -> HubSnapshot:
    return Hub(endpoint).snapshot(hub_id, revision)


def test_a_file_comes_whole_with_its_digest_and_the_token_of_this_machine(server: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down.safetensors"
    assert fetch(server, path) == hashlib.sha256(CONTENT).hexdigest()
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    assert server.tokens == {"Bearer secret"}
    fetch(server, tmp_path / "empty", "empty.txt")
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_broken_transfer_goes_on_where_it_stopped(server: FakeHub, tmp_path: Path) -> None:
    server.breaks["unet/model.safetensors"] = 1000
    path = tmp_path / "weights"
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    starts = [start for _, start in server.fetched]
    assert starts == [0, 1000, 2000, 3000, 4000]


def test_an_interrupted_download_resumes_in_the_next_call(server: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    (tmp_path / "weights.part").write_bytes(CONTENT[:500])
    server.breaks["unet/model.safetensors"] = 0
    with pytest.raises(HubError, match=r"broke off .*again to resume"):
        fetch(server, path)
    assert not path.exists() and (tmp_path / "weights.part").read_bytes() == CONTENT[:500]
    server.breaks.clear()
    fetch(server, path)
    assert path.read_bytes() == CONTENT and server.fetched[-1][1] == 500


def test_a_server_without_ranges_sends_the_file_anew(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "weights.part").write_bytes(b"x" * 50)
    server.ranges = False
    fetch(server, tmp_path / "weights")
    assert (tmp_path / "weights").read_bytes() == CONTENT


def test_more_bytes_than_the_file_has_are_thrown_away(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "weights.part").write_bytes(bytes(len(CONTENT) + 1))
    fetch(server, tmp_path / "weights")
    assert (tmp_path / "weights").read_bytes() == CONTENT


def test_other_bytes_than_the_hub_names_are_refused(server: FakeHub, tmp_path: Path) -> None:
    server.changed.add("unet/model.safetensors")
    with pytest.raises(HubError, match="the hub states"):
        fetch(server, tmp_path / "weights")
    assert not list(tmp_path.iterdir()), "neither the file nor its part may stay"


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "HF_TOKEN"), (403, "agree to the license"), (404, "no such"), (410, "status 410"), (503, "status 503")],
)
def test_a_refused_file_says_what_to_do(server: FakeHub, tmp_path: Path, status: int, words: str) -> None:
    server.statuses["unet/model.safetensors"] = status
    with pytest.raises(HubError, match=words) as refusal:
        fetch(server, tmp_path / "weights")
    assert "secret" not in str(refusal.value) and not list(tmp_path.iterdir())


def test_a_refused_repository_or_an_unreachable_hub_says_what_to_do(server: FakeHub) -> None:
    server.statuses["some/model"] = 401
    with pytest.raises(HubError, match="HF_TOKEN"):
        snapshot(server.endpoint)
    with pytest.raises(HubError, match="no such model, file or revision v9"):
        snapshot(server.endpoint, "no/model", "v9")
    with pytest.raises(HubError, match="cannot be reached"):
        snapshot("http://127.0.0.1:1")
    server.statuses.clear()
    server.repositories["some/model"].pop("empty.txt")
    assert list(snapshot(server.endpoint).files) == ["unet/model.safetensors"]


def test_a_server_that_is_no_hub_is_recognized(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "listing", lambda hub_id: ["hello"])
    with pytest.raises(HubError, match="does not answer as a Hugging Face hub"):
        snapshot(server.endpoint)
