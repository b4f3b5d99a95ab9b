"""The main job as a user sees it: `giantleap serve` on the pocket bundle, over HTTP, also when its parts die."""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import psutil
import pytest
import tritonclient.http as triton
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image
from safetensors.numpy import load, save

from giantleap.cli.demo import PROMPT, generate, running_service
from giantleap.models.bundle.descriptor import REDIFFUSION

BASE_PX = 128
REFINE = {"refine": {"strength": 0.1, "steps": 2}}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    # One thread for torch, as in every test: several of them wait for each other where other programs use the cores.
    with running_service() as url:
        yield url


def _read_png(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float)


@pytest.mark.parametrize("scale", [2, 4])
def test_a_prompt_becomes_an_image_of_the_right_size_and_colors(url: str, scale: int) -> None:
    content, stages = generate(url, PROMPT, scale, seed=7)
    image = _read_png(content)
    assert image.shape == (BASE_PX * scale, BASE_PX * scale, 3)
    strip = image.shape[0] // 10
    sky, floor = image[:strip].mean(axis=(0, 1)), image[-strip:].mean(axis=(0, 1))
    assert sky.argmax() == 2, f"the sky of {PROMPT!r} is {sky}"
    assert floor.argmax() == 1, f"the floor of {PROMPT!r} is {floor}"
    assert {"queue", "generate", "upscale", "decode", "encode"} <= set(stages)


def test_the_same_seed_draws_the_same_image_at_x2_and_x4(url: str) -> None:
    small, large = (_read_png(generate(url, PROMPT, scale, seed=11)[0]) for scale in (2, 4))
    shrunk = large.reshape(BASE_PX * 2, 2, BASE_PX * 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 16, "both are enlargements of one base latent"


def test_every_method_of_the_bundle_draws_and_those_that_it_lacks_say_why(url: str) -> None:
    """Those that change the network are followed by a plain drawing, which is as it was."""
    (model,) = httpx.get(f"{url}/models").json()
    plain = generate(url, PROMPT, 2, seed=3)[0]
    for method in REDIFFUSION:
        for height, refine in ((192, {}), (256, {}), (192, REFINE), (256, REFINE)):
            size = {"scale": 2, "width": 256, "height": height}
            body = {"prompt": PROMPT, "method": method, "steps": 3, **size, **refine}
            answer = httpx.post(f"{url}/generate", json=body, headers={"Accept": "image/png"}, timeout=300)
            if method in model["unavailable"]:
                assert answer.status_code == 422 and model["unavailable"][method] in answer.json()["detail"]
            else:
                assert answer.status_code == 200 and _read_png(answer.content).shape == (height, 256, 3)
                assert answer.headers["X-Method"] == method
    assert generate(url, PROMPT, 2, seed=3)[0] == plain


def test_a_raw_latent_comes_back_twice_as_large(url: str) -> None:
    latent = np.random.default_rng(0).standard_normal((24, 16, 16)).astype(np.float32)
    answer = httpx.post(
        f"{url}/upscale",
        params={"scale": 2, "scaled": "false", "output": "latent"},
        content=save({"latent": latent}),
        headers={"Content-Type": "application/x-safetensors", "Accept": "application/x-safetensors"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    (enlarged,) = load(answer.content).values()
    assert enlarged.shape[-3:] == (24, 32, 32) and np.isfinite(enlarged.astype(np.float32)).all()


def test_the_openai_client_draws(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as client:
        answer = client.images.generate(prompt=PROMPT, size="256x256", extra_body={"seed": 7})
        (event,) = client.images.generate(prompt=PROMPT, size="256x256", stream=True, extra_body={"seed": 7})
    content, _ = generate(url, PROMPT, 2, seed=7)
    for text in ((answer.data or [])[0].b64_json, event.b64_json):
        assert np.array_equal(_read_png(base64.b64decode(text or "")), _read_png(content))


def test_the_triton_client_enlarges_a_latent(url: str) -> None:
    latent = np.random.default_rng(0).standard_normal((2, 24, 8, 8)).astype(np.float32)
    given = triton.InferInput("latent", list(latent.shape), "FP32")
    given.set_data_from_numpy(latent)
    with triton.InferenceServerClient(url.removeprefix("http://"), network_timeout=60) as client:
        assert client.is_model_ready("pocket")
        enlarged = client.infer("pocket", [given], parameters={"scale": 2}).as_numpy("latent")
    assert enlarged.shape == (2, 24, 16, 16) and np.isfinite(enlarged).all()


def test_diffusers_remote_vae_encodes_and_decodes_back(url: str) -> None:
    image = Image.open(io.BytesIO(generate(url, PROMPT, 1, seed=7)[0])).convert("RGB")
    latent = remote_encode(f"{url}/remote_vae/pocket/encode", image)
    assert latent.shape == (1, 24, BASE_PX // 4, BASE_PX // 4)
    back = remote_decode(f"{url}/remote_vae/pocket/decode", latent, do_scaling=False, image_format="png")
    assert np.abs(np.asarray(back, np.float64) - np.asarray(image, np.float64)).mean() < 8, "the VAE's own loss"
    large = remote_decode(f"{url}/remote_vae/pocket/decode?scale=2", latent, do_scaling=False)
    assert isinstance(large, Image.Image) and large.size == (2 * BASE_PX, 2 * BASE_PX)


def test_words_that_the_bundle_does_not_know_are_reported(url: str) -> None:
    body = httpx.post(f"{url}/generate", json={"prompt": "a red sphere and a zeppelin", "steps": 2}, timeout=60).json()
    assert body["status"] == "succeeded"
    assert any("zeppelin" in warning for warning in body["warnings"])


def test_progress_is_reported_from_queued_to_done(url: str) -> None:
    job = httpx.post(
        f"{url}/generate", json={"prompt": PROMPT, "steps": 4}, headers={"Prefer": "respond-async"}, timeout=30
    )
    assert job.status_code == 202
    with httpx.stream("GET", url + httpx.URL(job.json()["events_url"]).path, timeout=60) as events:
        names, steps = [], []
        for line in events.iter_lines():
            if line.startswith("event:"):
                names.append(line.split(":", 1)[1].strip())
            if line.startswith("data:") and names[-1] == "step":
                steps.append(json.loads(line[5:])["step"])
    assert names[0] == "queued" and names[-1] == "done"
    assert steps == sorted(steps) and steps[-1] == 4


@pytest.mark.deploy
def test_promtool_accepts_the_metrics(url: str) -> None:
    text = httpx.get(f"{url}/metrics", timeout=10).text
    assert "giantleap_queue_depth" in text and 'stage="decode"' in text
    promtool = shutil.which("promtool")
    assert promtool is not None, "promtool is missing: apt-get install prometheus"
    answer = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
    assert answer.returncode == 0 and answer.stdout + answer.stderr == ""


def _children_of(url: str) -> tuple[psutil.Process, list[psutil.Process]]:
    port = url.rsplit(":", 1)[1]
    for process in psutil.Process().children():
        if port in process.cmdline():
            return process, process.children(recursive=True)
    raise AssertionError("the service is not a child of this process")


def _named(children: list[psutil.Process], word: str) -> psutil.Process:
    return next(child for child in children if word in child.cmdline() or word in child.name())


def _post_many(url: str, count: int) -> list[str]:
    body = {"prompt": PROMPT, "steps": 8}
    headers = {"Prefer": "respond-async"}
    return [
        httpx.post(f"{url}/generate", json={**body, "seed": seed}, headers=headers, timeout=30).json()["id"]
        for seed in range(count)
    ]


def _final_states(url: str, job_ids: list[str], timeout_s: float) -> list[str]:
    deadline_s = time.monotonic() + timeout_s
    states: list[str] = []
    while time.monotonic() < deadline_s:
        states = [httpx.get(f"{url}/jobs/{job_id}", timeout=30).json().get("status", "lost") for job_id in job_ids]
        if not set(states) & {"queued", "processing"}:
            return states
        time.sleep(0.5)
    raise AssertionError(f"not finished after {timeout_s} s: {states}")


def test_a_killed_worker_is_replaced_and_every_job_finishes(url: str) -> None:
    job_ids = _post_many(url, 20)
    _, children = _children_of(url)
    time.sleep(0.5)
    os.kill(_named(children, "worker").pid, signal.SIGKILL)
    assert _final_states(url, job_ids, timeout_s=600) == ["succeeded"] * 20


def test_a_killed_redis_loses_nothing_that_was_acknowledged(url: str) -> None:
    job_ids = _post_many(url, 8)
    _, children = _children_of(url)
    os.kill(_named(children, "valkey-server").pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 60
    while httpx.get(f"{url}/readyz", timeout=30).status_code != 200 and time.monotonic() < deadline_s:
        time.sleep(0.25)
    assert _final_states(url, job_ids, timeout_s=600) == ["succeeded"] * 8


def test_nothing_is_orphaned_when_the_parent_is_killed() -> None:
    with pytest.raises(AssertionError, match="killed on purpose"), running_service() as url:
        parent, children = _children_of(url)
        assert len(children) >= 3, "Redis, API and worker"
        os.kill(parent.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=45)
        assert not alive, f"still running: {[child.cmdline() for child in alive]}"
        raise AssertionError("killed on purpose")
