"""A SwinIR forward as in the published code: the baseline of `benchmarks.engines`.

It computes what `giantleap.models.lua.network.Lua` computes, from the same weights, as the published code does: the
shift mask is rebuilt in every block when the input differs from the build-time size (always, for a LUA trained on
patches), windows are rolled, cut and joined by copies, the position bias is gathered in every call, attention is two
matrix products around a softmax, and linear layers are those of `torch.nn`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantleap.models.lua.network import Lua, ScaleHead
from giantleap.models.lua.swin import MASK_VALUE, ResidualGroup, SwinBlock, WindowAttention


def cut_windows(x: Tensor, window: int) -> Tensor:
    """Cut [batch, height, width, dim] into [batch * windows, window, window, dim]."""
    batch, height, width, dim = x.shape
    x = x.view(batch, height // window, window, width // window, window, dim)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window, window, dim)


def join_windows(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """Invert `cut_windows`."""
    batch = windows.shape[0] // ((height // window) * (width // window))
    x = windows.view(batch, height // window, width // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, -1)


def build_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """Label the nine regions of the shifted image and compare the labels inside each window.

    Returns:
        [windows, window^2, window^2], 0 or -100.
    """
    labels = torch.zeros(1, height, width, 1)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    region = 0
    for rows in cuts:
        for columns in cuts:
            labels[:, rows, columns, :] = region
            region += 1
    flat = cut_windows(labels, window).view(-1, window * window)
    apart = flat.unsqueeze(1) - flat.unsqueeze(2)
    return apart.masked_fill(apart != 0, MASK_VALUE).masked_fill(apart == 0, 0.0)


class PublishedForward(nn.Module):
    """Run a `Lua` the published way; inference only.

    Args:
        net: The network; its weights are shared, not copied.
    """

    def __init__(self, net: Lua) -> None:
        super().__init__()
        self.net = net
        w = net.spec.window
        steps = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")).flatten(1)
        offset = (steps[:, :, None] - steps[:, None, :]).permute(1, 2, 0) + w - 1
        index = offset[..., 0] * (2 * w - 1) + offset[..., 1]
        self.register_buffer("index", index.to(next(net.parameters()).device))

    def forward(self, latent: Tensor, scale: int) -> Tensor:
        """Upscale [batch, channels, height, width] to [batch, channels, scale * height, scale * width]."""
        net, spec, w = self.net, self.net.spec, self.net.spec.window
        height, width = latent.shape[-2:]
        padded = F.pad(latent, (0, -width % w, 0, -height % w), mode="reflect")
        x = net.normalize(padded)
        shallow = net.conv_first(x)
        size = (x.shape[-2], x.shape[-1])
        tokens = net.patch_embed(shallow.flatten(2).transpose(1, 2))
        for layer in net.layers:
            assert isinstance(layer, ResidualGroup)
            tokens = self._group(layer, tokens, size)
        tokens = net.norm(tokens)
        features = net.conv_after_body(tokens.transpose(1, 2).view(x.shape[0], spec.embed_dim, *size)) + shallow
        head = net.heads[f"x{scale}"]
        assert isinstance(head, ScaleHead)
        y = head.conv_last(head.upsample(head.conv_before(features)))
        if spec.bicubic_skip:
            y = y + F.interpolate(x, scale_factor=scale, mode="bicubic")
        return net._restore(y)[..., : scale * height, : scale * width]

    def _group(self, group: ResidualGroup, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        y = tokens
        for block in group.residual_group.blocks:
            assert isinstance(block, SwinBlock)
            y = self._block(block, y, size)
        maps = y.transpose(1, 2).view(y.shape[0], -1, *size)
        out: Tensor = group.conv(maps).flatten(2).transpose(1, 2) + tokens
        return out

    def _block(self, block: SwinBlock, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = size
        batch, _, dim = tokens.shape
        window, shift = block.window, block.shift
        x = block.norm1(tokens).view(batch, height, width, dim)
        if shift:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        windows = cut_windows(x, window).view(-1, window * window, dim)
        mask = build_mask(height, width, window, shift).to(tokens) if shift else None
        windows = self._attention(block.attn, windows, mask)
        x = join_windows(windows.view(-1, window, window, dim), window, height, width)
        if shift:
            x = torch.roll(x, shifts=(shift, shift), dims=(1, 2))
        tokens = tokens + x.view(batch, height * width, dim)
        out: Tensor = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(tokens))))
        return out

    def _attention(self, attn: WindowAttention, x: Tensor, mask: Tensor | None) -> Tensor:
        count, n, dim = x.shape
        heads = attn.heads
        qkv = attn.qkv(x).reshape(count, n, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        logits = (q * (dim // heads) ** -0.5) @ k.transpose(-2, -1)
        bias = attn.relative_position_bias_table[self.index.view(-1)]  # type: ignore[operator]
        logits = logits + bias.view(n, n, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            logits = logits.view(count // windows, windows, heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            logits = logits.view(-1, heads, n, n)
        y = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(count, n, dim)
        out: Tensor = attn.proj(y)
        return out
