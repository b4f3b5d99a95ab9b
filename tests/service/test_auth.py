"""API keys: what their file may hold, whose key is whose, when the file is read again, and the commands about keys."""

import hashlib
import logging
import os
import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from giantleap.cli.main import app
from giantleap.service import auth
from giantleap.service.auth import (
    Caller,
    KeyRing,
    KeysFileError,
    Scope,
    check_auth_config,
    find_caller,
    new_key,
    read_keys,
)
from giantleap.service.settings import read_settings

ENTRY = '[[key]]\nname = "alice"\nsha256 = "{sha256}"\nscopes = ["generate"]\n'


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def entry(key: str, name: str = "alice", more: str = "") -> str:
    return ENTRY.replace("alice", name).format(sha256=digest(key)) + more


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.touch(mode=0o600)
    return path


def test_a_key_stands_for_its_caller_with_scopes_and_limits(path: Path) -> None:
    limits = "requests_per_minute = 60\nmax_jobs = 4\nmegapixel_steps_per_minute = 600\n"
    path.write_text(entry("k1") + entry("k2", "bob", limits).replace('"generate"', '"admin", "metrics"'))
    keys = read_keys(path)
    assert find_caller(keys, "k1") == Caller("alice", frozenset({Scope.GENERATE}))
    assert find_caller(keys, "k2") == Caller("bob", frozenset({Scope.ADMIN, Scope.METRICS}), 60, 4, 600)
    for wrong in ("", "k", "k3", digest("k1"), "K1", "k1 ", "\udcff"):
        assert find_caller(keys, wrong) is None


def test_two_keys_of_one_name_are_one_caller(path: Path) -> None:
    path.write_text(entry("old") + entry("new"))
    keys = read_keys(path)
    assert find_caller(keys, "old") == find_caller(keys, "new")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "key: is required"),
        ("key = []", "key: "),
        ("[[key]]\n", "key.0.name"),
        (entry("k") + "max_job = 1\n", "key.0.max_job: is not a known field"),
        (entry("k") + "max_jobs = 0\n", "key.0.max_jobs"),
        (entry("k") + 'max_jobs = "1"\n', "key.0.max_jobs"),
        (entry("k", "two words"), "key.0.name"),
        (entry("k", ""), "key.0.name"),
        (entry("k").replace("generate", "everything"), "key.0.scopes.0"),
        (entry("k").replace('"generate"', ""), "key.0.scopes"),
        (entry("k").replace(digest("k"), "abc"), "key.0.sha256"),
        (entry("k") + entry("k", "bob"), "twice"),
        ("[[key]\n", "not TOML"),
        ("\x00", "not TOML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_place(path: Path, text: str, reason: str) -> None:
    path.write_text(text)
    with pytest.raises(KeysFileError, match=re.escape(reason)):
        read_keys(path)


def test_a_secret_put_in_place_of_its_digest_is_not_repeated(path: Path) -> None:
    key, _ = new_key()
    path.write_text(entry("k").replace(digest("k"), key))
    with pytest.raises(KeysFileError) as refused:
        read_keys(path)
    assert key not in str(refused.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(path: Path) -> None:
    with pytest.raises(KeysFileError, match="cannot be read: No such file"):
        read_keys(path.with_name("none.toml"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(KeysFileError, match="UTF-8"):
        read_keys(path)
    path.write_bytes(b"#" * (auth._MAX_FILE_BYTES + 1))
    with pytest.raises(KeysFileError, match="too large"):
        read_keys(path)


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_may_read_is_warned_of(
    path: Path, mode: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(entry("k"))
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        read_keys(path)
    assert ("chmod 600" in caplog.text) == warns


def test_keys_are_read_again_when_the_file_changes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_CHECK_EVERY_S", 0.0)
    path.write_text(entry("k1"))
    ring = KeyRing.open(path)
    assert ring.find("k1") is not None and ring.find("k2") is None
    path.write_text(entry("k1") + entry("k2", "bob"))
    assert ring.find("k2") == Caller("bob", frozenset({Scope.GENERATE}))
    other = path.with_name("other.toml")
    other.write_text(entry("k3"))
    other.replace(path)  # as editors and Kubernetes do it
    assert ring.find("k1") is None and ring.find("k3") is not None


@pytest.mark.parametrize("wrong", ["[[key", "", None])
def test_a_file_that_became_wrong_keeps_the_keys_from_before(
    path: Path, wrong: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auth, "_CHECK_EVERY_S", 0.0)
    path.write_text(entry("k1"))
    ring = KeyRing.open(path)
    path.unlink() if wrong is None else path.write_text(wrong)
    for _ in range(3):
        assert ring.find("k1") is not None
    assert [record.levelname for record in caplog.records] == ["ERROR"], "said once, not at each request"
    path.write_text(entry("k2"))
    assert ring.find("k1") is None and ring.find("k2") is not None


def test_the_file_is_not_looked_at_for_every_request(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_CHECK_EVERY_S", 3600.0)
    path.write_text(entry("k1"))
    ring = KeyRing.open(path)
    path.write_text(entry("k2"))
    assert ring.find("k1") is not None and ring.find("k2") is None


def test_a_key_is_new_each_time_and_long() -> None:
    keys = {new_key()[0] for _ in range(8)}
    assert len(keys) == 8 and all(re.fullmatch(r"gl_[A-Za-z0-9_-]{43}", key) for key in keys)


@pytest.mark.parametrize(
    ("host", "warns"),
    [("127.0.0.1", False), ("127.8.8.8", False), ("::1", False), ("localhost", False), ("0.0.0.0", True),
     ("::", True), ("10.0.0.1", True), ("gpu.example.org", True)],
)  # fmt: skip
def test_listening_beyond_the_machine_without_keys_is_warned_of(
    host: str, warns: bool, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(entry("k"))
    with caplog.at_level(logging.WARNING):
        check_auth_config(read_settings(host=host, api_keys_file=path))
        assert caplog.text == ""
        check_auth_config(read_settings(host=host))
    assert ("without API keys" in caplog.text) == warns


def test_keys_new_prints_the_key_once_and_what_to_add() -> None:
    limits = ["--max-jobs", "2", "--megapixel-steps-per-minute", "600"]
    command = ["keys", "new", "--name", "alice", "--scope", "generate", "--scope", "upscale", *limits]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    key = done.stdout.strip()
    (added,) = tomllib.loads(done.stderr)["key"]
    limited = {"max_jobs": 2, "megapixel_steps_per_minute": 600}
    assert added == {"name": "alice", "sha256": digest(key), "scopes": ["generate", "upscale"]} | limited
    assert key not in done.stderr


def test_keys_new_refuses_a_name_that_the_file_would(path: Path) -> None:
    done = CliRunner().invoke(app, ["keys", "new", "--name", 'a"b', "--scope", "generate"])
    assert done.exit_code == 2 and not done.stdout


def test_keys_list_names_them_without_the_digest(path: Path) -> None:
    path.write_text(entry("k1", more="max_jobs = 3\nmegapixel_steps_per_minute = 9\n") + entry("k2", "bob"))
    done = CliRunner().invoke(app, ["keys", "list"], env={"GIANTLEAP_API_KEYS_FILE": str(path)})
    assert done.exit_code == 0 and digest("k1") not in done.stdout
    assert done.stdout.splitlines() == [
        f"alice  {digest('k1')[:8]}  generate  3 jobs, 9 megapixel-steps/min",
        f"bob  {digest('k2')[:8]}  generate  no limits",
    ]


@pytest.mark.parametrize("command", ["serve", "api"])
def test_a_broken_file_stops_the_start(path: Path, command: str) -> None:
    path.write_text("[[key")
    options = ["--redis-url", "redis://127.0.0.1:1/0"]
    done = CliRunner().invoke(app, [command, *options], env={"GIANTLEAP_API_KEYS_FILE": str(path)})
    assert done.exit_code == 2 and "not TOML" in done.stderr
    assert os.environ.get("GIANTLEAP_API_KEYS_FILE") is None


def run_new(path: Path, *more: str) -> Result:
    words = ["keys", "new", "--add", "--name", "alice", "--scope", "generate", *more]
    return CliRunner().invoke(app, words, env={"GIANTLEAP_API_KEYS_FILE": str(path)})


def test_a_new_key_is_added_to_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    for number in (1, 2):
        ended = run_new(path)
        assert ended.exit_code == 0, ended.output
        (key,) = ended.stdout.split()
        assert find_caller(read_keys(path), key) == Caller("alice", frozenset({Scope.GENERATE}))
        assert len(read_keys(path)) == number and path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path], "no draft is left"


def test_a_key_is_added_behind_a_link_and_comments_stay(tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text(f"# ours\n{entry('k1', 'bob')}")
    (tmp_path / "keys.toml").symlink_to(real)
    assert run_new(tmp_path / "keys.toml").exit_code == 0
    assert (tmp_path / "keys.toml").is_symlink() and real.read_text().startswith("# ours\n")
    assert [key.caller.name for key in read_keys(real)] == ["bob", "alice"]


def test_a_key_that_cannot_be_added_is_not_printed(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text("not = [toml")
    for path, reason in ((tmp_path / "keys.toml", "not TOML"), (tmp_path / "no" / "keys.toml", "mkdir -p")):
        ended = run_new(path)
        assert ended.exit_code == 2 and reason in ended.output and "gl_" not in ended.output
    assert (tmp_path / "keys.toml").read_text() == "not = [toml"
    ended = CliRunner().invoke(app, ["keys", "new", "--add", "--name", "alice", "--scope", "generate"])
    assert ended.exit_code == 2 and "GIANTLEAP_API_KEYS_FILE is not set" in ended.output
