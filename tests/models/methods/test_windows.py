"""Window arithmetic: how many there are, that they cover everything, and that none leaves the padded latent."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from giantleap.models.methods.windows import WindowGrid, starts
from tests.models.methods.tiny_unets import noise_of


@pytest.mark.parametrize(("side", "count"), [(128, 1), (256, 3), (384, 5), (512, 7), (129, 2), (192, 2), (96, 1)])
def test_windows_of_128_lie_64_apart_and_end_at_the_border(side: int, count: int) -> None:
    places = starts(side, 128, 64)
    assert len(places) == count and places[0] == 0 and places[-1] == max(0, side - 128)
    assert all(0 < after - before <= 64 for before, after in pairwise(places))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (24, 64), (12, 40), (16, 16)])
def test_jittered_windows_cover_every_place_and_stay_inside(height: int, width: int) -> None:
    grid = WindowGrid(height, width, 16)
    assert (grid.stride, grid.pad) == (8, 2)
    for seed in range(20):
        corners = grid.corners(noise_of(seed))
        assert len(corners) == len(starts(height, 16, 8)) * len(starts(width, 16, 8))
        covered = torch.zeros(height + 4, width + 4)
        for top, left in corners:
            assert 0 <= top <= height + 4 - grid.size[0] and 0 <= left <= width + 4 - grid.size[1]
            covered[top : top + grid.size[0], left : left + grid.size[1]] += 1
        assert covered[2:-2, 2:-2].min() >= 1


def test_a_window_at_a_border_moves_outwards_only_and_one_that_spans_the_latent_does_not_move() -> None:
    corners = [WindowGrid(16, 64, 16).corners(noise_of(seed)) for seed in range(50)]
    assert {top for each in corners for top, _ in each} == {2}
    assert {each[0][1] for each in corners} == {0, 1, 2} and {each[-1][1] for each in corners} == {50, 51, 52}
    assert {each[3][1] for each in corners} == {24, 25, 26, 27, 28}


def test_what_all_windows_agree_on_is_their_average() -> None:
    x = torch.randn(1, 3, 40, 24)

    def negate(cut: Tensor, corners: object) -> Tensor:
        assert cut.shape[1:] == (3, 16, 16)
        return -cut

    grid = WindowGrid(40, 24, 16)
    torch.testing.assert_close(grid.average(x, grid.corners(noise_of(0)), negate), -x)
