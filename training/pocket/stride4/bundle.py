"""Write bundles of stride 4: of the autoencoder alone, which is all that a training reads, or a whole one to serve."""

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
    SwinirFiles,
    Vocabulary,
)
from giantleap.models.bundle.digests import file_hashes
from giantleap.training.pocket.stride4.network import STRIDE_PX

LUA_FILE = "lua.safetensors"
GUIDANCE_SCALE = 1.5
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


def write_pocket_bundle(directory: Path, pipeline_dir: Path, lua_file: Path, swinir_files: dict[int, Path]) -> None:
    """Write a bundle to serve; its name is the directory's.

    Args:
        directory: Replaced.
        pipeline_dir: What the command `text` wrote.
        lua_file: What the command `adapter` wrote, for x2 and x4.
        swinir_files: By scale, what the command `swinir` wrote; may be empty.
    """
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(pipeline_dir, directory)
    shutil.copyfile(lua_file, directory / LUA_FILE)
    for scale, file in swinir_files.items():
        shutil.copyfile(file, directory / f"swinir_x{scale}.safetensors")
    hashes = file_hashes(directory)
    vae = json.loads((directory / "vae" / "config.json").read_text())
    write_bundle(
        directory,
        Descriptor(
            bundle=About(
                name=directory.name,
                title="Scenes of one or two objects, 128 px, drawn from a closed vocabulary",
                license="Apache-2.0",
                provenance=PROVENANCE,
            ),
            pipeline=PipelineSource(path="."),
            latent_space=LatentSpaceSource(
                name="pocket24", channels=vae["latent_channels"], stride_px=STRIDE_PX, scale=vae["scaling_factor"]
            ),
            lua=LuaFile(file=LUA_FILE, scales=(2, 4), sha256=hashes.pop(LUA_FILE)),
            swinir=SwinirFiles(**{f"x{scale}": f"swinir_x{scale}.safetensors" for scale in swinir_files})
            if swinir_files
            else None,
            defaults=Defaults(steps=12, guidance_scale=GUIDANCE_SCALE, base_width_px=128, base_height_px=128),
            limits=Limits(min_base_px=96, max_base_px=192, multiple_px=32, max_steps=100, max_direct_px=512),
            vocabulary=Vocabulary(closed=True),
            files=hashes,
        ),
    )
