"""Prompts of one or two objects become captions of the known vocabulary."""

import numpy as np

from giantleap.training.pocket.drawing.captions import Slots, known_words
from giantleap.training.pocket.drawing.prompts import CHOICES, Prompt, draw_prompt, prompt_caption, vary_prompt
from giantleap.training.pocket.tokenizer import MAX_TOKENS, open_tokenizer

PAIR = Prompt(
    Slots("sphere", "red", "green", "pink", "left", "large"), Slots("cube", "blue", None, None, "right", "small")
)


def test_two_objects_are_named_with_their_sides() -> None:
    assert prompt_caption(PAIR) == (
        "a large red sphere on the left and a small blue cube on the right, on a green floor under a pink sky"
    )


def test_mirroring_swaps_the_objects_and_keeps_floor_and_sky() -> None:
    assert prompt_caption(PAIR.mirrored()) == (
        "a small blue cube on the left and a large red sphere on the right, on a green floor under a pink sky"
    )
    assert PAIR.mirrored().mirrored() == PAIR


def test_one_object_is_mirrored_as_its_slots() -> None:
    one = Prompt(Slots("cone", "red", "green", "pink", "left", "large"))
    assert one.mirrored().slots.position == "right"


def test_objects_differ_in_color_from_each_other_and_from_what_lies_behind() -> None:
    for seed in range(60):
        prompt = draw_prompt(np.random.default_rng(seed), pair_share=1.0)
        assert prompt.second is not None
        shown = [prompt.slots.color, prompt.second.color]
        assert shown[0] != shown[1]
        assert not {prompt.slots.floor, prompt.slots.sky} & set(shown)
        assert (prompt.slots.position, prompt.second.position) == ("left", "right")


def test_every_wording_uses_known_words_and_fits_the_encoder() -> None:
    tokenizer, words = open_tokenizer(), set(known_words())
    for seed in range(60):
        rng = np.random.default_rng(seed)
        caption = vary_prompt(draw_prompt(rng, pair_share=1.0), rng)
        assert set(caption.replace(",", " ,").split()) <= words
        assert len(tokenizer(caption).input_ids) <= MAX_TOKENS


def test_two_objects_are_worded_in_both_orders() -> None:
    captions = {vary_prompt(PAIR, np.random.default_rng(seed)) for seed in range(20)}
    assert {"left" in caption.split(" and ")[0] for caption in captions} == {True, False}


def test_labels_number_the_choices_and_leave_zero_for_what_is_not_said() -> None:
    one = Prompt(Slots("sphere", "orange", "red", "black", "centre", "small"))
    assert one.labels() == [1, 2, 1, 10, 2, 1, 0, 0, 0]
    assert PAIR.labels()[-3:] == [2, 1 + CHOICES["color"].index("blue"), 1]


def test_prompts_survive_json() -> None:
    assert Prompt.from_json(PAIR.as_json()) == PAIR
