"""Build a stock `CLIPTokenizer` with our vocabulary: each known word is one token, other words are spelled out.

CLIP's tokenizer is byte-pair encoding, so a word is one token only if its merges come before conflicting ones.
`plan_merges` finds such an order. A word that does not become exactly one token, or a single letter other than "a", is
unknown.
"""

from graphlib import TopologicalSorter
from itertools import pairwise
from string import ascii_lowercase
from typing import Any

from tokenizers import Regex, normalizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from giantleap.training.pocket.drawing.captions import known_words

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 32
SUFFIX = "</w>"

Pair = tuple[str, str]


def open_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer from the words of `giantleap.training.pocket.drawing.captions`; ids depend on nothing else.

    Raises:
        graphlib.CycleError: No order of merges works for all words; rename one of them.
    """
    words = [word for word in known_words() if word.isalpha()]
    merges: list[Any] = list(plan_merges(words))  # pairs are missing in the library's annotation
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


def open_sana_tokenizer() -> PreTrainedTokenizerFast:
    """Build the same tokenizer for a SanaPipeline: it drops the instruction that the pipeline puts before a prompt.

    The instruction, meant for a language model, ends with "User Prompt: ". Without it the stock pipeline draws a prompt
    as it was trained, whatever it is called with.
    """
    known = open_tokenizer()
    backend = known.backend_tokenizer
    backend.normalizer = normalizers.Sequence(
        [backend.normalizer, normalizers.Replace(Regex(".*user prompt: "), "")]  # after spaces and case are uniform
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_TOKENS,
    )


def plan_merges(words: list[str]) -> list[Pair]:
    """Order the merges so that each word grows from its first letter to one token.

    While a word grows, the pair at its front must come before every other pair in it: a topological order.
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
    """Return, for each step of a word's growth, the pair to merge and the other pairs in the word."""
    symbols = [*word[:-1], word[-1] + SUFFIX]
    steps = []
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        steps.append((pairs[0], pairs[1:]))
        symbols = ["".join(symbols[:2]), *symbols[2:]]
    return steps
