"""A trained LUA carried over to another VAE: new ends for its latents, everything between them kept.

`transfer` is a pure function from one network to another; `match_latents` measures the linear maps between two VAEs'
latents that its best start needs. `transfer_and_train` does both and hands the rest to `giantleap.training.run.train`;
`giantleap train transfer` calls it. `benchmarks/training/transfer/run.py` compares the starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.bundle.digests import file_hash
from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.network import LinearSkip, Lua
from giantleap.models.vae.autoencoder import Vae
from giantleap.training.data.frozen_vae import read_vae, vae_hash
from giantleap.training.data.pairs_store import PairsStore
from giantleap.training.run import DistributedContext, train
from giantleap.training.run_config import PAPER, ConfigError, RunConfig, StageConfig, check_config, read_toml

Start = Literal["fresh", "slice", "fit"]

START_FILE = "start.safetensors"
MATCHED_TILES = 32  # of 64 x 64 latents: 131,072 samples of at most 32 unknowns a channel
RIDGE = 1e-4  # of the mean variance: VAEs have channels that hardly vary
STAGES: tuple[StageConfig, ...] = (
    PAPER["I"].model_copy(update={"steps": 5_000, "effective_batch": 256}),
    PAPER["III"].model_copy(update={"steps": 25_000}),
)
"""The fine-tune where no file says another one. The paper calls it brief and says no more; its third stage alone does
not recover from latents that are far off, so a short first one leads.

Ref: arXiv 2511.10629, section 4.1; lengths and the first stage's batch are ours.
"""


class TransferError(ValueError):
    """A transfer that cannot be made; the message says why."""


@dataclass(frozen=True)
class LatentMaps:
    """Affine maps between the latents of two VAEs, each as the networks see them: normalized where they normalize.

    Args:
        to_old, old_offset: Of a latent pixel of the new VAE to one of the old.
        to_new, new_offset: The way back.

    Shape:
        [old, new], [old], [new, old] and [new] channels.
    """

    to_old: Tensor
    old_offset: Tensor
    to_new: Tensor
    new_offset: Tensor


@torch.no_grad()
def transfer(
    net: Lua,
    channels: int,
    *,
    mean: Tensor,
    std: Tensor,
    start: Start = "fresh",
    maps: LatentMaps | None = None,
    seed: int = 0,
) -> Lua:
    """A network for latents of `channels` channels: a new first convolution, new last ones in the heads, the rest kept.

    Starts: "fresh" is that of an untrained network; "slice" takes the old channels one after the other, from the first
    again where there are more new ones than old; "fit" puts a linear map of the new latents to the old ones before
    the first convolution and its counterpart after the last.

    Args:
        net: The trained network. It is left as it is.
        channels: Of the other VAE.
        mean, std: Of each channel of its latents. Used by a network that normalizes, else left out.
        start: Of the new convolutions.
        maps: For "fit", of `match_latents`.
        seed: For "fresh".

    Shape:
        mean and std [channels].

    References:
        arXiv 2511.10629, section 3.2, changes the first convolution only; with another number of channels the last
        ones cannot stay either.

    Raises:
        TransferError: the network enlarges pictures, or the maps are missing or of other channels.
    """
    if net.spec.image_mean is not None:
        raise TransferError("this network enlarges RGB pictures, not latents: there is no VAE to transfer it from")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        moved = Lua(replace(net.spec, channels=channels))
    ends = {f"{name}.{kind}" for name in _ends(net) for kind in ("weight", "bias")} | {"latent_mean", "latent_std"}
    kept = {
        name: value for name, value in net.state_dict().items() if name not in ends and not name.startswith("skips.")
    }
    moved.load_state_dict({**moved.state_dict(), **kept})
    if moved.spec.latent_norm:
        moved.set_latent_statistics(mean, std)
    if start == "slice":
        _slice_ends(net, moved)
    elif start == "fit":
        if maps is None or maps.to_old.shape != (net.spec.channels, channels):
            raise TransferError(f"start fit needs maps between {net.spec.channels} and {channels} channels")
        _fit_ends(net, moved, maps)
    return moved.eval()


def _ends(net: Lua) -> list[str]:
    """The layers whose shape follows from the channels."""
    return ["conv_first", *(f"heads.{name}.{'conv_last' if name != 'liif' else 'last'}" for name in net.heads)]


def _last_layers(net: Lua) -> list[nn.Module]:
    return [net.get_submodule(name) for name in _ends(net)[1:]]


def _slice_ends(net: Lua, moved: Lua) -> None:
    old, new = net.spec.channels, moved.spec.channels
    source = torch.arange(new) % old
    times = torch.bincount(source, minlength=old)[source]  # a channel read twice counts half each time
    moved.conv_first.weight.copy_(net.conv_first.weight[:, source] / times.view(1, -1, 1, 1))
    _copy_bias(moved.conv_first, net.conv_first)
    for into, of in zip(_last_layers(moved), _last_layers(net), strict=True):
        for kind in ("weight", "bias"):
            into.get_parameter(kind).copy_(of.get_parameter(kind)[source])
    for name in net.skips if net.spec.linear_skip else ():
        taken, given = _skip_of(net, name), _skip_of(moved, name)
        weight = taken.weight.unflatten(0, (old, -1))[source][:, :, source] / times.view(1, 1, -1, 1, 1)
        given.weight.copy_(weight.flatten(0, 1))
        _bias_of(given).copy_(_bias_of(taken).view(old, -1)[source].flatten())


def _fit_ends(net: Lua, moved: Lua, maps: LatentMaps) -> None:
    """Composes the maps with the convolutions; exact but for the outermost ring, where the offsets are padded by 0."""
    weight = net.conv_first.weight
    moved.conv_first.weight.copy_(torch.einsum("eokl,on->enkl", weight, maps.to_old))
    _copy_bias(moved.conv_first, net.conv_first, (weight.sum(dim=(2, 3)) * maps.old_offset).sum(dim=1))
    # Beside a bicubic skip the heads make a difference of two latents, which has no offset.
    offset = torch.zeros_like(maps.new_offset) if net.spec.has_skip else maps.new_offset
    for into, of in zip(_last_layers(moved), _last_layers(net), strict=True):
        into.get_parameter("weight").copy_(torch.tensordot(maps.to_new, of.get_parameter("weight"), 1))
        into.get_parameter("bias").copy_(maps.to_new @ of.get_parameter("bias") + offset)
    if net.spec.linear_skip:
        _fit_skips(net, moved, maps)


def _fit_skips(net: Lua, moved: Lua, maps: LatentMaps) -> None:
    """Composes the maps with the linear skips, which carry whole latents: offsets count on both sides."""
    for name in net.skips:
        of, into = _skip_of(net, name), _skip_of(moved, name)
        weight, bias = of.weight.unflatten(0, (net.spec.channels, -1)), _bias_of(of).view(net.spec.channels, -1)
        bias = bias + (weight.sum(dim=(3, 4)) * maps.old_offset).sum(dim=2)
        mapped = torch.einsum("no,ospkl,pm->nsmkl", maps.to_new, weight, maps.to_old)
        into.weight.copy_(mapped.flatten(0, 1))
        _bias_of(into).copy_((maps.to_new @ bias + maps.new_offset.view(-1, 1)).flatten())


def _skip_of(net: Lua, name: str) -> nn.Conv2d:
    return cast(LinearSkip, net.skips[name]).conv


def _bias_of(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _copy_bias(into: nn.Conv2d, of: nn.Conv2d, more: Tensor | float = 0.0) -> None:
    assert into.bias is not None and of.bias is not None
    into.bias.copy_(of.bias + more)


@torch.no_grad()
def match_latents(net: Lua, old: Vae, new: Vae, large: Tensor, mean: Tensor, std: Tensor) -> LatentMaps:
    """Fits the maps between two VAEs: the new one decodes its latents, the old one encodes the pictures.

    The fit is least squares with a ridge, by normal equations in double precision.

    Args:
        net: The network trained on the old VAE, whose normalization counts.
        old, new: The VAEs.
        large: Latents of the new one.
        mean, std: As in `transfer`.

    Shape:
        large [tiles, channels, h, w].

    Raises:
        TransferError: the VAEs have another stride, or the old one's latents are not of the network's channels.
    """
    of_new, of_old = [], []
    for latent in large.split(1):
        matched = old.encode(new.decode(latent.to(new.device)).clamp(-1.0, 1.0)).float().cpu()
        if matched.shape != (1, net.spec.channels, *latent.shape[2:]):
            raise TransferError(
                f"the old VAE makes latents {list(matched.shape[1:])} of a picture whose new ones are "
                f"{list(latent.shape[1:])}; {net.spec.channels} channels and one stride are needed: use another start"
            )
        of_old.append(_pixels(matched))
        of_new.append(_pixels(latent.cpu()))
    seen_new, seen_old = torch.cat(of_new), torch.cat(of_old)
    if net.spec.latent_norm:
        seen_new = (seen_new - mean) / std
        seen_old = (seen_old - net.latent_mean.cpu()) / net.latent_std.cpu()
    to_old, old_offset = _fit(seen_new, seen_old)
    to_new, new_offset = _fit(seen_old, seen_new)
    return LatentMaps(to_old, old_offset, to_new, new_offset)


def _pixels(latent: Tensor) -> Tensor:
    return latent.permute(0, 2, 3, 1).flatten(0, 2)


def _fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of y by x with an offset.

    Shape:
        [n, a], [n, b] -> [b, a], [b].
    """
    x_mean, y_mean = x.double().mean(dim=0), y.double().mean(dim=0)
    centered = x.double() - x_mean
    gram = centered.T @ centered
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
    weight = torch.linalg.solve(gram + ridge, centered.T @ (y.double() - y_mean)).T
    return weight.float(), (y_mean - weight @ x_mean).float()


def prepare_start(source: Path, to_bundle: Path, pairs: Path, start: Start, device: torch.device, seed: int = 0) -> Lua:
    """Reads what is needed from disk and makes the transferred network.

    Args:
        source: A LUA file, or the directory of a bundle with one.
        to_bundle: Directory of the bundle with the other VAE.
        pairs: Latents of that VAE, of `giantleap train prepare`.
        start: As in `transfer`; "fit" needs a bundle as `source`, whose VAE the network was trained on.
        device: Where the VAEs compute.

    Raises:
        TransferError, BundleError, PairsError, CheckpointError, VaeError, FileNotFoundError: Something does not fit.
    """
    bundle = read_bundle(to_bundle)
    store = PairsStore.open(pairs)
    if store.summary["vae_sha256"] != vae_hash(bundle):
        raise TransferError(f"{pairs}: these pairs were made with another VAE than that of bundle {bundle.name}")
    net = read_lua(_weights_of(source))
    mean, std = store.statistics()
    maps = None
    if start == "fit":
        if not source.is_dir():
            raise TransferError(
                f"start fit needs the VAE that {source} was trained on: name the bundle's directory, or another start"
            )
        large = store.read(_spread(len(store), MATCHED_TILES), (1,))[1]
        old, new = (read_vae(each, device, torch.float32) for each in (read_bundle(source), bundle))
        maps = match_latents(net, old, new, large, mean, std)
    return transfer(net, bundle.latent_space.channels, mean=mean, std=std, start=start, maps=maps, seed=seed)


def _weights_of(source: Path) -> Path:
    if not source.is_dir():
        return source
    origin = read_bundle(source)
    if origin.lua is None:
        raise TransferError(f"{source}: {origin.unavailable_reason('lua')}")
    return origin.lua


def _spread(count: int, most: int) -> Sequence[int]:
    return range(0, count, max(1, count // most))[:most]


def plan_run(to_bundle: Path, pairs: Path, start_file: Path, config: Path | None) -> RunConfig:
    """The fine-tune: stages and the rest as a file says, or as `STAGES` and the defaults of a run.

    Raises:
        ConfigError: The file cannot be read, or it names what the command does (bundle, pairs, lua).
    """
    values: dict[str, Any] = {"stages": [stage.model_dump() for stage in STAGES]}
    if config is not None:
        given = read_toml(config)
        if taken := sorted({"bundle", "pairs", "lua"} & given.keys()):
            raise ConfigError(f"{config}: {', '.join(taken)}: the transfer names these itself; leave them out")
        values |= given
    return check_config(
        {**values, "bundle": to_bundle, "pairs": pairs, "lua": {"start": start_file}}, str(config or "")
    )


def transfer_and_train(
    source: Path,
    to_bundle: Path,
    pairs: Path,
    out: Path,
    place: DistributedContext,
    *,
    start: Start = "fit",
    config: Path | None = None,
    resume: bool = False,
    stop_after: int | None = None,
) -> Path:
    """Transfer, then fine-tune with `giantleap.training.run.train`, which describes `out`, `resume` and `stop_after`.

    Args:
        source, to_bundle, pairs, start: As in `prepare_start`.
        config: As in `plan_run`.
        place: Of this process; the first one writes the start.

    Returns:
        What `train` returns.

    Raises:
        TransferError: `out` holds a transfer and is not resumed, or one of other weights or another start.

    Effects:
        Writes `start.safetensors`, the transferred network before its first update, and a run into `out`.
    """
    start_file = out / START_FILE
    plan = plan_run(to_bundle, pairs, start_file, config)
    origin = {"transferred_from": file_hash(_weights_of(source)), "transfer_start": start}
    if place.is_first:
        if not start_file.is_file():
            net = prepare_start(source, to_bundle, pairs, start, place.device, plan.seed)
            out.mkdir(parents=True, exist_ok=True)
            write_lua(start_file, net, origin)
        elif not resume:
            raise TransferError(f"{out} holds a transfer: resume it, or name another directory")
    if place.world_size > 1:
        dist.barrier()  # the start is there for all
    with safe_open(start_file, framework="pt") as file:
        found = file.metadata() or {}
    if differing := sorted(key for key, value in origin.items() if found.get(key) != value):
        raise TransferError(f"{start_file} has another {', '.join(differing)}; name another directory")
    return train(plan, out, place, resume=resume, stop_after=stop_after)
