"""Live bytes are those of storages that are alive, each once, and the same on shapes alone."""

import pytest
import torch

from giantleap.models.live_storage import LiveStorage


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_counts_what_is_alive_at_once(device: str) -> None:
    outside = torch.ones(1000, device=device)
    with LiveStorage() as live:
        first = outside + 1
        second = first + 1
        del first
        third = second + 1
        del second, third
    assert live.peak_bytes == 2 * 4000


def test_views_and_inplace_results_do_not_count_again() -> None:
    with LiveStorage() as live:
        made = torch.ones(10, 10)
        view = made.t()[2:]
        view.add_(1)
        torch.exp(made, out=made)
    assert live.peak_bytes == 400
    assert live.largest_elements == 100
