"""Finds the words of a prompt that a bundle with a closed vocabulary does not know. It imports no torch.

The API process warns about them when it accepts a job. The tokenizer in `models/generation/generator.py` reads the
same `tokenizer/tokenizer.json`.
"""

import re
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

_WORDS = re.compile(r"\w+|[^\w\s]")


class PromptWords:
    """The vocabulary of one bundle.

    Args:
        tokenizer: A byte-pair tokenizer in which each word of the vocabulary is one token.
        unknown_token: Its token for symbols outside the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, unknown_token: str) -> None:
        self._tokenizer = tokenizer
        # The same few words come again and again, and the tokenizer takes 10 us for each.
        self._is_known = lru_cache(maxsize=4096)(self._look_up)
        self._unknown_token = unknown_token

    def unknown_words(self, prompt: str) -> list[str]:
        """The words that are not one token of the vocabulary: lower case, no duplicates, in the order of the prompt.

        A single letter other than "a" counts as unknown, although a byte-pair vocabulary has a token for each letter.
        """
        words = dict.fromkeys(_WORDS.findall(prompt.lower()))
        return [word for word in words if not self._is_known(word)]

    def _look_up(self, word: str) -> bool:
        tokens = self._tokenizer.encode(word, add_special_tokens=False).tokens
        spelled = len(word) == 1 and word.isalnum() and word != "a"
        return len(tokens) == 1 and tokens[0] != self._unknown_token and not spelled


def read_prompt_words(pipeline_dir: Path) -> PromptWords:
    """Read the vocabulary of a diffusers pipeline directory.

    Raises:
        FileNotFoundError: There is no `tokenizer/tokenizer.json`.
        ValueError: That file names no unknown token.
    """
    path = pipeline_dir / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a bundle with a closed vocabulary needs its fast tokenizer")
    tokenizer = Tokenizer.from_file(str(path))
    unknown_token = getattr(tokenizer.model, "unk_token", None)
    if not unknown_token:
        raise ValueError(f"{path} names no unknown token; without one a symbol that it cannot spell would be lost")
    return PromptWords(tokenizer, unknown_token)
