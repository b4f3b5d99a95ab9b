"""Reads the spec of a LUA from the weights of released files and renames their keys to ours.

Known layouts are the authors' release (SwinIR trunk, heads under `heads.x2` and `heads.x4`) and single-head SwinIR
files with the `pixelshuffle` upsampler, which become a LUA of one head. `models/lua/checkpoints.py` opens the files.
Only names and shapes are read; no torch is imported.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from giantleap.models.lua.spec import LuaSpec


class Shaped(Protocol):
    """A tensor, or its entry in the header of a file."""

    @property
    def shape(self) -> Sequence[int]:
        """Sides of the tensor."""
        ...


Weight = TypeVar("Weight", bound=Shaped)

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # SwinIR subtracts it from 3-channel images and does not store it
_RECOMPUTED = (".attn_mask", ".relative_position_index")


class CheckpointError(ValueError):
    """A weight file that is damaged, of an unknown layout, or does not fit its network."""


def convert_state_dict(weights: Mapping[str, Weight]) -> tuple[LuaSpec, dict[str, Weight]]:
    """Spec and weights under our own keys, without the buffers that depend on a size.

    Raises:
        CheckpointError: The layout is not known, or is a SwinIR variant that LUA has no counterpart for.
    """
    own = {key: value for key, value in weights.items() if not key.endswith(_RECOMPUTED)}
    _refuse_variants(own)
    if not any(key.startswith("heads.") for key in own):
        own = _single_head(own)
    spec = _infer_spec(own)
    return replace(spec, shift=_shifts_windows(weights, spec)), own


def _shifts_windows(weights: Mapping[str, Shaped], spec: LuaSpec) -> bool:
    """Whether odd blocks shift their windows: SwinIR does so unless it was built for images of one window.

    A file tells by the masks of the shifts, which SwinIR stores; one without any of these buffers tells nothing.
    """
    masks = sum(key.endswith(".attn_mask") for key in weights)
    odd_blocks = sum(depth // 2 for depth in spec.depths)
    if 0 < masks < odd_blocks:
        raise CheckpointError(f"found masks of {masks} blocks; expected those of all {odd_blocks} odd blocks, or none")
    return masks > 0 or not any(key.endswith(".relative_position_index") for key in weights)


def _refuse_variants(weights: Mapping[str, Shaped]) -> None:
    """Reject SwinIR variants other than `pixelshuffle` with one convolution per residual group."""
    for key in ("conv_first.weight", "layers.0.residual_group.blocks.0.attn.relative_position_bias_table"):
        _need(weights, key)
    released = any(key.startswith("heads.") for key in weights)
    single = "conv_before_upsample.0.weight" in weights
    variant = None
    if "absolute_pos_embed" in weights:
        variant = "absolute position embedding (key absolute_pos_embed)"
    elif "conv_after_body.0.weight" in weights:
        variant = "resi_connection '3conv' (key conv_after_body.0.weight)"
    elif "conv_up1.weight" in weights:
        variant = "upsampler 'nearest+conv' (key conv_up1.weight)"
    elif not released and not single and "upsample.0.weight" in weights:
        variant = "upsampler 'pixelshuffledirect' (upsample.0.weight without conv_before_upsample.0.weight)"
    elif not released and not single:
        variant = "no upsampler (neither heads.* nor conv_before_upsample.0.weight)"
    if variant is not None:
        raise CheckpointError(
            f"SwinIR variant not supported: {variant}; expected heads.x2 / heads.x4, or upsampler 'pixelshuffle'"
            " with resi_connection '1conv'"
        )


def _single_head(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Rename the one head of a SwinIR file to the head of that scale."""
    doublings = sorted(
        int(key.split(".")[1]) for key in weights if key.startswith("upsample.") and key.endswith(".weight")
    )
    shape = tuple(_need(weights, "upsample.0.weight").shape)
    if doublings not in ([0], [0, 2]) or shape[0] != 4 * shape[1]:
        raise CheckpointError(
            f"key upsample.0.weight: SwinIR scale not supported; found shape {shape} at places {doublings},"
            " expected [4 * num_feat, num_feat, 3, 3] at place 0 (x2) or at 0 and 2 (x4)"
        )
    head = f"heads.x{2 ** len(doublings)}"
    moves = {"conv_before_upsample.": f"{head}.conv_before.", "upsample.": f"{head}.upsample."}
    moves["conv_last."] = f"{head}.conv_last."

    def moved(key: str) -> str:
        start = next((old for old in moves if key.startswith(old)), "")
        return moves.get(start, "") + key.removeprefix(start)

    return {moved(key): value for key, value in weights.items()}


def _infer_spec(weights: Mapping[str, Shaped]) -> LuaSpec:
    embed_dim, channels, kernel, _ = _shape(weights, "conv_first.weight", 4)
    block = "layers.{}.residual_group.blocks.{}"
    table, fc1 = f"{block}.attn.relative_position_bias_table", f"{block}.mlp.fc1.weight"
    depths: list[int] = []
    heads: list[int] = []
    while table.format(len(depths), 0) in weights:
        layer = len(depths)
        depth = 0
        while table.format(layer, depth) in weights:
            depth += 1
        depths.append(depth)
        heads.append(_shape(weights, table.format(layer, 0), 2)[1])
    scales = sorted({key.split(".")[1] for key in weights if key.startswith("heads.")})
    if not set(scales) <= {"x2", "x4"}:
        raise CheckpointError(f"keys heads.*: found the heads {scales}, expected x2 and x4")
    try:
        return LuaSpec(
            channels=channels,
            embed_dim=embed_dim,
            depths=tuple(depths),
            num_heads=tuple(heads),
            window=_window(table.format(0, 0), _shape(weights, table.format(0, 0), 2)[0]),
            mlp_ratio=_shape(weights, fc1.format(0, 0), 2)[0] / embed_dim,
            num_feat=_shape(weights, f"heads.{scales[0]}.conv_before.0.weight", 4)[0],
            scales=tuple(int(scale[1:]) for scale in scales),
            conv_first_kernel=kernel,
            image_mean=RGB_MEAN if channels == 3 else None,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"the shapes of the weights give no valid LUA: {error}") from error


def _window(key: str, rows: int) -> int:
    side = math.isqrt(rows)
    if side * side != rows or side % 2 == 0:
        raise CheckpointError(f"key {key}: found {rows} rows, expected (2 * window - 1)^2")
    return (side + 1) // 2


def _shape(weights: Mapping[str, Shaped], key: str, dims: int) -> tuple[int, ...]:
    shape = tuple(_need(weights, key).shape)
    if len(shape) != dims:
        raise CheckpointError(f"key {key}: found shape {list(shape)}, expected {dims} dimensions")
    return shape


def _need(weights: Mapping[str, Weight], key: str) -> Weight:
    if key not in weights:
        starts = sorted({name.split(".")[0] for name in weights})[:8]
        raise CheckpointError(
            f"key {key} is missing: neither a LUA nor a SwinIR file; found keys starting with {starts}"
        )
    return weights[key]
