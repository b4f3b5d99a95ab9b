"""The checks of the doctor as functions of facts, for what no service here shows: TLS, old servers, full disks."""

import json
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from giantleap.service.doctor import access, address, hooks, host, images, publishing, redis_server, scrape, workers
from giantleap.service.doctor.findings import HIDDEN, Finding, Level, fail
from giantleap.service.doctor.probe import Answer, Service
from giantleap.service.doctor.requests import are_models, to_latent_request, to_long_body, to_small_body
from giantleap.service.jobqueue.replies import ServerReply
from giantleap.service.jobs.devices import Device

GIB = 1 << 30
SERVER: dict[str, Any] = {
    "redis_version": "7.2.4", "role": "master", "used_memory": GIB, "maxmemory": 4 * GIB, "aof_enabled": True,
    "maxmemory_policy": "noeviction",
}  # fmt: skip
MODEL: dict[str, Any] = {
    "name": "a", "scale": 2, "min_base": 96, "max_base": 192, "max_steps": 50, "max_images": 4,
    "max_image_pixels": 512 * 512, "methods": {"lua": [2, 4]}, "latent_space": {"channels": 4, "stride": 8},
}  # fmt: skip


def answer(document: object, status: int = 200, **headers: str) -> Answer:
    return Answer(status, headers, json.dumps(document).encode(), time.time(), time.time())


def images_answer(url: str) -> Answer:
    return answer({"data": [{"url": url}]})


PAGE = Answer(200, {"content-type": "text/html"}, b"<html>")


def server(**changes: Any) -> ServerReply:
    return ServerReply(**(SERVER | changes))


@pytest.mark.parametrize(
    ("finding", "level", "words"),
    [
        (address.check_transport("http://images.example.org"), Level.WARN, "plain HTTP over a network"),
        (address.check_transport("https://images.example.org"), Level.OK, "TLS"),
        (
            address.check_address("http://a.example", answer({}, 308, location="https://a.example/livez")),
            Level.FAIL,
            "redirects to https://a.example",
        ),
        (address.check_version(answer({"version": "0.0.1"}), "0.0.2"), Level.WARN, "0.0.1"),
        (address.check_version(answer({}, 404), "0.0.2"), Level.SKIPPED, "404"),
        (address.check_clock(answer({})), Level.SKIPPED, "no Date"),
        (address.check_clock(answer({}, date=formatdate(time.time(), usegmt=True))), Level.OK, "that of this machine"),
        (access.check_key(True, answer([]), answer([])), Level.WARN, "not checked"),
        (access.check_key(True, answer({}, 401), answer({}, 502)), Level.FAIL, "502"),
        (redis_server.check_server_version(server(redis_version="6.2.1")), Level.FAIL, "6.2.1"),
        (redis_server.check_room(server(used_memory=int(3.3 * GIB)), GIB), Level.WARN, "nearly full"),
        (redis_server.check_room(server(used_memory=4 * GIB), GIB), Level.FAIL, "refuses"),
        (redis_server.check_room(server(), 5 * GIB), Level.WARN, "5120 MiB of results"),
        (redis_server.check_room(server(maxmemory=0, total_system_memory=2 * GIB), GIB), Level.OK, "of its machine"),
        (redis_server.check_policy(ServerReply()), Level.SKIPPED, "maxmemory-policy"),
        (host.judge_disk(Path("/data"), 10 << 20, 100 * GIB), Level.FAIL, "0.0 GiB"),
        (host.judge_disk(Path("/data"), 5 * GIB, 100 * GIB), Level.WARN, "less than a tenth"),
        (images.check_stages(answer({"stages": {"queue": 40.0}})), Level.WARN, "queue 40.00 s"),
        (images.check_latent(answer({}, 202), (4, 24, 24)), Level.FAIL, "in time"),
        (images.check_latent(answer({}), (4, 24, 24)), Level.FAIL, "no safetensors"),
        (publishing.check_result_url("/a/jobs/1/result", PAGE), Level.FAIL, "below /a"),
        (
            publishing.check_absolute_url("https://a.example", images_answer("http://a.example/v1/images/1/content")),
            Level.FAIL,
            "are http, you used https",
        ),
        (
            publishing.check_absolute_url("https://a.example", images_answer("https://a.example/v1/images/1/content")),
            Level.OK,
            "",
        ),
        (publishing.check_stream(publishing.StreamFacts(True, True)), Level.SKIPPED, "longest"),
        (publishing.check_body_limit(Answer(0, reason="WriteError"), GIB), Level.FAIL, "1024 MiB does not arrive"),
        (hooks.check_counted("https://a.example/x", {}, {}), Level.SKIPPED, "a.example"),
        (hooks.check_counted("https://a.example/x", {"a": 1}, {"webhooks delivered": 1}), Level.OK, "took one"),
        (hooks.check_counted("https://a.example/x", {"a": 1}, {"a": 1}), Level.WARN, "was counted"),
        (scrape.check_metrics(answer({}), {"build_info": 1.0, "queue_reachable": 1.0}), Level.FAIL, "workers_live"),
        (scrape.check_metrics(answer({}), {"build_info": 1.0, "queue_reachable": 0.0}), Level.WARN, "reach Redis"),
    ],
)  # fmt: skip
def test_a_check_judges_facts(finding: Finding, level: Level, words: str) -> None:
    assert finding.level is level and words in finding.found, finding.to_line()
    assert (finding.advice != "") == (level is not Level.OK)


def test_a_queue_that_does_not_move_and_dead_letters_are_found() -> None:
    stuck = workers.QueueFacts(live_workers=1, waiting=3, processing=0, oldest_age_s=90.0, dead_lettered=2)
    alive, queue, dead = workers.check_queue(stuck)
    assert (alive.level, queue.level, dead.level) == (Level.OK, Level.FAIL, Level.WARN)
    assert "the first for 90 s" in queue.found and "dead list" in dead.advice


def test_a_worker_whose_type_is_emulated_is_found() -> None:
    slow = Device("cpu", GIB, 0, {"a": {}}, version="0.1.0", emulated_dtype="bfloat16")
    found = list(workers.check_devices([slow.to_json()], ["a"], "0.1.0"))
    assert [(each.check, each.level) for each in found][-1] == ("dtype", Level.WARN)
    assert "GIANTLEAP_DTYPE=float32" in found[-1].advice
    plain = replace(slow, emulated_dtype=None)
    assert all(each.level is Level.OK for each in workers.check_devices([plain.to_json()], ["a"], "0.1.0"))


def test_no_line_holds_a_secret_even_where_the_address_echoes_it() -> None:
    echoed = fail("key", "the server says: gl_secret is wrong\nand more", "ask for gl_secret")
    line = echoed.without(["gl_secret"]).to_line()
    assert "gl_secret" not in line and line.count(HIDDEN) == 2 and "\n" not in line


def test_the_key_goes_to_the_service_alone() -> None:
    service = Service(None, "https://a.example/images", "gl_x")  # type: ignore[arg-type]
    assert service.is_own(service.to_published("/images/jobs/1/result?index=0"))
    assert not service.is_own(service.to_published("https://b.example/jobs/1"))
    assert not service.is_own(service.to_published("http://a.example/jobs/1"))


def test_what_is_no_list_of_models_is_no_base_of_requests() -> None:
    assert are_models([MODEL])
    others: tuple[object, ...] = (None, {}, [], ["a"], [{"name": "a"}])
    for other in others:
        assert not are_models(other)


def test_requests_are_the_smallest_and_the_longest_of_a_bundle() -> None:
    small, long = to_small_body(MODEL), to_long_body(MODEL)
    assert (small["width"], small["height"], small["seed"]) == (192, 192, 7)
    assert (long["width"], long["steps"], long["num_images"]) == (384, 50, 4)
    latent = to_latent_request(MODEL)
    assert latent is not None and latent.shape == (4, 24, 24) and latent.query["scale"] == "2"
    assert to_latent_request(MODEL | {"methods": {"direct": [1]}}) is None
