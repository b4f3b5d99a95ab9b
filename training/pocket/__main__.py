"""Commands that make the pocket bundle: `python -m giantleap.training.pocket COMMAND`.

Run vae, freeze, decoder, pairs, lua, text, swinir, pack in this order; each is seeded, shows its progress and resumes
with `--resume`. The commands call the modules of the same names. `docs/lab/` has times and results.
"""

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.training.optim import Budget
from giantleap.training.pocket.bundle import LUA_FILE, write_descriptor, write_vae_bundle
from giantleap.training.pocket.decoder import freeze_encoder, train_decoder
from giantleap.training.pocket.lua import train_lua
from giantleap.training.pocket.options import Length, Resume, Seed
from giantleap.training.pocket.pairs import write_pairs
from giantleap.training.pocket.parallel import run_peers
from giantleap.training.pocket.swinir import PICTURE_PX, pool_pairs, train_swinir
from giantleap.training.pocket.text import train_text
from giantleap.training.pocket.vae import Pool, train_vae

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

PoolFolder = Annotated[Path, typer.Option(help="Folder of the drawn pictures; filled when empty.")]

RUNS = Path("runs")


@app.command()
def vae(
    out: Path = RUNS / "vae",
    pool: PoolFolder = RUNS / "pool",
    length: Length = Budget(minutes=30.0),
    seed: Seed = 0,
    peers: Annotated[int, typer.Option(help="Processes that share each batch; more than 1 only on idle cores.")] = 1,
    resume: Resume = False,
    channels: Annotated[int, typer.Option(min=1, help="Of the latent; the bundle's VAE has 16.")] = 16,
) -> None:
    """Train encoder and decoder."""
    run_peers(peers, train_vae, out, Pool(pool), length, seed, resume, channels)


@app.command()
def freeze(
    vae_dir: Path = RUNS / "vae/vae", out: Path = RUNS / "vae_frozen", pool: PoolFolder = RUNS / "pool", seed: Seed = 0
) -> None:
    """Scale the codes and freeze the encoder."""
    torch.set_num_threads(1)
    typer.echo(freeze_encoder(vae_dir, out, Pool(pool), seed))


@app.command()
def decoder(
    out: Path = RUNS / "decoder",
    frozen: Path = RUNS / "vae_frozen",
    pool: PoolFolder = RUNS / "pool",
    length: Length = Budget(minutes=20.0),
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train the decoder further with the encoder frozen."""
    torch.set_num_threads(1)
    train_decoder(out, frozen, Pool(pool), length, seed, resume)


@app.command()
def pairs(
    frozen: Path = RUNS / "vae_frozen",
    out: Path = RUNS / "pairs",
    pool: PoolFolder = RUNS / "pool",
    units: Annotated[int, typer.Option(help="How much, in squares of 256 px; the pictures have many sizes.")] = 14500,
) -> None:
    """Encode the training and held-out pictures of LUA."""
    torch.set_num_threads(1)
    encoder = AutoencoderKL.from_pretrained(frozen).eval()
    encoder.to(memory_format=torch.channels_last)
    pictures = Pool(pool, scene_count=160, scene_px=512)
    write_pairs(encoder, pictures.read_held_out(0), out / "held_out", 30, 1)
    write_pairs(encoder, pictures.read(0), out / "train", units, 0)


@app.command()
def lua(
    stage: Annotated[str, typer.Option(help="linear, square, or 1, 2, 3 of the paper.")],
    out: Annotated[Path, typer.Option(help="Folder of this stage.")],
    start: Annotated[Path | None, typer.Option(help="Weights of the stage before.")] = None,
    vae_dir: Path = RUNS / "decoder/vae",
    pairs_dir: Path = RUNS / "pairs",
    length: Length = Budget(minutes=20.0),
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train one stage of the adapter."""
    train_lua(out, vae_dir, pairs_dir, stage, start, length, seed, resume)


@app.command()
def text(
    out: Path = RUNS / "text",
    scenes: Path = RUNS / "scenes",
    frozen: Path = RUNS / "vae_frozen",
    length: Length = Budget(minutes=60.0),
    seed: Seed = 0,
    resume: Resume = False,
    threads: int = 1,
) -> None:
    """Train text to latent on captioned scenes."""
    train_text(out, scenes, frozen, length, seed, resume, threads)


@app.command()
def swinir(
    scale: Annotated[int, typer.Option(help="2 or 4.")],
    out: Annotated[Path, typer.Option(help="Folder of this scale.")],
    start: Annotated[Path | None, typer.Option(help="File of the other scale, to take its trunk.")] = None,
    vae_dir: Path = Path("bundles/pocket/vae"),
    pool: PoolFolder = RUNS / "pool",
    length: Length = Budget(minutes=12.0),
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train the pixel-space upscaler of one scale."""
    pictures = Pool(pool, scene_count=64, scene_px=PICTURE_PX, leaf_px=PICTURE_PX)
    train_swinir(out, *pool_pairs(vae_dir, pictures, scale, seed), start, length, seed, resume)


@app.command()
def pack(
    bundle: Path = Path("bundles/pocket"),
    vae_dir: Annotated[Path | None, typer.Option(help="VAE to put in, for example runs/decoder/vae.")] = None,
    lua_file: Annotated[Path | None, typer.Option(help="Adapter, for example runs/square/lua.safetensors.")] = None,
    text_dir: Annotated[Path | None, typer.Option(help="Pipeline, for example runs/text/pipeline.")] = None,
    swinir: Annotated[list[Path] | None, typer.Option(help="Files such as runs/swinir2/swinir_x2.safetensors.")] = None,
) -> None:
    """Copy the given parts into the bundle as float16 safetensors and write its descriptor; keep other parts."""
    if text_dir is not None:
        shutil.copytree(text_dir, bundle, ignore=shutil.ignore_patterns("vae"), dirs_exist_ok=True)
    if vae_dir is not None:
        shutil.rmtree(bundle / "vae", ignore_errors=True)
        autoencoder = AutoencoderKL.from_pretrained(vae_dir).half()
        autoencoder.register_to_config(_name_or_path="giantleap/pocket")  # keep paths of this machine out of the bundle
        autoencoder.save_pretrained(bundle / "vae")
    if lua_file is not None:
        provenance = {"trained_by": "python -m giantleap.training.pocket lua", "license": "Apache-2.0"}
        write_lua(bundle / LUA_FILE, read_lua(lua_file).half(), provenance)
    for file in swinir or ():
        shutil.copyfile(file, bundle / file.name)
    write_descriptor(bundle)


@app.command()
def vae_bundle(
    vae_dir: Annotated[Path, typer.Option(help="VAE, for example runs/vae4_frozen.")],
    out: Annotated[Path, typer.Option(help="Directory of the bundle; its name is the bundle's.")],
) -> None:
    """Make a bundle of a VAE alone for `giantleap train`."""
    write_vae_bundle(out, vae_dir, out.name)


if __name__ == "__main__":
    app()
