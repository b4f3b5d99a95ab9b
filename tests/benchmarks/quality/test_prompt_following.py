"""The measure of prompts reads renders back, and grades what it read, of one object or two."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.quality.prompt_following import Seen, draw_truth, grade, read_pictures, score, train_judge
from giantleap.training.pocket.drawing.captions import Slots
from giantleap.training.pocket.drawing.prompts import Prompt, draw_prompt

PAIR = Prompt(
    Slots("sphere", "red", "green", "white", "left", "large"), Slots("cube", "blue", None, None, "right", "large")
)
RIGHT = Seen("green", "white", ("red", "blue"), ("sphere", None, "cube"), ("large", None, "large"))


def test_a_picture_that_shows_all_is_graded_right() -> None:
    assert all(grade(RIGHT, PAIR).values())
    assert "two objects" in grade(RIGHT, PAIR)


@pytest.mark.parametrize(
    ("seen", "wrong"),
    [
        (replace(RIGHT, floor="red"), {"floor"}),
        (replace(RIGHT, sky="red"), {"sky"}),
        (replace(RIGHT, colors=("red", "pink")), {"color", "two objects"}),
        (replace(RIGHT, shapes=("cone", None, "cube")), {"shape", "two objects"}),
        (replace(RIGHT, shapes=("sphere", "cone", "cube")), {"position", "two objects"}),
        (replace(RIGHT, sizes=("small", None, "large")), {"size"}),
    ],
)
def test_each_fault_costs_what_it_concerns(seen: Seen, wrong: set[str]) -> None:
    assert {name for name, is_right in grade(seen, PAIR).items() if not is_right} == wrong


def test_one_object_has_no_grade_for_two() -> None:
    one = Prompt(Slots("cone", "red", "green", "white", "centre", "small"))
    seen = Seen("green", "white", ("red",), (None, "cone", None), (None, "small", None))
    grades = grade(seen, one)
    assert all(grades.values())
    assert "two objects" not in grades


def test_colors_of_renders_are_read_back() -> None:
    torch.manual_seed(0)
    picture = draw_truth(PAIR, np.random.default_rng(2), 128)
    (seen,) = read_pictures(picture[None], [PAIR], train_judge(renders=8, steps=1))
    assert (seen.floor, seen.sky, seen.colors) == ("green", "white", ("red", "blue"))


@pytest.mark.slow
def test_the_judge_reads_true_renders() -> None:
    prompts = [draw_prompt(np.random.default_rng([11, index])) for index in range(60)]
    images = torch.stack([draw_truth(p, np.random.default_rng([12, i]), 64) for i, p in enumerate(prompts)])
    scores = score(torch.nn.functional.interpolate(images, scale_factor=2.0), prompts, train_judge())
    assert min(scores.values()) > 0.9
