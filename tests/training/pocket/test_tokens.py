"""Networks with halved tokens begin where those with large ones stood."""

import torch

from giantleap.training.pocket.text import Recipe, TextToLatent
from giantleap.training.pocket.tokens import halve_patches, patch_of

LARGE = Recipe(width=64, depth=1)
SMALL = Recipe(width=64, depth=1, patch=2)


def networks() -> tuple[TextToLatent, TextToLatent]:
    torch.manual_seed(0)
    large, small = TextToLatent(40, LARGE), TextToLatent(40, SMALL)
    torch.nn.init.normal_(large.transformer.proj_out.weight)
    torch.nn.init.normal_(large.transformer.proj_out.bias)
    small.load_state_dict(halve_patches(large.state_dict()))
    return large, small


def test_patch_is_read_from_the_weights() -> None:
    large, small = networks()
    assert (patch_of(large.state_dict()), patch_of(small.state_dict())) == (4, 2)


def test_a_small_token_enters_as_a_large_one_made_of_it() -> None:
    large, small = networks()
    block = torch.randn(1, 24, 2, 2)
    whole = large.transformer.patch_embed.proj(block.tile(1, 1, 2, 2))
    torch.testing.assert_close(small.transformer.patch_embed.proj(block), whole, rtol=1e-4, atol=1e-4)


def test_a_small_token_leaves_as_the_mean_of_four_quarters() -> None:
    large, small = networks()
    states = torch.randn(3, 64)
    quarters = large.transformer.proj_out(states).view(3, 2, 2, 2, 2, 24)
    mean = quarters.mean(dim=(1, 3)).flatten(1)
    torch.testing.assert_close(small.transformer.proj_out(states), mean, rtol=1e-4, atol=1e-4)


def test_places_of_both_networks_span_the_same_picture() -> None:
    large, small = networks()
    coarse = large.transformer.patch_embed.get_buffer("pos_embed").view(8, 8, -1)
    fine = small.transformer.patch_embed.get_buffer("pos_embed").view(16, 16, -1)
    torch.testing.assert_close(fine[::2, ::2], coarse)
