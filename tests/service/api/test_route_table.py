"""Every route refuses parameters that it does not know, and every request is recorded under its route."""

import logging
from typing import Any

import httpx
import pytest

from giantleap.service.api.route_table import RouteTable
from tests.service.compat_fakes import FileProducer

JOB = "9ffc72bd-eedb-4a4b-8709-584d01415be4"
BODIES = {"/generate": {"prompt": "a"}, "/v1/images/generations": {"prompt": "a"}}


def operations(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(path, method) for path, methods in document["paths"].items() for method in methods]


def test_an_unknown_parameter_is_refused_by_name_on_every_route(
    live: tuple[FileProducer, str], document: dict[str, Any]
) -> None:
    producer, url = live
    producer.reset()
    for path, method in operations(document):
        place = path.format(job_id=JOB, model="paper", bundle="paper")
        sent = {"json": BODIES[path]} if path in BODIES else {}
        answer = httpx.request(method, f"{url}{place}?nonsense=1", timeout=60, **sent)  # type: ignore[arg-type]
        assert answer.status_code == 422, f"{method} {path}: {answer.status_code} {answer.text}"
        assert "nonsense" in answer.text and "is not a known query parameter" in answer.text
    assert not producer.records, "nothing was enqueued"


@pytest.mark.parametrize("path", ["/generate", "/upscale"])
def test_cancel_on_disconnect_is_true_or_false(live: tuple[FileProducer, str], path: str) -> None:
    answer = httpx.post(f"{live[1]}{path}?cancel_on_disconnect=maybe", json={"prompt": "a"}, timeout=60)
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"field": "cancel_on_disconnect", "reason": "must be true or false"}]


@pytest.mark.parametrize(
    "target", ["/generate?width=320", "/jobs?page=2", f"/jobs/{JOB}/result?format=jpeg", "/upscale?scal=2"]
)
def test_the_problem_names_the_parameter_and_those_that_exist(live: tuple[FileProducer, str], target: str) -> None:
    method = "POST" if target.startswith(("/generate", "/upscale")) else "GET"
    answer = httpx.request(method, live[1] + target, json={"prompt": "a"} if "generate" in target else None, timeout=60)
    assert answer.status_code == 422 and answer.headers["content-type"] == "application/problem+json"
    (fault,) = answer.json()["errors"]
    assert fault["field"] == target.partition("?")[2].partition("=")[0] and "known are " in fault["reason"]


def test_known_parameters_of_a_route_and_of_what_it_depends_on_are_taken(live: tuple[FileProducer, str]) -> None:
    producer, url = live
    producer.reset()
    for target in ("/generate?cancel_on_disconnect=true", "/v1/images/generations"):
        assert httpx.post(url + target, json={"prompt": "a"}, timeout=60).status_code == 200
    assert httpx.get(f"{url}/jobs?limit=1&status=succeeded", timeout=60).status_code == 200
    picture = producer.files[producer.jobs[-1].id][0]
    answer = httpx.post(f"{url}/upscale?cancel_on_disconnect=true&scale=2", content=picture, timeout=60)
    assert answer.status_code == 200, answer.text


def test_a_parameter_that_is_there_twice_is_refused(live: tuple[FileProducer, str]) -> None:
    answer = httpx.get(f"{live[1]}/jobs?limit=1&limit=2", timeout=60)
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == "limit"


def test_a_table_knows_templates_and_parameters() -> None:
    document: dict[str, Any] = {
        "paths": {
            "/a/{x}": {
                "get": {
                    "parameters": [
                        {"name": "q", "in": "query", "schema": {"type": "string"}},
                        {"name": "many", "in": "query", "schema": {"anyOf": [{"type": "array"}, {"type": "null"}]}},
                        {"name": "h", "in": "header", "schema": {}},
                    ]
                }
            }
        }
    }
    table = RouteTable.from_document(document)
    assert [table.template(path) for path in ("/a/1", "/a/1/2", "/docs", "/b")] == ["/a/{x}", "none", "/docs", "none"]
    assert table.faults("/a/1", "HEAD", ["q", "many", "many"]) == []
    assert [name for name, _ in table.faults("/a/1", "GET", ["q", "h", "z", "z"])] == ["h", "z"]
    assert table.faults("/a/1", "GET", ["q", "q"]) == [("q", "is in the query more than once; send it once")]


@pytest.mark.parametrize(
    ("target", "headers", "route"),
    [
        ("/generate", {"X-Long": "a" * 40_000}, "/generate"),
        ("/generate", {"Content-Encoding": "gzip"}, "/generate"),
        (f"/jobs/{JOB}", {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, "/jobs/{job_id}"),
        ("/nowhere", {}, "none"),
    ],
)
def test_a_refused_request_is_logged_under_its_route(
    live: tuple[FileProducer, str],
    caplog: pytest.LogCaptureFixture,
    target: str,
    headers: dict[str, str],
    route: str,
) -> None:
    caplog.set_level(logging.INFO)
    method = "DELETE" if target.startswith("/jobs") else "POST"
    with httpx.Client(timeout=60) as client:
        request = client.build_request(method, live[1] + target, headers=headers, content=b"{}")
        answer = client.send(request)
    assert answer.status_code >= 400
    (ended,) = [record for record in caplog.records if record.message == "request ended"]
    assert ended.fields["route"] == route  # type: ignore[attr-defined]
