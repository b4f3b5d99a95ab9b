"""Planning: which claims run together, over random lists of claims."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantleap.models.pixels.image_formats import FileOptions
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobs.grid import LatentGrid, count_items, output_latent_px
from giantleap.service.jobs.job import JobParams
from giantleap.service.worker.batching import batch_key, items_together, plan_batch, slice_items
from tests.service.fakes import GENERATE, UPSCALE, make_claim

GRIDS = {"tiny": LatentGrid(stride_px=8, window=4), "other": LatentGrid(stride_px=16, window=8)}
WIDE = 10**9

generates = st.builds(
    lambda scale, side, steps, n: replace(
        GENERATE, scale=scale, width_px=side * scale, height_px=side * scale, steps=steps, num_images=n
    ),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([64, 128]),
    st.sampled_from([2, 3]),
    st.integers(1, 4),
)
upscales = st.builds(
    lambda scale, h, w, n: replace(UPSCALE, scale=scale, latent_height=h, latent_width=w, batch_items=n),
    st.sampled_from([2, 4]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
)
jobs = st.lists(st.tuples(st.one_of(generates, upscales), st.sampled_from(["tiny", "other"])), max_size=12)


def to_claims(listed: list[tuple[JobParams, str]]) -> list[Claim]:
    return [make_claim(f"job-{index}", params, bundle=bundle) for index, (params, bundle) in enumerate(listed)]


def key_of(claim: Claim) -> object:
    return batch_key(claim.job.bundle, claim.job.params, GRIDS[claim.job.bundle])


def cost_of(batch: list[Claim]) -> tuple[int, int]:
    items = sum(count_items(claim.job.params) for claim in batch)
    pixels = sum(
        count_items(claim.job.params) * output_latent_px(claim.job.params, GRIDS[claim.job.bundle]) for claim in batch
    )
    return items, pixels


@settings(max_examples=200, deadline=None)
@given(jobs, st.integers(1, 8), st.integers(1, 5000))
def test_each_claim_is_in_one_batch_of_its_kind_within_the_budget(
    listed: list[tuple[JobParams, str]], budget_items: int, budget_latent_px: int
) -> None:
    claims = to_claims(listed)
    batches = plan_batch(claims, GRIDS, budget_items, budget_latent_px)
    assert sorted(c.job.id for batch in batches for c in batch) == sorted(c.job.id for c in claims)
    for batch in batches:
        assert len({key_of(claim) for claim in batch}) == 1
        items, pixels = cost_of(batch)
        assert len(batch) == 1 or (items <= budget_items and pixels <= budget_latent_px)
    firsts = [claims.index(batch[0]) for batch in batches]
    assert firsts == sorted(firsts), "batches run in the order of their first claims"
    assert all(batch == sorted(batch, key=claims.index) for batch in batches)


@given(jobs)
def test_compatible_claims_share_one_batch_where_the_budget_is_wide(listed: list[tuple[JobParams, str]]) -> None:
    claims = to_claims(listed)
    assert len(plan_batch(claims, GRIDS, WIDE, WIDE)) == len({key_of(claim) for claim in claims})


@pytest.mark.parametrize(
    "change",
    [{"scale": 4}, {"width_px": 128}, {"height_px": 128}, {"steps": 9}, {"guidance_scale": 1.5}],
    ids=str,
)
def test_what_fixes_the_work_parts_batches(change: dict[str, Any]) -> None:
    claims = [make_claim("a"), make_claim("b", replace(GENERATE, **change))]
    assert len(plan_batch(claims, GRIDS, WIDE, WIDE)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 9},
        {"prompt": "x"},
        {"negative_prompt": "x"},
        {"output_format": "webp"},
        {"file": FileOptions("small", 80)},
    ],
)
def test_what_differs_per_item_does_not_part_batches(change: dict[str, Any]) -> None:
    claims = [make_claim("a"), make_claim("b", replace(GENERATE, **change))]
    assert len(plan_batch(claims, GRIDS, WIDE, WIDE)) == 1


def test_latents_that_pad_to_one_size_share_a_batch_and_others_do_not() -> None:
    sides = [5, 8, 7, 9]
    claims = [make_claim(f"side-{s}", replace(UPSCALE, latent_height=s, latent_width=s)) for s in sides]
    batches = plan_batch(claims, GRIDS, WIDE, WIDE)
    assert [[c.job.id for c in batch] for batch in batches] == [["side-5", "side-8", "side-7"], ["side-9"]]


def test_the_budget_counts_latent_pixels_after_upscaling() -> None:
    small = replace(GENERATE, scale=1, width_px=64, height_px=64)
    assert output_latent_px(small, GRIDS["tiny"]) == 64
    assert output_latent_px(replace(UPSCALE, scale=4, latent_height=3), GRIDS["tiny"]) == 4 * 4 * 16
    claims = [make_claim(f"job-{n}", small) for n in range(4)]
    assert [len(batch) for batch in plan_batch(claims, GRIDS, WIDE, 2 * 64)] == [2, 2]


def test_a_job_of_many_images_counts_each_and_may_exceed_the_budget_alone() -> None:
    many = replace(GENERATE, num_images=4)
    claims = [make_claim("one"), make_claim("four", many), make_claim("two", replace(GENERATE, num_images=2))]
    batches = plan_batch(claims, GRIDS, 3, WIDE)
    assert [[c.job.id for c in batch] for batch in batches] == [["one", "two"], ["four"]]


def test_a_cpu_batches_only_full_claims_and_a_gpu_whatever_waits() -> None:
    assert [items_together("cpu", waiting, 8) for waiting in (1, 2, 7, 8)] == [1, 1, 1, 8]
    assert [items_together("cuda", waiting, 8) for waiting in (1, 2, 7, 8)] == [8, 8, 8, 8]


def test_a_slice_holds_what_the_budget_allows_and_at_least_one_item() -> None:
    assert slice_items(64, 8, 640) == 8
    assert slice_items(64, 8, 200) == 3
    assert slice_items(10**6, 8, 200) == 1
