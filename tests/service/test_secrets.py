"""What must not be known is not logged: whole runs at the lowest level, with marked secrets in every place."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from safetensors.numpy import save

from giantleap.service.auth import new_key
from giantleap.service.settings import read_settings
from giantleap.service.supervisor.embedded_redis import free_port
from tests.service.compat_fakes import LATENT
from tests.service.paper_bundle import write_paper_bundle

PROMPT = "a marmalade-zeppelin over a green floor"
WORD = "marmalade"


def ask_everything(url: str, key: str, wrong_key: str) -> set[int]:
    """Good and bad requests on each front, the secrets in every place that a request has; their statuses."""
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": f"{WORD}-1", "Prefer": "respond-async"}
    body = {"prompt": PROMPT, "negative_prompt": WORD}
    seen = set()
    with httpx.Client(base_url=url, timeout=60, headers=headers) as client:
        for path, sent in (
            ("/generate", {"json": body}),
            ("/generate", {"json": body | {"steps": WORD}}),
            ("/generate", {"json": body | {WORD: 1}}),
            ("/generate", {"content": json.dumps(body)[:-3], "headers": {"Content-Type": "application/json"}}),
            ("/generate", {"json": body | {"init_image": WORD}}),
            ("/upscale", {"content": WORD.encode() * 100}),
            (f"/upscale?bundle={WORD}", {"content": LATENT.tobytes()}),
            (
                f"/upscale?refine_steps=4&prompt={WORD}&negative_prompt={WORD}",
                {
                    "content": save({"latent": LATENT}),
                    "headers": {"Content-Type": "application/x-safetensors", "Idempotency-Key": "refine"},
                },
            ),
            (f"/v2/models/{WORD}/infer", {"json": {"inputs": WORD}}),
            ("/v1/images/generations", {"json": body | {"size": WORD}}),
            ("/generate", {"json": body, "headers": {"Authorization": f"Bearer {wrong_key}"}}),
            ("/generate", {"json": body, "headers": {"X-API-Key": wrong_key}}),
            (f"/{WORD}", {}),
        ):
            answer = client.post(path, **sent)
            assert key not in answer.text and wrong_key not in answer.text
            seen.add(answer.status_code)
            if answer.status_code == 202:
                assert httpx.head(url + answer.json()["events_url"], timeout=60).status_code == 200, "signed"
        for path in (f"/jobs/{WORD}", "/models", "/metrics"):
            answer = client.get(path)
            assert key not in answer.text and WORD not in answer.text
            seen.add(answer.status_code)
    return seen


def run_and_ask(command: list[str], environment: dict[str, str], port: int, keys: list[str]) -> tuple[set[int], str]:
    """Starts the command, asks, stops it in order; the statuses, and all that it wrote."""
    process = subprocess.Popen(
        [sys.executable, "-m", "giantleap", *command, "--port", str(port)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{url}/livez", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
        statuses = ask_everything(url, *keys)
        process.send_signal(signal.SIGTERM)
        return statuses, process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize("command", ["api", pytest.param("serve", marks=pytest.mark.slow)])
def test_no_secret_is_in_the_logs_of_a_whole_run(command: str, redis_url: str, key_prefix: str, tmp_path: Path) -> None:
    password = urlsplit(redis_url).password
    assert password, "the session's Redis asks for one"
    (key, digest), (wrong_key, _) = new_key(), new_key()
    keys_file = tmp_path / "keys.toml"
    scopes = '["generate", "upscale", "metrics", "admin"]'
    keys_file.write_text(f'[[key]]\nname = "alice"\nsha256 = "{digest}"\nscopes = {scopes}\n')
    given: dict[str, Any] = {
        "REDIS_URL": redis_url,
        "KEY_PREFIX": key_prefix,
        "API_KEYS_FILE": keys_file,
        "LOG_LEVEL": "debug",
        "URL_SECRET": f"{WORD}-{WORD}",
    }
    if command == "api":  # no worker runs: any descriptor does
        given["BUNDLE"] = write_paper_bundle(tmp_path / "paper")
    environment = os.environ | {f"GIANTLEAP_{name}": str(value) for name, value in given.items()}
    statuses, output = run_and_ask([command], environment, free_port(), [key, wrong_key])
    assert {200, 202, 400, 401, 404, 415, 422} <= statuses
    lines = [line for line in output.splitlines() if line.startswith("{")]
    assert len(lines) >= 5, output
    for secret in (key, wrong_key, digest, password, WORD, "signature="):
        assert secret not in output, "\n".join(line for line in output.splitlines() if secret in line)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cr3t-marker@127.0.0.1:1/0",
        "redis://:s3cr3t-marker@127.0.0.1:port/0",
        "http://:s3cr3t-marker@127.0.0.1/0",
        "redis://user:s3cr3t-marker@[::1/0",
        "redis://:s3cr3t-marker#x@127.0.0.1/0",
    ],
)
def test_an_address_of_redis_that_does_not_work_is_not_repeated(url: str, tmp_path: Path) -> None:
    bundle = write_paper_bundle(tmp_path / "paper")
    environment = os.environ | {"GIANTLEAP_BUNDLE": str(bundle)}
    script = "import asyncio, sys\nfrom giantleap.service.api.app import create_app\n"
    script += "from giantleap.service.settings import read_settings\n"
    script += "app = create_app(read_settings(redis_url=sys.argv[1]))\n"
    script += "async def run():\n    async with app.router.lifespan_context(app): pass\nasyncio.run(run())"
    done = subprocess.run(
        [sys.executable, "-c", script, url], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode == 0) == url.endswith("127.0.0.1:1/0")  # of a server that is away; the API waits for it
    assert "s3cr3t-marker" not in done.stdout + done.stderr, done.stderr


def test_settings_do_not_show_the_address_of_redis() -> None:
    settings = read_settings(redis_url="redis://:s3cr3t-marker@127.0.0.1:1/0")
    assert "s3cr3t-marker" not in repr(settings) + str(settings)
    with pytest.raises(ValueError) as refused:
        read_settings(redis_url=["redis://:s3cr3t-marker@127.0.0.1:1/0"], port="s3cr3t-marker")
    assert "s3cr3t-marker" not in str(refused.value)
