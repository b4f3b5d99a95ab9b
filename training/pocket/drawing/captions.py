"""The vocabulary of the pocket model, and its captions.

A prompt fills up to six slots: shape, color, size and position of one object, color of the floor, color of the sky.
This module writes captions with free order and missing parts.
"""

from dataclasses import dataclass

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
SHAPES = ("sphere", "cube", "cone", "cylinder")
POSITIONS = ("left", "centre", "right")
SIZES = ("small", "medium", "large")

DROP_SHARE = 0.35  # of the free captions leave slots out

SYNONYMS = {
    "sphere": ("sphere", "sphere", "ball"),
    "cube": ("cube", "cube", "box"),
    "small": ("small", "small", "little"),
    "large": ("large", "large", "big"),
    "centre": ("centre", "centre", "center", "middle"),
}
FILLERS = (
    "a",
    "an",
    "the",
    "on",
    "at",
    "in",
    "to",
    "of",
    "under",
    "with",
    "and",
    "side",
    "floor",
    "ground",
    "sky",
    ",",
)


@dataclass(frozen=True)
class Slots:
    """Content of one picture. `None`: the caption does not say."""

    shape: str | None
    color: str | None
    floor: str | None
    sky: str | None
    position: str | None
    size: str | None


def known_words() -> tuple[str, ...]:
    """Return every word that is one token, in a fixed order."""
    synonyms = tuple(word for words in SYNONYMS.values() for word in words)
    return tuple(dict.fromkeys((*COLORS, *SHAPES, *POSITIONS, *SIZES, *synonyms, *FILLERS)))


def draw_slots(rng: np.random.Generator) -> Slots:
    """Draw all six slots at random; the object never has the color of floor or sky."""
    floor, sky = str(rng.choice(COLORS)), str(rng.choice(COLORS))
    free = [color for color in COLORS if color not in (floor, sky)]
    return Slots(
        shape=str(rng.choice(SHAPES)),
        color=str(rng.choice(free)),
        floor=floor,
        sky=sky,
        position=str(rng.choice(POSITIONS)),
        size=str(rng.choice(SIZES)),
    )


def to_caption(slots: Slots) -> str:
    """Write the plain form: `a large red sphere on a green floor under a blue sky, on the left`."""
    parts = [_article(_object_words(slots))]
    if slots.floor:
        parts.append(f"on {_article(slots.floor)} floor")
    if slots.sky:
        parts.append(f"under {_article(slots.sky)} sky")
    where = {"left": "on the left", "right": "on the right", "centre": "in the centre"}
    caption = " ".join(part for part in parts if part)
    return f"{caption}, {where[slots.position]}" if slots.position else caption


def vary_caption(slots: Slots, rng: np.random.Generator, drop_share: float = DROP_SHARE) -> str:
    """Write a variation: synonyms, other orders, sometimes an unknown word; `drop_share` of them leave slots out."""
    slots = _say_synonyms(_drop_slots(slots, rng) if rng.random() < drop_share else slots, rng)
    ground = "floor" if rng.random() < 0.8 else "ground"
    trailing_size = slots.size is not None and rng.random() < 0.2
    object_words = _object_words(slots, with_size=not trailing_size)
    place = _place_words(slots.position, rng) if slots.position else ""
    floor = f"on {_determiner(slots.floor, rng)} {ground}" if slots.floor else ""
    sky = f"under {_determiner(slots.sky, rng)} sky" if slots.sky else ""
    tail = str(slots.size) if trailing_size else ""
    parts = [_article(object_words), floor, sky]
    extras = [part for part in (place, tail) if part]
    if rng.random() < 0.25:
        parts = [parts[index] for index in rng.permutation(3)]
    filled = [part for part in parts if part]
    caption = " ".join(filled) if rng.random() < 0.7 else ", ".join(filled)
    if extras and rng.random() < 0.15:
        caption = ", ".join([*extras, caption])
    elif extras:
        caption = ", ".join([caption, *extras])
    return _insert_noise(caption, rng) if rng.random() < 0.06 else caption


def mirror(slots: Slots) -> Slots:
    """Return the slots of the mirrored picture."""
    swapped = {"left": "right", "right": "left"}
    position = swapped.get(slots.position, slots.position) if slots.position else None
    return Slots(slots.shape, slots.color, slots.floor, slots.sky, position, slots.size)


def _object_words(slots: Slots, with_size: bool = True) -> str:
    words = (slots.size if with_size else None, slots.color, slots.shape)
    return " ".join(word for word in words if word)


def _article(words: str) -> str:
    if not words:
        return ""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _determiner(words: str, rng: np.random.Generator) -> str:
    return _article(words) if rng.random() < 0.85 else f"the {words}"


def _place_words(position: str, rng: np.random.Generator) -> str:
    prepositions = (
        ("in the {}",) if position in ("centre", "center", "middle") else ("on the {}", "at the {}", "to the {}")
    )
    forms = (*prepositions, "{}", f"{prepositions[0]} side" if len(prepositions) > 1 else "{}")
    return str(rng.choice(forms)).format(position)


def _drop_slots(slots: Slots, rng: np.random.Generator) -> Slots:
    """Drop each slot with probability 0.35; the shape only when the remaining words make sense."""
    keep = rng.random(6) >= 0.35
    values = [value if is_kept else None for value, is_kept in zip(_values(slots), keep, strict=True)]
    if values[0] is None and (values[1] or values[5]):
        values[0] = slots.shape
    return Slots(*values)


def _say_synonyms(slots: Slots, rng: np.random.Generator) -> Slots:
    def say(word: str | None) -> str | None:
        return str(rng.choice(SYNONYMS[word])) if word in SYNONYMS else word

    return Slots(say(slots.shape), slots.color, slots.floor, slots.sky, say(slots.position), say(slots.size))


def _insert_noise(caption: str, rng: np.random.Generator) -> str:
    """Insert one made-up word, so that the model learns to ignore unknown words."""
    letters = rng.integers(0, 26, size=int(rng.integers(3, 8)))
    words = caption.split(" ")
    words.insert(int(rng.integers(0, len(words) + 1)), "".join(chr(97 + letter) for letter in letters))
    return " ".join(words)


def _values(slots: Slots) -> tuple[str | None, ...]:
    return (slots.shape, slots.color, slots.floor, slots.sky, slots.position, slots.size)
