"""Token policies: what a trigger may be made of."""

from typing import Any

import pytest

from trigger_opt.errors import UserError
from trigger_opt.tokens import TokenPolicy, allowed_ids


def allowed_texts(tokenizer: Any, policy: TokenPolicy) -> list[str]:
    mask = allowed_ids(tokenizer, policy, len(tokenizer))
    return [tokenizer.decode([i]) for i in mask.nonzero()[:, 0].tolist()]


def test_ascii_tokens_are_printable_and_visible(tokenizer: Any) -> None:
    texts = allowed_texts(tokenizer, TokenPolicy(allow="ascii"))
    assert {" the", "user", "a", "~"} <= set(texts)
    assert all(t.isascii() and t.isprintable() and t.strip() for t in texts)
    assert len([t for t in texts if len(t) == 1]) == 94


def test_every_token_left_out_by_ascii_is_left_out_for_a_reason(tokenizer: Any) -> None:
    mask = allowed_ids(tokenizer, TokenPolicy(), len(tokenizer))
    for token in (~mask).nonzero()[:, 0].tolist():
        text = tokenizer.decode([token])
        special = token in tokenizer.all_special_ids
        assert special or not text.isascii() or not text.isprintable() or not text.strip(), text


def test_printable_lets_other_scripts_in_but_no_halves_of_characters() -> None:
    class Words:
        """A tokenizer of whole words in several scripts."""

        texts = ("a", "é", "漢", "\ufffd", "\u200b", "\n", " ", "\u3000", "<s>", ".\n", "\t")
        all_special_ids = (8,)

        def __len__(self) -> int:
            return len(self.texts)

        def get_added_vocab(self) -> dict[str, int]:
            return {}

        def batch_decode(self, ids: list[list[int]], **options: Any) -> list[str]:
            return ["".join(self.texts[i] for i in row) for row in ids]

    def texts(allow: str) -> list[str]:
        return [Words.texts[i] for i in allowed_ids(Words(), TokenPolicy(allow=allow), 11).nonzero()[:, 0].tolist()]

    assert texts("ascii") == ["a"]
    assert texts("lines") == ["a", "\n", ".\n"]
    assert texts("printable") == ["a", "é", "漢"]
    assert texts("all") == [t for t in Words.texts if t != "<s>"]
    assert texts("special") == list(Words.texts)


def test_special_tokens_only_when_asked_for(tokenizer: Any) -> None:
    special = set(tokenizer.all_special_ids)
    assert len(special) == 3
    for allow in ("ascii", "printable", "all"):
        mask = allowed_ids(tokenizer, TokenPolicy(allow=allow), len(tokenizer))
        assert not mask[sorted(special)].any()
    assert bool(allowed_ids(tokenizer, TokenPolicy(allow="special"), len(tokenizer)).all())
    assert int(allowed_ids(tokenizer, TokenPolicy(allow="all"), len(tokenizer)).sum()) == len(tokenizer) - 3


def test_added_tokens_count_as_special() -> None:
    from tests import tiny

    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["toolcall"])
    added = len(tokenizer) - 1
    assert not allowed_ids(tokenizer, TokenPolicy(allow="all"), len(tokenizer))[added]
    assert allowed_ids(tokenizer, TokenPolicy(allow="special"), len(tokenizer))[added]


def test_denied_substrings_hold_for_every_policy(tokenizer: Any) -> None:
    for allow in ("ascii", "special"):
        texts = allowed_texts(tokenizer, TokenPolicy(allow=allow, deny=["he", "im_"]))
        assert " the" not in texts
        assert "<|im_end|>" not in texts
        assert " sea" in texts
        assert not any("he" in t or "im_" in t for t in texts)


def test_rows_beyond_the_tokenizer_are_never_allowed(tokenizer: Any) -> None:
    for allow in ("ascii", "special"):
        mask = allowed_ids(tokenizer, TokenPolicy(allow=allow), len(tokenizer) + 50)
        assert mask.shape == (len(tokenizer) + 50,)
        assert not mask[len(tokenizer) :].any()


def test_a_tokenizer_larger_than_the_model_is_cut_to_it(tokenizer: Any) -> None:
    mask = allowed_ids(tokenizer, TokenPolicy(), 300)
    assert mask.shape == (300,)
    assert mask.any()


def test_a_policy_that_leaves_nothing_says_so(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"allow='ascii', deny=\[''\] leaves no token; allow more"):
        allowed_ids(tokenizer, TokenPolicy(deny=[""]), len(tokenizer))
