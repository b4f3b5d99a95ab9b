"""A bundle that exists on paper only: all that the API process reads, and no weights that could run."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

KNOWN_WORDS = ("a", "red", "sphere", "on", "green", "floor")
CHANNELS = 16
BASE_PX = 64

_DESCRIPTOR = """
[bundle]
name = "{name}"
title = "Paper"
license = "Apache-2.0"
provenance = "written by a test"
[pipeline]
path = "pipeline"
[latent_space]
{latent_space}
[lua]
file = "lua.safetensors"
scales = [2, 4]
sha256 = "{digest}"
[defaults]
steps = 8
guidance_scale = 3.0
base_width_px = 64
base_height_px = 64
[limits]
min_base_px = 32
max_base_px = 128
multiple_px = 16
max_steps = 50
max_direct_px = 256
[vocabulary]
closed = true
[files]
"""
PAPER_SPACE = 'name = "paper"\nchannels = 16\nstride_px = 8\nscale = 0.5\nshift = 0.25'


def write_paper_bundle(
    directory: Path,
    name: str = "paper",
    latent_space: str = PAPER_SPACE,
    pipeline_class: str = "StableDiffusionPipeline",
) -> Path:
    """Write the bundle; `latent_space` is that section of its descriptor."""
    pipeline = directory / "pipeline"
    for part in ("vae", "tokenizer"):
        (pipeline / part).mkdir(parents=True)
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": pipeline_class}))
    (pipeline / "vae" / "config.json").write_text(json.dumps({"latent_channels": CHANNELS}))
    vocabulary = {word: index for index, word in enumerate(("[unknown]", *KNOWN_WORDS))}
    Tokenizer(WordLevel(vocabulary, unk_token="[unknown]")).save(str(pipeline / "tokenizer" / "tokenizer.json"))
    save_file({"nothing": np.zeros(1, np.float32)}, directory / "lua.safetensors")
    (directory / "bundle.toml").write_text(_DESCRIPTOR.format(name=name, latent_space=latent_space, digest="0" * 64))
    return directory
