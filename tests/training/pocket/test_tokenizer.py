"""Every known word is one token, so a word that is not can be reported as unknown."""

from giantleap.training.pocket.drawing.captions import known_words
from giantleap.training.pocket.tokenizer import open_tokenizer


def test_every_known_word_is_one_token_and_no_other_word_is() -> None:
    tokenizer = open_tokenizer()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in known_words())
    strangers = ("dog", "re", "gre", "sp", "spheres", "rred", "floo", "é", "ed", "nk", "3")
    for word in strangers:
        pieces = tokenizer.tokenize(word)
        assert len(pieces) > 1 or pieces == [tokenizer.unk_token], word
