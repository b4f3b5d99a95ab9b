"""The comparison of a transferred adapter with one from scratch: equal but for start and length, the worst judged."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.training.transfer.run import judge, make_bundle, plan, table, variants_of
from giantleap.models.bundle.bundle import read_bundle
from giantleap.training.data.frozen_vae import read_vae
from giantleap.training.pocket.drawing.leaves import draw_leaves
from giantleap.training.pocket.network import BlockPca
from giantleap.training.pocket.pictures import to_images


def test_variants_differ_in_start_and_length_alone() -> None:
    variants = {variant.name: variant for variant in variants_of(30)}
    assert {name: (each.start, each.steps) for name, each in variants.items()} == {
        "transfer_fit": ("fit", 30),
        "transfer_slice": ("slice", 30),
        "transfer_fresh": ("fresh", 30),
        "scratch_short": (None, 30),
        "scratch": (None, 300),
    }
    folder = Path("somewhere")
    moved = plan(folder, folder, folder / "start.safetensors", 30, 1e-3, 4).model_dump()
    scratch = plan(folder, folder, None, 300, 1e-3, 4).model_dump()
    assert moved.pop("lua") != scratch.pop("lua")
    (moved_stage,), (scratch_stage,) = moved.pop("stages"), scratch.pop("stages")
    assert (moved_stage.pop("steps"), scratch_stage.pop("steps")) == (30, 300)
    assert moved_stage == scratch_stage and moved == scratch


def test_a_figure_says_how_far_the_transfer_is_ahead() -> None:
    names = ("held_out_x2_db", "held_out_x4_db", "photos_x2_db", "photos_x4_db")
    scratch = dict.fromkeys(names, 25.0)
    moved = scratch | {"held_out_x2_db": 25.5, "photos_x4_db": 24.6}
    figures = {"transfer_fit 0": scratch, "transfer_fit 30": moved, "scratch 300": scratch, "scratch_short 30": moved}
    assert judge(figures, 30) == pytest.approx(dict(zip(names, (0.5, 0.0, 0.0, -0.4), strict=True)))
    assert len(table(figures).splitlines()) == 5


def test_the_other_autoencoder_starts_at_the_principal_components(tmp_path: Path) -> None:
    leaves = np.stack([draw_leaves(np.random.default_rng((7, i)), 96) for i in range(3)])
    make_bundle(tmp_path / "pocket12", leaves)
    bundle = read_bundle(tmp_path / "pocket12")
    assert (bundle.latent_space.channels, bundle.latent_space.stride_px) == (12, 4)
    vae, pictures = read_vae(bundle, torch.device("cpu"), torch.float32), to_images(leaves)
    codes = vae.encode(pictures)
    expected = BlockPca.fit(pictures, 12)
    torch.testing.assert_close(codes, expected.encode(pictures), rtol=0.01, atol=0.02)
    torch.testing.assert_close(vae.decode(codes), expected.decode(codes), rtol=0.05, atol=0.05)
