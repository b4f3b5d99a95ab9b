"""What takes minutes: compiled code, half types, and the decoders of all families, each through its real tools."""

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from giantleap.export.aoti import write_aoti
from giantleap.export.build import Request, check_directory, export_bundle
from giantleap.export.graphs import DecoderGraph, trace
from giantleap.export.manifest import Precision
from giantleap.export.onnx_files import write_onnx
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.bundle.names import SHIPPED
from giantleap.models.engines.base import Artifact
from giantleap.models.engines.onnx_runtime import open_graph
from giantleap.models.vae.decode import decode_plain
from tests.export.random_networks import random_vae
from tests.tiny_bundle import write_tiny_bundle

CPU = torch.device("cpu")


@pytest.mark.parametrize(("capability", "level"), [("AVX2", "x86-64-v3"), ("AVX512", "x86-64-v4")])
def test_code_is_for_the_processors_that_the_manifest_names(
    capability: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, **named: given.update(named))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    net = torch.nn.Linear(2, 2)
    write_aoti(torch.export.export(net, (torch.zeros(1, 2),)), tmp_path / "lua_x2.pt2")
    assert given["inductor_configs"] == {"cpp.march": level}


@pytest.mark.compiler
@pytest.mark.timeout(1800)
def test_compiled_code_agrees_with_pytorch(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "tiny")
    bundle = read_bundle(tmp_path / "tiny")
    manifest = export_bundle(Request(bundle, "aoti", "fp32", tmp_path / "out", (2,)))
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["lua_x2.pt2", "manifest.json"]
    assert manifest.artifacts[0].parity.max_error <= 1e-4 and manifest.machine.cpu_capability is not None
    check_directory(tmp_path / "out", bundle, CPU)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["fp16"])
def test_half_types_run_in_onnxruntime(tmp_path: Path, precision: Precision) -> None:
    write_tiny_bundle(tmp_path / "tiny")
    manifest = export_bundle(Request(read_bundle(tmp_path / "tiny"), "onnx", precision, tmp_path / "out", (2,)))
    parity = manifest.artifacts[0].parity
    assert 1e-5 < parity.max_error < parity.allowed_error and parity.psnr_db is not None and parity.psnr_db > 50


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["kl", "flux2", "qwen", "wan", "dc", "dc-attention"])
def test_decoders_of_every_family_export(tmp_path: Path, name: str) -> None:
    vae = random_vae(name)
    path = tmp_path / "decoder.onnx"
    write_onnx(trace(DecoderGraph(vae, torch.float32), 4, 1), path, "image")
    run = open_graph(Artifact(path, "latent", "image"), CPU)
    for batch, height, width in ((1, 4, 4), (3, 5, 9), (8, 12, 7)):
        latent = torch.randn(batch, 4, height, width)
        assert (run(latent) - decode_plain(vae, latent)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_decoder_of_a_bundle_of_an_autoencoder_alone_is_exported_and_checked(tmp_path: Path) -> None:
    bundle = read_bundle(SHIPPED / "pocket")
    manifest = export_bundle(Request(bundle, "onnx", "fp32", tmp_path / "out", parts=("decoder",)))
    (artifact,) = manifest.artifacts
    assert (artifact.channels, artifact.output_stride) == (24, 4)
    assert artifact.parity.max_error <= 1e-4 and artifact.parity.psnr_db is not None and artifact.parity.psnr_db > 60
    check_directory(tmp_path / "out", bundle, CPU)
