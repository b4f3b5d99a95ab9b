"""The LIIF head: the value of the latent at any point, from the features around it; one head for every scale.

It replaces the scale heads (`models/lua/network.py`, `LuaSpec.head`); table 4 of arXiv 2511.10629 compares both. The
first layer of the decoder sees 3 x 3 features side by side, which is a convolution: it runs once per latent pixel
instead of once per point and gives the same sums.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantleap.models.lua.spec import LIIF_POINTS, LuaSpec, scaled_size

HIDDEN_LAYERS = 4


@dataclass(frozen=True, slots=True)
class Corners:
    """For each point along one side, the two features that it is between.

    Args:
        index: Their indices, [2, points]; beyond the border that of the mirrored feature.
        offset: From each feature to the point, in half pixels, so that a feature's own pixel spans -1 to 1.
        weight: Of each feature: the distance from the point to the other one. Both add up to 1.
    """

    index: Tensor
    offset: Tensor
    weight: Tensor

    @classmethod
    def build(cls, side: int, points: int, like: Tensor) -> Self:
        """For `points` evenly spread over `side` features, on the device of `like`, with values in its type.

        References:
            arXiv 2012.09161, section 3: pixel-centered coordinates, features mirrored outside the border.
        """
        center = (torch.arange(points, device=like.device) + 0.5) * (side / points) - 0.5
        before = center.floor()
        spots = torch.stack([before, before + 1.0])
        offset = center - spots
        index = spots.long().clamp(0, side - 1)  # a point is at most half a pixel outside, and the mirror of -1 is 0
        return cls(index, (2.0 * offset).to(like.dtype), (1.0 - offset.abs()).to(like.dtype))


class LiifHead(nn.Module):
    """Features to the latent at any scale: f(features at a corner, offset from it, cell), mixed over four corners.

    References:
        arXiv 2012.09161, Eq. 2 (decoder), 3 (feature unfolding, zeros outside), 4 (local ensemble), 5 (cell decoding);
        the decoder has four hidden layers and ReLU as there. Cells count in half pixels, as offsets do.

    Args:
        spec: `num_feat` is the width of the hidden layers.
    """

    def __init__(self, spec: LuaSpec) -> None:
        super().__init__()
        f = spec.num_feat
        self.entry = nn.Conv2d(spec.embed_dim, f, 3, padding=1)  # the first layer, of the unfolded features
        self.place = nn.Linear(4, f, bias=False)  # the first layer, of offset and cell
        self.hidden = nn.ModuleList(nn.Linear(f, f) for _ in range(HIDDEN_LAYERS - 1))
        self.last = nn.Linear(f, spec.channels)
        self.points_at_once = LIIF_POINTS
        for layer in (self.entry, *self.hidden):
            # torch's default halves the signal in every layer; arXiv 1502.01852, Eq. 10, preserves it for ReLU
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        """Evaluate the head; memory beside input and output is bounded for any size, except for a gradient.

        Shape:
            [batch, embed_dim, height, width] -> [batch, channels, scale * height, scale * width].
        """
        batch, _, height, width = x.shape
        out_height, out_width = scaled_size(height, scale), scaled_size(width, scale)
        rows, columns = Corners.build(height, out_height, x), Corners.build(width, out_width, x)
        entry = self.entry(x)
        tokens = entry.permute(0, 2, 3, 1).reshape(batch * height * width, -1)
        cell = x.new_tensor([2.0 * height / out_height, 2.0 * width / out_width])
        parts, count = [], batch * out_height * out_width
        for start in range(0, count, self.points_at_once):
            points = torch.arange(start, min(start + self.points_at_once, count), device=x.device)
            row, column = points // out_width % out_height, points % out_width
            top = points // (out_height * out_width) * height  # first row of features of the point's latent
            parts.append(self._mix(tokens, top, row, column, rows, columns, cell, width))
        values = torch.cat(parts)
        return values.view(batch, out_height, out_width, -1).permute(0, 3, 1, 2).contiguous()

    def _mix(
        self,
        tokens: Tensor,
        top: Tensor,
        row: Tensor,
        column: Tensor,
        rows: Corners,
        columns: Corners,
        cell: Tensor,
        width: int,
    ) -> Tensor:
        """Shape: tokens [batch * height * width, num_feat]; top, row and column [points] -> [points, channels]."""
        n = len(row)
        index = ((top + rows.index[:, row])[:, None] * width + columns.index[:, column]).view(4 * n)
        weight = (rows.weight[:, row][:, None] * columns.weight[:, column]).view(4, n, 1)
        offset = torch.stack(
            [rows.offset[:, row][:, None].expand(2, 2, n), columns.offset[:, column].expand(2, 2, n)], dim=-1
        ).view(4 * n, 2)
        y = F.relu(tokens[index] + self.place(torch.cat([offset, cell.expand(4 * n, 2)], dim=1)))
        for layer in self.hidden:
            y = F.relu(layer(y))
        values: Tensor = self.last(y)
        return (weight * values.view(4, n, -1)).sum(dim=0)
