"""Writes the descriptor of the pocket bundle: what it is, where its weights come from, its limits and their digests.

`python -m training.pocket pack` calls it after every change of the weights.
"""

from pathlib import Path

from models.bundle import file_hashes, write_bundle
from models.bundle_descriptor import (
    About,
    Defaults,
    Descriptor,
    LatentSpaceSource,
    Limits,
    LuaFile,
    PipelineSource,
    SwinirFiles,
    Vocabulary,
)

LUA_FILE = "lua.safetensors"
SWINIR_FILES = {"x2": "swinir_x2.safetensors", "x4": "swinir_x4.safetensors"}

PROVENANCE = (
    "Trained from random weights by `python -m training.pocket` on pictures that its own code draws: dead leaves for "
    "the VAE and the adapter, ray-cast scenes with captions for text to latent. No photograph, no foreign weight."
)


def write_descriptor(directory: Path) -> None:
    """Write `bundle.toml` for the weights that lie in `directory`.

    Effects: replaces the file that was there.
    """
    hashes = file_hashes(directory)
    swinir = {key: name for key, name in SWINIR_FILES.items() if name in hashes}
    write_bundle(
        directory,
        Descriptor(
            bundle=About(
                name="pocket",
                title="Simple scenes of 128 px, drawn from a closed vocabulary",
                licence="Apache-2.0",
                provenance=PROVENANCE,
            ),
            pipeline=PipelineSource(path="."),
            latent_space=LatentSpaceSource(name="pocket16"),
            lua=LuaFile(file=LUA_FILE, scales=(2, 4), sha256=hashes.pop(LUA_FILE)),
            swinir=SwinirFiles(**swinir) if swinir else None,
            # The network has only seen 128 px: at 64 px its pictures break, at 256 px it repeats the object.
            defaults=Defaults(steps=12, guidance_scale=3.0, base_width_px=128, base_height_px=128),
            # Larger ones repeat it as well; they are allowed directly so that the methods can be compared.
            limits=Limits(min_base_px=96, max_base_px=192, multiple_px=32, max_steps=100, max_direct_px=512),
            vocabulary=Vocabulary(closed=True),
            files=hashes,
        ),
    )
