"""Write the descriptor of the pocket bundle: provenance, limits and digests.

`python -m giantleap.training.pocket pack` calls it after every change of the weights. `write_vae_bundle` makes a bundle
of a VAE alone, which is all that training needs.
"""

import json
import shutil
from pathlib import Path

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

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
    SwinirFiles,
    Vocabulary,
)
from giantleap.models.bundle.digests import file_hashes

LUA_FILE = "lua.safetensors"
SWINIR_FILES = {"x2": "swinir_x2.safetensors", "x4": "swinir_x4.safetensors"}

PROVENANCE = (
    "Trained from random weights by `python -m giantleap.training.pocket` on pictures that its own code draws: dead "
    "leaves for the VAE and the adapter, ray-cast scenes with captions for text to latent. No photograph, no foreign "
    "weight."
)


def write_descriptor(directory: Path) -> None:
    """Write or replace `bundle.toml` for the weights in `directory`."""
    hashes = file_hashes(directory)
    swinir = {key: name for key, name in SWINIR_FILES.items() if name in hashes}
    write_bundle(
        directory,
        Descriptor(
            bundle=About(
                name="pocket",
                title="Simple scenes of 128 px, drawn from a closed vocabulary",
                license="Apache-2.0",
                provenance=PROVENANCE,
            ),
            pipeline=PipelineSource(path="."),
            latent_space=LatentSpaceSource(name="pocket16"),
            lua=LuaFile(file=LUA_FILE, scales=(2, 4), sha256=hashes.pop(LUA_FILE)),
            swinir=SwinirFiles(**swinir) if swinir else None,
            # Trained at 128 px only: at 64 px images break, at 256 px the object repeats.
            defaults=Defaults(steps=12, guidance_scale=3.0, base_width_px=128, base_height_px=128),
            # Larger images repeat the object, too; they are allowed for comparing the methods.
            limits=Limits(min_base_px=96, max_base_px=192, multiple_px=32, max_steps=100, max_direct_px=512),
            vocabulary=Vocabulary(closed=True),
            files=hashes,
        ),
    )


def write_vae_bundle(directory: Path, vae_dir: Path, name: str) -> None:
    """Write a bundle of a VAE alone, to train in its latent space; `giantleap serve` refuses it.

    Args:
        directory: Directory of the bundle; its content is replaced.
        vae_dir: An AutoencoderKL of stride 8, written by diffusers.
        name: Name of the bundle and of its latent space.
    """
    shutil.rmtree(directory, ignore_errors=True)
    vae = AutoencoderKL.from_pretrained(vae_dir).half()
    vae.register_to_config(_name_or_path=f"giantleap/{name}")  # keep paths of this machine out of the bundle
    vae.save_pretrained(directory / "vae")
    provenance = (
        "Trained from random weights by `python -m giantleap.training.pocket vae` on pictures that its own code draws."
    )
    index = {"_class_name": "DiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_bundle(
        directory,
        Descriptor(
            bundle=About(name=name, title="A VAE alone, to train with", license="Apache-2.0", provenance=provenance),
            pipeline=PipelineSource(path="."),
            latent_space=LatentSpaceSource(
                name=name,
                channels=int(vae.config.latent_channels),
                stride_px=8,
                scale=float(vae.config.scaling_factor),
            ),
            lua_source=LuaSource(train="giantleap train prepare, giantleap train transfer"),
            # placeholders for a pipeline that does not exist
            defaults=Defaults(
                steps=1, guidance_scale=0.0, base_width_px=128, base_height_px=128, scale=1, method="bicubic"
            ),
            limits=Limits(min_base_px=32, max_base_px=512, multiple_px=32, max_steps=1),
            vocabulary=Vocabulary(closed=False),
            files=file_hashes(directory),
        ),
    )
