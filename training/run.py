"""Trains a LUA for the VAE of a bundle: builds everything, runs the stages one after the other, saves.

`train` is the whole run and `_update` one update of it; `Recorder` keeps what comes of them. All that is random in an
update follows from the seed and the update's number (`training/curriculum.py`), and all that is not is in the
checkpoint, so a run that was stopped, however, ends with the weights of one that was not. Processes started by
`torchrun` hold equal weights and share each update.
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
from torch import Tensor, nn
from tqdm import tqdm

from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.statistics import STATISTICS_KEY, LatentStatistics
from giantleap.models.vae.autoencoder import Vae
from giantleap.training.checkpoint import TrainingStateError, checkpoints_in, read_checkpoint, restore, write_checkpoint
from giantleap.training.curriculum import loss_terms, rate_at, scales_at, tiles_at, total
from giantleap.training.data.frozen_vae import decode_target, decode_with_gradient, read_vae, vae_hash
from giantleap.training.data.pairs_store import PairsStore
from giantleap.training.evaluation.held_out import evaluate
from giantleap.training.guard_statistics import guard_statistics
from giantleap.training.linear_skip import fit_linear_skip
from giantleap.training.optim import Ema
from giantleap.training.picture_map import fit_picture_map
from giantleap.training.run_config import ConfigError, RunConfig, StageConfig
from giantleap.training.run_log import Log, open_log
from giantleap.training.stage_optimizer import StageOptimizer, build_optimizer

PURE_EMA = 10**9  # as if so many updates were done: the average's decay without its warm-up
# What may differ between the parts of one run: it changes neither an update nor its place.
FREE_KEYS = frozenset({"log_every", "evaluate_every", "save_every", "keep", "tensorboard", "bundle", "pairs"})


class DivergedError(RuntimeError):
    """A loss or a gradient that is not finite. The last checkpoint is from before."""


@dataclass(frozen=True)
class DistributedContext:
    """Which of how many processes this is, and where it computes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the logs and checkpoints."""
        return self.rank == 0


@contextmanager
def open_distributed_context(device: torch.device) -> Iterator[DistributedContext]:
    """Joins the processes that `torchrun` started, if it did: NCCL between GPUs, gloo between CPUs.

    Args:
        device: For a GPU its index is replaced by LOCAL_RANK where there are several processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield DistributedContext(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield DistributedContext(device, dist.get_rank(), world_size)
    finally:
        dist.destroy_process_group()


def train(
    config: RunConfig, out: Path, place: DistributedContext, resume: bool = False, stop_after: int | None = None
) -> Path:
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
    run = _start(config, out, place, bundle, store)
    last = _last_checkpoint(run, resume)
    if last is not None:
        _resume(run, last, origin)
    end = config.total_steps if stop_after is None else min(stop_after, config.total_steps)
    if place.world_size > 1:
        dist.barrier()  # all have looked into the directory before the first one writes there
    recorder = _open_recorder(run, bundle, store, origin) if place.is_first else None
    with (
        # Losses in float32 are in whole float32: torch rounds convolutions on a GPU to TF32 by default.
        torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False),
        ThreadPoolExecutor(1) as reader,
        tqdm(total=config.total_steps, initial=run.done, desc="train", unit="update", disable=recorder is None) as bar,
    ):
        ahead = reader.submit(_read_share, config, store, place, tile_count, min(run.done, config.total_steps - 1))
        while run.done < end:
            share, following = ahead.result(), min(run.done + 1, config.total_steps - 1)
            ahead = reader.submit(_read_share, config, store, place, tile_count, following)
            values = _update(run, share)
            bar.update()
            if recorder is not None:
                recorder.record(values, is_end=run.done == end)
    if recorder is not None and run.done == config.total_steps:
        recorder.write_weights(out / "lua.safetensors", config.stages[-1])
    if place.world_size > 1:
        dist.barrier()  # no process leaves before everything is written
    return out / "lua.safetensors" if run.done == config.total_steps else checkpoints_in(run.checkpoints)[-1]


@dataclass
class Run:
    """A run as one process holds it.

    Args:
        config: Of the run.
        out: Its directory.
        place: Of this process.
        vae: Frozen; the losses on pixels decode with it.
        micro_batches: Of this process in one update, by stage.
        net: What is trained.
        ema: The average of its weights.
        optimizer: Of the stage that `done` belongs to.
        picture_map: The decoder as a linear map of errors, where a stage has a loss that needs it.
        done: Updates so far.
    """

    config: RunConfig
    out: Path
    place: DistributedContext
    vae: Vae
    micro_batches: Sequence[int]
    net: Lua
    ema: Ema
    optimizer: StageOptimizer
    picture_map: Tensor | None = None
    done: int = 0

    @property
    def checkpoints(self) -> Path:
        """Their directory."""
        return self.out / "checkpoints"


def _start(config: RunConfig, out: Path, place: DistributedContext, bundle: Bundle, store: PairsStore) -> Run:
    micro_batches = [stage.micro_batches(place.world_size) for stage in config.stages]
    vae = read_vae(bundle, place.device, torch.bfloat16 if config.precision == "bfloat16" else torch.float32)
    net = _build(config, bundle, store).to(place.device).train()
    ema = Ema(net, config.optimizer.ema_decay)
    optimizer = build_optimizer(config.optimizer, config.stages[0], net)
    picture_map = None
    if any(stage.weights.linear_square for stage in config.stages):
        picture_map = fit_picture_map(vae, store, config.seed).to(place.device)
    return Run(config, out, place, vae, micro_batches, net, ema, optimizer, picture_map)


def _resume(run: Run, path: Path, origin: Mapping[str, Any]) -> None:
    """Goes back to a checkpoint; between two stages without moments, since each stage starts its own optimizer."""
    config, checkpoint = run.config, read_checkpoint(path)
    _check_origin(path, checkpoint.origin, origin)
    run.done = checkpoint.step
    is_inside = run.done < config.total_steps and config.at(run.done)[1] > 0
    if is_inside:
        run.optimizer = build_optimizer(config.optimizer, config.stages[config.at(run.done)[0]], run.net)
    restore(checkpoint, run.net, run.ema, run.optimizer if is_inside else None)


def _update(run: Run, share: "Share") -> dict[str, float]:
    """One update of the weights and of their average.

    Returns:
        Rate, gradient norm before clipping, loss and its terms, for the log.

    Raises:
        DivergedError: One of them is not finite; the weights are as they were.
    """
    config, net = run.config, run.net
    index, step = config.at(run.done)
    stage = config.stages[index]
    if step == 0:
        run.optimizer = build_optimizer(config.optimizer, stage, net)
    rate = rate_at(config.optimizer, stage.steps, step)
    scales = scales_at(stage, net.spec.scales, config.seed, index, step)
    torch.manual_seed(_step_seed(config.seed, run.done, run.place.rank))

    run.optimizer.zero_grad()
    parts = share.split(run.micro_batches[index])
    sums: dict[str, Tensor] = {}
    for latents in parts:
        for name, value in _backward(config, stage, net, run.vae, latents, scales, len(parts), run.picture_map).items():
            sums[name] = sums.get(name, torch.zeros((), device=run.place.device)) + value
    weights = _trained(net)
    values = _average(weights, sums, run.place.world_size)
    norm = float(nn.utils.clip_grad_norm_(weights, config.optimizer.clip))
    if not all(math.isfinite(value) for value in (*values.values(), norm)):
        kept = checkpoints_in(run.checkpoints)
        raise DivergedError(
            f"stage {stage.name}, update {run.done + 1}: loss {values['loss']}, gradient norm {norm}; "
            f"the last good checkpoint is {kept[-1] if kept else 'none: the run had not saved yet'}"
        )
    run.optimizer.step(rate)
    run.ema.update(net, run.done if config.optimizer.ema_warmup else PURE_EMA)
    run.done += 1
    return {"rate": rate, "gradient_norm": norm, **values}


@dataclass
class Recorder:
    """What the first process writes of a run: log, scores of held-out tiles, weights of each stage, checkpoints.

    Args:
        run: Which.
        store: The pairs, of which the last tiles are held out.
        origin: For the checkpoints.
        bundle: Its name, for the header of weights.
        statistics: Of the latents, for the guard (`models/lua/clamp.py`); also in that header.
        log: Of the run.
        averaged: A network to put average weights into.
        begun: Updates that were done when this part of the run started.
        started_s: When it did, by the monotonic clock.
    """

    run: Run
    store: PairsStore
    origin: Mapping[str, Any]
    bundle: str
    statistics: LatentStatistics
    log: Log
    averaged: Lua
    begun: int
    started_s: float

    def record(self, values: Mapping[str, float], is_end: bool) -> None:
        """Writes what is due after an update; everything at the end of a stage, nearly everything at that of a part."""
        run, config, done = self.run, self.run.config, self.run.done
        index, step = config.at(done - 1)
        stage = config.stages[index]
        is_last = step + 1 == stage.steps
        if done % config.log_every == 0 or is_last or is_end:
            speed = {"updates_per_s": (done - self.begun) / max(time.monotonic() - self.started_s, 1e-9)}
            self.log.write({"step": done, "stage": stage.name, **values}, speed)
        if config.held_out_tiles and (done % config.evaluate_every == 0 or is_last):
            run.ema.copy_to(self.averaged)
            held_out = range(len(self.store) - config.held_out_tiles, len(self.store))
            scores, sheet = evaluate(self.averaged, run.vae, self.store, held_out)
            self.log.write({"step": done, "stage": stage.name, **scores}, {})
            self.log.write_sheet(done, sheet)
        if is_last:
            self.write_weights(run.out / f"lua-stage-{index + 1}-{stage.name}.safetensors", stage)
        if done % config.save_every == 0 or is_last or is_end:
            write_checkpoint(run.checkpoints, done, self.origin, run.net, run.ema, run.optimizer, config.keep)

    def write_weights(self, path: Path, stage: StageConfig) -> None:
        """Average weights, with what they were trained on in the header."""
        self.run.ema.copy_to(self.averaged)
        said = {"stage": stage.name, "step": self.run.done, "bundle": self.bundle}
        write_lua(path, self.averaged, {"training": json.dumps(said), STATISTICS_KEY: self.statistics.to_json()})


def _open_recorder(run: Run, bundle: Bundle, store: PairsStore, origin: Mapping[str, Any]) -> Recorder:
    return Recorder(
        run=run,
        store=store,
        origin=origin,
        bundle=bundle.name,
        statistics=guard_statistics(store, run.net.spec.scales),
        log=open_log(run.out, run.done, run.config.tensorboard),
        averaged=Lua(run.net.spec).to(run.place.device).eval(),
        begun=run.done,
        started_s=time.monotonic(),
    )


def _backward(
    config: RunConfig,
    stage: StageConfig,
    net: Lua,
    vae: Vae,
    latents: Mapping[int, Tensor],
    scales: Sequence[int],
    parts: int,
    picture_map: Tensor | None = None,
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
            upscaled = net(latents[scale].to(device), scale)
        upscaled = upscaled.float()
        decoded = decode_with_gradient(vae, upscaled, config.checkpoints) if stage.weights.decodes else None
        ds_factor = scale if config.ds_factor == "scale" else config.ds_factor
        terms = loss_terms(
            stage.weights,
            upscaled,
            large,
            decoded,
            target,
            ds_factor=ds_factor,
            eagle_filter=config.eagle_filter,
            picture_map=picture_map,
            square_floor=config.square_floor,
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


def _read_share(config: RunConfig, store: PairsStore, place: DistributedContext, tile_count: int, done: int) -> Share:
    index, step = config.at(done)
    batch = config.stages[index].effective_batch
    tiles = tiles_at(tile_count, batch, config.seed, index, step)
    share = batch // place.world_size
    return Share(store.read(tiles[place.rank * share : (place.rank + 1) * share]))


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
    if net.spec.linear_skip:
        fit_linear_skip(net, store, len(store) - config.held_out_tiles)
    return net


def _trained(net: Lua) -> list[nn.Parameter]:
    return [weight for weight in net.parameters() if weight.requires_grad]


def _step_seed(seed: int, done: int, rank: int) -> int:
    """Of torch's generators for one update of one process: nothing random depends on what was run before."""
    return ((seed * 1_000_003 + done) * 65_537 + rank) % 2**63  # what torch takes


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


def _last_checkpoint(run: Run, resume: bool) -> Path | None:
    known, out = checkpoints_in(run.checkpoints), run.out
    if not resume and (known or (out / "log.jsonl").exists()):
        raise TrainingStateError(f"{out} holds a run: resume it, or name another directory")
    return known[-1] if known else None
