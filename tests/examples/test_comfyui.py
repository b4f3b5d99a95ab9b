"""The nodes of `clients/comfyui` as ComfyUI loads and calls them, against a running service."""

import importlib.util
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from giantleap.models.latent_space import LatentSpace
from giantleap_client import Client, GiantleapError, generate_request
from tests.examples.conftest import ROOT

SAMPLES = torch.randn(2, 24, 16, 16, generator=torch.Generator().manual_seed(0))


class InterruptProcessingException(Exception):
    pass


@dataclass
class ComfyUI:
    """What ComfyUI does with a folder of nodes: import it by its path, read two mappings, call a node with inputs."""

    nodes: dict[str, Any]
    url: str
    interrupted: bool = False

    def call(self, name: str, **given: Any) -> Any:
        """The one output of a node; widgets that are not given have their defaults."""
        node = self.nodes[name]
        inputs = {}
        for field, (kind, *options) in node.INPUT_TYPES()["required"].items():
            default = kind[0] if isinstance(kind, list) else (options[0]["default"] if options else None)
            inputs[field] = given.get(field, self.url if field == "url" else default)
        function: Callable[..., tuple[Any, ...]] = getattr(node(), node.FUNCTION)
        assert list(inspect.signature(function).parameters) == list(inputs)
        (output,) = function(**inputs)
        (kind,) = node.RETURN_TYPES
        values: Tensor = output["samples"] if kind == "LATENT" else output
        assert values.dtype == torch.float32 and values.device.type == "cpu" and values.dim() >= 4
        if kind == "IMAGE":
            assert values.shape[-1] == 3 and 0 <= float(values.min()) < float(values.max()) <= 1
        return output


@pytest.fixture
def comfyui(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ComfyUI]:
    def throw_exception_if_processing_interrupted() -> None:
        if running.interrupted:
            raise InterruptProcessingException

    management = types.ModuleType("comfy.model_management")
    vars(management).update(
        InterruptProcessingException=InterruptProcessingException,
        throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted,
    )
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    folder = ROOT / "clients" / "comfyui"
    spec = importlib.util.spec_from_file_location("custom_nodes_giantleap", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_nodes_giantleap", module)
    spec.loader.exec_module(module)
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    assert all(node.CATEGORY == "latent/giantleap" for node in module.NODE_CLASS_MAPPINGS.values())
    running = ComfyUI(module.NODE_CLASS_MAPPINGS, url)
    yield running
    sys.modules.pop("custom_nodes_giantleap.nodes")


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, timeout_s=120) as client:
        yield client


def test_a_latent_comes_back_larger_with_what_it_holds(comfyui: ComfyUI, client: Client) -> None:
    mask = torch.ones(1, 64, 64)
    larger = comfyui.call("GiantleapUpscaleLatent", samples={"samples": SAMPLES, "noise_mask": mask}, scale=4.0)
    assert larger.keys() == {"samples", "noise_mask"} and larger["noise_mask"] is mask
    same = client.upscale(SAMPLES, scale=4, output="latent")
    assert torch.equal(larger["samples"], torch.stack([same.tensor(0), same.tensor(1)]))


def test_a_latent_becomes_an_image(comfyui: ComfyUI, client: Client) -> None:
    images = comfyui.call("GiantleapUpscaleDecode", samples={"samples": SAMPLES}, method="bicubic")
    assert images.shape == (2, 128, 128, 3)
    same = client.upscale(SAMPLES, scale=2, method="bicubic")
    assert torch.equal(images[1].mul(255).round(), torch.from_numpy(same.array(1).copy()).float())


def test_latents_of_flux_2_are_converted_both_ways(comfyui: ComfyUI, client: Client) -> None:
    bodies = {model["name"]: model["latent_space"] for model in json.loads(client.send("GET", "models"))}
    body = bodies["klein"]
    mean, std = tuple(body["mean"]), tuple(body["std"])
    space = LatentSpace("flux2", body["channels"], body["stride"], body["scale"], packing="flux", mean=mean, std=std)

    def fold(raw: Tensor) -> Tensor:
        tokens: Tensor = space.from_raw(raw)
        return tokens.transpose(1, 2).reshape(len(raw), -1, raw.shape[2] // 2, raw.shape[3] // 2)

    raw = torch.randn(1, body["channels"], 8, 12, generator=torch.Generator().manual_seed(1))
    samples = {"samples": fold(raw)}
    larger = comfyui.call("GiantleapUpscaleLatent", samples=samples, bundle="klein")["samples"]
    same = client.upscale(raw, scale=2, bundle="klein", output="latent").tensor()[None]
    torch.testing.assert_close(larger, fold(same), atol=1e-4, rtol=1e-4)
    image = comfyui.call("GiantleapUpscaleDecode", samples=samples, bundle="klein")
    assert image.shape == (1, 16 * body["stride"], 24 * body["stride"], 3)


def test_the_button_of_comfyui_cancels_the_job(comfyui: ComfyUI, client: Client) -> None:
    busy = [client.submit(generate_request("a red sphere", steps=100, num_images=4, scale=4)) for _ in range(2)]
    comfyui.interrupted = True
    with pytest.raises(InterruptProcessingException):
        comfyui.call("GiantleapUpscaleDecode", samples={"samples": SAMPLES})
    (job,) = json.loads(client.send("GET", "jobs", limit=1))["jobs"]
    assert (job["kind"], job["status"]) == ("upscale", "canceled")
    for each in busy:
        with suppress(GiantleapError):  # it has ended
            each.cancel()


def test_an_unknown_bundle_is_answered_with_those_that_there_are(comfyui: ComfyUI) -> None:
    with pytest.raises(ValueError, match="no bundle 'sdxl'; it has pocket, tiny, klein"):
        comfyui.call("GiantleapUpscaleLatent", samples={"samples": SAMPLES}, bundle="sdxl")
    with pytest.raises(GiantleapError, match="invalid_request"):
        comfyui.call("GiantleapUpscaleLatent", samples={"samples": SAMPLES}, bundle="tiny")


def test_the_key_is_read_from_the_environment_and_is_no_input(
    comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIANTLEAP_API_KEY", "not a key")
    with pytest.raises(ValueError, match="api_key has characters"):
        comfyui.call("GiantleapUpscaleLatent", samples={"samples": SAMPLES})
    for node in comfyui.nodes.values():
        assert "key" not in json.dumps(node.INPUT_TYPES())
