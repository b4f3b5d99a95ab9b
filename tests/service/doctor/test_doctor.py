"""`giantleap doctor` over a real service: all is well, or a fault that was put in is found by name."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from pydantic import SecretStr
from typer.testing import CliRunner

from giantleap.cli.main import app
from giantleap.models.worker_role import WorkerRole
from giantleap.service.auth import Scope
from giantleap.service.doctor.examination import Options, examine
from giantleap.service.doctor.findings import Finding, Level, is_healthy
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.devices import Device
from giantleap.service.settings import Settings
from tests.chaos.stores import OneServer
from tests.service.doctor.conftest import Installation, OpenApi, write_key
from tests.service.doctor.faulty_proxy import FaultyProxy, running_proxy

PROMPT_WORDS = ("sphere", "floor")


def run_doctor(url: str, settings: Settings, webhook_url: str | None = None) -> list[Finding]:
    findings = list(examine(Options(url, settings, webhook_url, timeout_s=120.0)))
    lines = "\n".join(finding.to_line() for finding in findings)
    secrets = [settings.api_key and settings.api_key.get_secret_value(), urlsplit(settings.redis_url or "").password]
    assert not [secret for secret in secrets if secret and secret in lines]
    assert not [word for word in PROMPT_WORDS if word in lines]
    return findings


def of_check(findings: list[Finding], check: str) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


def the(findings: list[Finding], check: str, level: Level) -> Finding:
    """The one finding of a check, which has this level and says what to do."""
    found = of_check(findings, check)
    assert [each.level for each in found] == [level], "\n".join(each.to_line() for each in findings)
    assert (found[0].advice != "") == (level is not Level.OK)
    return found[0]


@contextmanager
def configured(store: OneServer, **values: str) -> Iterator[None]:
    """The server with other values of its configuration, until the block ends."""
    with redis.Redis.from_url(store.url, decode_responses=True) as client:
        names = {name.replace("_", "-"): value for name, value in values.items()}
        before: dict[str, str] = {name: client.config_get(name)[name] for name in names}
        try:
            for name, value in names.items():
                client.config_set(name, value)
            yield
        finally:
            for name, value in before.items():
                client.config_set(name, value)


@contextmanager
def registered(settings: Settings, device: Device) -> Iterator[None]:
    """A worker that lives and takes nothing."""
    assert settings.redis_url is not None
    consumer = JobConsumer(open_redis(settings.redis_url), settings, ("tiny",), "w", device=device, role=device.role)
    consumer.open()
    try:
        yield
    finally:
        consumer.close()


def test_a_healthy_service_gives_nothing_but_ok(installation: Installation) -> None:
    findings = run_doctor(installation.url, installation.settings)
    assert [each.to_line() for each in findings if each.level is not Level.OK] == []
    assert Counter(each.check for each in findings) == Counter(
        [
            *("address", "transport", "version", "clock", "readiness", "key", "scopes", "metrics"),
            *("redis", "eviction", "append file", "fsync", "memory", "redis clock"),
            *("workers", "queue", "versions", "roles", "body size", "latent", "events"),
            *("result URL", "image", "marks", "signature", "stages", "whole URL", "webhook", "disk", "store"),
        ]
    )


def test_without_redis_and_from_afar_the_doctor_says_what_it_did_not_see(installation: Installation) -> None:
    findings = run_doctor(installation.url, installation.settings.model_copy(update={"redis_url": None}))
    assert {each.check for each in findings if each.level is Level.SKIPPED} == {"redis", "versions"}
    assert is_healthy(findings)


@pytest.mark.parametrize(
    ("values", "check", "level", "words"),
    [
        ({"maxmemory_policy": "allkeys-lru"}, "eviction", Level.FAIL, "allkeys-lru"),
        ({"appendonly": "no"}, "append file", Level.FAIL, "appendonly no"),
        ({"appendfsync": "everysec"}, "fsync", Level.WARN, "everysec"),
    ],
)
def test_a_redis_that_can_lose_jobs_is_found(
    values: dict[str, str], check: str, level: Level, words: str,
    lonely: Settings, store: OneServer, open_api: OpenApi,
) -> None:  # fmt: skip
    with configured(store, **values), open_api(lonely) as url:
        findings = run_doctor(url, lonely)
    assert words in the(findings, check, level).found


def test_without_a_url_of_redis_the_warnings_of_the_api_are_passed_on(
    lonely: Settings, store: OneServer, open_api: OpenApi
) -> None:
    with configured(store, maxmemory_policy="allkeys-lru"), open_api(lonely) as url:
        findings = run_doctor(url, lonely.model_copy(update={"redis_url": None}))
    policy, unseen = of_check(findings, "redis")
    assert policy.level is Level.FAIL and "noeviction" in policy.advice and unseen.level is Level.SKIPPED


def test_a_redis_that_is_nearly_full_is_found(lonely: Settings, store: OneServer, open_api: OpenApi) -> None:
    with redis.Redis.from_url(store.url) as client:
        used_bytes = int(client.info("memory")["used_memory"])
    with open_api(lonely) as url, configured(store, maxmemory=str(int(used_bytes * 1.1))):
        findings = run_doctor(url, lonely)
    full = of_check(findings, "memory")[0]
    assert full.level in (Level.WARN, Level.FAIL) and "maxmemory" in full.advice


def test_a_service_without_worker_is_found_and_nothing_of_it_counts_as_checked(
    lonely: Settings, open_api: OpenApi
) -> None:
    with open_api(lonely) as url:
        findings = run_doctor(url, lonely)
    assert "giantleap worker" in the(findings, "workers", Level.FAIL).advice
    assert the(findings, "readiness", Level.FAIL).found == "no worker is ready"
    assert {each.check for each in findings if each.level is Level.SKIPPED} == {"latent", "image", "webhook", "store"}
    assert the(findings, "events", Level.OK) and the(findings, "body size", Level.OK)
    assert the(findings, "key", Level.WARN)


def test_a_worker_of_another_version_is_found(lonely: Settings, open_api: OpenApi) -> None:
    device = Device("cpu", 1 << 30, 0, {"tiny": {}}, version="0.0.1")
    with registered(lonely, device), open_api(lonely) as url:
        findings = list(examine(Options(url, lonely, timeout_s=1.0)))
    assert "0.0.1" in the(findings, "versions", Level.WARN).found
    assert "no worker took" in the(findings, "image", Level.FAIL).found


def test_a_missing_pool_of_decoding_workers_is_found(lonely: Settings, open_api: OpenApi) -> None:
    device = Device("cpu", 1 << 30, 0, {"tiny": {}}, WorkerRole.GENERATE)
    with registered(lonely, device), open_api(lonely) as url:
        findings = list(examine(Options(url, lonely, timeout_s=1.0)))
    assert "no worker of role decode serves bundle tiny" in the(findings, "roles", Level.FAIL).found
    assert "no worker of role decode" in the(findings, "readiness", Level.FAIL).found


def test_a_bundle_that_no_worker_serves_is_found(lonely: Settings, open_api: OpenApi) -> None:
    with registered(lonely, Device("cpu", 1 << 30, 0, {"other": {}})), open_api(lonely) as url:
        findings = list(examine(Options(url, lonely, timeout_s=1.0)))
    assert "no worker serves bundle tiny" in the(findings, "roles", Level.FAIL).found


@pytest.mark.parametrize(("key", "words"), [("gl_wrong", "does not know"), (None, "needs an API key")])
def test_a_wrong_key_and_none_are_found(installation: Installation, key: str | None, words: str) -> None:
    secret = None if key is None else SecretStr(key)
    settings = installation.settings.model_copy(update={"api_key": secret})
    findings = run_doctor(installation.url, settings)
    assert words in the(findings, "key", Level.FAIL).found
    assert not of_check(findings, "image") and the(findings, "jobs", Level.SKIPPED)


def test_missing_scopes_are_found_and_skip_what_they_forbid(lonely: Settings, open_api: OpenApi, tmp_path: Any) -> None:
    key = write_key(tmp_path / "keys.toml", Scope.UPSCALE)
    settings = lonely.model_copy(update={"api_key": SecretStr(key)})
    with open_api(lonely, api_keys_file=tmp_path / "keys.toml") as url:
        findings = run_doctor(url, settings)
    assert the(findings, "scopes", Level.WARN).found == "the key lacks generate, metrics"
    for check in ("metrics", "image", "webhook"):
        assert "lacks the scope" in the(findings, check, Level.SKIPPED).found


@pytest.mark.parametrize(
    ("fault", "check", "level", "words"),
    [
        ({"max_body_bytes": 1 << 19}, "body size", Level.FAIL, "413"),
        ({"blocked": ("/metrics",)}, "metrics", Level.WARN, "404"),
        ({"skew_s": 400.0}, "clock", Level.FAIL, "ahead"),
        ({"skew_s": -30.0}, "clock", Level.WARN, "behind"),
        ({"blocked": ("/readyz",)}, "readiness", Level.FAIL, "404"),
    ],
)
def test_a_fault_of_a_proxy_is_found(
    fault: dict[str, Any], check: str, level: Level, words: str, lonely: Settings, open_api: OpenApi
) -> None:
    with open_api(lonely) as url, running_proxy(FaultyProxy(url, **fault)) as outside:
        findings = run_doctor(outside, lonely)
    assert words in the(findings, check, level).found


def test_a_proxy_that_buffers_events_is_found(lonely: Settings, open_api: OpenApi) -> None:
    with open_api(lonely) as url, running_proxy(FaultyProxy(url, buffers=True)) as outside:
        findings = run_doctor(outside, lonely)
    assert "buffers the stream" in the(findings, "events", Level.FAIL).found


def test_a_proxy_below_a_path_that_the_service_does_not_know_is_found(installation: Installation) -> None:
    with running_proxy(FaultyProxy(installation.url, prefix="/images")) as outside:
        findings = run_doctor(outside, installation.settings)
    assert "GIANTLEAP_ROOT_PATH" in the(findings, "result URL", Level.FAIL).advice
    assert "lack the path /images" in the(findings, "whole URL", Level.FAIL).found
    assert the(findings, "image", Level.OK), "the image itself is there"


def test_a_proxy_that_drops_the_host_is_found(installation: Installation) -> None:
    with running_proxy(FaultyProxy(installation.url, passes_host=False)) as outside:
        findings = run_doctor(outside, installation.settings)
    assert urlsplit(installation.url).netloc in the(findings, "whole URL", Level.FAIL).found
    assert the(findings, "result URL", Level.OK)


def test_a_webhook_host_that_is_not_allowed_is_found(lonely: Settings, open_api: OpenApi) -> None:
    changes = {"webhook_secret": SecretStr("a secret of webhooks"), "webhook_hosts": ("hooks.example.org",)}
    settings = lonely.model_copy(update=changes)
    with open_api(settings) as url:
        findings = run_doctor(url, settings, "https://elsewhere.example.com/secret-path")
    refused = the(findings, "webhook", Level.FAIL)
    assert "not on the list" in refused.found and "GIANTLEAP_WEBHOOK_HOSTS" in refused.advice
    assert "secret-path" not in refused.to_line()


def test_a_receiver_of_the_operator_gets_one(installation: Installation) -> None:
    with running_proxy(FaultyProxy(installation.url)) as receiver:  # answers a POST to an unknown path with 404
        refusing = run_doctor(installation.url, installation.settings, f"{receiver}/nowhere")
    assert "did not take one" in the(refusing, "webhook", Level.FAIL).found


def test_an_address_that_is_silent_and_one_that_is_another_program(lonely: Settings, store: OneServer) -> None:
    silent = run_doctor("http://127.0.0.1:1", lonely)
    assert "ConnectError" in the(silent, "address", Level.FAIL).found and the(silent, "eviction", Level.OK)
    with running_proxy(FaultyProxy("http://127.0.0.1:1", blocked=("/livez",))) as other:
        assert "404" in the(run_doctor(other, lonely), "address", Level.FAIL).found


def test_the_command_prints_lines_or_json_and_its_exit_code_says_whether_one_failed(
    lonely: Settings, open_api: OpenApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIANTLEAP_DATA_DIR", str(lonely.data_dir))
    monkeypatch.setenv("GIANTLEAP_KEY_PREFIX", lonely.key_prefix)
    with open_api(lonely) as url:
        lines = CliRunner().invoke(app, ["doctor", "--url", url, "--redis-url", lonely.redis_url or ""])
        objects = CliRunner().invoke(app, ["doctor", "--url", url, "--json"])
    assert (lines.exit_code, objects.exit_code) == (1, 1)
    assert "fail     workers     no worker is alive; 0 jobs wait  -> start `giantleap worker`" in lines.stdout
    checks = [json.loads(line) for line in objects.stdout.splitlines()]
    assert {"level", "check", "found", "advice"} == set(checks[0]) and checks[0]["level"] == "ok"
