"""Pulling a bundle: only what is needed comes, at one commit, and the result serves without a network."""

import errno
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import load_file

from giantleap.models.bundle.bundle import Bundle, BundleError, check_files, read_bundle, write_bundle
from giantleap.models.bundle.descriptor import Descriptor
from giantleap.models.bundle.hub import Hub, HubError
from giantleap.models.bundle.pull import choose_model_files, choose_pipeline_files, pull_bundle
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from tests.models.fake_hub import FakeHub, Repository, serve_hub

PIPELINE, VAE, TINY, LUA = "maker/pipeline", "maker/vae", "maker/tiny", "maker/lua"
WEIGHTS = save({})
OWN = b"weights of one's own"
VAE_CONFIG = json.dumps({"latent_channels": 16, "scaling_factor": 1.0}).encode()
INDEX = {"_class_name": "Some", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "safety_checker": [None, None]}


def released_lua(channels: int = 16) -> bytes:
    torch.manual_seed(0)
    net = Lua(LuaSpec(channels, 4, (1,), 1, window=2, num_feat=1))
    buffer = io.BytesIO()
    torch.save({"params_ema": net.state_dict()}, buffer)
    return buffer.getvalue()


def repositories() -> dict[str, Repository]:
    return {
        PIPELINE: {
            "README.md": b"words",
            "LICENSE.md": b"terms",
            "everything.safetensors": b"x" * 5000,
            "model_index.json": json.dumps(INDEX).encode(),
            "unet/config.json": b"{}",
            "unet/diffusion_pytorch_model.bin": b"pickle",
            "unet/diffusion_pytorch_model.safetensors": b"full precision",
            "unet/diffusion_pytorch_model.fp16.safetensors": b"half precision" * 100,
            "vae/config.json": VAE_CONFIG,
            "vae/diffusion_pytorch_model.safetensors": b"vae",
            "safety_checker/model.safetensors": b"not part of it",
        },
        VAE: {"config.json": VAE_CONFIG, "diffusion_pytorch_model.safetensors": b"fixed", "other.safetensors": b"?"},
        TINY: {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"tiny"},
        LUA: {"lua.pth": released_lua(), "README.md": b"words"},
    }


def descriptor(**change: Any) -> Descriptor:
    values: dict[str, Any] = {
        "bundle": {"name": "some", "title": "t", "license": "l", "provenance": "p", "license_notes": "n"},
        "pipeline": {"hub_id": PIPELINE, "revision": "main", "dtype": "bfloat16", "variant": "fp16"},
        "vae": {"hub_id": VAE, "revision": "main"},
        "tiny_vae": {"hub_id": TINY, "revision": "main"},
        "latent_space": {"name": "own", "channels": 16, "stride_px": 8, "scale": 1.0},
        "lua_source": {"hub_id": LUA, "revision": "main", "file": "lua.pth", "scales": (2, 4)},
        "defaults": {"steps": 2, "guidance_scale": 1.0, "base_width_px": 64, "base_height_px": 64, "method": "bicubic"},
        "limits": {"min_base_px": 32, "max_base_px": 128, "multiple_px": 16, "max_steps": 9, "max_direct_px": 256},
        "vocabulary": {"closed": False},
    }
    return Descriptor.model_validate({key: value for key, value in (values | change).items() if value is not None})


def bundle_of(directory: Path, **change: Any) -> Bundle:
    directory.mkdir()
    for name in change.get("files", {}):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(OWN)
    write_bundle(directory, descriptor(**change))
    return read_bundle(directory)


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with serve_hub(repositories()) as hub:
        yield hub


Pull = Callable[..., Bundle]


@pytest.fixture
def pull(server: FakeHub, tmp_path: Path) -> Pull:
    def run(to: Path = tmp_path / "to", **change: Any) -> Bundle:
        source = tmp_path / f"source{len(list(tmp_path.iterdir()))}"
        return pull_bundle(bundle_of(source, **change), to, Hub(server.endpoint), lambda line: None)

    return run


def test_a_pulled_bundle_has_every_part_in_its_directory_and_digests_of_all_weights(
    pull: Pull, server: FakeHub, tmp_path: Path
) -> None:
    done = pull()
    to = tmp_path / "to"
    assert done.directory == to and done.pipeline == to / "pipeline" and done.revision is None
    assert done.vae is not None and done.vae.place == to / "vae" and done.vae.revision is None
    assert done.tiny_vae is not None and done.tiny_vae.place == to / "tiny_vae"
    assert (done.dtype, done.variant) == ("bfloat16", "fp16")
    found = sorted(path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file())
    assert found == [
        "bundle.toml",
        "lua.safetensors",
        "pipeline/LICENSE.md",
        "pipeline/model_index.json",
        "pipeline/unet/config.json",
        "pipeline/unet/diffusion_pytorch_model.fp16.safetensors",
        "pipeline/vae/config.json",
        "pipeline/vae/diffusion_pytorch_model.safetensors",
        "pull.json",
        "tiny_vae/config.json",
        "tiny_vae/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    check_files(done)
    assert done.descriptor.origin == {
        part: f"{hub_id}@{server.commit_of(hub_id)}"
        for part, hub_id in (("pipeline", PIPELINE), ("vae", VAE), ("tiny_vae", TINY), ("lua", LUA))
    }
    lock = json.loads((to / "pull.json").read_text())
    assert lock["parts"]["vae"] == {"hub_id": VAE, "revision": "main", "commit": server.commit_of(VAE)}
    assert set(lock["files"]) == set(found) - {"bundle.toml", "pull.json"}


def test_released_lua_weights_become_ours_and_the_default_method(pull: Pull, tmp_path: Path) -> None:
    done = pull()
    assert done.methods == ("lua", "direct", "bicubic") and done.defaults.method == "lua"
    assert done.lua is not None
    net, released = read_lua(done.lua), torch.load(io.BytesIO(released_lua()), weights_only=True)["params_ema"]
    assert all(torch.equal(value, released[key]) for key, value in net.state_dict().items())
    assert load_file(done.lua).keys() == released.keys()
    assert not list((tmp_path / "to").rglob("*.pth"))


def test_without_published_lua_weights_the_bundle_says_so_and_keeps_its_method(pull: Pull) -> None:
    done = pull(lua_source={"train": "`giantleap train`"})
    assert done.methods == ("direct", "bicubic") and done.defaults.method == "bicubic"
    assert "train your own: `giantleap train`" in done.unavailable_reason("lua")


def test_weights_beside_the_descriptor_come_along(pull: Pull, tmp_path: Path) -> None:
    name, digest = "up/x2.safetensors", hashlib.sha256(OWN).hexdigest()
    done = pull(swinir={"x2": name}, files={name: digest})
    assert done.swinir == {2: tmp_path / "to" / name} and "swinir" in done.methods
    assert (tmp_path / "to" / name).read_bytes() == OWN
    check_files(done)
    with pytest.raises(BundleError, match="is not the file with sha256"):
        pull(tmp_path / "other", swinir={"x2": name}, files={name: "0" * 64})


def test_an_interrupted_pull_goes_on_at_the_same_commit(pull: Pull, server: FakeHub, tmp_path: Path) -> None:
    name = "unet/diffusion_pytorch_model.fp16.safetensors"
    server.statuses["diffusion_pytorch_model.safetensors"] = 500  # of the VAE, after the whole pipeline
    with pytest.raises(HubError, match="run the same command again"):
        pull()
    assert not (tmp_path / "to" / "bundle.toml").exists(), "an unfinished directory is no bundle"
    first = server.commit_of(PIPELINE)
    came = len(server.fetched)
    server.statuses.clear()
    with pytest.raises(BundleError, match="pull of bundle some"):
        pull(bundle={"name": "other", "title": "t", "license": "l", "provenance": "p"})
    done = pull()
    check_files(done)
    assert done.descriptor.origin["pipeline"].endswith(first)
    again = [fetched for fetched, _ in server.fetched[came:]]
    assert name not in again and "model_index.json" not in again, "what is here does not come again"


def test_a_disk_that_is_full_at_the_very_end_leaves_no_half_descriptor(
    pull: Pull, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text

    def fill(path: Path, text: str, **options: Any) -> int:
        if path.parent == tmp_path / "to" and path.name.endswith("bundle.toml"):
            write_text(path, text[:40], **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, text, **options)

    with monkeypatch.context() as full, pytest.raises(OSError, match="No space"):
        full.setattr(Path, "write_text", fill)
        pull()
    assert not list((tmp_path / "to").glob("*bundle.toml")), "what looks complete is complete"
    assert pull().name == "some"


def test_a_repository_that_moved_between_two_runs_is_not_mixed(pull: Pull, server: FakeHub) -> None:
    server.statuses["vae/config.json"] = 500
    with pytest.raises(HubError):
        pull()
    server.statuses.clear()
    server.moved = True
    with pytest.raises(HubError, match="no such model, file or revision"):
        pull()  # this hub keeps only its newest commit; nothing of it may come
    with pytest.raises(BundleError, match=r"was pulled from maker/pipeline at main"):
        pull(pipeline={"hub_id": PIPELINE, "revision": "v2"})


def test_a_complete_pull_is_checked_and_not_fetched_again(pull: Pull, server: FakeHub, tmp_path: Path) -> None:
    pull()
    came = len(server.fetched)
    assert pull().name == "some" and len(server.fetched) == came
    (tmp_path / "to" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"xixed")
    with pytest.raises(BundleError, match="has sha256"):
        pull()


def test_what_does_not_fit_is_refused(pull: Pull, server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    with pytest.raises(BundleError, match="not empty"):
        pull(tmp_path / "full")
    with pytest.raises(BundleError, match=r"found heads \(2, 4\) for 16 channels; expected \(2,\) for 16"):
        pull(tmp_path / "a", lua_source={"hub_id": LUA, "revision": "main", "file": "lua.pth", "scales": (2,)})
    with pytest.raises(BundleError, match=r"has no file lua2\.pth"):
        pull(tmp_path / "b", lua_source={"hub_id": LUA, "revision": "main", "file": "lua2.pth", "scales": (2, 4)})
    with pytest.raises(BundleError, match="is no diffusers pipeline"):
        pull(tmp_path / "c", pipeline={"hub_id": VAE, "revision": "main"})
    with pytest.raises(BundleError, match="latent_channels is 16; latent space sdxl"):
        pull(tmp_path / "d", latent_space={"name": "sdxl"}, lua_source={"train": "x"})
    server.repositories[LUA]["../../lua.pth"] = b"outside"
    with pytest.raises(BundleError, match="leaves the directory"):
        pull(tmp_path / "e", lua_source={"hub_id": LUA, "revision": "main", "file": "../../lua.pth", "scales": (2, 4)})


def test_a_local_bundle_needs_no_pull(pull: Pull, tmp_path: Path) -> None:
    done = pull()
    with pytest.raises(BundleError, match="bundle some is a local one"):
        pull_bundle(done, tmp_path / "again", Hub(), print)


def test_of_a_large_repository_only_the_parts_of_the_pipeline_come() -> None:
    names = [
        "README.md", "flux1-dev.safetensors", "ae.safetensors", "model_index.json", "LICENSE.md", "dev_grid.jpg",
        "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
        "text_encoder/flax_model.msgpack", "text_encoder/openvino_model.bin", "text_encoder/openvino_model.xml",
        "tokenizer/merges.txt", "tokenizer/vocab.json", "tokenizer_2/spiece.model",
        "transformer/config.json", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae_decoder/model.onnx", "vae_1_0/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    parts = ("scheduler", "text_encoder", "tokenizer", "tokenizer_2", "transformer")
    index = {"_class_name": "FluxPipeline", "force": True, **{part: ["diffusers", "X"] for part in parts}}
    left_out = {
        "README.md", "flux1-dev.safetensors", "ae.safetensors", "dev_grid.jpg", "text_encoder/flax_model.msgpack",
        "text_encoder/openvino_model.bin", "text_encoder/openvino_model.xml", "vae_decoder/model.onnx",
        "vae_1_0/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    chosen, _ = choose_pipeline_files(names, index, None)
    assert len(chosen) == len(set(chosen)) and set(chosen) == set(names) - left_out
    assert set(choose_pipeline_files(names, index, "fp16")[0]) == set(chosen), "no such variant: the files without one"


@pytest.mark.parametrize(
    ("variant", "weights"),
    [
        (
            None,
            {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"},
        ),
        (
            "fp16",
            {
                "model.fp16-00001-of-00002.safetensors",
                "model-00002-of-00002.fp16.safetensors",
                "model.safetensors.index.fp16.json",
            },
        ),
    ],
)
def test_a_variant_is_taken_whole_and_alone(variant: str | None, weights: set[str]) -> None:
    names = [
        "config.json", "generation_config.json", "chat_template.jinja", "pytorch_model.bin", "vae.safetensors",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "model.fp16-00001-of-00002.safetensors", "model-00002-of-00002.fp16.safetensors",
        "model.safetensors.index.fp16.json",
    ]  # fmt: skip
    configs = {"config.json", "generation_config.json", "chat_template.jinja"}
    assert set(choose_model_files(names, variant)[0]) == configs | weights


FP16 = "diffusion_pytorch_model.fp16.safetensors"


def test_weights_that_come_as_one_variant_only_are_fetched_and_named(
    pull: Pull, server: FakeHub, tmp_path: Path
) -> None:
    for hub_id, folder in ((PIPELINE, "unet/"), (PIPELINE, "vae/"), (VAE, ""), (TINY, "")):
        files = server.repositories[hub_id]
        files[f"{folder}{FP16}"] = files.pop(f"{folder}diffusion_pytorch_model.safetensors")
    done = pull(pipeline={"hub_id": PIPELINE, "revision": "main"})
    to = tmp_path / "to"
    assert all((to / part / FP16).is_file() for part in ("pipeline/unet", "pipeline/vae", "vae", "tiny_vae"))
    assert done.vae is not None and done.tiny_vae is not None
    assert (done.variant, done.vae.variant, done.tiny_vae.variant) == ("fp16", "fp16", "fp16")


@pytest.mark.parametrize(
    ("part", "files", "reason"),
    [
        (VAE, {"diffusion_pytorch_model.safetensors": None}, "vae: the repository has no weights"),
        (TINY, {"diffusion_pytorch_model.safetensors": None, "weights.safetensors": b"?"}, "tiny_vae: the repository"),
        (PIPELINE, {"vae/diffusion_pytorch_model.safetensors": None}, "vae: the repository has no weights"),
        (
            VAE,
            {"diffusion_pytorch_model.safetensors": None, FP16: b"a", FP16.replace("fp16", "bf16"): b"b"},
            "variants bf16, fp16; name one as `variant`",
        ),
        (
            VAE,
            {
                "diffusion_pytorch_model.safetensors": None,
                "diffusion_pytorch_model.safetensors.index.json": b'{"weight_map": {"a": "lost.safetensors"}}',
            },
            "names lost.safetensors, which the repository lacks",
        ),
        (
            PIPELINE,
            {"vae/diffusion_pytorch_model.safetensors": None, f"vae/{FP16.replace('fp16', 'bf16')}": b"b"},
            "variant bf16 only; the pipeline's is fp16",
        ),
    ],
)
def test_a_part_whose_weights_cannot_be_fetched_ends_the_pull(
    pull: Pull, server: FakeHub, tmp_path: Path, part: str, files: dict[str, bytes | None], reason: str
) -> None:
    for name, content in files.items():
        if content is None:
            del server.repositories[part][name]
        else:
            server.repositories[part][name] = content
    with pytest.raises(BundleError, match=reason):
        pull()
    assert not (tmp_path / "to" / "bundle.toml").exists(), "it is not to be served"


def test_weights_that_are_pickles_only_are_refused() -> None:
    with pytest.raises(BundleError, match="come as pickles only"):
        choose_model_files(["unet/config.json", "unet/diffusion_pytorch_model.bin"])


def test_a_part_of_which_the_repository_has_no_file_ends_the_pull(pull: Pull, server: FakeHub, tmp_path: Path) -> None:
    pipeline = server.repositories[PIPELINE]
    for name in [name for name in pipeline if name.startswith("vae/")]:
        del pipeline[name]
    with pytest.raises(BundleError, match="names the part vae, of which the repository has no file"):
        pull()
    assert not (tmp_path / "to" / "bundle.toml").exists()


def test_a_directory_whose_pull_broke_off_says_how_it_goes_on(pull: Pull, server: FakeHub, tmp_path: Path) -> None:
    server.statuses["lua.pth"] = 503
    with pytest.raises(HubError):
        pull()
    with pytest.raises(BundleError, match="unfinished download: resume it"):
        read_bundle(tmp_path / "to")
