"""Studio scenes show what their prompts say, and pools hold them with the latents of both views."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from giantleap.training.pocket.drawing.captions import Slots
from giantleap.training.pocket.drawing.prompts import Prompt
from giantleap.training.pocket.drawing.still_life import render_still_life
from giantleap.training.pocket.network import make_autoencoder
from giantleap.training.pocket.studio import PLAN, draw_studio, read_pool, write_pool

PAIR = Prompt(
    Slots("sphere", "red", "green", "white", "left", "large"), Slots("cube", "blue", None, None, "right", "large")
)


def test_objects_stand_where_the_prompt_says() -> None:
    picture = render_still_life(draw_studio(np.random.default_rng(3), PAIR), 64)
    seen = picture[:, [40, 60, 40], [17, 32, 47]]  # the sphere, the floor in front, the cube
    assert seen.argmax(dim=0).tolist() == [0, 1, 2]


def test_a_prompt_of_one_object_has_one() -> None:
    one = Prompt(Slots("cone", "red", "green", "white", "centre", "small"))
    assert len(draw_studio(np.random.default_rng(0), one).solids) == 1
    assert len(draw_studio(np.random.default_rng(0), PAIR).solids) == 2


def test_a_pool_holds_pictures_prompts_and_latents_of_both_views(tmp_path: Path) -> None:
    vae = make_autoencoder().eval()
    write_pool(tmp_path, vae, 3, seed=0)
    pool = read_pool(tmp_path)
    assert pool.pictures.shape == (3, 3, 128, 128)
    assert pool.latents.shape == (3, 2, 24, 32, 32)
    picture = torch.from_numpy(pool.pictures[1].astype(np.float32)) / 127.5 - 1.0
    with torch.no_grad():
        mirrored = vae.encode(picture.flip(-1)[None]).latent[0]
    assert torch.allclose(torch.from_numpy(pool.latents[1, 1].astype(np.float32)), mirrored, atol=0.02)
    assert json.loads((tmp_path / PLAN).read_text())["count"] == len(pool.prompts) == 3


def test_an_unfinished_pool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="render"):
        read_pool(tmp_path)
