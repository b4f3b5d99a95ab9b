"""The refine pass of a request: what becomes of it in a job, what is refused and why, and its memory."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.generation.refinement import Refinement
from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import DoesNotFit, InvalidFields
from giantleap.service.jobs.capacity import required_bytes, to_workload
from giantleap.service.jobs.devices import Device, StagePeak
from giantleap.service.jobs.grid import LatentGrid
from giantleap.service.jobs.job import GenerateParams, Job, Priority, UpscaleParams
from giantleap.service.jobs.latents import to_blob
from giantleap.service.jobs.planning import plan_generate, prepare_upscale
from giantleap.service.jobs.requests import GenerateRequest, UpscaleQuery
from giantleap.service.settings import read_settings
from giantleap.service.worker.batching import batch_key
from tests.service.fakes import GENERATE, UPSCALE
from tests.service.paper_bundle import write_paper_bundle

SETTINGS = read_settings(max_image_px=4096 * 4096)
LATENT = np.zeros((2, 16, 8, 12), np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(write_paper_bundle(tmp_path_factory.mktemp("bundles") / "paper"))


def generate(bundle: Bundle, devices: Sequence[Device] = (), **fields: Any) -> GenerateParams:
    request = GenerateRequest.model_validate({"prompt": "a red sphere"} | fields)
    return plan_generate(request, bundle, SETTINGS, 1, "png", devices)


def upscale(bundle: Bundle, devices: Sequence[Device] = (), **query: Any) -> UpscaleParams:
    sent = UpscaleQuery.model_validate(query)
    return prepare_upscale(sent, to_blob(LATENT), None, bundle, SETTINGS, "png", devices, seed=9)[0]


def refusal(error: pytest.ExceptionInfo[InvalidFields]) -> list[str]:
    return [f"{name} {reason}" for name, reason in error.value.fields]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (None, None),
        ({}, Refinement(0.15, 4)),
        ({"strength": 0.3}, Refinement(0.3, 4)),
        ({"steps": 8}, Refinement(0.15, 8)),
        ({"strength": 0.5, "steps": 1}, Refinement(0.5, 1)),
        ({"strength": 0, "steps": 8}, None),
        ({"strength": None, "steps": 8.0}, Refinement(0.15, 8)),
    ],
)
def test_what_is_left_out_takes_the_documented_start(
    bundle: Bundle, field: dict[str, Any] | None, expected: Refinement | None
) -> None:
    assert generate(bundle, refine=field).refine == expected


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ({"strength": 0.51}, "refine.strength"),
        ({"strength": -0.1}, "refine.strength"),
        ({"strength": float("nan")}, "refine.strength"),
        ({"steps": 0}, "refine.steps"),
        ({"steps": 101}, "refine.steps"),
        ({"steps": 4.5}, "refine.steps"),
        ({"weight": 1}, "refine.weight"),
        (True, "refine"),
    ],
)
def test_values_out_of_range_are_refused(bundle: Bundle, field: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        generate(bundle, refine=field)


def test_a_strength_below_its_steps_is_refused_with_one_that_works(bundle: Bundle) -> None:
    with pytest.raises(InvalidFields) as error:
        generate(bundle, refine={"strength": 0.003, "steps": 4})
    assert refusal(error) == [
        "refine.strength is 0.003, which is less than 4 steps of 1000; send at least 0.004, or fewer steps"
    ]
    assert generate(bundle, refine={"strength": 0.004, "steps": 4}).refine == Refinement(0.004, 4)
    with pytest.raises(InvalidFields) as error:
        upscale(bundle, refine_strength=0.003, prompt="a red sphere")
    assert [each.split()[0] for each in refusal(error)] == ["refine_strength"]


def test_more_steps_than_the_bundle_takes_are_refused(bundle: Bundle) -> None:
    with pytest.raises(InvalidFields) as error:
        generate(bundle, refine={"strength": 0.5, "steps": 60})
    assert refusal(error) == ["refine.steps is 60; bundle paper takes at most 50"]


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"_class_name": "Flux2KleinPipeline"}, "the Flux2KleinPipeline of bundle paper does not start from a latent"),
        ({"_class_name": "SanaSprintPipeline"}, "the SanaSprintPipeline of bundle paper does not start from a latent"),
        (
            {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "LCMScheduler"]},
            "the LCMScheduler of bundle paper has too few steps",
        ),
    ],
)
def test_a_bundle_that_cannot_refine_says_why(tmp_path: Path, index: dict[str, Any], reason: str) -> None:
    directory = write_paper_bundle(tmp_path / "paper")
    (directory / "pipeline" / "model_index.json").write_text(json.dumps(index))
    other = read_bundle(directory)
    for plan, fields in ((generate, {"refine": {}}), (upscale, {"refine_steps": 4, "prompt": "a red sphere"})):
        with pytest.raises(InvalidFields) as error:
            plan(other, **fields)
        (line,) = refusal(error)
        assert line.startswith("refine") and reason in line and line.endswith("leave it out")


def test_an_upscale_has_the_prompt_and_seed_of_its_pass(bundle: Bundle) -> None:
    params = upscale(bundle, refine_steps="5", prompt="a red sphere", negative_prompt="green")
    assert params.refine == Refinement(0.15, 5) and params.seed == 9
    assert (params.prompt, params.negative_prompt, params.guidance_scale) == ("a red sphere", "green", 3.0)
    plain = upscale(bundle)
    assert (plain.refine, plain.prompt, plain.negative_prompt, plain.guidance_scale, plain.seed) == (
        None,
        "",
        "",
        0,
        None,
    )
    assert upscale(bundle, refine_strength=0, prompt="a red sphere") == plain


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ({"refine_strength": 0.2}, ["prompt"]),
        ({"prompt": "a red sphere"}, ["prompt"]),
        ({"seed": 3, "guidance_scale": 2.0, "negative_prompt": "x"}, ["negative_prompt", "guidance_scale", "seed"]),
    ],
)
def test_a_pass_and_its_prompt_come_together(bundle: Bundle, query: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(InvalidFields) as error:
        upscale(bundle, **query)
    assert [line.split()[0] for line in refusal(error)] == names


@pytest.mark.parametrize("role", [WorkerRole.GENERATE, WorkerRole.DECODE])
def test_split_pools_do_not_refine(bundle: Bundle, role: WorkerRole) -> None:
    both = [Device("cpu", 2**40, 0, {"paper": {}}), Device("cpu", 2**40, 0, {"paper": {}}, role)]
    assert generate(bundle, both).refine is None and generate(bundle, both[:1], refine={}).refine is not None
    with pytest.raises(InvalidFields, match="both generate and upscale"):
        generate(bundle, both, refine={})
    with pytest.raises(InvalidFields, match="both generate and upscale"):
        upscale(bundle, both, refine_steps=4, prompt="a red sphere")


PEAKS = {"generate": StagePeak(0, 10.0), "refine": StagePeak(0, 1000.0), "exact": StagePeak(0, 1.0)}


def test_a_pass_needs_the_memory_of_one_window(bundle: Bundle) -> None:
    """The bundle draws up to 256 px at once: 32 x 32 latent pixels."""
    device = Device("cpu", 2**40, 500, {"paper": PEAKS})
    for width, height, latent_px in (
        (128, 128, 16 * 16),
        (256, 192, 32 * 24),
        (512, 256, 32 * 32),
        (512, 512, 32 * 32),
    ):
        work = to_workload(generate(bundle, width=width, height=height, scale=4, refine={}), bundle)
        assert work.stages(WorkerRole.ALL)["refine"] == latent_px
        assert required_bytes(work, "paper", device, items=3) == 500 + 1000 * latent_px, "one image at a time"
    small = Device("cpu", 900_000, 500, {"paper": PEAKS})
    assert generate(bundle, [small], width=512, height=512, scale=4).refine is None
    with pytest.raises(DoesNotFit, match="the largest size that fits is 192x192 px"):
        generate(bundle, [small], width=512, height=512, scale=4, refine={})


def test_enlarged_pixels_are_encoded_at_their_final_size(bundle: Bundle) -> None:
    params = replace(GENERATE, method="swinir", scale=2, width_px=128, height_px=128)
    plain, refined = (
        to_workload(each, bundle).stages(WorkerRole.ALL)
        for each in (params, replace(params, refine=Refinement(0.2, 4)))
    )
    assert plain == {"generate": 64, "swinir x2": 64, "exact": 64}
    assert refined == {"generate": 64, "swinir x2": 64, "refine": 256, "encode": 256, "exact": 256}
    image = replace(UPSCALE, method="swinir", image_width_px=64, image_height_px=64, refine=Refinement(0.2, 4))
    assert to_workload(image, bundle).stages(WorkerRole.ALL) == {
        "swinir x2": 64,
        "refine": 256,
        "encode": 256,
        "exact": 256,
    }


def test_only_jobs_of_one_pass_run_together() -> None:
    grid = LatentGrid(8, 4)
    for params in (GENERATE, UPSCALE):
        refined = replace(params, refine=Refinement(0.2, 4))
        keys = {batch_key("tiny", each, grid) for each in (params, refined, replace(params, refine=Refinement(0.3, 4)))}
        assert len(keys) == 3
        assert batch_key("tiny", replace(refined, prompt="another", seed=77), grid) in keys


@pytest.mark.parametrize("params", [GENERATE, UPSCALE])
def test_a_job_with_a_pass_survives_the_queue(params: GenerateParams | UpscaleParams) -> None:
    refined = replace(params, refine=Refinement(0.2, 4))
    job = Job("1", "tiny", priority=Priority.HIGH, created_at_s=0.0, params=refined)
    assert Job.from_json(job.to_json()) == job
    with pytest.raises(ValueError, match="more"):
        Job.from_json(job.to_json().replace('"steps":4', '"steps":4,"more":1'))
