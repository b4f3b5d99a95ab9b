"""What the prompts of the pocket model say: one object, or two beside each other, on a floor under a sky.

One object is described by the slots of `training/pocket/drawing/captions.py`. Of two objects one stands left and one
right; the vocabulary is the same. `training/pocket/studio.py` renders the prompts.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from giantleap.training.pocket.drawing.captions import (
    COLORS,
    DROP_SHARE,
    POSITIONS,
    SHAPES,
    SIZES,
    SYNONYMS,
    Slots,
    draw_slots,
    mirror,
    to_caption,
    vary_caption,
)

PAIR_SHARE = 0.3
CHOICES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": COLORS,
    "floor": COLORS,
    "sky": COLORS,
    "position": POSITIONS,
    "size": SIZES,
}
SECOND = ("shape", "color", "size")  # what a prompt says of the object on the right


@dataclass(frozen=True)
class Prompt:
    """The content of one picture.

    Args:
        slots: The object, or the left one of two, with floor and sky.
        second: The object on the right: shape, color, size and position.
    """

    slots: Slots
    second: Slots | None = None

    @property
    def objects(self) -> tuple[Slots, ...]:
        """The objects from left to right."""
        return (self.slots,) if self.second is None else (self.slots, self.second)

    def mirrored(self) -> "Prompt":
        """The prompt of the mirrored picture."""
        if self.second is None:
            return Prompt(mirror(self.slots))
        left, right = mirror(self.second), mirror(self.slots)
        return Prompt(
            Slots(left.shape, left.color, right.floor, right.sky, left.position, left.size),
            Slots(right.shape, right.color, None, None, right.position, right.size),
        )

    def labels(self) -> list[int]:
        """The number of each slot's choice, 0 where the prompt does not say: six of one object, three of a second."""
        first = [_number(slot, getattr(self.slots, slot)) for slot in CHOICES]
        return first + [_number(slot, getattr(self.second, slot, None)) for slot in SECOND]

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON stores them."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Prompt":
        """The opposite of `as_json`."""
        return cls(Slots(**fields["slots"]), Slots(**fields["second"]) if fields["second"] else None)


def _number(slot: str, value: str | None) -> int:
    return 0 if value is None else 1 + CHOICES[slot].index(value)


def draw_prompt(rng: np.random.Generator, pair_share: float = PAIR_SHARE) -> Prompt:
    """Draw a prompt; no object has the color of floor, sky or the other object."""
    slots = draw_slots(rng)
    if rng.random() >= pair_share:
        return Prompt(slots)
    free = [color for color in COLORS if color not in (slots.floor, slots.sky, slots.color)]
    shape, color, size = str(rng.choice(SHAPES)), str(rng.choice(free)), str(rng.choice(SIZES))
    left = Slots(slots.shape, slots.color, slots.floor, slots.sky, "left", slots.size)
    return Prompt(left, Slots(shape, color, None, None, "right", size))


def prompt_caption(prompt: Prompt) -> str:
    """Write the plain form.

    `a large red sphere on the left and a small blue cube on the right, on a green floor under a pink sky`.
    """
    if prompt.second is None:
        return to_caption(prompt.slots)
    return _pair_caption(_object(prompt.slots), _object(prompt.second), prompt.slots, "left", "right")


def vary_prompt(prompt: Prompt, rng: np.random.Generator, drop_share: float = DROP_SHARE) -> str:
    """Write a variation: other orders and synonyms, for one object also missing slots and unknown words."""
    if prompt.second is None:
        return vary_caption(prompt.slots, rng, drop_share)
    left, right = (_object(slots, rng) for slots in prompt.objects)
    if rng.random() < 0.5:
        return _pair_caption(left, right, prompt.slots, "left", "right")
    return _pair_caption(right, left, prompt.slots, "right", "left")


def _pair_caption(one: str, other: str, slots: Slots, here: str, there: str) -> str:
    scene = f"on {_article(str(slots.floor))} floor under {_article(str(slots.sky))} sky"
    return f"{_article(one)} on the {here} and {_article(other)} on the {there}, {scene}"


def _object(slots: Slots, rng: np.random.Generator | None = None) -> str:
    words = [str(word) for word in (slots.size, slots.color, slots.shape)]
    if rng is not None:
        words = [str(rng.choice(SYNONYMS[word])) if word in SYNONYMS else word for word in words]
    return " ".join(words)


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
