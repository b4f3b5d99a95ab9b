"""Requests that the OpenAPI document allows, and some that it does not: no fault of ours, and answers as it says.

Against a real server, queue and Redis, with a worker that makes real files without a model. `make fuzz` sends many.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as examples
from hypothesis.errors import Unsatisfiable
from safetensors.numpy import save
from schemathesis.checks import content_type_conformance, response_schema_conformance, status_code_conformance
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from giantleap.service.api.app import create_app
from giantleap.service.api.openapi import describe
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.job import GenerateParams, ResultFile
from giantleap.service.settings import read_settings
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis
from tests.service.compat_fakes import to_file
from tests.service.fake_producer import FakeProducer
from tests.service.live_server import live_server
from tests.service.paper_bundle import CHANNELS, write_paper_bundle
from tests.service.thread_worker import thread_worker

CHECKS = (content_type_conformance, response_schema_conformance, status_code_conformance)
MAY_FAIL = (503, 504)  # not ready, a full store, a deadline: documented, and no fault of ours


def read_document(root: Path) -> dict[str, Any]:
    """The OpenAPI document; a producer in memory, which gets no request."""
    app = create_app(read_settings(bundle=(write_paper_bundle(root),)), FakeProducer())  # type: ignore[arg-type]
    return describe(app)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return read_document(tmp_path_factory.mktemp("document") / "paper")


def make_results(claim: Claim) -> list[tuple[ResultFile, bytes]]:
    """Files of the right kind and size: noise, or a latent of zeros."""
    params = claim.job.params
    if isinstance(params, GenerateParams):
        contents, kind = [to_file(claim.job, index) for index in range(params.num_images)], params.output_format
    elif params.output == "image":
        contents, kind = [to_file(claim.job, index) for index in range(params.batch_items)], params.output_format
    else:
        height, width = (int(params.scale * side) for side in (params.latent_height, params.latent_width))
        file = save({"latent": np.zeros((CHANNELS, height, width), np.float32)})
        return [(ResultFile("application/x-safetensors", len(file)), file)] * params.batch_items
    return [(ResultFile(f"image/{kind}", len(content), 1, 8, 8), content) for content in contents]


def end_with_files(consumer: JobConsumer, claim: Claim) -> None:
    consumer.complete(claim, make_results(claim), {}, ())


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("openapi")
    server = EmbeddedRedis(appendfsync="everysec")
    settings = read_settings(
        redis_url=server.start(root / "redis"),
        key_prefix="openapi",
        bundle=(write_paper_bundle(root / "paper"),),
        wait_timeout_s=20.0,
        log_level="error",
    )
    with live_server(create_app(settings)) as base_url, thread_worker(settings, "paper", end_with_files):
        yield base_url
    server.stop()


def send_examples(document: dict[str, Any], url: str, number: int) -> int:
    """Sends `number` requests to each operation, half as the document says; how many answers were looked at."""
    schema = schemathesis.openapi.from_dict(document)
    responses = 0
    for each in schema.get_all_operations():
        assert isinstance(each, Ok), each
        operation = each.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @examples(
                max_examples=max(1, number // 2),
                deadline=None,
                derandomize=True,
                database=None,
                phases=(Phase.generate,),
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(mode))
            def send(case: schemathesis.Case[Any]) -> None:
                nonlocal responses
                response = case.call(base_url=url, session=session, timeout=60)
                assert response.status_code < 500 or response.status_code in MAY_FAIL, (
                    f"{case.method} {case.formatted_path}: {response.status_code} {response.text[:500]}"
                )
                case.validate_response(response, checks=list(CHECKS))
                responses += 1

            # Unsatisfiable: an operation without a value that could be wrong.
            nothing_wrong = (Unsatisfiable,) if mode is GenerationMode.NEGATIVE else ()
            with requests.Session() as session, contextlib.suppress(*nothing_wrong):
                send()
    return responses


def test_a_few_examples_of_each_operation_are_answered_as_documented(document: dict[str, Any], url: str) -> None:
    assert send_examples(document, url, 6) > 2 * len(document["paths"])


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.timeout(1800)
def test_many_examples_of_each_operation_are_answered_as_documented(
    document: dict[str, Any], url: str, record_property: Callable[[str, object], None]
) -> None:
    responses = send_examples(document, url, 250)
    record_property("answers as documented", responses)
    print(f"{responses} answers, all as documented")
    assert responses > 10 * len(document["paths"])
