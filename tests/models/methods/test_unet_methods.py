"""Methods inside a UNet: their published places and steps, and that it is the same afterwards, however it ends."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from giantleap.models.methods.denoiser import Denoiser
from giantleap.models.methods.hidiffusion import (
    HiDiffusionPlan,
    hidiffusion,
    join_windows,
    map_size,
    plan_hidiffusion,
    split_windows,
)
from giantleap.models.methods.scalecrafter import dilated, plan_scalecrafter, scalecrafter
from giantleap.models.methods.unet_hooks import Geometry, attention_level, geometry_inside
from giantleap.models.methods.views import View
from tests.models.methods.tiny_unets import noise_of, sd15_levels, sdxl_levels

UNETS = {"sd15": sd15_levels, "sdxl": sdxl_levels}
BOTH = pytest.mark.parametrize("name", UNETS)
NEVER = HiDiffusionPlan(range(0), range(0))
POOL, STRIDE = HiDiffusionPlan(range(1), range(0)), HiDiffusionPlan(range(0), range(1))
POOL_AND_STRIDE = HiDiffusionPlan(range(1), range(1))


def run(unet: Any, height: int = 32, width: int = 48) -> Tensor:
    is_xl = unet.config.addition_embed_type is not None
    added = {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)} if is_xl else None
    x = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0))
    text = torch.ones(1, 5, unet.config.cross_attention_dim)
    with torch.no_grad():
        out: Tensor = unet(x, 500, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]
    return out


def hooks_and_geometry(unet: Any) -> list[object]:
    convs = [Geometry.of(module) for module in unet.modules() if isinstance(module, nn.Conv2d)]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())
    return [hooks, convs, [type(each) for each in unet.attn_processors.values()]]


@pytest.mark.parametrize(
    ("name", "side", "steps", "pool", "stride"),
    [
        ("sdxl", 256, 50, (8, 20), (0, 8)),
        ("sdxl", 256, 30, (4, 12), (0, 4)),
        ("sdxl", 512, 30, (0, 21), (0, 9)),
        ("sd15", 256, 50, (0, 0), (0, 20)),
        ("sd15", 512, 50, (0, 15), (0, 35)),
    ],
)
def test_the_steps_of_hidiffusion(
    name: str, side: int, steps: int, pool: tuple[int, int], stride: tuple[int, int]
) -> None:
    plan = plan_hidiffusion(UNETS[name](sample_size=128), side, side, steps)
    assert (plan.pool, plan.stride) == (range(*pool), range(*stride))


@BOTH
@pytest.mark.parametrize(
    ("plan", "sizes"),
    [
        (POOL, [(32, 32), (24, 40), (18, 30), (20, 36), (36, 36)]),
        (STRIDE, [(32, 32), (18, 30), (20, 36)]),
        (POOL_AND_STRIDE, [(64, 64), (48, 80)]),
        (NEVER, [(32, 32), (20, 36), (36, 28)]),
    ],
    ids=["pool", "stride", "both", "windows"],
)
def test_hidiffusion_changes_the_output_at_any_size_and_leaves_nothing_behind(
    name: str, plan: HiDiffusionPlan, sizes: list[tuple[int, int]]
) -> None:
    unet = UNETS[name]()
    before = hooks_and_geometry(unet)
    for height, width in sizes:
        plain = run(unet, height, width)
        with hidiffusion(unet, plan, noise_of(0)) as state:
            state.begin(0)
            changed = run(unet, height, width)
        assert changed.shape == plain.shape and not torch.equal(changed, plain)
        assert torch.equal(run(unet, height, width), plain) and hooks_and_geometry(unet) == before


def down_sizes(unet: Any, plan: HiDiffusionPlan, side: int) -> list[int]:
    """Width of the maps that leave each down block."""
    sizes: list[int] = []
    with ExitStack() as stack:
        for block in unet.down_blocks:
            hook = block.register_forward_hook(lambda block, inputs, output: sizes.append(output[0].shape[-1]))
            stack.callback(hook.remove)
        state = stack.enter_context(hidiffusion(unet, plan, noise_of(0)))
        state.begin(0)
        run(unet, side, side)
    return sizes


def test_the_maps_of_sdxl_are_halved_once_more_where_the_paper_does() -> None:
    unet = sdxl_levels()
    assert attention_level(unet) == 1 and attention_level(sd15_levels()) == 0
    assert down_sizes(unet, NEVER, 64) == [32, 16, 16]
    assert down_sizes(unet, POOL, 64) == [32, 8, 8]
    assert down_sizes(unet, STRIDE, 64) == [32, 8, 8]
    assert down_sizes(unet, POOL_AND_STRIDE, 128) == [64, 8, 8]
    assert down_sizes(sd15_levels(), STRIDE, 64) == [16, 8, 4, 4]


@pytest.mark.parametrize("size", [(8, 12), (7, 12), (9, 5)])
@pytest.mark.parametrize("shift", [(0, 0), (1, 1), (2, 3)])
def test_windows_are_put_back_where_they_were(size: tuple[int, int], shift: tuple[int, int]) -> None:
    tokens = torch.randn(2, size[0] * size[1], 3)
    even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
    windows = split_windows(tokens, size, even, shift)
    assert tuple(windows.shape) == (8, even[0] * even[1] // 4, 3)
    if size == even:
        assert torch.equal(join_windows(windows, size, even, shift), tokens)
    else:
        assert join_windows(windows, size, even, shift).shape == tokens.shape


def test_the_first_window_is_the_upper_left_quarter() -> None:
    tokens = torch.arange(16.0).reshape(1, 16, 1)
    assert split_windows(tokens, (4, 4), (4, 4), (0, 0))[0].flatten().tolist() == [0, 1, 4, 5]
    assert split_windows(tokens, (4, 4), (4, 4), (1, 1))[0].flatten().tolist() == [5, 6, 9, 10]


@pytest.mark.parametrize(("latent", "tokens", "size"), [((256, 256), 16384, (128, 128)), ((36, 28), 63, (9, 7))])
def test_the_size_of_a_map_follows_from_its_tokens(latent: tuple[int, int], tokens: int, size: tuple[int, int]) -> None:
    assert map_size(latent, tokens) == size


def denoiser_of(unet: Any) -> Denoiser:
    def network(x: Tensor, t: Tensor, prompt: Any, view: View) -> Tensor:
        return torch.cat([run(unet, *x.shape[-2:]) for _ in x])

    return Denoiser(network, {"text": torch.zeros(1, 1)}, {"text": torch.ones(1, 1)})


def factors(unet: Any, scale: int) -> dict[str, list[int]]:
    """The factors of a plan by block, and how many convolutions have them."""
    names = {module: name for name, module in unet.named_modules()}
    found: dict[str, list[int]] = {}
    for conv in plan_scalecrafter(unet, scale, 50).convs:
        found.setdefault(".".join(names[conv.conv].split(".")[:2]).removesuffix(".resnets"), []).append(conv.strong)
    return found


def test_scalecrafter_dilates_the_published_convolutions_of_sdxl() -> None:
    unet = sdxl_levels()
    assert factors(unet, 2) == {"mid_block": [2] * 4, "up_blocks.0": [2] * 7}
    assert factors(unet, 4) == {
        "mid_block": [4] * 4,
        "down_blocks.2": [4] * 4,
        "up_blocks.0": [4] * 7,
        "up_blocks.1": [3] * 7,
        "up_blocks.2": [2] * 6,
    }
    weak = [conv.weak for conv in plan_scalecrafter(unet, 4, 50).convs]
    assert weak.count(2) == 11 and weak.count(1) == 28 - 11


def test_scalecrafter_dilates_the_published_blocks_of_sd15() -> None:
    unet = sd15_levels()
    two, four = factors(unet, 2), factors(unet, 4)
    blocks = [
        "mid_block",
        "down_blocks.1",
        "down_blocks.2",
        "down_blocks.3",
        "up_blocks.0",
        "up_blocks.1",
        "up_blocks.2",
    ]
    assert sorted(two) == sorted(four) == sorted(blocks)
    assert {name: set(values) for name, values in two.items()} == {block: {2} for block in blocks}
    assert {name: values.pop() for name, values in four.items()} == dict(
        zip(blocks, [4, 2, 3, 4, 4, 3, 2], strict=True)
    )


def test_scalecrafter_stops_at_its_step_and_falls_at_four_times_the_size() -> None:
    two, four = plan_scalecrafter(sdxl_levels(), 2, 50), plan_scalecrafter(sdxl_levels(), 4, 50)
    assert (two.until, four.until) == (30, 35)
    assert [two.factor(2, index) for index in (0, 29, 30)] == [2, 2, 1]
    assert [four.factor(4, index) for index in (0, 8, 9, 17, 18, 34, 35)] == [4, 4, 3, 3, 2, 2, 1]
    assert four.factor(1, 0) == 1


def test_a_factor_of_one_is_the_convolution_itself_and_two_is_a_dilation_of_two() -> None:
    conv, x = nn.Conv2d(3, 3, 3, padding=1), torch.randn(1, 3, 9, 12)
    own = Geometry.of(conv)
    assert dilated(own, 1) == own
    plain = conv(x)
    with ExitStack() as stack:
        geometry_inside(stack, conv, lambda own: dilated(own, 2))
        wide = conv(x)
        assert Geometry.of(conv) == own, "only while it runs"
    expected = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2)
    assert torch.equal(wide, expected) and torch.equal(conv(x), plain)


@BOTH
@pytest.mark.parametrize("scale", [2, 4])
def test_scalecrafter_changes_early_steps_only_and_leaves_nothing_behind(name: str, scale: int) -> None:
    unet = UNETS[name]()
    before, plain, denoiser = hooks_and_geometry(unet), run(unet), denoiser_of(unet)
    x, t, view = torch.zeros(1, 4, 32, 48), torch.tensor(500), View(256, 384, 3.0)
    with scalecrafter(plan_scalecrafter(unet, scale, 50), denoiser) as crafted:
        crafted.begin(0)
        early = crafted(x, t, view)
        crafted.begin(49)
        late = crafted(x, t, view)
    assert not torch.equal(early, plain) and torch.equal(late, plain)
    assert torch.equal(run(unet), plain) and hooks_and_geometry(unet) == before


def test_guidance_takes_its_negative_half_from_the_weaker_unet() -> None:
    unet = sdxl_levels()
    plan = plan_scalecrafter(unet, 4, 50)
    halves: list[float] = []

    class Halves:
        def halves(self, x: Tensor, t: Tensor, view: View) -> tuple[Tensor, Tensor]:
            halves.append(float(len(halves)))
            return torch.full((1,), 10.0 + len(halves)), torch.full((1,), 20.0)

    with scalecrafter(plan, Halves()) as crafted:  # type: ignore[arg-type]
        crafted.begin(0)
        guided = crafted(torch.zeros(1), torch.tensor(1), View(8, 8, 3.0))
    assert float(guided) == 12 + 3 * (20 - 11) and len(halves) == 2


class StopError(Exception):
    pass


@BOTH
@pytest.mark.parametrize("method", ["hidiffusion", "scalecrafter"])
def test_an_error_in_the_middle_of_the_unet_leaves_nothing_behind(name: str, method: str) -> None:
    unet = UNETS[name]()
    before, plain = hooks_and_geometry(unet), run(unet)

    def fail(module: nn.Module, inputs: Any) -> None:
        raise StopError

    entries: dict[str, Callable[[], Any]] = {
        "hidiffusion": lambda: hidiffusion(unet, POOL_AND_STRIDE, noise_of(0)),
        "scalecrafter": lambda: scalecrafter(plan_scalecrafter(unet, 4, 50), denoiser_of(unet)),
    }
    for place in (unet.mid_block.resnets[0].conv1, unet.up_blocks[0].resnets[1].conv2):
        with pytest.raises(StopError), entries[method]() as state:
            state.begin(0)
            handle = place.register_forward_pre_hook(fail)
            try:
                run(unet)
            finally:
                handle.remove()
        assert torch.equal(run(unet), plain) and hooks_and_geometry(unet) == before


def test_a_unet_without_a_place_to_halve_is_refused() -> None:
    unet: Any = nn.Module()
    unet.down_blocks = [object(), object()]
    with pytest.raises(ValueError, match="attention above its last level"), hidiffusion(unet, POOL, noise_of(0)):
        pass
