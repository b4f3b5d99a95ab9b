"""Writes a bundle of the autoencoder of stride 4 alone, which is all that a training reads; none can be served."""

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
    LuaSource,
    PipelineSource,
    Vocabulary,
)
from giantleap.models.bundle.digests import file_hashes

PROVENANCE = (
    "Started at the principal components of 4 x 4 blocks and trained by `python -m giantleap.training.pocket.stride4` "
    "on pictures that its own code draws and on nine photographs under CC0-1.0 and CC-BY-4.0 from Debian's package "
    "lomiri-wallpapers-16.04; names, authors and licenses are in training/pocket/stride4/photographs.py."
)


def write_autoencoder_bundle(directory: Path, autoencoder: AutoencoderDC) -> None:
    """Writes the bundle, its weights as float16; its name, the directory's, is that of the latent space too.

    Effects: replaces what the directory held.
    """
    shutil.rmtree(directory, ignore_errors=True)
    name = directory.name
    autoencoder.half()
    autoencoder.register_to_config(_name_or_path=f"giantleap/{name}")  # no path of this machine in the bundle
    autoencoder.save_pretrained(directory / "vae")
    index = {"_class_name": "DiffusionPipeline", "vae": ["diffusers", "AutoencoderDC"]}
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    stride_px = int(autoencoder.spatial_compression_ratio)
    write_bundle(
        directory,
        Descriptor(
            bundle=About(name=name, title="An autoencoder alone", license="Apache-2.0", provenance=PROVENANCE),
            pipeline=PipelineSource(path="."),
            latent_space=LatentSpaceSource(
                name=name,
                channels=int(autoencoder.config["latent_channels"]),
                stride_px=stride_px,
                scale=float(autoencoder.config["scaling_factor"]),
            ),
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
