"""Edits on the running service: the client of OpenAI and /generate, with a small FLUX.2 Klein of random weights."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from giantleap.models.bundle.bundle import write_bundle
from giantleap.models.bundle.digests import file_hashes
from giantleap.models.latent_space import LATENT_SPACES
from tests.models.generation.test_generator_families import saved
from tests.running_service import serving
from tests.service.jobs.test_edit_inputs import to_file, to_text
from tests.tiny_pipelines import tiny_flux2_klein

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
WHITE = np.zeros((64, 96), np.uint8)
WHITE[:, 48:] = 255
MASK = to_file(np.dstack([PIXELS, 255 - WHITE]))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory: Path = tmp_path_factory.mktemp("klein")
    bundle = saved(directory, tiny_flux2_klein(), LATENT_SPACES["flux2"])
    write_bundle(directory, bundle.descriptor.model_copy(update={"files": file_hashes(directory)}))
    with serving(directory) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


def edit(client: openai.OpenAI, image: bytes | list[bytes], **fields: object) -> list[np.ndarray]:
    """The images of an edit, each the same for the same seed."""
    ours = {"seed": 1, "num_inference_steps": 2, "scale": 1}
    answer = client.images.edit(image=image, prompt="a red sphere", extra_body=ours, **fields)  # type: ignore[call-overload]
    files = [base64.b64decode(each.b64_json) for each in answer.data]
    assert all(b"compositeWithTrainedAlgorithmicMedia" in file for file in files)
    return [np.asarray(Image.open(io.BytesIO(file))).astype(int) for file in files]


def test_the_client_of_openai_edits_a_part_of_an_image(client: openai.OpenAI, url: str) -> None:
    first, second = edit(client, to_file(PIXELS), mask=MASK, n=2, size="96x64")
    assert first.shape == (64, 96, 3) and np.abs(first - second).max() > 3
    body = {"prompt": "a red sphere", "seed": 2, "steps": 2, "scale": 1, "width": 96, "height": 64}
    images = {"init_image": to_text(to_file(PIXELS)), "mask": to_text(to_file(WHITE))}
    native = httpx.post(f"{url}/generate", json=body | images, headers={"Accept": "image/png"}, timeout=300)
    assert native.status_code == 200, native.text
    same = np.asarray(Image.open(io.BytesIO(native.content))).astype(int)
    assert np.abs(same - second).max() <= 1, "the same mask in both conventions, the second image of a batch alone"


def test_the_client_of_openai_edits_after_several_images(client: openai.OpenAI) -> None:
    one, other = to_file(PIXELS), to_file(255 - PIXELS)
    (alone,), (both,) = edit(client, one, size="64x64"), edit(client, [one, other], size="64x64")
    assert alone.shape == both.shape == (64, 64, 3) and not np.array_equal(alone, both)


def test_a_stream_of_edits_completes(client: openai.OpenAI, url: str) -> None:
    image, extra = ("a.png", to_file(PIXELS)), {"num_inference_steps": 1}
    with client.images.edit(image=image, mask=MASK, prompt="a cube", stream=True, extra_body=extra) as stream:
        assert [event.type for event in stream] == ["image_edit.completed"]
    job = httpx.get(f"{url}/jobs/{stream.response.headers['x-job-id']}", timeout=60).json()
    assert job["status"] == "succeeded" and "vae_encode" not in job["stages"]
