"""Trains a LUA for the VAE of a bundle: builds everything, runs the stages one after the other, saves.

`train` is the whole run, read top to bottom. All that is random in an update follows from the seed and the update's
number (`training/curriculum.py`), and all that is not is in the checkpoint, so a run that was stopped, however, ends
with the weights of one that was not. Processes started by `torchrun` hold equal weights and share each update.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim import Adam
from tqdm import tqdm

from models.bundle import Bundle, read_bundle
from models.checkpoints import read_lua, write_lua
from models.latent_statistics import STATISTICS_KEY, LatentStatistics
from models.lua import Lua
from models.vae import Vae
from training.checkpoint import TrainingStateError, checkpoints_in, read_checkpoint, restore, write_checkpoint
from training.curriculum import (
    ConfigError,
    RunConfig,
    StageConfig,
    loss_terms,
    rate_at,
    scales_at,
    tiles_at,
    total,
)
from training.frozen_vae import decode_target, decode_with_gradient, read_vae, vae_hash
from training.guard_statistics import guard_statistics
from training.optim import Ema
from training.pairs_store import PairsStore, replace_file

PURE_EMA = 10**9  # as if so many updates were done: the average's decay without its warm-up
SAMPLES = 4  # tiles on a sheet
# What may differ between the parts of one run: it changes neither an update nor its place.
FREE_KEYS = frozenset({"log_every", "evaluate_every", "save_every", "keep", "tensorboard", "bundle", "pairs"})


class DivergedError(RuntimeError):
    """A loss or a gradient that is not finite. The last checkpoint is from before."""


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, and where it computes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def open_place(device: torch.device) -> Iterator[Place]:
    """Joins the processes that `torchrun` started, if it did: NCCL between GPUs, gloo between CPUs.

    Args:
        device: For a GPU its index is replaced by LOCAL_RANK where there are several processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Place(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(device, dist.get_rank(), world_size)
    finally:
        dist.destroy_process_group()


def train(config: RunConfig, out: Path, place: Place, resume: bool = False, stop_after: int | None = None) -> Path:
    """Runs all stages; writes checkpoints, `log.jsonl`, samples, and the average weights of each stage into `out`.

    Args:
        config: Checked by `read_config`.
        out: A new directory, or with `resume` that of the run that goes on. With `resume` and no checkpoint yet, the
            run starts.
        place: Of this process.
        stop_after: Ends the run, with a checkpoint, when so many updates are done.

    Returns:
        The final weights (`lua.safetensors`), or the last checkpoint where the run was stopped before its end.

    Raises:
        ConfigError, PairsError, TrainingStateError, BundleError: The run cannot start.
        DivergedError: A loss is not finite.

    Effects:
        Safe to kill at any time; repeating it with `resume` goes on from the last checkpoint.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first matrix product on a GPU
        torch.use_deterministic_algorithms(True)
    bundle, store = read_bundle(config.bundle), PairsStore.open(config.pairs)
    origin = _origin(config, bundle, store)
    tile_count = len(store) - config.held_out_tiles
    if tile_count < 1:
        raise ConfigError(f"{len(store)} tiles, of which {config.held_out_tiles} are held out: none is left")
    micro_batches = [stage.micro_batches(place.world_size) for stage in config.stages]
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    vae = read_vae(bundle, place.device, dtype)
    net = _build(config, bundle, store).to(place.device).train()
    ema = Ema(net, config.optimiser.ema_decay)
    averaged = Lua(net.spec).to(place.device).eval()
    weights = [weight for weight in net.parameters() if weight.requires_grad]

    done, optimiser = 0, _adam(config.stages[0], weights)
    last = _last_checkpoint(out, resume)
    if last is not None:
        checkpoint = read_checkpoint(last)
        _check_origin(last, checkpoint.origin, origin)
        done = checkpoint.step
        is_inside = done < config.total_steps and config.at(done)[1] > 0
        if is_inside:
            optimiser = _adam(config.stages[config.at(done)[0]], weights)
        restore(checkpoint, net, ema, optimiser if is_inside else None)
    begun, end = done, config.total_steps if stop_after is None else min(stop_after, config.total_steps)
    if place.world_size > 1:
        dist.barrier()  # all have looked into the directory before the first one writes there
    log = Log(out, done, config.tensorboard) if place.is_first else None
    statistics = guard_statistics(store, net.spec.scales) if place.is_first else None
    with (
        ThreadPoolExecutor(1) as reader,
        tqdm(total=config.total_steps, initial=done, desc="train", unit="update", disable=not place.is_first) as bar,
    ):
        ahead = reader.submit(_read_share, config, store, place, tile_count, min(done, config.total_steps - 1))
        started_s = time.monotonic()
        while done < end:
            index, step = config.at(done)
            stage = config.stages[index]
            if step == 0:
                optimiser = _adam(stage, weights)
            rate = rate_at(config.optimiser, stage.steps, step)
            scales = scales_at(stage, net.spec.scales, config.seed, index, step)
            torch.manual_seed(_step_seed(config.seed, done, place.rank))
            parts = ahead.result().split(micro_batches[index])
            ahead = reader.submit(_read_share, config, store, place, tile_count, min(done + 1, config.total_steps - 1))

            optimiser.zero_grad(set_to_none=True)
            sums: dict[str, Tensor] = {}
            for latents in parts:
                for name, value in _backward(config, stage, net, vae, latents, scales, len(parts)).items():
                    sums[name] = sums.get(name, torch.zeros((), device=place.device)) + value
            values = _average(weights, sums, place.world_size)
            norm = float(nn.utils.clip_grad_norm_(weights, config.optimiser.clip))
            if not all(math.isfinite(value) for value in (*values.values(), norm)):
                kept = checkpoints_in(out / "checkpoints")
                raise DivergedError(
                    f"stage {stage.name}, update {done + 1}: loss {values['loss']}, gradient norm {norm}; "
                    f"the last good checkpoint is {kept[-1] if kept else 'none: the run had not saved yet'}"
                )
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            ema.update(net, done if config.optimiser.ema_warmup else PURE_EMA)
            done += 1
            bar.update()

            is_last = step + 1 == stage.steps
            if log is not None and (done % config.log_every == 0 or is_last or done == end):
                speed = {"updates_per_s": (done - begun) / max(time.monotonic() - started_s, 1e-9)}
                log.write({"step": done, "stage": stage.name, "rate": rate, "gradient_norm": norm, **values}, speed)
            if log is not None and config.held_out_tiles and (done % config.evaluate_every == 0 or is_last):
                ema.copy_to(averaged)
                scores, sheet = evaluate(averaged, vae, store, range(tile_count, len(store)))
                log.write({"step": done, "stage": stage.name, **scores}, {})
                log.write_sheet(done, sheet)
            if place.is_first and is_last:
                ema.copy_to(averaged)
                _write_weights(
                    out / f"lua-stage-{index + 1}-{stage.name}.safetensors", averaged, stage, done, bundle, statistics
                )
            if place.is_first and (done % config.save_every == 0 or is_last or done == end):
                write_checkpoint(out / "checkpoints", done, origin, net, ema, optimiser, config.keep)
    if place.is_first and done == config.total_steps:
        ema.copy_to(averaged)
        _write_weights(out / "lua.safetensors", averaged, config.stages[-1], done, bundle, statistics)
    if place.world_size > 1:
        dist.barrier()  # nobody leaves before everything is written
    return out / "lua.safetensors" if done == config.total_steps else checkpoints_in(out / "checkpoints")[-1]


def _write_weights(
    path: Path, net: Lua, stage: StageConfig, done: int, bundle: Bundle, statistics: LatentStatistics | None
) -> None:
    """Average weights; with them in the header what they were trained on, for the guard (`models/guard.py`)."""
    header = {"training": json.dumps({"stage": stage.name, "step": done, "bundle": bundle.name})}
    if statistics is not None:  # the first process has them, and only it writes
        header[STATISTICS_KEY] = statistics.to_json()
    write_lua(path, net, header)


def _backward(
    config: RunConfig,
    stage: StageConfig,
    net: Lua,
    vae: Vae,
    latents: Mapping[int, Tensor],
    scales: Sequence[int],
    parts: int,
) -> dict[str, Tensor]:
    """Adds the gradient of one micro batch, head by head, so that one head's decoded pictures are alive at a time.

    The heads' losses are summed; the target is decoded once for both (arXiv 2511.10629, A.4).

    Returns:
        "loss" and its terms by scale, each over `parts`, without gradient.
    """
    device = next(net.parameters()).device
    large = latents[1].to(device)
    target = decode_target(vae, large) if stage.weights.decodes else None
    sums = {"loss": torch.zeros((), device=device)}
    for scale in scales:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            grown = net(latents[scale].to(device), scale)
        grown = grown.float()
        decoded = decode_with_gradient(vae, grown, config.checkpoints) if stage.weights.decodes else None
        ds_factor = scale if config.ds_factor == "scale" else config.ds_factor
        terms = loss_terms(
            stage.weights,
            grown,
            large,
            decoded,
            target,
            ds_factor=ds_factor,
            eagle_filter=config.eagle_filter,
        )
        loss = total(terms) / parts
        torch.autograd.backward(loss)
        sums["loss"] += loss.detach()
        sums |= {f"x{scale}_{name}": term.detach() / parts for name, term in terms.items()}
    return sums


def _average(weights: Sequence[nn.Parameter], sums: Mapping[str, Tensor], world_size: int) -> dict[str, float]:
    """Replaces gradients by their mean over the processes; returns the values' mean.

    One sum over all gradients at the end of an update, where torch's DistributedDataParallel has one per backward
    pass: an update has many, of one head at a time, and only the last would count for the head that it trains.
    """
    if world_size > 1:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        flat = torch.cat([*(each.flatten() for each in gradients), *(value.view(1) for value in sums.values())])
        dist.all_reduce(flat)
        flat /= world_size
        means = flat.split([*(each.numel() for each in gradients), *(1 for _ in sums)])
        for gradient, mean in zip(gradients, means[: len(gradients)], strict=True):
            gradient.copy_(mean.view(gradient.shape))
        sums = dict(zip(sums, means[len(gradients) :], strict=True))
    return {name: float(value) for name, value in sums.items()}


@dataclass(frozen=True)
class Share:
    """The tiles of one process in one update, by level."""

    latents: Mapping[int, Tensor]

    def split(self, parts: int) -> list[dict[int, Tensor]]:
        """Micro batches of equal size."""
        split = {level: tensor.chunk(parts) for level, tensor in self.latents.items()}
        return [{level: tensors[part] for level, tensors in split.items()} for part in range(parts)]


def _read_share(config: RunConfig, store: PairsStore, place: Place, tile_count: int, done: int) -> Share:
    index, step = config.at(done)
    batch = config.stages[index].effective_batch
    tiles = tiles_at(tile_count, batch, config.seed, index, step)
    share = batch // place.world_size
    return Share(store.read(tiles[place.rank * share : (place.rank + 1) * share]))


@torch.no_grad()
def evaluate(net: Lua, vae: Vae, store: PairsStore, tiles: Sequence[int]) -> tuple[dict[str, float], Tensor]:
    """Measures average weights on tiles that were held out.

    Returns:
        By scale the latent L1, the PSNR in dB of the decoded picture against the decoded large latent, and what it
        gains over decoding the small latent and enlarging its picture bicubically; and a sheet of the first tiles:
        target, then bicubic and LUA for each scale.

    **Shape** the sheet is [3, height_px, width_px], in [-1, 1].
    """
    scores: dict[str, list[float]] = {}
    rows: list[Tensor] = []
    for tile in tiles:
        latents = {level: tensor.to(vae.device) for level, tensor in store.read([tile]).items()}
        target = vae.decode(latents[1]).clamp(-1.0, 1.0)
        pictures = [target]
        for scale in net.spec.scales:
            grown = net(latents[scale], scale)
            picture = vae.decode(grown).clamp(-1.0, 1.0)
            size = (target.shape[-2], target.shape[-1])
            bicubic = F.interpolate(vae.decode(latents[scale]), size=size, mode="bicubic").clamp(-1.0, 1.0)
            psnr = psnr_db(picture, target)
            scores.setdefault(f"x{scale}_held_out_latent_l1", []).append(float((grown - latents[1]).abs().mean()))
            scores.setdefault(f"x{scale}_held_out_psnr_db", []).append(psnr)
            scores.setdefault(f"x{scale}_held_out_gain_db", []).append(psnr - psnr_db(bicubic, target))
            pictures += [bicubic, picture]
        if len(rows) < SAMPLES:
            rows.append(torch.cat(pictures, dim=3)[0].cpu())
    return {name: sum(values) / len(values) for name, values in scores.items()}, torch.cat(rows, dim=1)


def psnr_db(picture: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in [-1, 1]; at most 100 dB, so that a mean stays finite."""
    return min(100.0, -10.0 * math.log10(max(float((picture - target).square().mean()) / 4.0, 1e-10)))


class Log:
    """`log.jsonl`, sample sheets, and TensorBoard's own files where asked for.

    Args:
        out: Directory of the run.
        done: Updates that are in the checkpoint; lines of later ones, from before a kill, are dropped.
        tensorboard: Needs the extra `train`.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(self, out: Path, done: int, tensorboard: bool) -> None:
        self.out = out
        self.path = out / "log.jsonl"
        (out / "samples").mkdir(parents=True, exist_ok=True)
        before = self.path.read_text().splitlines() if self.path.exists() else []
        replace_file(self.path, "".join(f"{line}\n" for line in before if _is_until(line, done)).encode())
        self.board = _open_board(out / "tensorboard", done) if tensorboard else None

    def write(self, line: Mapping[str, Any], volatile: Mapping[str, float]) -> None:
        """Adds a line; `volatile` values differ from run to run."""
        with self.path.open("a") as file:
            file.write(json.dumps({**line, **volatile}) + "\n")
        if self.board is not None:
            for name, value in {**line, **volatile}.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, line["step"])
            self.board.flush()

    def write_sheet(self, step: int, sheet: Tensor) -> None:
        levels = ((sheet + 1.0) * 127.5).round().byte()
        Image.fromarray(levels.permute(1, 2, 0).numpy()).save(self.out / "samples" / f"step-{step:09d}.png")
        if self.board is not None:
            self.board.add_image("held_out", levels, step)


def _is_until(line: str, done: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= done
    except ValueError:  # the last line of a killed process may be cut
        return False


def _open_board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError('tensorboard = true needs it installed: pip install "giantleap[train]"') from error
    return SummaryWriter(str(folder), purge_step=done + 1)


def _build(config: RunConfig, bundle: Bundle, store: PairsStore) -> Lua:
    channels = bundle.latent_space.channels
    if config.lua.start is not None:
        net = read_lua(config.lua.start)
        if net.spec.channels != channels:
            raise ConfigError(
                f"lua.start: {net.spec.channels} channels; latent space {bundle.latent_space.name} has {channels}"
            )
        return net
    torch.manual_seed(config.seed)
    net = Lua(config.lua.to_spec(channels))
    if net.spec.latent_norm:
        net.set_latent_statistics(*store.statistics())
    return net


def _adam(stage: StageConfig, weights: list[nn.Parameter]) -> Adam:
    return Adam(weights, lr=0.0, betas=stage.betas, weight_decay=0.0)


def _step_seed(seed: int, done: int, rank: int) -> int:
    """Of torch's generators for one update of one process: nothing random depends on what was run before."""
    return (seed * 1_000_003 + done) * 65_537 + rank


def _origin(config: RunConfig, bundle: Bundle, store: PairsStore) -> dict[str, Any]:
    """What must stay the same over all parts of a run."""
    vae_sha256 = vae_hash(bundle)
    if store.summary["vae_sha256"] != vae_sha256:
        raise ConfigError(f"{store.folder}: these pairs were made with another VAE than that of bundle {bundle.name}")
    said = config.model_dump(mode="json")
    kept = {key: value for key, value in said.items() if key not in FREE_KEYS}
    return {**kept, "vae_sha256": vae_sha256, "index_sha256": store.summary["index_sha256"]}


def _check_origin(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if differing:
        raise TrainingStateError(f"{path} is of a run with other {', '.join(differing)}; start a new one elsewhere")


def _last_checkpoint(out: Path, resume: bool) -> Path | None:
    known = checkpoints_in(out / "checkpoints")
    if not resume and (known or (out / "log.jsonl").exists()):
        raise TrainingStateError(f"{out} holds a run: resume it, or name another directory")
    return known[-1] if known else None
