"""What a re-diffusion method needs of a pipeline, read from its configuration: a job it cannot serve is not queued.

Nothing here imports torch. A part without a configuration file is not checked.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from giantleap.models.bundle.descriptor import HAS_UNET, REDIFFUSION, SAMPLES_AGAIN, Method

_BLOCKS = {
    "down_block_types": {"DownBlock2D", "CrossAttnDownBlock2D"},
    "mid_block_type": {"UNetMidBlock2D", "UNetMidBlock2DCrossAttn"},
    "up_block_types": {"UpBlock2D", "CrossAttnUpBlock2D"},
}
_WINDOWED = ("demofusion", "lsrna", "hidiffusion")  # they need the size that the network was trained at
_PREDICTIONS = {"epsilon", "sample", "v_prediction"}
_BETAS = {"linear", "scaled_linear", "squaredcos_cap_v2"}
_FLOW_PREDICTIONS = {"flow_prediction", "sample"}


def refused_pipeline(method: Method, pipeline: Path | None, pipeline_class: str | None, scheduler: str | None) -> str:
    """Why a pipeline cannot run a method; empty if it can.

    Args:
        method: Any.
        pipeline: Its directory; None while it is on the hub.
        pipeline_class: Its class; None while it is on the hub.
        scheduler: The class that replaces its scheduler, with the same configuration.
    """
    if method not in REDIFFUSION:
        return ""
    if (reason := _refused_class(method, pipeline_class)) or pipeline is None:
        return reason
    has_unet = pipeline_class in HAS_UNET
    network = _read(pipeline / ("unet" if has_unet else "transformer") / "config.json")
    times = _read(pipeline / "scheduler" / "scheduler_config.json")
    return (
        (_refused_unet(method, network) if has_unet else "")
        or _refused_size(method, network)
        or _refused_schedule(scheduler or str(times.get("_class_name", "")), times)
    )


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _refused_class(method: Method, pipeline_class: str | None) -> str:
    """Why a pipeline of this class cannot run a method; empty if it can."""
    if method not in REDIFFUSION:
        return ""
    if pipeline_class is None:
        return f"{method} depends on the class of the pipeline, which is known once the bundle is pulled"
    known = HAS_UNET if method in ("hidiffusion", "scalecrafter") else SAMPLES_AGAIN
    if pipeline_class in known:
        return ""
    where = "works inside a UNet" if known is HAS_UNET else "has a sampling loop of its own"
    return f"{method} {where}, for {' and '.join(sorted(known))}; this is a {pipeline_class}"


def _refused_unet(method: Method, unet: Mapping[str, Any]) -> str:
    if unet.get("time_cond_proj_dim") is not None:
        return (
            "its UNet has the guidance as an input, as distilled for few steps; the method needs a guidance of its own"
        )
    if method not in ("hidiffusion", "scalecrafter"):
        return ""
    for key, known in _BLOCKS.items():
        blocks = unet.get(key, ())
        if unknown := sorted(
            {str(block) for block in ([blocks] if isinstance(blocks, str | None) else blocks)} - known
        ):
            return f"{method} changes {' and '.join(sorted(known))}; the {key} of this UNet have {unknown[0]}"
    if unet.get("dual_cross_attention"):
        return f"{method} changes transformer blocks; this UNet has dual_cross_attention"
    down = unet.get("down_block_types")
    if method == "hidiffusion" and down is not None and not any("CrossAttn" in block for block in down[:-1]):
        return "hidiffusion needs attention above the last level of the UNet; this one has none"
    return ""


def _refused_size(method: Method, network: Mapping[str, Any]) -> str:
    side = network.get("sample_size", 1)
    if method not in _WINDOWED or (isinstance(side, int) and side > 0):
        return ""
    return f"{method} needs the side at which the network was trained: an integer sample_size in its config.json"


def _refused_schedule(scheduler: str, times: Mapping[str, Any]) -> str:
    if not scheduler:
        return ""
    if times.get("use_flow_sigmas") or scheduler.startswith("FlowMatch"):
        if times.get("use_dynamic_shifting"):
            return f"the {scheduler} has other times at every size (use_dynamic_shifting)"
        prediction = times.get("prediction_type", "flow_prediction")
        return _unknown("prediction_type", prediction, _FLOW_PREDICTIONS, scheduler)
    if scheduler.startswith("EDM"):
        return f"the {scheduler} has no noise schedule that DDIM can step on"
    return _unknown("prediction_type", times.get("prediction_type", "epsilon"), _PREDICTIONS, scheduler) or _unknown(
        "beta_schedule", times.get("beta_schedule", "linear"), _BETAS, scheduler
    )


def _unknown(key: str, value: Any, known: set[str], scheduler: str) -> str:
    return (
        "" if value in known else f"the {scheduler} has {key} {value}; the method steps with {', '.join(sorted(known))}"
    )
