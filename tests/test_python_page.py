"""The code of docs/python.md runs against the pocket bundle, and `import giantleap` stays light."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import giantleap
from giantleap.models.lua.checkpoints import CheckpointError

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_the_page_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundles").symlink_to(ROOT / "bundles")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(PAGE), "exec"), {"__name__": "page"})
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert image.size == (256, 256), "128 px at x2"


def test_the_page_is_short() -> None:
    assert BLOCKS
    assert len(PAGE.read_text().split()) <= 400


def test_importing_giantleap_loads_neither_torch_nor_pydantic() -> None:
    code = "import sys, giantleap; sys.exit(bool({'torch', 'diffusers', 'pydantic', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_every_public_name_is_there() -> None:
    assert all(hasattr(giantleap, name) for name in giantleap.__all__)
    assert set(giantleap.__all__) <= set(dir(giantleap))
    with pytest.raises(AttributeError, match="no attribute 'load_upscalers'"):
        _ = giantleap.load_upscalers


def test_an_upscaler_prints_its_contract() -> None:
    assert repr(giantleap.load_upscaler(ROOT / "bundles" / "pocket", device="cpu")) == (
        "Upscaler(name='pocket', latent_space='pocket24', channels=24, scales=(2, 4), window=8, engine='torch', "
        "device='cpu', dtype=torch.float32)"
    )


@pytest.mark.parametrize(
    ("latents", "scale", "message"),
    [
        (torch.zeros(1, 4, 8, 8), 2, r"\[batch, 24, height, width\]; found \[1, 4, 8, 8\]"),
        (torch.zeros(24, 8, 8), 2, r"found \[24, 8, 8\]"),
        (torch.zeros(0, 24, 8, 8), 2, r"found \[0, 24, 8, 8\]"),
        (torch.zeros(1, 24, 8, 8, dtype=torch.int64), 2, "floating point; found torch.int64"),
        (torch.full((1, 24, 8, 8), float("nan")), 2, "must be finite"),
        (torch.zeros(1, 24, 8, 8), 3, "one of 2, 4; found 3"),
    ],
)
def test_an_upscaler_says_what_is_wrong_with_its_input(latents: torch.Tensor, scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        giantleap.load_upscaler("pocket", device="cpu")(latents, scale)


def test_an_upscaler_from_a_weight_file_computes_as_that_of_the_bundle() -> None:
    latents = torch.randn(2, 24, 9, 13, generator=torch.Generator().manual_seed(0))
    whole = giantleap.load_upscaler("pocket", device="cpu")
    alone = giantleap.load_upscaler(ROOT / "bundles" / "pocket" / "lua.safetensors", device=torch.device("cpu"))
    assert alone.latent_space is None
    large = alone(latents, scale=4)
    assert large.shape == (2, 24, 36, 52)
    torch.testing.assert_close(large, whole(latents, scale=4))
    torch.testing.assert_close(whole(latents.half()), whole(latents.half().float(), scale=2))


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(giantleap.BundleError, match=r"no known bundle; .*pocket"):
        giantleap.load_bundle("no-such-bundle")
    with pytest.raises(giantleap.BundleError, match="giantleap bundle pull"):
        giantleap.load_route("sdxl")
    with pytest.raises(giantleap.BundleError, match="has no LUA weights"):
        giantleap.load_upscaler("sdxl")
    with pytest.raises(giantleap.BundleError, match="has no LUA weights"):
        giantleap.load_upscaler("sd3.5-medium")  # a name with a dot is not a file name
    with pytest.raises(FileNotFoundError, match="no LUA weights at"):
        giantleap.load_upscaler(tmp_path / "lua.safetensors")
    (tmp_path / "lua.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"\.safetensors, \.pth or \.pt"):
        giantleap.load_upscaler(tmp_path / "lua.txt")
