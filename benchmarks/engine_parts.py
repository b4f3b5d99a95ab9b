"""What one portion of a Swin block costs on this CPU, part by part, and the alternatives that lost.

`python -m benchmarks.engine_parts` prints microseconds of one thread for 512 tokens at the width of the preset `medium`
(180 channels, 6 heads, windows of 64 tokens): the least of several means, since neighbours only ever add.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.prepared_layers import PackedLinear

WIDTH, HEADS, WINDOW_TOKENS, TOKENS = 180, 6, 64, 512
_CALLS, _MEANS = 200, 9


def least_us(call: Callable[[], object]) -> float:
    """Microseconds of processor time."""
    means = []
    for _ in range(_MEANS):
        started_s = time.process_time()
        for _ in range(_CALLS):
            call()
        means.append((time.process_time() - started_s) / _CALLS)
    return 1e6 * min(means)


def packed(out: int, into: int, gelu: bool = False) -> PackedLinear:
    return PackedLinear.pack(torch.randn(out, into), torch.randn(out), torch.float32, gelu)


def attention(head_dim: int, fused: bool) -> Callable[[], Tensor]:
    """Of all windows and heads of a portion, from the output of `qkv`."""
    qkv, bias = torch.randn(TOKENS, 3 * HEADS * head_dim), torch.randn(1, HEADS, WINDOW_TOKENS, WINDOW_TOKENS)

    def run() -> Tensor:
        parts = qkv.view(-1, WINDOW_TOKENS, 3, HEADS, head_dim).permute(2, 0, 3, 1, 4)
        if fused:
            return F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=bias, scale=1.0)
        q, k, v = parts.contiguous().unbind(0)
        answer: Tensor = (q @ k.transpose(-2, -1)).add_(bias).softmax(-1) @ v
        return answer

    return run


def cases() -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    x, hidden, heads = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, 2 * WIDTH), torch.randn(TOKENS, 192)
    tokens, order = torch.randn(8 * TOKENS, WIDTH), torch.randperm(8 * TOKENS)[:TOKENS]
    one, zero = torch.ones(WIDTH), torch.zeros(WIDTH)
    qkv, qkv_30, fc1, plain_fc1 = packed(576, WIDTH), packed(540, WIDTH), packed(360, WIDTH, True), packed(360, WIDTH)
    fc2, wide_fc2, proj, wide_proj = packed(WIDTH, 360), packed(192, 360), packed(WIDTH, 192), packed(192, 192)
    return {
        "gather": lambda: tokens.index_select(0, order),
        "norm": lambda: F.layer_norm(x, (WIDTH,), one, zero),
        "norm without an affine part": lambda: F.layer_norm(x, (WIDTH,)),
        "qkv, heads padded to 32": lambda: qkv(x),
        "qkv, heads of 30": lambda: qkv_30(x),
        "attention fused, heads padded to 32": attention(32, fused=True),
        "attention fused, heads of 30": attention(30, fused=True),
        "attention by products and softmax": attention(32, fused=False),
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


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {TOKENS} tokens")
    with torch.inference_mode():
        for name, call in cases().items():
            print(f"{name:<38}{least_us(call):>8.0f} us")


if __name__ == "__main__":
    main()
