"""LoRA files as their headers describe them: what is listed, what is refused, and why one does not fit a pipeline."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from giantleap.models.adapters.files import AdapterError, misfit, read_denoiser, read_directory, read_file

SHAPES = {"transformer_blocks.0.attn.to_q.weight": (16, 8), "norm.weight": (8,)}


def write(path: Path, start: str = "transformer.transformer_blocks.0.attn.to_q", *, features: tuple[int, int] = (8, 16),
          down: str = "lora_A", up: str = "lora_B", base: str | None = None) -> Path:  # fmt: skip
    tensors = {
        f"{start}.{down}.weight": torch.zeros(4, features[0]),
        f"{start}.{up}.weight": torch.zeros(features[1], 4),
    }
    save_file(tensors, path, metadata=None if base is None else {"modelspec.architecture": base})
    return path


def test_a_directory_is_listed_by_name_with_rank_digest_and_base(tmp_path: Path) -> None:
    write(tmp_path / "style-1.0.safetensors", base="stable-diffusion-xl-v1-base/lora")
    (tmp_path / "notes.txt").write_text("no LoRA")
    (file,) = read_directory(tmp_path).values()
    assert (file.name, file.rank, file.base) == ("style-1.0", 4, "stable-diffusion-xl-v1-base/lora")
    assert len(file.sha256) == 64 and file.size_bytes == (tmp_path / "style-1.0.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["-style", "a b", "..", "a" * 65, "caf\u00e9"])
def test_names_that_requests_could_not_send_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="rename it"):
        read_file(write(tmp_path / f"{name}.safetensors"))


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]", (8).to_bytes(8, "little") + b"{not js}"],
    ids=["empty", "short", "long header", "list", "no json"],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "style.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="no safetensors file"):
        read_file(path)


def test_weights_that_are_no_lora_are_refused(tmp_path: Path) -> None:
    save_file({"transformer.to_q.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match="no pairs"):
        read_directory(tmp_path)


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is no directory"):
        read_directory(tmp_path / "loras")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"start": "lora_transformer_transformer_blocks_0_attn_to_q", "down": "lora_down", "up": "lora_up"}, ""),
        ({"start": "lora_unet_double_blocks_0_img_attn_qkv", "down": "lora_down", "up": "lora_up"}, ""),
        ({"start": "transformer.blocks.0.attn.to_q"}, "none of its layers is in this model"),
        ({"features": (8, 32)}, r"is for \(8, 32\) features in and out, and this model's has \(8, 16\)"),
        ({"base": "flux-1-dev/lora"}, ""),
        ({"base": "sdxl_base_v1-0"}, "it is made for sdxl_base_v1-0, not for FluxPipeline"),
        ({"base": "a model of tomorrow"}, ""),
    ],
)
def test_a_file_is_refused_for_what_it_says(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    import re

    found = misfit(read_file(write(tmp_path / "a.safetensors", **changes)), "FluxPipeline", SHAPES)  # type: ignore[arg-type]
    assert re.fullmatch(f".*{reason}" if reason else "", found)


def test_a_pipeline_that_takes_none_refuses_all(tmp_path: Path) -> None:
    assert "loads no LoRA" in misfit(read_file(write(tmp_path / "a.safetensors")), "PRXPipeline", SHAPES)


def test_shapes_are_read_from_every_part_of_a_sharded_denoiser(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    for number in (1, 2):
        save_file(
            {f"layer.{number}.weight": torch.zeros(number, 3)}, tmp_path / f"transformer/part-{number}.safetensors"
        )
    assert read_denoiser(tmp_path) == {"layer.1.weight": (1, 3), "layer.2.weight": (2, 3)}
