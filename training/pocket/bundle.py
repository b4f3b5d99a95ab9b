"""Write the descriptor of the pocket bundle, and bundles of an autoencoder alone, all that a training reads."""

import json
import shutil
from pathlib import Path

from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

from giantleap.models.bundle.bundle import write_bundle
from giantleap.models.bundle.descriptor import (
    About,
    Defaults,
    Descriptor,
    LatentSpaceSource,
    Limits,
    LuaFile,
    LuaSource,
    PipelineSource,
    PreviewFile,
    SwinirFiles,
    Vocabulary,
)
from giantleap.models.bundle.digests import file_hashes
from giantleap.models.vae.preview import PREVIEW_FILE

LUA_FILE = "lua.safetensors"
SWINIR_FILES = {"x2": "swinir_x2.safetensors", "x4": "swinir_x4.safetensors"}
LATENT_SPACE = "pocket24"
STEPS = 8
GUIDANCE_SCALE = 1.0  # none: the network follows prompts by itself, in half of the time
PROVENANCE = (
    "Started at the principal components of 4 x 4 blocks and trained by `python -m giantleap.training.pocket` "
    "on pictures that its own code draws and on nine photographs under CC0-1.0 and CC-BY-4.0 from Debian's package "
    "lomiri-wallpapers-16.04; names, authors and licenses are in training/pocket/drawing/photographs.py."
)


def write_autoencoder_bundle(directory: Path, autoencoder: AutoencoderDC) -> None:
    """Write a bundle of an autoencoder as float16; `giantleap serve` refuses it.

    Args:
        directory: Replaced; its name is that of the bundle and of the latent space.
        autoencoder: Converted in place.
    """
    shutil.rmtree(directory, ignore_errors=True)
    name = directory.name
    autoencoder.half()
    autoencoder.register_to_config(_name_or_path=f"giantleap/{name}")  # no path of this machine in the bundle
    autoencoder.save_pretrained(directory / "vae")
    index = {"_class_name": "DiffusionPipeline", "vae": ["diffusers", "AutoencoderDC"]}
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_bundle(
        directory,
        Descriptor(
            bundle=About(name=name, title="An autoencoder alone", license="Apache-2.0", provenance=PROVENANCE),
            pipeline=PipelineSource(path="."),
            latent_space=_latent_space(name, autoencoder),
            lua_source=LuaSource(train="giantleap train prepare, giantleap train run"),
            # What a pipeline would need; there is none.
            defaults=Defaults(
                steps=1, guidance_scale=0.0, base_width_px=128, base_height_px=128, scale=1, method="bicubic"
            ),
            limits=Limits(min_base_px=32, max_base_px=512, multiple_px=32, max_steps=1),
            vocabulary=Vocabulary(closed=False),
            files=file_hashes(directory),
        ),
    )


def _latent_space(name: str, autoencoder: AutoencoderDC) -> LatentSpaceSource:
    if name == LATENT_SPACE:
        return LatentSpaceSource(name=name)
    return LatentSpaceSource(
        name=name,
        channels=int(autoencoder.config["latent_channels"]),
        stride_px=int(autoencoder.spatial_compression_ratio),
        scale=float(autoencoder.config["scaling_factor"]),
    )


def write_descriptor(directory: Path) -> None:
    """Write or replace `bundle.toml` of the pocket bundle for the weights in `directory`."""
    hashes = file_hashes(directory)
    swinir = {key: name for key, name in SWINIR_FILES.items() if name in hashes}
    write_bundle(
        directory,
        Descriptor(
            bundle=About(
                name="pocket",
                title="Scenes of one or two objects, 128 px, drawn from a closed vocabulary",
                license="Apache-2.0",
                provenance=PROVENANCE,
            ),
            pipeline=PipelineSource(path="."),
            latent_space=LatentSpaceSource(name=LATENT_SPACE),
            lua=LuaFile(file=LUA_FILE, scales=(2, 4), sha256=hashes.pop(LUA_FILE)),
            swinir=SwinirFiles(**swinir) if swinir else None,
            preview=PreviewFile(file=PREVIEW_FILE) if PREVIEW_FILE in hashes else None,
            # Trained at 128 px only; other sizes are allowed for comparing the methods.
            defaults=Defaults(steps=STEPS, guidance_scale=GUIDANCE_SCALE, base_width_px=128, base_height_px=128),
            limits=Limits(min_base_px=96, max_base_px=192, multiple_px=32, max_steps=100, max_direct_px=512),
            vocabulary=Vocabulary(closed=True),
            files=hashes,
        ),
    )
