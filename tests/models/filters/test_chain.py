"""Image filters: found by entry point, run in order, and whatever goes wrong holds the image back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from giantleap.models.filters.chain import FilterChain, FilterFailed, ImageRefused
from giantleap.models.filters.image_filter import FilterSetupError, ImageContext, ImageFilter
from tests.filter_packages import install, install_example

FLAT = torch.full((8, 12, 3), 200, dtype=torch.uint8)
NOISE = torch.randint(0, 256, (8, 12, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
CONTEXT = ImageContext("generate", "tiny", 12, 8)


class Saying:
    """Answers the same to every image; None is what a forgotten `return` gives."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.seen: list[tuple[NDArray[np.uint8], ImageContext]] = []

    def refuses(self, pixels: NDArray[np.uint8], context: ImageContext) -> bool:
        self.seen.append((pixels, context))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


def chain(**filters: ImageFilter) -> tuple[FilterChain, list[tuple[str, str]]]:
    outcomes: list[tuple[str, str]] = []
    return FilterChain(filters, lambda name, outcome: outcomes.append((name, outcome))), outcomes


def test_the_example_package_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_example(tmp_path / "site", monkeypatch)
    filters = FilterChain.open(["flat"])
    filters.check(NOISE, CONTEXT)
    with pytest.raises(ImageRefused, match="filter flat refused the image"):
        filters.check(FLAT, CONTEXT)


def test_filters_run_in_order_until_one_refuses_and_see_a_copy_and_the_context() -> None:
    first, second, third = Saying(False), Saying(np.bool_(True)), Saying(False)
    filters, outcomes = chain(first=first, second=second, third=third)
    with pytest.raises(ImageRefused, match="second"):
        filters.check(NOISE, CONTEXT)
    ((pixels, context),) = first.seen
    assert context == CONTEXT and pixels.tolist() == NOISE.tolist()
    pixels[:] = 0
    assert NOISE.any() and second.seen[0][0].any(), "a filter cannot change the image"
    assert third.seen == [] and outcomes == [("first", "passed"), ("second", "refused")]


@pytest.mark.parametrize("answer", [None, 0, "no", ValueError("of the filter")], ids=repr)
def test_a_filter_that_fails_holds_the_image_back(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    filters, outcomes = chain(broken=Saying(answer))
    with pytest.raises(FilterFailed, match=r"^filter broken (raised ValueError|returned (NoneType|int|str))") as failed:
        filters.check(NOISE, CONTEXT)
    assert "of the filter" not in str(failed.value), "the text of its error is for the log"
    assert ("of the filter" in caplog.text) == isinstance(answer, Exception)
    assert outcomes == [("broken", "failed")]


def test_previews_are_seen_and_not_counted() -> None:
    filters, outcomes = chain(strict=Saying(True))
    with pytest.raises(ImageRefused):
        filters.check(NOISE, ImageContext("generate", "tiny", 12, 8, is_preview=True))
    assert outcomes == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", r"filter mine \(own:Mine\) cannot be opened: AttributeError"),
        ("import no_such_module", "cannot be opened: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def Mine():\n    raise OSError('no\\nweights')", "cannot be opened: OSError: no weights$"),
        ("class Mine: ...", "has no method `refuses`"),
    ],
)
def test_a_filter_that_cannot_be_opened_is_one_line(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "own", {"mine": "own:Mine"}, source, monkeypatch)
    monkeypatch.delitem(__import__("sys").modules, "own", raising=False)
    with pytest.raises(FilterSetupError, match=message) as failed:
        FilterChain.open(["mine"])
    assert "\n" not in str(failed.value)


def test_an_unknown_name_names_the_installed_ones_and_a_name_of_two_packages_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FilterSetupError, match="filter nsfw is not installed; installed filters: none"):
        FilterChain.open(["nsfw"])
    install_example(tmp_path / "site", monkeypatch)
    with pytest.raises(FilterSetupError, match="installed filters: flat"):
        FilterChain.open(["flat", "nsfw"])
    install(tmp_path / "other", "other", {"flat": "other:Flat"}, "", monkeypatch)
    with pytest.raises(FilterSetupError, match="offered by flat_image_filter:FlatImageFilter and other:Flat"):
        FilterChain.open(["flat"])
