"""Holds the memory plan to measurement: networks of real width, and every stage and method of a bundle.

`python -m benchmarks.memory` counts live tensors: of the networks on shapes alone (device "meta"; random weights, few
layers, since more need no more at a time), of the bundle with its numbers on the CPU. On a machine with a GPU
`--device cuda` asks its allocator instead, which also sees what kernels use inside. Prints a table and writes
`benchmarks/results/memory.json`. `tests/models/memory/test_plan.py` builds its networks here.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.live_storage import LiveStorage
from benchmarks.machine import read_machine
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.engines.eager import TorchEngine
from giantleap.models.generator import GenerationItem
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import PRESETS, scaled_size
from giantleap.models.memory.activations import denoiser_elements, lua_bytes
from giantleap.models.memory.from_bundle import read_memory_plan
from giantleap.models.memory.plan import DeviceKind, Workload
from giantleap.models.route import Route
from giantleap.service.settings import POCKET_BUNDLE

MIB = 2**20


def unet_of(channels: tuple[int, ...], attends: tuple[bool, ...], **changes: Any) -> Callable[[], Any]:
    down = tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends)
    up = tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends))
    shape = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 64, **changes}
    return lambda: diffusers.UNet2DConditionModel(
        block_out_channels=channels, down_block_types=down, up_block_types=up, **shape
    )


UNETS: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "sd15": unet_of((320, 640, 1280, 1280), (True, True, True, False), attention_head_dim=8),
        "sdxl": unet_of(
            (320, 640, 1280),
            (False, True, True),
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True,
        ),
        "narrow": unet_of((16, 48), (True, False), attention_head_dim=8, norm_num_groups=8, layers_per_block=1),
    }
)


def run_unet(model: Any, batch: int, height: int, width: int) -> Callable[[], object]:
    """One call at this latent size."""
    like = {"device": model.device, "dtype": model.dtype}
    latent, text = torch.zeros(batch, 4, height, width, **like), torch.zeros(batch, 77, 64, **like)
    step = torch.zeros((), device=model.device)
    return lambda: model(latent, step, encoder_hidden_states=text, return_dict=False)


def give_sd3(like: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(1, 16, height, width, **like),
        "timestep": torch.zeros(1, device=like["device"]),
        "encoder_hidden_states": torch.zeros(1, 333, 4096, **like),
        "pooled_projections": torch.zeros(1, 2048, **like),
    }


def give_flux1(like: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    tokens = height * width // 4
    return {
        "hidden_states": torch.zeros(1, tokens, 64, **like),
        "timestep": torch.zeros(1, **like),
        "guidance": torch.zeros(1, **like),
        "encoder_hidden_states": torch.zeros(1, 512, 4096, **like),
        "pooled_projections": torch.zeros(1, 768, **like),
        "img_ids": torch.zeros(tokens, 3, **like),
        "txt_ids": torch.zeros(512, 3, **like),
    }


def give_flux2(like: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    tokens = height * width // 4
    return {
        "hidden_states": torch.zeros(1, tokens, 128, **like),
        "timestep": torch.zeros(1, **like),
        "encoder_hidden_states": torch.zeros(1, 512, 7680, **like),
        "img_ids": torch.zeros(tokens, 4, device=like["device"]),
        "txt_ids": torch.zeros(512, 4, device=like["device"]),
    }


def give_qwen(like: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(1, height * width // 4, 64, **like),
        "timestep": torch.zeros(1, **like),
        "encoder_hidden_states": torch.zeros(1, 200, 3584, **like),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, height // 2, width // 2)]],
    }


def give_z_image(like: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    return {
        "x": [torch.zeros(16, 1, height, width, **like)],
        "t": torch.zeros(1, device=like["device"]),
        "cap_feats": [torch.zeros(200, 2560, **like)],
    }


Arguments = Callable[[dict[str, Any], int, int], dict[str, Any]]
# Real widths, few layers: more of them need no more at a time.
TRANSFORMERS: Mapping[str, tuple[Callable[[], Any], Arguments]] = MappingProxyType(
    {
        "sd3.5-medium": (
            lambda: diffusers.SD3Transformer2DModel(
                num_layers=2,
                num_attention_heads=24,
                caption_projection_dim=1536,
                pos_embed_max_size=384,
                qk_norm="rms_norm",
                dual_attention_layers=(0,),
            ),
            give_sd3,
        ),
        "sd3.5-large": (
            lambda: diffusers.SD3Transformer2DModel(
                num_layers=2,
                num_attention_heads=38,
                caption_projection_dim=2432,
                pos_embed_max_size=192,
                qk_norm="rms_norm",
            ),
            give_sd3,
        ),
        "flux1": (
            lambda: diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True),
            give_flux1,
        ),
        "flux2-klein": (
            lambda: diffusers.Flux2Transformer2DModel(
                num_layers=1,
                num_single_layers=1,
                num_attention_heads=24,
                joint_attention_dim=7680,
                guidance_embeds=False,
            ),
            give_flux2,
        ),
        "qwen-image": (lambda: diffusers.QwenImageTransformer2DModel(num_layers=2), give_qwen),
        "z-image": (
            lambda: diffusers.ZImageTransformer2DModel(n_layers=2, n_refiner_layers=1, axes_lens=[2048, 512, 512]),
            give_z_image,
        ),
    }
)


def build(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    """A network of random weights, ready for inference."""
    with torch.device(device):
        return make().to(dtype).eval()


def config_of(model: Any) -> dict[str, Any]:
    """What `config.json` of a diffusers model holds."""
    return {**model.config, "_class_name": type(model).__name__}


def measure_peak(run: Callable[[], object], device: str) -> int:
    """The most bytes that tensors of a call take beyond what was there before."""
    with torch.inference_mode():
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            return int(torch.cuda.max_memory_allocated() - before)
        with LiveStorage() as live:
            run()
    peak_bytes: int = live.peak_bytes
    return peak_bytes


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement beside its estimate."""

    what: str
    dtype: str
    image_px: int
    stage: str
    measured_bytes: int
    estimated_bytes: int

    @property
    def ratio(self) -> float:
        return self.estimated_bytes / self.measured_bytes


def measure_networks(device: str, sizes_px: Sequence[int], dtypes: Sequence[str]) -> list[Figures]:
    """Denoisers and LUA presets at the latents of these image sizes, one image each."""
    rows = []
    for dtype in dtypes:
        kind = getattr(torch, dtype)
        like = {"device": device, "dtype": kind}
        for name, make in UNETS.items():
            model = build(make, device, kind)
            for px in sizes_px:
                measured = measure_peak(run_unet(model, 1, px // 8, px // 8), device)
                elements = denoiser_elements(config_of(model), 1, px // 8, px // 8, dtype)
                rows.append(Figures(name, dtype, px, "generate", measured, elements * kind.itemsize))
        for name, (make, arguments) in TRANSFORMERS.items():
            model = build(make, device, kind)
            for px in sizes_px:
                given = arguments(like, px // 8, px // 8)
                measured = measure_peak(partial(model, **given, return_dict=False), device)
                elements = denoiser_elements(config_of(model), 1, px // 8, px // 8, dtype)
                rows.append(Figures(name, dtype, px, "generate", measured, elements * kind.itemsize))
    for name, spec in PRESETS.items():
        net = build(partial(Lua, spec), device, torch.float32)
        for px in sizes_px:
            for scale in spec.scales:
                latent = torch.zeros(1, spec.channels, px // 8 // scale, px // 8 // scale, device=device)
                with torch.inference_mode():
                    net(latent, scale)  # its biases stay
                measured = measure_peak(partial(net, latent, scale), device)
                where: DeviceKind = "cuda" if device == "cuda" else "cpu"
                estimate = lua_bytes(spec, 1, latent.shape[2], latent.shape[3], scale, "float32", where)
                rows.append(Figures(f"lua-{name} x{scale}", "float32", px, "upscale", measured, estimate))
    return rows


def measure_bundle(directory: Path, device: DeviceKind, dtype: str) -> list[Figures]:
    """Every method of a bundle at its default base size, each scale, one image and two; stage by stage."""
    bundle = read_bundle(directory)
    route = Route.open(bundle, torch.device(device), getattr(torch, dtype))
    prepared = isinstance(route.lua, TorchEngine) and route.lua.prepared
    plan = replace(read_memory_plan(bundle, device, dtype), prepared=prepared)
    rows = []
    for method in bundle.methods:
        for scale in bundle.scales_of(method):
            for items in (1, 2):
                defaults = bundle.defaults
                sides = (scaled_size(defaults.base_width_px, scale), scaled_size(defaults.base_height_px, scale))
                work = Workload(*sides, scale, method, items=items, guidance_scale=defaults.guidance_scale)
                found = plan.estimate(work).stages
                for stage, measured in measure_stages(route, work, device).items():
                    what = f"{bundle.name} {method} x{scale} {items} items"
                    rows.append(Figures(what, dtype, max(sides), stage, measured, found[stage]))  # type: ignore[index]
    return rows


def measure_stages(route: Route, work: Workload, device: str) -> dict[str, int]:
    """Peak of each stage of a job, run one after the other; an upscaler runs twice, since it keeps its biases."""
    width_px, height_px = work.base_px
    item = GenerationItem("a red sphere", "", 1, width_px, height_px, 2, work.guidance_scale)
    stages: dict[str, int] = {}
    latents: list[Tensor] = []
    images: list[Tensor | None] = []

    def generate() -> None:
        drawn = route.generate([item] * work.items)
        latents.extend(latent for latent in drawn if latent is not None)

    stages["generate"] = measure_peak(generate, device)
    enlarged = latents
    if work.method in ("lua", "bicubic") and work.scale > 1:
        enlarged = route.upscale_items(latents, work.scale, work.method)
        stages["upscale"] = measure_peak(lambda: route.upscale_items(latents, work.scale, work.method), device)
    decode = work.decode or "exact"
    stages["decode"] = measure_peak(lambda: images.extend(route.decode_items(enlarged, decode)), device)
    if work.method == "swinir" and work.scale > 1:
        route.upscale_pixels(images, work.scale)
        stages["upscale"] = measure_peak(lambda: route.upscale_pixels(images, work.scale), device)
    return stages


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, stores."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--px", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--bundle", type=Path, default=POCKET_BUNDLE)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    chosen = parser.parse_args(arguments)
    networks = "meta" if chosen.device == "cpu" else chosen.device
    rows = measure_networks(networks, chosen.px, ("float32", "bfloat16"))
    rows += measure_bundle(chosen.bundle, chosen.device, "float32")
    print(f"{'what':<28}{'dtype':<10}{'px':>6} {'stage':<9}{'measured MiB':>13}{'estimate MiB':>13}{'ratio':>7}")
    for row in rows:
        sizes = f"{row.measured_bytes / MIB:>13.1f}{row.estimated_bytes / MIB:>13.1f}{row.ratio:>7.2f}"
        print(f"{row.what:<28}{row.dtype:<10}{row.image_px:>6} {row.stage:<9}{sizes}")
    worst = max(rows, key=lambda row: abs(row.ratio - 1))
    print(f"worst: {worst.what} {worst.stage} at {worst.image_px} px: {worst.ratio:.2f}")
    stored = {"device": chosen.device, "machine": read_machine(), "rows": [asdict(row) for row in rows]}
    chosen.out.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
