"""Shared code of the compatible protocols: bundles by path, requests by other names, results as one batch.

Their routes make jobs through `giantleap.service.api.submission` as the native ones do.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from giantleap.service.api.dependencies import AppState
from giantleap.service.errors import InvalidFields, NotFound, validation_problem
from giantleap.service.jobs.bundles import ServedBundle
from giantleap.service.jobs.latents import Floats, read_latent
from giantleap.service.jobs.media_types import SAFETENSORS_TYPE

Model = TypeVar("Model", bound=BaseModel)


def find_bundle(state: AppState, name: str) -> ServedBundle:
    """The bundle that a path names.

    Raises:
        NotFound: There is none of that name.
    """
    try:
        return state.select_bundle(name)
    except InvalidFields as error:
        raise NotFound(f"no model of that name is served here; available are {', '.join(state.bundles)}") from error


def validate_as(model: type[Model], values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> Model:
    """The values as one of the native requests.

    Args:
        model: Type of the request.
        values: Fields of the request.
        names: Names of fields that the protocol calls otherwise.

    Raises:
        InvalidFields: Some are not valid; the message has the protocol's names of the fields.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise validation_problem(error.errors(include_url=False, include_input=False), names) from error


def stack_latents(results: Sequence[bytes]) -> Floats:
    """The latents of a job, one file each, as one batch.

    Shape:
        [C, h, w] each -> [B, C, h, w]; of a video of one frame [C, 1, h, w] each -> [B, C, 1, h, w].
    """
    return np.stack([read_latent(file, SAFETENSORS_TYPE) for file in results])
