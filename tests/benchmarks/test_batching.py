"""Batch sizes: the rows and tables of the report, and one worker's batches as arithmetic."""

from dataclasses import replace

import pytest

from benchmarks.batching.report import to_batch_seconds, to_markdown, to_row
from benchmarks.batching.run import time_rounds
from benchmarks.batching.simulation import Policy, batch_seconds, evaluate, random_arrivals, simulate
from giantleap.service.jobs.grid import LatentGrid
from giantleap.service.jobs.job import GenerateParams

PARAMS = GenerateParams("", "", 2, 64, 64, 8, 1.0, 0, 1, "png")
GRID = LatentGrid(stride_px=8, window=4)
ITEM_LATENT_PX = 64
WIDE = Policy("cuda", 8, 10**9)
WIDE_CPU = replace(WIDE, kind="cpu")
GAINS_S = {1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0}
NO_GAIN_S = {size: float(size) for size in GAINS_S}


def test_a_row_holds_the_medians_of_the_ratios_of_each_round() -> None:
    rounds = [{1: 1.0, 2: 1.0}, {1: 10.0, 2: 16.0}, {1: 2.0, 2: 4.0}]
    row = to_row("decode", rounds)
    assert row == {
        "stage": "decode",
        "single_s": 2.0,
        "ratios": {"1": 1.0, "2": 1.25},
        "images_per_s": {"1": 0.5, "2": 0.625},
    }
    assert to_batch_seconds(row) == {1: 2.0, 2: 3.2}


def test_the_table_has_a_row_per_stage_and_a_line_per_policy() -> None:
    machine = {
        "model": "a CPU",
        "cpu_capability": "AVX2",
        "threads": 2,
        "load_1min": 0.04,
        "measured_at": "2026-11-30T00",
    }
    policy = {"scale": 4, "batch_items": 8, "low_load": 0.3, **evaluate(GAINS_S, WIDE, PARAMS, GRID)}
    policy |= {"throughput_over_best": 1.0, "latency_over_single": 0.9}
    record = {"machine": machine, "rows": [to_row("generate", [{1: 2.0, 2: 3.2}])], "policy": [policy]}
    assert to_markdown(record).splitlines() == [
        "a CPU with AVX2, 2 threads, load 0.0, 2026-11-30.",
        "",
        "| images/s by batch size (over size 1) | 1 | 2 |",
        "|---|---|---|",
        "| generate | 0.50 (1.00) | 0.62 (1.25) |",
        "",
        "Simulated, x4, up to 8 images, wait 0 ms: at full load 100 % of the best fixed size (8); at 30 % load mean "
        "latency 0.90 times that without batching.",
    ]


def test_sizes_run_in_turns_forwards_and_backwards() -> None:
    order: list[int] = []

    def time_size(size: int) -> dict[str, float]:
        order.append(size)
        return {"decode": float(len(order))}

    assert time_rounds(time_size, [1, 2], runs=2) == {"decode": [{1: 1.0, 2: 2.0}, {2: 3.0, 1: 4.0}]}
    assert order == [1, 2, 2, 1]


def test_a_size_between_measured_ones_lies_on_the_line_and_others_are_refused() -> None:
    assert batch_seconds(GAINS_S, 6) == 2.5
    assert batch_seconds(GAINS_S, 8) == 3.0
    with pytest.raises(ValueError, match="batch size 9 was not measured; expected one between 1 and 8"):
        batch_seconds(GAINS_S, 9)


def test_jobs_that_wait_for_the_device_run_together_and_end_together() -> None:
    served = simulate([0.0, 0.2, 0.4], GAINS_S, WIDE, PARAMS, GRID)
    assert served.mean_latency_s == pytest.approx((1.0 + 2.3 + 2.1) / 3)
    assert served.images_per_s == pytest.approx(3 / 2.5)


def test_a_lone_job_waits_for_no_other() -> None:
    served = simulate([0.0, 5.0, 10.0], GAINS_S, WIDE, PARAMS, GRID)
    assert served.mean_latency_s == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("policy", "size"),
    [(WIDE, 8), (WIDE_CPU, 8), (Policy("cuda", 4, 10**9), 4), (Policy("cuda", 8, 4 * ITEM_LATENT_PX), 4)],
)
def test_at_full_load_batches_are_as_large_as_the_settings_allow(policy: Policy, size: int) -> None:
    served = simulate([0.0] * 64, GAINS_S, policy, PARAMS, GRID)
    assert served.images_per_s == pytest.approx(size / GAINS_S[size])


def test_batches_that_gain_lower_the_latency_at_low_load_and_others_raise_it() -> None:
    gains, none = (evaluate(times_s, WIDE, PARAMS, GRID) for times_s in (GAINS_S, NO_GAIN_S))
    assert gains["best_fixed_size"] == 8
    assert gains["throughput_over_best"] == none["throughput_over_best"] == 1.0
    assert gains["latency_over_single"] < 1.0 < none["latency_over_single"]


def test_a_cpu_runs_jobs_one_by_one_unless_a_full_claim_waits() -> None:
    few = simulate([0.0] * 7, GAINS_S, WIDE_CPU, PARAMS, GRID)
    assert few.mean_latency_s == pytest.approx(4.0)
    low = evaluate(NO_GAIN_S, WIDE_CPU, PARAMS, GRID)
    assert low["latency_over_single"] == pytest.approx(1.0, abs=0.01)
    assert low["throughput_over_best"] == 1.0


def test_random_arrivals_have_the_rate_and_are_the_same_each_time() -> None:
    arrivals_s = random_arrivals(2.0, jobs=4000)
    assert arrivals_s == random_arrivals(2.0, jobs=4000) == sorted(arrivals_s)
    assert arrivals_s[-1] == pytest.approx(2000, rel=0.1)
