"""The remote VAE as diffusers' own functions call it, and what they cannot send."""

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image

from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.pixels.image_formats import FileOptions
from giantleap.service.api.compat.remote_vae import to_tensor
from giantleap.service.errors import QueueFull
from giantleap.service.jobs.job import UpscaleParams
from tests.service.compat_fakes import (
    LATENT,
    STAGES,
    FileProducer,
    build_app,
    read_pixels,
    write_wan_bundle,
)
from tests.service.fake_producer import expire, fail
from tests.service.live_server import live_server
from tests.service.paper_bundle import CHANNELS

pytestmark = pytest.mark.filterwarnings("ignore:.*do_scaling.*deprecated:FutureWarning")

TENSOR = torch.from_numpy(LATENT)
SCALE, SHIFT = 0.5, 0.25  # of the paper bundle's latent space
FLUX = LATENT_SPACES["flux1"]
SENT = {"shape": list(LATENT.shape), "dtype": "float32"}


@pytest.fixture
def producer(live: tuple[FileProducer, str]) -> FileProducer:
    return live[0].reset()


@pytest.fixture
def url(live: tuple[FileProducer, str], producer: FileProducer) -> str:
    return f"{live[1]}/remote_vae/paper/decode"


def decode(url: str, latent: torch.Tensor, **options: Any) -> Any:
    """`remote_decode`, whose return type is the union of all that its options may ask for."""
    return remote_decode(url, latent, **options)


def encode_image(url: str, image: Image.Image | torch.Tensor, **options: Any) -> Any:
    return remote_encode(url, image, **options)


def post(url: str, content: bytes = LATENT.tobytes(), **query: Any) -> httpx.Response:
    headers = {"Content-Type": "tensor/binary"}
    return httpx.post(url, params=SENT | query, content=content, headers=headers, timeout=60, verify=False)


def assert_error(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and set(response.json()) == {"error", "code"}
    assert all(word in response.json()["error"] for word in words), response.text


def made_file(producer: FileProducer) -> bytes:
    return producer.files[producer.jobs[-1].id][0]


def test_an_image_is_decoded_at_its_own_size(url: str, producer: FileProducer) -> None:
    image = decode(url, TENSOR, scaling_factor=SCALE, shift_factor=SHIFT)
    assert image.size == (48, 32) and image.format == "jpeg"
    np.testing.assert_array_equal(np.asarray(image), read_pixels(made_file(producer)))
    (job,) = producer.jobs
    assert isinstance(job.params, UpscaleParams) and (job.params.scale, job.params.output) == (1, "image")
    np.testing.assert_allclose(producer.latent_of(), LATENT / SCALE + SHIFT, rtol=1e-6)


def test_the_endpoints_own_scale_enlarges(url: str, producer: FileProducer) -> None:
    image = decode(f"{url}?scale=4&method=bicubic", TENSOR, do_scaling=False, image_format="png")
    assert image.size == (192, 128) and image.format == "png"
    assert (producer.jobs[0].params.scale, producer.jobs[0].params.method) == (4, "bicubic")
    np.testing.assert_array_equal(producer.latent_of(), LATENT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_values(url: str, producer: FileProducer, dtype: torch.dtype) -> None:
    decode(url, TENSOR.to(dtype), do_scaling=False)
    np.testing.assert_array_equal(producer.latent_of(), TENSOR.to(dtype).float().numpy())


def test_without_factors_the_bundles_own_scaling_is_undone(url: str, producer: FileProducer) -> None:
    decode(url, TENSOR)  # diffusers then says do_scaling=True
    np.testing.assert_allclose(producer.latent_of(), LATENT / SCALE + SHIFT, rtol=1e-6)


def test_packed_latents_are_unpacked_scaled_or_not(url: str, producer: FileProducer) -> None:
    tokens, size = torch.from_numpy(LATENT.reshape(1, 6, 4 * CHANNELS)), {"height": 32, "width": 48}
    flux = url.replace("paper", "flux")
    decode(flux, tokens, scaling_factor=FLUX.scale, shift_factor=FLUX.shift, **size)
    expected = FLUX.to_raw(tokens.numpy(), 32, 48)
    np.testing.assert_allclose(producer.latent_of(), expected, rtol=1e-6)
    decode(flux, tokens / FLUX.scale + FLUX.shift, do_scaling=False, **size)
    np.testing.assert_allclose(producer.latent_of(), expected, rtol=1e-5)


def test_a_tensor_of_bytes_has_the_images_pixels(url: str, producer: FileProducer) -> None:
    batch = torch.cat([TENSOR, TENSOR])
    pixels = decode(url, batch, output_type="pt", return_type="pt", partial_postprocess=True)
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 32, 48, 3)
    for image, file in zip(pixels.numpy(), producer.files[producer.jobs[0].id], strict=True):
        np.testing.assert_array_equal(image, read_pixels(file))


def test_a_tensor_of_floats_postprocesses_to_the_same_pixels(url: str, producer: FileProducer) -> None:
    tensor = decode(url, TENSOR, output_type="pt", return_type="pt")
    assert tensor.dtype == torch.float16 and tensor.shape == (1, 3, 32, 48)
    assert tensor.min() >= -1 and tensor.max() <= 1 and tensor.min() < -0.9
    image = VaeImageProcessor().postprocess(tensor.float(), output_type="pil")[0]
    np.testing.assert_array_equal(np.asarray(image), read_pixels(made_file(producer)))
    image = decode(url, TENSOR, processor=VaeImageProcessor(), output_type="pt", return_type="pil")
    np.testing.assert_array_equal(np.asarray(image), read_pixels(made_file(producer)))
    (image,) = decode(url, TENSOR, processor=VaeImageProcessor(), output_type="pil")
    np.testing.assert_array_equal(np.asarray(image), read_pixels(made_file(producer)))


def test_the_answer_has_the_headers_of_a_job(url: str, producer: FileProducer) -> None:
    response = post(url)
    assert response.status_code == 200 and response.headers["content-type"] == "image/jpeg"
    assert response.headers["x-job-id"] == producer.jobs[0].id and response.headers["server-timing"] == STAGES


def test_an_image_is_encoded_to_its_latent(url: str, producer: FileProducer) -> None:
    encode, image = url.replace("decode", "encode"), Image.new("RGB", (48, 32), (7, 7, 7))
    latent = encode_image(encode, image)
    assert latent.dtype == torch.float32 and latent.shape == (1, CHANNELS, 4, 6) and (latent == 7).all()
    (job,) = producer.jobs
    assert isinstance(job.params, UpscaleParams) and (job.params.scale, job.params.output) == (1, "latent")
    scaled = encode_image(encode, image, scaling_factor=SCALE, shift_factor=SHIFT)
    assert ((scaled - (7 - SHIFT) * SCALE).abs() < 1e-6).all()


def test_deadline_and_key_come_by_header(url: str, producer: FileProducer) -> None:
    headers = {"Content-Type": "tensor/binary", "Cancel-After": "9", "Idempotency-Key": "k-4"}
    options: dict[str, Any] = {"params": SENT, "content": LATENT.tobytes(), "timeout": 60, "verify": False}
    responses = [httpx.post(url, headers=headers, **options) for _ in range(2)]
    assert responses[0].status_code == 200 and responses[0].content == responses[1].content
    assert [job.cancel_after_s for job in producer.jobs] == [9.0]
    producer.end = expire
    late = httpx.post(url, headers=headers | {"Idempotency-Key": "k-5"}, **options)
    assert_error(late, 504, "did not end in time")
    image = io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "PNG")
    headers = {"Content-Type": "image/png", "Cancel-After": "8"}
    encoded = httpx.post(
        url.replace("/decode", "/encode"), content=image.getvalue(), headers=headers, timeout=60, verify=False
    )
    assert_error(encoded, 504, "did not end in time")
    assert producer.jobs[-1].cancel_after_s == 8.0


def test_what_cannot_be_encoded_is_refused(url: str, producer: FileProducer) -> None:
    encode = url.replace("decode", "encode")
    for refused in (torch.zeros(1, 3, 32, 48), Image.new("RGB", (50, 32)), Image.new("RGB", (1024, 512))):
        with pytest.raises(RuntimeError, match="image"):
            encode_image(encode, refused)
    with pytest.raises(RuntimeError, match=r"scaling_factor: is 0\.3"):
        encode_image(encode, Image.new("RGB", (48, 32)), scaling_factor=0.3, shift_factor=SHIFT)
    assert not producer.records


@pytest.mark.parametrize(
    ("query", "status", "word"),
    [
        ({"scaling_factor": 0.18215}, 422, "scaling_factor"),
        ({"scaling_factor": SCALE}, 422, "shift_factor"),
        ({"scaling_factor": SCALE, "shift_factor": 0.1}, 422, "shift_factor"),
        ({"shift_factor": SHIFT}, 422, "shift_factor"),
        ({"scaling_factor": "nan"}, 422, "scaling_factor"),
        ({"dtype": "float64"}, 422, "dtype"),
        ({"dtype": "float16"}, 400, "bytes"),
        ({"shape": [1, 8, 8, 6]}, 422, "latent"),
        ({"shape": [16, 24]}, 422, "latent"),
        ({"shape": [384]}, 422, "dimensions"),
        ({"shape": [-1, 16, 4, 6]}, 422, "shape"),
        ({"shape": [10**18] * 4}, 400, "shape"),
        ({"output_type": "mp4"}, 422, "output_type"),
        ({"height": 64, "width": 96}, 422, "width"),
        ({"scale": 3}, 422, "scale"),
        ({"shpae": 1}, 422, "shpae"),
    ],
)
def test_bad_values_are_refused_and_enqueue_nothing(
    url: str, producer: FileProducer, query: dict[str, Any], status: int, word: str
) -> None:
    assert_error(post(url, **query), status, word)
    assert not producer.records


def test_a_video_of_one_frame_is_a_latent_of_a_video_vae(tmp_path: Path) -> None:
    producer = FileProducer()
    with live_server(build_app(producer, (write_wan_bundle(tmp_path),))) as server:
        url = f"{server}/remote_vae/paper/decode"
        decode(url, TENSOR[:, :, None])
        np.testing.assert_allclose(producer.latent_of(), LATENT_SPACES["wan21"].to_raw(LATENT[:, :, None]), rtol=1e-5)
        decode(url, TENSOR[:, :, None], do_scaling=False)
        np.testing.assert_array_equal(producer.latent_of(), LATENT)
        with pytest.raises(RuntimeError, match=r"takes raw latents .* or a video of one frame \[batch, 16, 1, h, w\]"):
            decode(url, TENSOR[:, :, None].repeat(1, 1, 3, 1, 1), do_scaling=False)
        with pytest.raises(RuntimeError, match="has no meaning"):
            decode(url, TENSOR[:, :, None], scaling_factor=1.0)


def test_limits_hold(url: str, producer: FileProducer) -> None:
    with pytest.raises(RuntimeError, match="payload_too_large"):
        decode(url, torch.zeros(1, CHANNELS, 160, 160))
    with pytest.raises(RuntimeError, match="pixels; at most"):
        decode(f"{url}?scale=4", torch.zeros(1, CHANNELS, 64, 64))
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        decode(url, torch.full_like(TENSOR, torch.nan))
    with pytest.raises(RuntimeError, match="request pt"):
        decode(url, torch.cat([TENSOR, TENSOR]))
    producer.refusal = QueueFull("32 jobs wait", retry_after_s=17)
    with pytest.raises(RuntimeError, match="queue_full"):
        decode(url, TENSOR)
    response = post(url)
    assert_error(response, 429, "32 jobs wait")
    assert response.headers["retry-after"] == "17"
    assert not producer.records


def test_other_faults_have_the_same_shape(url: str, producer: FileProducer) -> None:
    assert_error(post(url.replace("paper", "unknown")), 404, "paper, flux")
    assert_error(post(url + "/more"), 404)
    plain = httpx.post(url, params=SENT, content=b"x", headers={"Content-Type": "text/plain"}, verify=False)
    assert_error(plain, 415, "text/plain")
    producer.end = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(url, TENSOR)


def test_every_8_bit_value_survives_float16() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    forms: list[tuple[Any, int, int]] = [("zero_one", 0, 1), ("minus_one_one", -1, 1)]
    for form, low, high in forms:
        tensor = to_tensor([file.getvalue()], form).astype(np.float32)
        back = ((tensor - low) / (high - low) * 255).round().astype(np.uint8)
        np.testing.assert_array_equal(back[0].transpose(1, 2, 0), pixels)


@pytest.mark.parametrize("extra", [{}, {"width": 48, "height": 32}, {"input_tensor_type": "binary"}])
def test_an_unpacked_scaled_latent_of_a_packed_space_is_decoded(
    live: tuple[FileProducer, str], extra: dict[str, Any]
) -> None:
    """As diffusers' issue 11304 and the nodes of ComfyUI send the latents of FLUX.1."""
    producer, base = live
    producer.reset()
    space = LATENT_SPACES["flux1"]
    scaled = ((LATENT - space.shift) * space.scale).astype(np.float32)
    query: dict[str, Any] = SENT | {"scaling_factor": space.scale, "shift_factor": space.shift}
    answer = httpx.post(
        f"{base}/remote_vae/flux/decode",
        params=query | extra,
        content=scaled.tobytes(),
        headers={"Content-Type": "tensor/binary"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    np.testing.assert_allclose(producer.latent_of(), LATENT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("jpg", "image/jpeg"), ("jpeg", "image/jpeg"), ("webp", "image/webp")])
def test_formats_have_their_usual_names(url: str, producer: FileProducer, name: str, kind: str) -> None:
    assert post(url, image_format=name).headers["content-type"] == kind


def test_a_file_is_compressed_as_the_query_says(url: str, producer: FileProducer) -> None:
    assert post(url, image_format="webp", compression="small", quality=80).status_code == 200
    assert producer.jobs[-1].params.file == FileOptions("small", 80)
    assert_error(post(url, image_format="png", quality=80), 422, "quality", "a png keeps every pixel")
