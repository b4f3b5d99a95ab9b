"""What is exported computes what the networks compute, before any converter has touched it."""

import pytest
import torch
from torch import Tensor

from giantleap.export.graphs import DTYPES, DecoderGraph, LuaGraph
from giantleap.export.manifest import Precision
from giantleap.models.vae.decode import decode_plain
from giantleap.models.vae.decoder_check import UnknownDecoderError
from tests.export.random_networks import SPECS, random_vae
from tests.random_lua import random_lua


def latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("scale", [2, 4])
def test_in_float32_the_graph_is_the_core(name: str, scale: int) -> None:
    net = random_lua(SPECS[name])
    latent = latents(3, net.spec.channels, 8, 12)
    with torch.inference_mode():
        assert torch.allclose(LuaGraph(net, scale, "fp32")(latent), net.core(latent, scale), atol=1e-6)


def test_the_graph_holds_one_head_and_leaves_the_network_alone() -> None:
    net = random_lua(SPECS["pocket"])
    before = {name: (value.dtype, value.clone()) for name, value in net.state_dict().items()}
    graph = LuaGraph(net, 4, "bf16")
    names = set(graph.state_dict())
    assert not any("heads" in name for name in names) and any(name.startswith("head.upsample.2") for name in names)
    for name, value in net.state_dict().items():
        assert value.dtype == before[name][0] and torch.equal(value, before[name][1])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_types_round_the_network_but_neither_statistics_nor_skip(precision: Precision) -> None:
    net, latent = random_lua(SPECS["pocket"], spread=0.02), latents(2, 4, 8, 12)
    graph = LuaGraph(net, 2, precision)
    assert {each.dtype for each in graph.parameters()} == {DTYPES[precision]}
    with torch.inference_mode():
        assert (graph(latent) - net.core(latent, 2)).abs().max() > 0
        for head in (graph.head, net.heads["x2"]):
            torch.nn.init.zeros_(head.get_parameter("conv_last.weight"))
            torch.nn.init.zeros_(head.get_parameter("conv_last.bias"))
        found = graph(latent)
        assert found.dtype == torch.float32
        assert torch.allclose(found, net.core(latent, 2), atol=1e-6), "what is left is not the network's"


@pytest.mark.parametrize("name", ["kl", "flux2", "qwen", "wan", "dc", "dc-attention"])
def test_the_decoder_is_the_plain_decode_whatever_the_switches(name: str) -> None:
    vae, latent = random_vae(name), latents(2, 4, 6, 5)
    expected = decode_plain(vae, latent)
    vae.use_slicing = vae.use_tiling = True
    graph = DecoderGraph(vae, torch.float32)
    with torch.inference_mode():
        assert torch.allclose(graph(latent), expected, atol=1e-6)
    assert not graph.vae.use_slicing and not graph.vae.use_tiling, "a graph has no branches to choose from"
    assert vae.use_slicing and vae.use_tiling, "the VAE itself stays as it was"


def test_an_unknown_autoencoder_is_refused() -> None:
    with pytest.raises(UnknownDecoderError):
        DecoderGraph(torch.nn.Identity(), torch.float32)
