"""Commands that make the pocket bundle: `python -m giantleap.training.pocket COMMAND`.

In order: `autoencoder`, `bundle`, `pictures`; then the public trainer makes the adapter, as for any bundle:
`giantleap train prepare` and `giantleap train run` with `training/pocket/adapter.toml` and `adapter_long.toml`; then
`swinir`, `scenes`, `text`, and `pack`.
"""

import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.vae.preview import PREVIEW_FILE
from giantleap.models.vae.preview_fit import add_preview_map
from giantleap.training.optim import Budget
from giantleap.training.pocket.autoencoder import Recipe, train_autoencoder
from giantleap.training.pocket.bundle import LUA_FILE, write_autoencoder_bundle, write_descriptor
from giantleap.training.pocket.options import Length, Resume, Seed
from giantleap.training.pocket.pictures import write_pictures, write_scenes
from giantleap.training.pocket.studio import write_pool
from giantleap.training.pocket.swinir import read_pairs, train_swinir
from giantleap.training.pocket.text import Recipe as TextRecipe
from giantleap.training.pocket.text import train_text

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

RUNS = Path("runs/pocket")
PoolFolder = Annotated[Path, typer.Option(help="Folder of photographs and drawn pictures; filled when empty.")]


@app.command()
def autoencoder(
    out: Path = RUNS / "autoencoder",
    pool: PoolFolder = RUNS / "pool",
    length: Length = Budget(minutes=46.0),
    seed: Seed = 0,
    resume: Resume = False,
    bfloat16: Annotated[bool, typer.Option(help="1.4 times faster where the CPU has avx512_bf16, else slower.")] = True,
) -> None:
    """Train encoder and decoder."""
    torch.set_num_threads(1)
    train_autoencoder(out, pool, length, seed, resume, Recipe(is_bfloat16=bfloat16))


@app.command()
def bundle(
    autoencoder_dir: Path = RUNS / "autoencoder/vae",
    out: Annotated[Path, typer.Option(help="Directory of the bundle.")] = RUNS / "pocket24",
) -> None:
    """Make a bundle of the autoencoder alone, for `giantleap train`."""
    write_autoencoder_bundle(out, AutoencoderDC.from_pretrained(autoencoder_dir))


@app.command()
def pictures(
    out: Path = RUNS / "pictures",
    pool: PoolFolder = RUNS / "pool",
    count: Annotated[int, typer.Option(help="Pictures of 256 x 256 px.")] = 4800,
    still_lifes: Annotated[int, typer.Option(help="Still lifes of 512 px more; each gives four pictures.")] = 300,
    studio_scenes: Annotated[int, typer.Option(help="Calm scenes of 512 px more; each gives four pictures.")] = 220,
    orientations: Annotated[int, typer.Option(min=1, max=8, help="Of each picture of a scene.")] = 4,
    seed: Annotated[int, typer.Option(help="Fixes the pictures.")] = 0,
) -> None:
    """Write the pictures that `giantleap train prepare` encodes; the held-out ones come last by name."""
    torch.set_num_threads(1)
    write_scenes(out, "drawn", still_lifes, seed, orientations)
    write_scenes(out, "calm", studio_scenes, seed, orientations)
    write_pictures(out, pool, count, seed)


@app.command()
def swinir(
    scale: Annotated[int, typer.Option(help="2 or 4.")],
    out: Annotated[Path, typer.Option(help="Folder of this scale.")],
    start: Annotated[Path | None, typer.Option(help="File of the other scale, to take its trunk.")] = None,
    autoencoder_dir: Path = RUNS / "pocket24/vae",
    pictures_dir: Annotated[Path, typer.Option(help="What `pictures` wrote.")] = RUNS / "pictures",
    length: Length = Budget(minutes=12.0),
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train the pixel-space upscaler of one scale on the adapter's pictures."""
    vae, files = _open_autoencoder(autoencoder_dir), sorted(pictures_dir.glob("*.png"))
    held_out = [file for file in files if file.name.startswith("held_out")]
    pairs = read_pairs(vae, [file for file in files if file not in set(held_out)], scale)
    train_swinir(out, pairs, read_pairs(vae, held_out, scale), start, length, seed, resume)


@app.command()
def scenes(
    out: Path = RUNS / "scenes",
    autoencoder_dir: Path = RUNS / "pocket24/vae",
    count: Annotated[int, typer.Option(help="Scenes of 128 px.")] = 6000,
    seed: Annotated[int, typer.Option(help="Fixes the scenes.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes that render.")] = 1,
) -> None:
    """Render captioned scenes and encode them, for `text`."""
    torch.set_num_threads(1)
    write_pool(out, _open_autoencoder(autoencoder_dir), count, seed, processes)


@app.command()
def text(
    out: Path = RUNS / "text",
    scenes_dir: Path = RUNS / "scenes",
    autoencoder_dir: Path = RUNS / "pocket24/vae",
    length: Length = Budget(minutes=62.0),
    seed: Seed = 0,
    resume: Resume = False,
    bfloat16: Annotated[bool, typer.Option(help="1.4 times faster where the CPU has avx512_bf16, else slower.")] = True,
    compiled: Annotated[bool, typer.Option(help="1.15 times faster; needs a C++ compiler.")] = False,
    patch: Annotated[
        int, typer.Option(help="Side of a token in latent pixels: 4, or 2, which takes 4 times as long.")
    ] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a step.")] = 64,
    start: Annotated[
        Path | None, typer.Option(help="state.pt of a run to begin with, at a lower rate; its tokens may be larger.")
    ] = None,
) -> None:
    """Train text to latent: a stock SanaPipeline."""
    recipe = TextRecipe(batch=batch, patch=patch, is_bfloat16=bfloat16, is_compiled=compiled)
    train_text(out, scenes_dir, _open_autoencoder(autoencoder_dir), length, seed, resume, recipe, start)


@app.command()
def pack(
    bundle: Annotated[Path, typer.Option(help="Directory of the bundle.")] = Path("bundles/pocket"),
    text_dir: Annotated[Path | None, typer.Option(help="Pipeline, for example runs/pocket/text/pipeline.")] = None,
    lua_file: Annotated[Path | None, typer.Option(help="Adapter, what `giantleap train run` wrote.")] = None,
    swinir: Annotated[list[Path] | None, typer.Option(help="Files such as runs/swinir2/swinir_x2.safetensors.")] = None,
) -> None:
    """Copy the given parts into the bundle, LUA as float16, and write its descriptor; keep other parts.

    Fits the map for previews where the pipeline is new or has none.
    """
    if text_dir is not None:
        for part in bundle.glob("*/"):  # those of another pipeline
            shutil.rmtree(part)
        shutil.copytree(text_dir, bundle, dirs_exist_ok=True)
    if lua_file is not None:
        provenance = {"trained_by": "giantleap train run", "license": "Apache-2.0"}
        write_lua(bundle / LUA_FILE, read_lua(lua_file).half(), provenance)
    for file in swinir or ():
        shutil.copyfile(file, bundle / file.name)
    write_descriptor(bundle)
    if text_dir is not None or not (bundle / PREVIEW_FILE).exists():
        add_preview_map(read_bundle(bundle))


def _open_autoencoder(directory: Path) -> AutoencoderDC:
    vae: Any = AutoencoderDC.from_pretrained(directory)  # missing in the library's annotations
    opened: AutoencoderDC = vae.float().eval().to(memory_format=torch.channels_last)
    return opened


if __name__ == "__main__":
    app()
