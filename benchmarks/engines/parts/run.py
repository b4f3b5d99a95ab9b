"""Time the parts of one Swin block on this CPU, with the alternatives that were slower.

`python -m benchmarks.engines.parts` prints microseconds per 512 tokens and thread at the width of the preset `medium`
(180 channels, 6 heads, windows of 64 tokens). Each figure is the minimum of several means, because other processes can
only add time. With `--threads 2`, a part that scales perfectly takes as long as on one thread.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.allocator import keep_freed_memory
from giantleap.models.engines.packed_layers import PackedConv, PackedLinear

WIDTH, HEADS, WINDOW_TOKENS, TOKENS_A_THREAD = 180, 6, 64, 512
MAP_SIDE = 64  # side of the maps of the convolution between two groups
_CALLS, _MEANS = 100, 15


def min_us(call: Callable[[], object]) -> float:
    """Return the minimum over several means, in wall-clock microseconds."""
    means = []
    for _ in range(_MEANS):
        started_s = time.perf_counter()
        for _ in range(_CALLS):
            call()
        means.append((time.perf_counter() - started_s) / _CALLS)
    return 1e6 * min(means)


def packed(out: int, into: int, gelu: bool = False) -> PackedLinear:
    """Return a packed linear layer with random weights."""
    return PackedLinear.pack(torch.randn(out, into), torch.randn(out), torch.float32, gelu)


class Attention:
    """Variants of attention over a portion, from the output of `qkv` to the input of `proj`."""

    def __init__(self, tokens: int, head_dim: int) -> None:
        self.windows, self.head_dim = tokens // WINDOW_TOKENS, head_dim
        qkv = 0.3 * torch.randn(tokens, 3 * HEADS * head_dim)
        self.qkv = qkv.view(-1, WINDOW_TOKENS, 3, HEADS, head_dim)
        self.bias = torch.randn(1, HEADS, WINDOW_TOKENS, WINDOW_TOKENS)

    def _joined(self, y: Tensor) -> Tensor:
        """Reshape [windows, heads, window^2, head_dim] to [tokens, heads * head_dim]."""
        return y.transpose(1, 2).reshape(self.windows * WINDOW_TOKENS, -1)

    def fused(self) -> Tensor:
        """Use the fused kernel."""
        q, k, v = self.qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self._joined(F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=1.0))

    def products(self) -> Tensor:
        """Use two matrix products and a softmax."""
        q, k, v = self.qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        return self._joined((q @ k.transpose(-2, -1)).add_(self.bias).softmax(-1) @ v)

    def products_base_2(self) -> Tensor:
        """Use a softmax of powers of two, which torch computes faster than those of e."""
        q, k, v = self.qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        logits = (q @ k.transpose(-2, -1)).add_(self.bias)
        weights = logits.sub_(logits.amax(-1, keepdim=True)).exp2_()
        return self._joined((weights @ v).div_(weights.sum(-1, keepdim=True)))

    def grouped_convolutions(self) -> Tensor:
        """Do as `products_base_2`, each product as a 1x1 oneDNN convolution with one group per window and head."""
        q, k, v = self.qkv.unbind(2)
        groups, n = self.windows * HEADS, WINDOW_TOKENS
        keys = k.transpose(1, 2).reshape(groups * n, self.head_dim, 1, 1)
        values = v.permute(0, 2, 3, 1).reshape(groups * self.head_dim, n, 1, 1)
        logits = _grouped(q.transpose(0, 1).reshape(n, -1), keys, groups).view(n, self.windows, HEADS, n)
        logits.add_(self.bias.permute(2, 0, 1, 3))
        weights = logits.sub_(logits.amax(-1, keepdim=True)).exp2_()
        y = _grouped(weights.view(n, -1), values, groups).view(n, self.windows, HEADS, self.head_dim)
        return y.div_(weights.sum(-1, keepdim=True)).transpose(0, 1).reshape(self.windows * n, -1)


def _grouped(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A matrix product per group.

    Shape:
        x [64, groups * in], weight [groups * out, in, 1, 1] -> [64, groups * out].
    """
    maps = x.view(1, 8, 8, -1).permute(0, 3, 1, 2)
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        maps, weight, None, [0, 0], [1, 1], [1, 1], groups, "none", [], ""
    )
    return y.permute(0, 2, 3, 1).view(len(x), -1)


class Winograd:
    """A 3x3 convolution by F(4x4, 3x3) of Lavin and Gray (arXiv 1509.09308, section 4.3): a quarter of the products.

    Shape:
        [1, WIDTH, MAP_SIDE, MAP_SIDE] -> the same, channels last.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        into = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
                [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]  # fmt: skip
        back = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
        taps = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
        self.into, self.back = (torch.kron(torch.tensor(m), torch.tensor(m)).float() for m in (into, back))
        g = torch.tensor(taps, dtype=torch.float64) / 24
        kernels = torch.einsum("ai,bj,ocij->aboc", g, g, weight.double()).flatten(0, 1).float()
        self.products = [PackedLinear.pack(kernel, torch.zeros(len(bias)), torch.float32) for kernel in kernels]
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve [1, channels, MAP_SIDE, MAP_SIDE]."""
        tiles = MAP_SIDE // 4
        patches = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).unfold(1, 6, 4).unfold(2, 6, 4)
        spectrum = torch.mm(self.into, patches.permute(4, 5, 0, 1, 2, 3).reshape(36, -1)).view(36, tiles**2, -1)
        y = torch.stack([product(part) for product, part in zip(self.products, spectrum, strict=True)])
        y = torch.mm(self.back, y.view(36, -1)).view(4, 4, tiles, tiles, -1).permute(2, 0, 3, 1, 4)
        return y.reshape(1, MAP_SIDE, MAP_SIDE, -1).add_(self.bias).permute(0, 3, 1, 2)


def convolutions() -> dict[str, Callable[[], object]]:
    """Return the convolutions of a map of MAP_SIDE x MAP_SIDE, for any number of threads."""
    maps = torch.randn(1, WIDTH, MAP_SIDE, MAP_SIDE).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(WIDTH, WIDTH, 3, 3) / 40, torch.randn(WIDTH)
    direct, winograd = PackedConv.pack(weight, bias, [1, 1], torch.float32), Winograd(weight, bias)
    torch.testing.assert_close(winograd(maps), direct(maps), atol=1e-3, rtol=1e-3)
    return {"convolution": lambda: direct(maps), "convolution by Winograd's products": lambda: winograd(maps)}


def cases(threads: int) -> dict[str, Callable[[], object]]:
    """Return the measured parts of a portion, by name."""
    count = threads * TOKENS_A_THREAD
    x, hidden, heads = torch.randn(count, WIDTH), torch.randn(count, 2 * WIDTH), torch.randn(count, 192)
    tokens, order = torch.randn(8 * count, WIDTH), torch.randperm(8 * count)[:count]
    wide, narrow = Attention(count, 32), Attention(count, 30)
    one, zero = torch.ones(WIDTH), torch.zeros(WIDTH)
    qkv, qkv_30, fc1, plain_fc1 = packed(576, WIDTH), packed(540, WIDTH), packed(360, WIDTH, True), packed(360, WIDTH)
    fc2, wide_fc2, proj, wide_proj = packed(WIDTH, 360), packed(192, 360), packed(WIDTH, 192), packed(192, 192)
    return {
        "gather": lambda: tokens.index_select(0, order),
        "norm": lambda: F.layer_norm(x, (WIDTH,), one, zero),
        "norm without an affine part": lambda: F.layer_norm(x, (WIDTH,)),
        "qkv, heads padded to 32": lambda: qkv(x),
        "qkv, heads of 30": lambda: qkv_30(x),
        "attention fused, heads padded to 32": wide.fused,
        "attention fused, heads of 30": narrow.fused,
        "attention by products and softmax": wide.products,
        "attention by products, powers of 2": wide.products_base_2,
        "attention by grouped convolutions": wide.grouped_convolutions,
        "proj and sum": lambda: proj(heads).add_(x),
        "proj and sum, 192 outputs": lambda: x + wide_proj(heads)[:, :WIDTH],
        "proj and sum, fused by oneDNN": lambda: torch.ops.mkldnn._linear_pointwise.binary(
            heads, x, proj.weight, proj.bias, "add"
        ),
        "fc1 with GELU": lambda: fc1(x),
        "fc1 without GELU": lambda: plain_fc1(x),
        "fc2 and sum": lambda: fc2(hidden).add_(x),
        "fc2 and sum, 192 outputs": lambda: x + wide_fc2(hidden)[:, :WIDTH],
    }


def run(threads: int) -> None:
    """Print the minimum time of every part."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads")
    with torch.inference_mode():
        for name, call in {**cases(threads), **convolutions()}.items():
            print(f"{name:<38}{min_us(call):>8.0f} us")
