"""Every file in `examples/` does what its docstring says, against a running service."""

import ast
import os
import subprocess
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from examples import diffusers_latents, export_lua, openai_client
from examples.webhooks.receiver import Receiver, is_genuine
from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.spec import LuaSpec
from tests.examples.conftest import ROOT, SECRET
from tests.random_lua import random_lua
from tests.waiting import wait_until

EXAMPLES = ROOT / "examples"
FILES = [path for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("webhooks/*")) if path.is_file()]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_example_says_how_it_is_run(path: Path) -> None:
    text = path.read_text() if path.suffix == ".sh" else ast.get_docstring(ast.parse(path.read_text()))
    assert text is not None and f" {path.relative_to(ROOT)}" in text


def test_latents_of_diffusers_give_one_image_decoded_there_and_here(url: str, tmp_path: Path) -> None:
    diffusers_latents.main(str(tmp_path), url, str(ROOT / "bundles" / "pocket"))
    there, here = pixels(tmp_path / "decoded_there.png"), pixels(tmp_path / "decoded_here.png")
    assert there.shape == (256, 256, 3) and np.abs(there - here).max() <= 2
    strip = there[-16:].mean(axis=(0, 1))
    assert strip.argmax() == 1, f"the floor is green: {strip}"


def test_the_client_of_openai_draws_streams_and_edits(url: str, tmp_path: Path) -> None:
    openai_client.main(str(tmp_path), "tiny", url)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "edited.png", "image.png", "partial_0.jpg", "partial_1.jpg", "streamed.png",
    ]  # fmt: skip
    image = pixels(tmp_path / "image.png")
    assert np.array_equal(image, pixels(tmp_path / "streamed.png"))
    assert pixels(tmp_path / "partial_0.jpg").shape == (128, 128, 3), "previews are of the base image"
    assert pixels(tmp_path / "edited.png").shape == (64, 64, 3), "the size of the bundle that edits"


def test_a_webhook_is_received_checked_and_its_image_stored(url: str, tmp_path: Path) -> None:
    receiver = Receiver(0, tmp_path, SECRET, url)
    thread = threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        address = f"http://127.0.0.1:{receiver.server_port}/"
        command = ["sh", str(EXAMPLES / "webhooks" / "generate.sh"), address]
        environment = {**os.environ, "GIANTLEAP_API_URL": url}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        image = tmp_path / f"{ran.stdout.strip()}.png"
        wait_until(image.exists, "the image of the job")
        assert len(receiver.deliveries) == 1
        forged = httpx.post(address, content=b"{}", headers={"X-Giantleap-Signature": "t=1,v1=00"}, timeout=60)
        assert forged.status_code == 401
    finally:
        receiver.shutdown()
        thread.join(60)
        receiver.server_close()
    assert pixels(image).shape == (256, 256, 3)


@pytest.mark.parametrize("header", ["", "t=1", "t=,v1=", "t=1,v1=00", "v1=00", "t=²,v1=00", "t=1700000000,v1=é"])
def test_a_signature_that_is_not_the_services_is_none(header: str) -> None:
    assert not is_genuine(SECRET, header, b"{}")


@pytest.mark.parametrize("scale", [None, 2, 4])
def test_an_exported_lua_reads_back_as_the_same_network(tmp_path: Path, scale: int | None) -> None:
    spec = LuaSpec(16, 24, (2, 3), 3, window=4, num_feat=8)
    net = random_lua(spec)
    write_lua(tmp_path / "lua.safetensors", net)
    arguments = () if scale is None else (str(scale),)
    export_lua.main(str(tmp_path / "lua.safetensors"), str(tmp_path / "lua.pth"), *arguments)
    again = read_lua(tmp_path / "lua.pth")
    assert again.spec.shift and again.spec.scales == (spec.scales if scale is None else (scale,))
    latent = torch.randn(1, 16, 9, 6)
    with torch.no_grad():
        for each in again.spec.scales:
            assert torch.equal(again(latent, each), net(latent, each))


def test_an_exported_lua_has_the_buffers_that_swinir_stores(tmp_path: Path) -> None:
    net = random_lua(LuaSpec(16, 24, (2,), 3, window=4, num_feat=8))
    write_lua(tmp_path / "lua.safetensors", net)
    export_lua.main(str(tmp_path / "lua.safetensors"), str(tmp_path / "lua.pth"), "2")
    (outer, weights), *others = torch.load(tmp_path / "lua.pth", weights_only=True).items()
    assert outer == "params_ema" and not others
    trunk, head = "conv_first patch_embed layers norm conv_after_body", "conv_before_upsample upsample conv_last"
    assert {key.split(".")[0] for key in weights} == {*trunk.split(), *head.split()}
    place = "layers.0.residual_group.blocks"
    index = weights[f"{place}.0.attn.relative_position_index"]
    assert index.dtype == torch.int64 and (index[0, 0], index[0, -1], index[-1, 0]) == (24, 0, 48)
    mask = weights[f"{place}.1.attn_mask"]
    assert mask.shape == (4, 16, 16) and set(mask.unique().tolist()) == {-100.0, 0.0} and not mask[0].any()
    assert f"{place}.0.attn_mask" not in weights


def test_what_a_layout_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cannot hold linear_skip, latent_norm"):
        export_lua.main(str(ROOT / "bundles" / "pocket" / "lua.safetensors"), str(tmp_path / "lua.pth"))
    write_lua(tmp_path / "lua.safetensors", random_lua(LuaSpec(4, 12, (2,), 2, window=4, num_feat=8, scales=(2,))))
    with pytest.raises(SystemExit, match="no head of scale 4; it has 2"):
        export_lua.main(str(tmp_path / "lua.safetensors"), str(tmp_path / "lua.pth"), "4")
