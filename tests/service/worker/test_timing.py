"""The paper's protocol on a fake route: what is warm-up, what counts, and that the figures are those of the runs."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from giantleap.models.bundle.descriptor import DecodeName, Method
from giantleap.models.bundle.stages import stages_of
from giantleap.models.device import StageClock, StageName, StageObserver
from giantleap.models.generation.items import GenerationItem
from giantleap.models.generation.refinement import Refinement
from giantleap.service.worker.timing import ProtocolPlan, ProtocolResult, time_runs, to_result, to_statistics, to_table


class TickingClock(StageClock):
    """Each stage takes the next of the given times."""

    def __init__(self, times_s: Iterator[float]) -> None:
        super().__init__(torch.device("cpu"))
        self._times_s = times_s

    @contextmanager
    def measure(self, stage: StageName) -> Iterator[None]:
        self.stages_s[stage] = next(self._times_s)
        yield


@dataclass
class TimedRoute:
    times_s: Iterator[float]
    generated: list[GenerationItem] = field(default_factory=list)
    scaled: list[int] = field(default_factory=list)
    name: str = "tiny"
    engine: str = "fake"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def clock(self) -> StageClock:
        return TickingClock(self.times_s)

    def generate_latents(self, item: GenerationItem, clock: StageClock, method: Method, scale: float) -> list[Tensor]:
        self.generated.append(item)
        with clock.measure("generate"):
            return [torch.zeros(4, 2, 2)]

    def scales_of(self, method: Method) -> tuple[int, ...]:
        return (1, 2, 4) if method == "lua" else (1, 2)

    def upscale_and_decode(
        self,
        latents: list[Tensor],
        scale: int,
        method: Method,
        decode: DecodeName | None,
        observer: StageObserver,
        refine: Sequence[GenerationItem],
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        self.scaled.append(scale)
        for stage in stages_of(method, scale, bool(refine)):
            with observer.measure(stage):
                pass
        return latents, [None]


def measure(route: TimedRoute, plan: ProtocolPlan) -> ProtocolResult:
    return to_result(route, plan, list(time_runs(route, plan)))  # type: ignore[arg-type]


def test_warm_ups_are_thrown_away_and_the_median_is_that_of_the_runs() -> None:
    warmups = [9.0, 9.0, 9.0] * 2
    runs = [1.0, 0.1, 0.5, 3.0, 0.2, 0.5, 2.0, 0.3, 0.5]
    route = TimedRoute(iter(warmups + runs))
    result = measure(route, ProtocolPlan(2, 64, 32, 4, 1.5, warmups=2, runs=3))
    assert result.stages["generate"].median_s == 2.0
    assert result.stages["upscale"].median_s == 0.2
    assert result.stages["decode"].median_s == 0.5
    assert result.stages["total"].median_s == pytest.approx(2.8)
    assert result.stages["total"].p95_s == pytest.approx(3.7)
    assert result.stages["total"].mean_s == pytest.approx((1.6 + 3.7 + 2.8) / 3)


def test_every_run_is_batch_one_at_the_planned_size() -> None:
    route = TimedRoute(iter([1.0] * 15))
    result = measure(route, ProtocolPlan(4, 64, 32, 7, 1.5, warmups=2, runs=3))
    assert len(route.generated) == 5 and route.scaled == [4] * 5
    planned = {(item.width_px, item.height_px, item.steps, item.guidance_scale) for item in route.generated}
    assert planned == {(64, 32, 7, 1.5)} and result.guidance_scale == 1.5
    assert result.image_px == "256x128"


def test_twenty_warm_ups_are_the_default() -> None:
    route = TimedRoute(iter([1.0] * 3 * 21))
    assert measure(route, ProtocolPlan(2, 64, 64, 4, 1.5, runs=1)).warmups == 20
    assert len(route.generated) == 21


def test_json_and_table_hold_the_figures_and_the_conditions() -> None:
    result = measure(TimedRoute(iter([0.25] * 6)), ProtocolPlan(2, 64, 64, 4, 1.5, warmups=1, runs=1))
    stored = json.loads(result.to_json())
    assert stored["stages"]["total"]["median_s"] == 0.75
    assert stored["warmups"] == 1 and stored["dtype"] == "float32" and stored["torch_version"]
    table = to_table([result])
    assert "0.7500" in table and "1 warm-ups" in table and "128x128" in table


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (19, 19), (20, 19), (21, 20), (100, 95)])
def test_p95_is_the_nearest_rank(count: int, rank: int) -> None:
    assert to_statistics([float(n) for n in range(count, 0, -1)]).p95_s == rank


def test_an_unknown_scale_and_an_empty_measurement_are_refused() -> None:
    route = TimedRoute(iter([]))
    with pytest.raises(ValueError, match="scale 3"):
        measure(route, ProtocolPlan(3, 64, 64, 4, 1.5))
    with pytest.raises(ValueError, match="runs is 0"):
        ProtocolPlan(2, 64, 64, 4, 1.5, runs=0)


def test_a_refine_pass_is_a_row_of_its_own() -> None:
    route = TimedRoute(iter([1.0] * 8))
    plan = ProtocolPlan(2, 64, 32, 4, 1.5, warmups=1, runs=1, refine=Refinement(0.15, 4))
    result = measure(route, plan)
    assert list(result.stages) == ["generate", "upscale", "refine", "decode", "total"]
    assert json.loads(result.to_json())["refine"] == {"strength": 0.15, "steps": 4}
    assert any(" refine " in line for line in to_table([result]).splitlines())
