"""The refine pass of a request: its values, and why a bundle or its workers cannot run one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.generation.refinement import DEFAULT_STEPS, DEFAULT_STRENGTH, MAX_SCHEDULE_STEPS, Refinement
from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import InvalidFields
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.job import UpscaleParams
from giantleap.service.jobs.requests import RefineRequest, UpscaleQuery

Check = tuple[bool, str, str]  # whether the field is wrong, its name, and the reason
_ONLY_WITH_REFINE = ("prompt", "negative_prompt", "guidance_scale", "seed")  # of /upscale


def to_refinement(strength: float | None, steps: int | None) -> Refinement | None:
    """The refine pass that was requested; None where its strength is 0."""
    strength = DEFAULT_STRENGTH if strength is None else strength
    return Refinement(strength, DEFAULT_STEPS if steps is None else steps) if strength > 0 else None


def choose_refine(bundle: Bundle, values: Mapping[str, float] | None) -> Refinement | None:
    """The refine pass of a field `refine`.

    Raises:
        ValidationError: A value is not valid.
        InvalidFields: The bundle cannot run it.
    """
    request = None if values is None else RefineRequest.model_validate(values)
    refinement = None if request is None else to_refinement(request.strength, request.steps)
    if faults := [(name, reason) for is_wrong, name, reason in refine_checks(refinement, bundle, ()) if is_wrong]:
        raise InvalidFields(*faults)
    return refinement


def with_refine(query: UpscaleQuery, params: UpscaleParams, bundle: Bundle, seed: int) -> UpscaleParams:
    """The parameters with the refine pass of the query, where it has one."""
    refinement = to_refinement(query.refine_strength, query.refine_steps) if requests_refine(query) else None
    if refinement is None:
        return params
    default = bundle.defaults.guidance_scale
    return replace(
        params,
        refine=refinement,
        prompt=query.prompt or "",
        negative_prompt=query.negative_prompt or "",
        guidance_scale=default if query.guidance_scale is None else query.guidance_scale,
        seed=seed,
    )


def requests_refine(query: UpscaleQuery) -> bool:
    """Whether the query of /upscale names the refine pass."""
    return query.refine_strength is not None or query.refine_steps is not None


def refine_checks(
    refinement: Refinement | None,
    bundle: Bundle,
    devices: Sequence[Device],
    names: tuple[str, str, str] = ("refine", "refine.strength", "refine.steps"),
) -> tuple[Check, ...]:
    """What may be wrong with a refine pass.

    Args:
        refinement: The pass.
        bundle: Its bundle.
        devices: The devices that the job may run on.
        names: What the request calls the pass, its strength and its steps.
    """
    if refinement is None:
        return ()
    name, strength, steps = names
    least = refinement.steps / MAX_SCHEDULE_STEPS
    return (
        (bool(bundle.refine_unavailable), name, f"is not possible: {bundle.refine_unavailable}; leave it out"),
        (
            any(device.role is not WorkerRole.ALL for device in devices),
            name,
            f"needs workers that both generate and upscale; those of bundle {bundle.name} run one half each "
            "(GIANTLEAP_ROLE); leave it out",
        ),
        (
            refinement.schedule_steps > MAX_SCHEDULE_STEPS,
            strength,
            f"is {refinement.strength}, which is less than {refinement.steps} steps of {MAX_SCHEDULE_STEPS}; send at "
            f"least {least:g}, or fewer steps",
        ),
        (
            refinement.steps > bundle.limits.max_steps,
            steps,
            f"is {refinement.steps}; bundle {bundle.name} takes at most {bundle.limits.max_steps}",
        ),
    )


def query_checks(query: UpscaleQuery) -> tuple[Check, ...]:
    """A refine pass of /upscale needs a prompt, and the fields of a prompt need a refine pass."""
    if requests_refine(query):
        return ((query.prompt is None, "prompt", "is required to refine: describe the image"),)
    extra = [name for name in _ONLY_WITH_REFINE if getattr(query, name) is not None]
    return tuple((True, name, "applies to a refine pass; send refine_strength or leave it out") for name in extra)
