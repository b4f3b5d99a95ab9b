"""Unknown words of a closed vocabulary, read from the tokenizer file alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from giantleap.models.bundle.vocabulary import PromptWords, read_prompt_words


@pytest.fixture(scope="module")
def words(tiny_bundle_dir: Path) -> PromptWords:
    return read_prompt_words(tiny_bundle_dir / "pipeline")


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red sphere on a green floor, under a blue sky", []),
        ("A RED Sphere", []),
        ("", []),
        ("a red zeppelin and a zeppelin", ["zeppelin"]),
        ("redsphere", ["redsphere"]),
        ("a b", ["b"]),
        ("3 red spheres!", ["3", "spheres", "!"]),
        ("rot, grün", ["rot", "grün"]),
    ],
)
def test_words_that_are_not_one_token_are_unknown(words: PromptWords, prompt: str, unknown: list[str]) -> None:
    assert words.unknown_words(prompt) == unknown


def test_a_pipeline_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        read_prompt_words(tmp_path)


def test_reading_words_does_not_load_torch() -> None:
    code = (
        "import sys, giantleap.models.bundle.vocabulary; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
