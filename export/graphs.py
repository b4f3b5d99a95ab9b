"""The modules that are exported: LUA's backbone with one scale head, and the VAE decoder, both for any size.

Input and output are float32 raw latents (or images) in every precision; only the network between them computes in a
half type, so that neither the latent's statistics nor a bicubic skip are rounded. `trace` makes the program that
`export/onnx_files.py`, `export/aoti.py` and `export/tensorrt_plans.py` convert.
"""

import contextlib
import copy
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn.attention import SDPBackend, sdpa_kernel

from giantleap.export.manifest import INPUT, Precision
from giantleap.models.lua.network import Lua, ScaleHead
from giantleap.models.vae.decode import DC_CLASSES, FRAME_CLASSES, STRIP_CLASSES
from giantleap.models.vae.decoder_check import check_autoencoder

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_BATCH, MAX_SIDE = 64, 1024  # limits of the traced program; sides in latent pixels
# Added to a denominator. diffusers adds 1e-15, which ONNX's optimizer takes for 0 and removes: 0 / 0 is left.
ATTENTION_EPS = 1e-7


class LuaGraph(nn.Module):
    """`Lua.core` for one scale, on a copy of its weights.

    Args:
        net: The network; it is not changed.
        scale: One of its scales.
        precision: What the backbone and the head compute in.
    """

    latent_mean: Tensor | None
    latent_std: Tensor | None

    def __init__(self, net: Lua, scale: int, precision: Precision) -> None:
        super().__init__()
        mean, std = None, None
        if net.spec.latent_norm:
            mean, std = net.latent_mean, net.latent_std
        elif net.spec.image_mean is not None:
            mean = net.image_mean
        self.register_buffer("latent_mean", None if mean is None else mean.detach().clone().view(-1, 1, 1))
        self.register_buffer("latent_std", None if std is None else std.detach().clone().view(-1, 1, 1))
        self.scale = scale
        self.bicubic_skip = net.spec.bicubic_skip
        self.linear_skip = copy.deepcopy(net.skips[f"x{scale}"]) if net.spec.linear_skip else None
        self.dtype = DTYPES[precision]
        self.head: ScaleHead = copy.deepcopy(net.heads[f"x{scale}"]).to(self.dtype)  # type: ignore[assignment]
        self.backbone = copy.deepcopy(net).to(self.dtype)
        self.backbone.heads = nn.ModuleDict()
        if net.spec.linear_skip:
            self.backbone.skips = nn.ModuleDict()
        self.eval()

    def forward(self, latent: Tensor) -> Tensor:
        """Shape: [batch, channels, h, w], multiples of the window -> [batch, channels, scale * h, scale * w]."""
        x = latent if self.latent_mean is None else latent - self.latent_mean
        x = x if self.latent_std is None else x / self.latent_std
        y: Tensor = self.head(self.backbone.forward_features(x.to(self.dtype))).float()
        if self.bicubic_skip:
            y = y + F.interpolate(x, scale_factor=float(self.scale), mode="bicubic")
        if self.linear_skip is not None:
            y = y + self.linear_skip(x)
        y = y if self.latent_std is None else y * self.latent_std
        return y if self.latent_mean is None else y + self.latent_mean


class DecoderGraph(nn.Module):
    """`vae.decode`, whole and untiled, on a copy of the VAE; one frame for VAEs of videos.

    Args:
        vae: An autoencoder of a class that `models/vae/decode.py` knows; it is not changed.
        dtype: The compute type.

    Raises:
        UnknownDecoderError: The VAE is of another class.
    """

    def __init__(self, vae: Any, dtype: torch.dtype) -> None:
        super().__init__()
        check_autoencoder(vae, *STRIP_CLASSES, *DC_CLASSES, *FRAME_CLASSES)
        self.frames = isinstance(vae, FRAME_CLASSES)
        self.dtype = dtype
        self.vae = copy.deepcopy(vae).to(dtype)
        self.vae.use_tiling = self.vae.use_slicing = False
        for attention in self.vae.modules():
            if isinstance(attention, SanaMultiscaleLinearAttention):
                attention.eps = max(attention.eps, ATTENTION_EPS)
        self.eval()

    def forward(self, latent: Tensor) -> Tensor:
        """Shape: [batch, channels, h, w] -> [batch, 3, stride * h, stride * w], not clamped."""
        raw = latent.to(self.dtype)
        image: Tensor = self.vae.decode(raw[:, :, None] if self.frames else raw, return_dict=False)[0]
        return (image[:, :, 0] if self.frames else image)[:, :3].float()


def trace(graph: nn.Module, channels: int, side_multiple: int, fused_attention: bool = False) -> ExportedProgram:
    """Trace a graph for any batch and any sides that are multiples of `side_multiple`.

    The example has a batch of 2 and unequal sides, because torch treats a size of 1, or two equal sizes, as constants.
    `export/parity.py` detects other sizes that became constants.

    Args:
        graph: One of the above, on its device.
        channels: Of its input.
        side_multiple: Unit of the sides in latent pixels.
        fused_attention: Keep attention as one operator, for a compiler that has it. Otherwise it becomes products and a
            softmax; the fused kernel's memory layout would trace to views that the products do not allow.
    """
    rows, columns = Dim("rows", min=1, max=MAX_SIDE), Dim("columns", min=1, max=MAX_SIDE)
    sizes: dict[int, Any] = {0: Dim("batch", min=1, max=MAX_BATCH), 2: side_multiple * rows, 3: side_multiple * columns}
    if side_multiple == 1:
        # diffusers compares sizes with limits; with explicit ranges torch refuses to keep those dynamic.
        sizes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    device = next(graph.parameters()).device
    units = 2 if side_multiple > 1 else 6
    example = torch.zeros(2, channels, units * side_multiple, (units + 1) * side_multiple, device=device)
    kernels = contextlib.nullcontext() if fused_attention else sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), kernels:
        return export(graph, (example,), dynamic_shapes={INPUT: sizes}, strict=False)
