"""A stock `CLIPTokenizer` whose vocabulary is our own: each known word is one token, every other word is spelled out.

CLIP's tokenizer is byte-pair encoding, so a word is one token only if its merges are applied before those of other
words get in the way. `plan_merges` finds such an order. Spelled-out words are how a caller sees that a word is
unknown: a word that does not become exactly one token, or a single letter other than "a", is not in the vocabulary.
"""

from graphlib import TopologicalSorter
from itertools import pairwise
from string import ascii_lowercase
from typing import Any

from transformers import CLIPTokenizer

from giantleap.training.pocket.captions import known_words

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 32
SUFFIX = "</w>"

Pair = tuple[str, str]


def open_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer from the words of `giantleap.training.pocket.captions`; ids depend on nothing else.

    Raises:
        graphlib.CycleError: when no order of merges serves all words; rename one of them.
    """
    words = [word for word in known_words() if word.isalpha()]
    merges: list[Any] = list(plan_merges(words))  # pairs, which the library's annotation leaves out
    letters = [*ascii_lowercase, *(letter + SUFFIX for letter in ascii_lowercase), "," + SUFFIX]
    symbols = dict.fromkeys([START, END, *letters, *("".join(pair) for pair in merges)])
    return CLIPTokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)},
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_TOKENS,
    )


def plan_merges(words: list[str]) -> list[Pair]:
    """Order the merges so that each word grows from its first letter to one token.

    While a word grows, the pair at its front must come before every other pair that stands in it: an order that meets
    all of these demands is a topological order.
    """
    fronts = [pair for word in words for pair, _ in _growth(word)]
    wanted = set(fronts)
    before: dict[Pair, set[Pair]] = {pair: set() for pair in fronts}
    for word in words:
        for pair, later in _growth(word):
            for other in wanted.intersection(later) - {pair}:
                before[other].add(pair)
    return list(TopologicalSorter(before).static_order())


def _growth(word: str) -> list[tuple[Pair, list[Pair]]]:
    """For each step of a word's growth: the pair to merge, and the other pairs that stand in the word then."""
    symbols = [*word[:-1], word[-1] + SUFFIX]
    steps = []
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        steps.append((pairs[0], pairs[1:]))
        symbols = ["".join(symbols[:2]), *symbols[2:]]
    return steps
