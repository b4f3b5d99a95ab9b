"""KServe v2 as Triton's own HTTP client speaks it, and what that client cannot send: broken and hostile bodies."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ml_dtypes  # tritonclient's own type for BF16, which it brings with it
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from giantleap.models.latent_space import LATENT_SPACES
from giantleap.service.errors import QueueFull
from giantleap.service.jobs.job import Priority, UpscaleParams
from tests.service.compat_fakes import (
    LATENT,
    STAGES,
    FileProducer,
    build_app,
    read_pixels,
    write_wan_bundle,
)
from tests.service.fake_producer import expire, fail, stay_queued
from tests.service.live_server import live_server
from tests.service.paper_bundle import CHANNELS

SHIFT, SCALE = 0.25, 0.5  # of the paper bundle's latent space
INFER = "/v2/models/paper/infer"


@pytest.fixture
def producer(live: tuple[FileProducer, str]) -> FileProducer:
    return live[0].reset()


@pytest.fixture
def url(live: tuple[FileProducer, str], producer: FileProducer) -> str:
    return live[1]


@pytest.fixture
def client(url: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(url.removeprefix("http://"), network_timeout=60) as client:
        yield client


def to_input(latent: np.ndarray, datatype: str = "FP32", binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("latent", list(latent.shape), datatype)
    tensor.set_data_from_numpy(latent, binary_data=binary)
    return tensor


def ask(name: str, binary: bool = True) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, binary_data=binary)]


def enlarge(latent: np.ndarray, scale: int) -> np.ndarray:
    return latent.repeat(scale, 2).repeat(scale, 3)


def body_of(latent: np.ndarray, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "latent", "datatype": "FP32", "shape": list(latent.shape), "data": latent.ravel().tolist()}
    return {"inputs": [tensor | changes.pop("tensor", {})], **changes}


def send(url: str, content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.post(url, content=content, headers=headers, timeout=60, verify=False)  # no certificates to load


def post(url: str, body: dict[str, Any], tail: bytes | None = None, **headers: Any) -> httpx.Response:
    text = json.dumps(body).encode()
    if tail is not None:
        headers["Inference-Header-Content-Length"] = str(len(text))
    return send(url + INFER, content=text + (tail or b""), headers=headers)


def assert_error(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and set(response.json()) == {"error"}
    assert all(word in response.json()["error"] for word in words), response.text


def test_the_client_finds_the_server_and_its_models(
    client: triton.InferenceServerClient, producer: FileProducer
) -> None:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("flux")
    server = client.get_server_metadata()
    assert server["name"] == "giantleap" and server["extensions"] == ["binary_tensor_data"]
    model = client.get_model_metadata("paper")
    assert model["inputs"] == [{"name": "latent", "datatype": "FP32", "shape": [-1, CHANNELS, -1, -1]}]
    assert [output["name"] for output in model["outputs"]] == ["latent", "image"]
    producer.live_workers = 0
    assert client.is_server_live() and not client.is_server_ready() and not client.is_model_ready("paper")
    assert not client.is_model_ready("unknown")
    with pytest.raises(InferenceServerException, match="paper, flux"):
        client.get_model_metadata("unknown")


@pytest.mark.parametrize("binary", [True, False])
def test_a_latent_comes_back_enlarged(
    client: triton.InferenceServerClient, producer: FileProducer, binary: bool
) -> None:
    response = client.infer(
        "paper", [to_input(LATENT, binary=binary)], outputs=ask("latent", binary), request_id="r1",
        parameters={"scale": 4, "method": "bicubic"},
    )  # fmt: skip
    np.testing.assert_array_equal(response.as_numpy("latent"), enlarge(LATENT, 4))
    (job,) = producer.jobs
    assert isinstance(job.params, UpscaleParams) and (job.params.method, job.params.output) == ("bicubic", "latent")
    content = response.get_response()
    assert content["id"] == "r1" and content["model_name"] == "paper" and content["parameters"]["job_id"] == job.id


def test_a_batch_comes_back_as_a_batch(client: triton.InferenceServerClient, producer: FileProducer) -> None:
    batch = np.concatenate([LATENT, 2 * LATENT, -LATENT])
    response = client.infer("paper", [to_input(batch)], parameters={"scale": 1})
    np.testing.assert_array_equal(response.as_numpy("latent"), batch)


def test_the_bundles_defaults_hold_where_a_request_gives_none(
    client: triton.InferenceServerClient, producer: FileProducer
) -> None:
    response = client.infer("paper", [to_input(LATENT[0])])
    np.testing.assert_array_equal(response.as_numpy("latent"), enlarge(LATENT, 2))
    assert producer.jobs[0].params.method == "lua" and producer.jobs[0].priority is Priority.HIGH
    client.infer("paper", [to_input(LATENT)], priority=2)
    assert producer.jobs[1].priority is Priority.LOW


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_comes_in_as_its_own_values(
    client: triton.InferenceServerClient, producer: FileProducer, datatype: str
) -> None:
    latent = LATENT.astype(np.float16 if datatype == "FP16" else ml_dtypes.bfloat16)
    client.infer("paper", [to_input(latent, datatype)])
    np.testing.assert_array_equal(producer.latent_of(), latent.astype(np.float32))


def test_scaled_and_packed_latents_become_raw(client: triton.InferenceServerClient, producer: FileProducer) -> None:
    client.infer("paper", [to_input(LATENT)], parameters={"scaled": True})
    np.testing.assert_allclose(producer.latent_of(), LATENT / SCALE + SHIFT, rtol=1e-6)
    tokens = LATENT.reshape(1, 6, 4 * CHANNELS)
    client.infer("flux", [to_input(tokens)], parameters={"scaled": True, "width": 48, "height": 32})
    assert producer.latent_of().shape == (1, CHANNELS, 4, 6)


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_images_come_back_as_files(
    client: triton.InferenceServerClient, producer: FileProducer, output_format: str
) -> None:
    batch = np.concatenate([LATENT, LATENT])
    response = client.infer(
        "paper", [to_input(batch)], outputs=ask("image"), parameters={"output_format": output_format}
    )
    files = response.as_numpy("image")
    assert files.tolist() == producer.files[producer.jobs[0].id] and len(files) == 2
    assert read_pixels(files[0]).shape == (64, 96, 3)


def test_an_image_in_json_is_base64_and_says_so(url: str, producer: FileProducer) -> None:
    response = post(url, body_of(LATENT, outputs=[{"name": "image"}], parameters={"scale": 1}))
    (output,) = response.json()["outputs"]
    assert output["parameters"] == {"content_type": "base64"} and output["shape"] == [1]
    assert base64.b64decode(output["data"][0]) == producer.files[producer.jobs[0].id][0]


def test_the_answer_has_the_headers_of_a_job(url: str, producer: FileProducer) -> None:
    response = post(url, body_of(LATENT, tensor={"data": LATENT.tolist()}))
    assert response.headers["x-job-id"] == producer.jobs[0].id and response.headers["server-timing"] == STAGES
    assert response.headers["x-method"] == "lua" and response.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in response.headers


@pytest.mark.parametrize(
    ("tensor", "changes", "status", "word"),
    [
        ({"data": [[1.0], [2.0, 3.0]]}, {}, 422, "data"),
        ({"data": ["1.0"] * LATENT.size}, {}, 422, "data"),
        ({"data": [True] * LATENT.size}, {}, 422, "data"),
        ({"data": [1.0]}, {}, 400, "shape"),
        ({"data": None}, {}, 400, "data"),
        ({"data": [1e39] * LATENT.size}, {}, 422, "infinite"),
        ({"data": [float("nan")] * LATENT.size}, {}, 422, "NaN"),
        ({"data": [10**400] * LATENT.size}, {}, 422, "data"),
        ({"shape": [1, CHANNELS, 6, 4, 1]}, {}, 422, "latent"),
        ({"shape": [1, 8, 8, 6]}, {}, 422, "latent"),
        ({"shape": [-1, CHANNELS, 4, 6]}, {}, 422, "shape"),
        ({"shape": [10**4000] * 5}, {}, 400, "shape"),
        ({"shape": []}, {}, 422, "shape"),
        ({"datatype": "FP64"}, {}, 422, "datatype"),
        ({"datatype": "FP16"}, {}, 422, "datatype"),
        ({"name": "x"}, {}, 422, "name"),
        ({"parameters": {"shared_memory_region": "r"}}, {}, 422, "shared_memory_region"),
        ({}, {"parameters": {"scale": 3}}, 422, "scale"),
        ({}, {"parameters": {"method": "direct"}}, 422, "method"),
        ({}, {"parameters": {"sequence_id": 5}}, 422, "sequence_id"),
        ({}, {"parameters": {"output_format": "png"}}, 422, "output_format"),
        ({}, {"outputs": [{"name": "latent"}, {"name": "image"}]}, 422, "outputs"),
        ({}, {"outputs": [{"name": "other"}]}, 422, "outputs"),
        ({}, {"inputs": []}, 422, "inputs"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_and_enqueue_nothing(
    url: str, producer: FileProducer, tensor: dict[str, Any], changes: dict[str, Any], status: int, word: str
) -> None:
    assert_error(post(url, body_of(LATENT, tensor=tensor) | changes), status, word)
    assert not producer.records


def test_broken_bodies_are_refused(url: str, producer: FileProducer) -> None:
    for content in (b"", b"{", b"[" * 100_000, b"\xff", b"[]"):
        response = send(url + INFER, content=content)
        assert response.status_code in (400, 422) and set(response.json()) == {"error"}, content[:10]
    size = {"data": None, "parameters": {"binary_data_size": LATENT.nbytes}}
    good = body_of(LATENT, tensor=size)
    assert_error(post(url, good), 400, "Inference-Header-Content-Length")
    assert_error(post(url, good, LATENT.tobytes()[:-4]), 400, "binary_data_size")
    assert_error(post(url, good, LATENT.tobytes() + b"more"), 400, "binary_data_size")
    assert_error(post(url, body_of(LATENT), LATENT.tobytes()), 400, "binary_data_size")
    for length in ("-1", "x", str(10**30)):
        response = send(url + INFER, content=b"{}", headers={"Inference-Header-Content-Length": length})
        assert response.status_code in (400, 422) and set(response.json()) == {"error"}
    assert_error(post(url, good, LATENT.tobytes(), **{"Content-Encoding": "gzip"}), 415, "compressed")
    assert_error(post(url, good, LATENT.tobytes(), **{"Content-Type": "text/plain"}), 415, "text/plain")
    assert not producer.records
    assert post(url, good, LATENT.tobytes()).status_code == 200


def test_bytes_that_are_not_finite_are_refused(client: triton.InferenceServerClient, producer: FileProducer) -> None:
    with pytest.raises(InferenceServerException, match="NaN or infinite"):
        client.infer("paper", [to_input(np.full_like(LATENT, np.inf))])
    assert not producer.records


def test_limits_hold(url: str, client: triton.InferenceServerClient, producer: FileProducer) -> None:
    with pytest.raises(InferenceServerException, match="too large; send") as too_large:
        client.infer("paper", [to_input(np.zeros((1, CHANNELS, 160, 160), np.float32))])
    assert "413" in too_large.value.status()
    with pytest.raises(InferenceServerException, match="pixels; at most") as too_many_px:
        client.infer("paper", [to_input(np.zeros((1, CHANNELS, 64, 64), np.float32))], parameters={"scale": 4})
    assert "422" in too_many_px.value.status()
    producer.refusal = QueueFull("32 jobs wait", retry_after_s=17)
    response = post(url, body_of(LATENT))
    assert_error(response, 429, "32 jobs wait")
    assert response.headers["retry-after"] == "17"
    assert not producer.records


def test_a_large_latent_is_not_written_as_json(bundle_dirs: tuple[Path, ...]) -> None:
    producer = FileProducer()
    app = build_app(producer, bundle_dirs, max_image_px=1 << 24)
    size = {"data": None, "parameters": {"binary_data_size": 4 * CHANNELS * 64 * 65}}
    latent = np.zeros((1, CHANNELS, 64, 65), np.float32)
    with live_server(app) as url:
        body = body_of(latent, tensor=size, parameters={"scale": 4})
        assert_error(post(url, body, latent.tobytes()), 422, "binary_data")
        assert not producer.records


def test_an_unknown_model_or_path_is_not_found(url: str) -> None:
    assert_error(send(f"{url}/v2/models/unknown/infer", content=b"{}"), 404, "paper")
    assert_error(httpx.get(f"{url}/v2/unknown"), 404)
    assert_error(httpx.get(url + INFER), 405)


def test_a_failed_job_is_the_clients_exception(client: triton.InferenceServerClient, producer: FileProducer) -> None:
    producer.end = fail
    with pytest.raises(InferenceServerException, match="out of memory"):
        client.infer("paper", [to_input(LATENT)])


@pytest.mark.parametrize(("headers", "state"), [({}, "canceled"), ({"Idempotency-Key": "k"}, "queued")])
def test_a_job_that_takes_too_long_is_canceled_unless_it_can_be_found_again(
    bundle_dirs: tuple[Path, ...], headers: dict[str, Any], state: str
) -> None:
    producer = FileProducer()
    producer.end = stay_queued
    with live_server(build_app(producer, bundle_dirs, wait_timeout_s=0.05)) as url:
        response = post(url, body_of(LATENT), **headers)
        assert_error(response, 504)
        assert response.headers["x-job-id"] == producer.jobs[0].id
    assert [record.state for record in producer.records.values()] == [state]


def test_a_deadline_comes_by_timeout_or_by_header(client: triton.InferenceServerClient, producer: FileProducer) -> None:
    client.infer("paper", [to_input(LATENT)], timeout=2_500_000)
    client.infer("paper", [to_input(LATENT)], headers={"Cancel-After": "7"})
    client.infer("paper", [to_input(LATENT)])
    assert [job.cancel_after_s for job in producer.jobs] == [2.5, 7.0, None]
    producer.end = expire
    with pytest.raises(InferenceServerException, match="did not end in time"):
        client.infer("paper", [to_input(LATENT)], timeout=1)


def test_a_deadline_that_cannot_be_meant_is_refused(url: str, producer: FileProducer) -> None:
    for timeout in (0, -1, 1.5, "2", 7 * 86_400 * 10**6 + 1):
        assert_error(post(url, body_of(LATENT, parameters={"timeout": timeout})), 422, "timeout")
    both = post(url, body_of(LATENT, parameters={"timeout": 10**6}), None, **{"Cancel-After": "1"})
    assert_error(both, 422, "Cancel-After; send one of them")
    assert_error(post(url, body_of(LATENT), None, **{"Cancel-After": "soon"}), 400, "Cancel-After")
    assert not producer.records


def test_a_repeat_under_the_same_key_is_the_same_job(
    client: triton.InferenceServerClient, producer: FileProducer
) -> None:
    key = {"Idempotency-Key": "k-3"}
    first, second = (client.infer("paper", [to_input(LATENT)], headers=key).get_response() for _ in range(2))
    assert first == second and len(producer.records) == 1


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_video_of_one_frame_comes_back_as_one(tmp_path: Path, scaled: bool, batch: int) -> None:
    producer, sent = FileProducer(), LATENT.repeat(batch, 0)[:, :, None]
    with (
        live_server(build_app(producer, (write_wan_bundle(tmp_path),))) as url,
        triton.InferenceServerClient(url.removeprefix("http://"), network_timeout=60) as client,
    ):
        response = client.infer("paper", [to_input(sent)], parameters={"scale": 2, "scaled": scaled}).as_numpy("latent")
        raw = LATENT_SPACES["wan21"].to_raw(sent) if scaled else sent[:, :, 0]
        np.testing.assert_allclose(producer.latent_of(), raw, rtol=1e-5)
        assert response.shape == (batch, CHANNELS, 1, 8, 12)
        np.testing.assert_allclose(response[:, :, 0], enlarge(raw, 2), rtol=1e-5)
        plain = client.infer("paper", [to_input(LATENT)], parameters={"scale": 2}).as_numpy("latent")
        assert plain.shape == (1, CHANNELS, 8, 12), "a raw latent without a frame is answered without one"


def test_a_video_is_refused_where_it_has_more_frames_or_the_vae_is_of_images(
    tmp_path: Path, client: triton.InferenceServerClient, producer: FileProducer
) -> None:
    video = LATENT[:, :, None]
    with pytest.raises(InferenceServerException, match=r"takes raw latents \[batch, 16, .* found \[1, 16, 1, 4, 6\]"):
        client.infer("paper", [to_input(video)])
    with pytest.raises(InferenceServerException, match=r"found \[1, 4, 16, 4, 6\]"):
        client.infer("paper", [to_input(LATENT.repeat(4, 0)[None])])  # not four latents of 16 channels
    with (
        live_server(build_app(producer, (write_wan_bundle(tmp_path),))) as url,
        triton.InferenceServerClient(url.removeprefix("http://"), network_timeout=60) as wan,
        pytest.raises(InferenceServerException, match=r"or a video of one frame \[batch, 16, 1, h, w\]"),
    ):
        wan.infer("paper", [to_input(video.repeat(2, 2))])
    assert not producer.records
