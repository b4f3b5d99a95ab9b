"""A filter on the running service: every route that makes images refuses what it refuses, and nothing else."""

import io
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import numpy as np
import openai
import pytest
import tritonclient.http as triton
from PIL import Image

from giantleap.cli.demo import PROMPT, running_service
from tests.filter_packages import install

# Of the pocket bundle, whose base size is 128 px: images at scale 4 are refused, those at scale 2 are not.
SOURCE = """
class Small:
    def refuses(self, pixels, context):
        assert pixels.shape == (context.height_px, context.width_px, 3) and context.bundle == "pocket"
        return context.width_px >= 512
"""
LATENT = np.random.default_rng(0).standard_normal((1, 24, 32, 32)).astype("<f4")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    site = tmp_path_factory.mktemp("site")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:  # for the start alone: other tests run in this process
            install(site, "size_filter", {"small": "size_filter:Small"}, SOURCE, environment)
            environment.setenv("PYTHONPATH", str(site), prepend=":")
            environment.setenv("GIANTLEAP_FILTERS", "small")
            url = stack.enter_context(running_service())
        yield stack.enter_context(httpx.Client(base_url=url, timeout=300))


def photo() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_native_routes_refuse_and_store_nothing(client: httpx.Client) -> None:
    accept = {"Accept": "image/png"}
    assert client.post("/generate", json={"prompt": PROMPT, "scale": 2}, headers=accept).status_code == 200
    drawn = client.post("/generate", json={"prompt": PROMPT, "scale": 4, "num_images": 2})
    enlarged = client.post("/upscale?scale=4", content=photo(), headers={"Content-Type": "image/png"})
    for answer in (drawn, enlarged):
        problem = answer.json()
        assert (answer.status_code, problem["code"], problem["retryable"]) == (422, "blocked_by_filter", False)
        assert problem["detail"].startswith("filter small refused the image")
        job = client.get(problem["status_url"]).json()
        assert job["status"] == "failed" and job["error"]["code"] == "blocked_by_filter" and not job["results"]
        assert client.get(f"{problem['status_url']}/result").status_code == 422
    assert client.get("/dead-letters").json()["dead_letters"] == [], "there is nothing to repair"
    metrics = client.get("/metrics").text
    assert 'giantleap_filtered_images_total{filter="small",outcome="passed"} 1.0' in metrics
    assert 'giantleap_filtered_images_total{filter="small",outcome="refused"} 3.0' in metrics


def test_clients_of_compatible_routes_see_the_refusal(client: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{str(client.base_url).rstrip(chr(47))}/v1", api_key="none", timeout=300) as images:
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            images.images.generate(prompt=PROMPT, size="512x512", extra_body={"scale": 4})
        assert refused.value.code == "blocked_by_filter"
        with pytest.raises(openai.APIError, match="filter small refused"):
            list(images.images.generate(prompt=PROMPT, size="512x512", extra_body={"scale": 4}, stream=True))
    kserve = triton.InferenceServerClient(f"{client.base_url.host}:{client.base_url.port}", network_timeout=300)
    latent = triton.InferInput("latent", [1, 24, 32, 32], "FP32")
    latent.set_data_from_numpy(LATENT)
    output = triton.InferRequestedOutput("image")
    with pytest.raises(triton.InferenceServerException, match="filter small refused"):
        kserve.infer("pocket", [latent], outputs=[output], parameters={"scale": 4})
    query = "scale=4&shape=1&shape=24&shape=32&shape=32&dtype=float32&output_type=pt"
    vae = client.post(f"/remote_vae/pocket/decode?{query}", content=LATENT.tobytes(),
                      headers={"Content-Type": "tensor/binary"})  # fmt: skip
    assert vae.status_code == 422 and vae.json()["code"] == "blocked_by_filter"


def test_the_events_of_a_refused_job_end_as_those_of_a_failed_one(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "scale": 4}
    job = client.post("/generate", json=body, headers={"Prefer": "respond-async"}).json()
    with client.stream("GET", job["events_url"]) as stream:
        text = "".join(stream.iter_text())
    assert text.rstrip().endswith('data: {"state":"failed"}')
