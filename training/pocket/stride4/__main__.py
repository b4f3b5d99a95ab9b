"""The commands that make autoencoder and adapter of stride 4: `python -m giantleap.training.pocket.stride4 <command>`.

In order: `autoencoder`, `bundle`, `pictures`; then the public trainer makes the adapter, as for any bundle:
`giantleap train prepare` and `giantleap train run` with `training/pocket/stride4/adapter.toml`; `adapter` makes its
file small. `training/pocket/stride4/checkpoints` holds the results, with the figures.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.training.optim import Budget
from giantleap.training.pocket.options import Length, Resume, Seed
from giantleap.training.pocket.stride4.bundle import write_autoencoder_bundle
from giantleap.training.pocket.stride4.pictures import write_pictures
from giantleap.training.pocket.stride4.train import Recipe, train

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

RUNS = Path("runs/stride4")
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
    train(out, pool, length, seed, resume, Recipe(is_bfloat16=bfloat16))


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
    count: Annotated[int, typer.Option(help="Pictures of 256 x 256 px.")] = 2600,
    seed: Annotated[int, typer.Option(help="Fixes the pictures.")] = 0,
) -> None:
    """Write the pictures that `giantleap train prepare` encodes; the held-out ones come last by name."""
    write_pictures(out, pool, count, seed)


@app.command()
def adapter(
    lua_file: Annotated[Path, typer.Argument(help="What `giantleap train run` wrote.")],
    out: Path = RUNS / "lua.safetensors",
) -> None:
    """Write an adapter's weights as float16."""
    provenance = {
        "trained_by": "giantleap train run --config training/pocket/stride4/adapter.toml",
        "license": "Apache-2.0",
    }
    write_lua(out, read_lua(lua_file).half(), provenance)


if __name__ == "__main__":
    app()
