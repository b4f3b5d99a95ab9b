"""What the doctor reads of a Redis as its users see it: with the least rights, with too few, and of a replica."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from giantleap.service.doctor.findings import Finding, Level
from giantleap.service.doctor.redis_server import RedisFacts, check_redis, read_redis
from giantleap.service.settings import Settings, read_settings
from tests.ports import free_ports
from tests.service.redis_groups import Server

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("doctor") / "server", free_ports(1)[0])
    started.start()
    yield started
    started.kill()


@pytest.fixture
def settings() -> Settings:
    return read_settings()


def read_as(server: Server, settings: Settings, *rules: str) -> RedisFacts | Finding:
    """What a user with these rights reads."""
    server.client.execute_command("ACL", "SETUSER", "doctor", "reset", "on", ">secret", *rules)
    return read_redis(f"redis://doctor:secret@127.0.0.1:{server.port}/0", settings)


def test_the_least_access_list_is_enough_but_for_fsync(server: Server, settings: Settings) -> None:
    lines = (ROOT / "deploy" / "redis" / "giantleap.acl").read_text().splitlines()
    _, _, *rules = next(line for line in lines if line.startswith("user ")).split()
    facts = read_as(server, settings, *(rule for rule in rules if rule != "on" and not rule.startswith(">")))
    assert isinstance(facts, RedisFacts)
    levels: dict[str, Any] = {finding.check: finding.level for finding in check_redis(facts, 1 << 20)}
    assert levels.pop("fsync") is Level.SKIPPED
    assert set(levels.values()) == {Level.OK}


def test_a_user_with_too_few_rights_is_found(server: Server, settings: Settings) -> None:
    refused = read_as(server, settings, "~*", "+ping", "+select")
    assert isinstance(refused, Finding) and refused.level is Level.FAIL
    assert "lacks a permission" in refused.found and "giantleap.acl" in refused.advice


def test_a_wrong_password_is_found_and_not_shown(server: Server, settings: Settings) -> None:
    refused = read_redis(f"redis://doctor:guessed@127.0.0.1:{server.port}/0", settings)
    assert isinstance(refused, Finding) and refused.level is Level.FAIL
    assert "refuses the login" in refused.found and "guessed" not in refused.to_line()


def test_a_replica_is_found(tmp_path: Path, settings: Settings) -> None:
    replica = Server(tmp_path / "replica", free_ports(1)[0], "replicaof 127.0.0.1 1")
    replica.start()
    try:
        found = read_redis(f"redis://127.0.0.1:{replica.port}/0", settings)
    finally:
        replica.kill()
    assert isinstance(found, Finding) and "is a replica" in found.found
