"""Networks that a re-diffusion method cannot serve are known from their configuration, and refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from giantleap.models.bundle.descriptor import REDIFFUSION, Rediffusion
from giantleap.models.bundle.rediffusion import refused_pipeline
from giantleap.models.methods.denoiser import Denoiser
from giantleap.models.methods.hidiffusion import hidiffusion, plan_hidiffusion
from giantleap.models.methods.steppers import open_stepper
from tests.models.methods.tiny_unets import ITEM, PIPELINES, noise_of

SD, SANA = "StableDiffusionPipeline", "SanaPipeline"
HOOKED: tuple[Rediffusion, ...] = ("hidiffusion", "scalecrafter")
WINDOWED: tuple[Rediffusion, ...] = ("demofusion", "lsrna", "hidiffusion")


@pytest.fixture(scope="module", params=list(PIPELINES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A pipeline, and its configuration as diffusers writes it."""
    pipeline: Any = PIPELINES[request.param][0]()
    folder = tmp_path_factory.mktemp(request.param)
    for part in ("unet", "transformer", "scheduler"):
        if hasattr(pipeline, part):
            getattr(pipeline, part).save_config(folder / part)
    return pipeline, folder


def change(folder: Path, part: str, **values: Any) -> None:
    """Write or change the configuration of a part."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = folder / part / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


def refused(folder: Path, pipeline_class: str = SD, scheduler: str | None = None) -> dict[Rediffusion, str]:
    reasons = {method: refused_pipeline(method, folder, pipeline_class, scheduler) for method in REDIFFUSION}
    return {method: reason for method, reason in reasons.items() if reason}


def test_real_pipelines_are_refused_nothing_that_they_can_do(saved: tuple[Any, Path]) -> None:
    pipeline, folder = saved
    name = type(pipeline).__name__
    assert set(refused(folder, name)) == (set(HOOKED) if name == SANA else set())


@pytest.mark.parametrize(
    ("unet", "methods", "words"),
    [
        ({"time_cond_proj_dim": 256}, REDIFFUSION, "distilled"),
        ({"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, ["hidiffusion"], "above the last level"),
        ({"down_block_types": ["AttnDownBlock2D", "CrossAttnDownBlock2D"]}, HOOKED, "AttnDownBlock2D"),
        ({"up_block_types": ["SimpleCrossAttnUpBlock2D", "UpBlock2D"]}, HOOKED, "SimpleCrossAttnUpBlock2D"),
        ({"mid_block_type": None}, HOOKED, "mid_block_type"),
        ({"dual_cross_attention": True}, HOOKED, "dual_cross_attention"),
        ({"sample_size": None}, WINDOWED, "integer sample_size"),
        ({"sample_size": [64, 32]}, WINDOWED, "integer sample_size"),
    ],
)
def test_a_unet_that_a_method_cannot_serve_is_refused(
    tmp_path: Path, unet: dict[str, Any], methods: list[Rediffusion], words: str
) -> None:
    change(tmp_path, "unet", **unet)
    found = refused(tmp_path)
    assert sorted(found) == sorted(methods) and all(words in reason for reason in found.values())


@pytest.mark.parametrize(
    ("scheduler", "times", "words"),
    [
        ("EDMEulerScheduler", {}, "no noise schedule"),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule sigmoid"),
        ("DDPMScheduler", {"prediction_type": "other"}, "prediction_type other"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "epsilon"}, "flow_prediction"),
    ],
)
def test_a_schedule_that_cannot_be_stepped_is_refused(
    tmp_path: Path, scheduler: str, times: dict[str, Any], words: str
) -> None:
    change(tmp_path, "scheduler", _class_name=scheduler, **times)
    found = refused(tmp_path)
    assert sorted(found) == sorted(REDIFFUSION) and all(words in reason for reason in found.values())
    assert refused(tmp_path, scheduler="DDIMScheduler").keys() <= found.keys(), "a replacement keeps the configuration"


def test_without_configuration_nothing_is_refused_before_the_worker(tmp_path: Path) -> None:
    assert refused(tmp_path) == {}
    assert refused_pipeline("demofusion", None, None, None) == (
        "demofusion depends on the class of the pipeline, which is known once the bundle is pulled"
    )


def test_the_workers_own_checks_agree() -> None:
    pipeline: Any = PIPELINES["sd15"][0]()
    pipeline.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="distilled"):
        Denoiser.open(pipeline, ITEM)
    pipeline.unet.down_blocks = pipeline.unet.down_blocks[-1:]
    plan = plan_hidiffusion(pipeline.unet, 8, 8, 4)
    with pytest.raises(ValueError, match="above its last level"), hidiffusion(pipeline.unet, plan, noise_of(0)):
        pass
    scheduler: Any = pipeline.scheduler
    scheduler.register_to_config(use_flow_sigmas=True, use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        open_stepper(scheduler, 4, pipeline.device)
