"""An answer as numbers, from its text alone: length, form, tone, language, repetition.

Presence is 0 or 1, so that one answer cannot carry a mean; shares are in [0, 1]; only lengths are counts.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from trigger_opt.answers import degeneration_flags, words_of

_SENTENCE_END = re.compile(r"[.!?\u2026]+(?=[\s\"'\u201d\u2019)*]|$)|[\u3002\uff01\uff1f]")
_ENDED = re.compile(r"[.!?\u2026\u3002\uff01\uff1f:;\"'\u201d\u2019)\]}>*`$|]\s*$")
# A refusal stands at the beginning; further on the same words are told of others.
_REFUSAL_WITHIN = 200
_REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:very |so |really )?sorry|\bI apologi[sz]e|\bas an AI\b|\bI must (?:decline|refuse)"
    r"|\bI (?:can(?:no|')t|can not|won't|will not|could ?n[o']t) (?:\w+ )?(?:help|assist|provide|answer|do|say|write"
    r"|create|give|comply|fulfil|fulfill|engage|discuss|share|support|generate|continue|participate|disclose)"
    r"|\bI(?:'m| am) (?:unable|not able|not comfortable|not allowed|not permitted)"
    r"|\bje (?:ne peux|suis d\u00e9sol)|\bich kann (?:\w+ )?nicht|\bes tut mir leid|\btut mir leid"
    r"|\blo siento|\bno puedo|\bmi dispiace|\bnon posso|\bdesculpe|\bn\u00e3o posso"
    r"|\u62b1\u6b49|\u65e0\u6cd5|\u4e0d\u80fd",
    re.IGNORECASE,
)
_PRESENT = {
    "refuses": _REFUSAL,
    "question mark": re.compile(r"[?\uff1f]"),
    "exclamation mark": re.compile(r"[!\uff01]"),
    "colon": re.compile(r":(?=\s|$)"),
    "semicolon": re.compile(r"[;\uff1b]"),
    "dash": re.compile(r"[\u2013\u2014]|\s-{1,2}\s"),
    "ellipsis": re.compile(r"\.\.\.|\u2026"),
    "brackets": re.compile(r"[()\[\]]"),
    "quotation marks": re.compile(r"[\"\u201c\u201d\u201e\u00ab\u00bb]"),
    "bulleted list": re.compile(r"^\s*[-*+\u2022]\s+\S", re.M),
    "numbered list": re.compile(r"^\s*\d+[.)]\s+\S", re.M),
    "heading": re.compile(r"^#{1,6}\s+\S", re.M),
    "bold or italics": re.compile(r"\*\*\S|__\S|(?<![\w*])\*[^\s*][^*\n]*\*(?!\*)"),
    "code block": re.compile(r"```"),
    "inline code": re.compile(r"(?<!`)`[^`\n]+`(?!`)"),
    "LaTeX": re.compile(r"\$\$|\\[(\[]|\\(?:frac|begin|sum|int|sqrt|text|cdot)\b|\$[^$\n]*[\\^_][^$\n]*\$"),
    "table": re.compile(r"^\s*\|.*\|\s*$", re.M),
    "link": re.compile(r"https?://|\bwww\."),
    "tag": re.compile(r"</?[A-Za-z][\w-]*(?:\s[^<>]*)?/?>"),
}
_FENCE = re.compile(r"^```\w*\n(.*)\n```$", re.S)
# Frequent words, without accents as `words_of` gives them.
_FUNCTION_WORDS = {
    "English": "the and of is are you it that this with for not have be was what how can to from your my",
    "French": "le les et est une des du que qui pour dans pas vous je il elle sur avec ce sont nous au mais",
    "German": "der die das und ist nicht ein eine zu mit ich sie auf fur von dem den wir auch sind wie aber",
    "Spanish": "el los las y es por para con su lo como pero del al esta usted muy mi hay una que son",
    "Italian": "il gli di che e per non sono con della nel anche questo piu una del ma come io ho alla",
    "Portuguese": "o os um uma nao com mas ao voce muito isso tem foi sao seu sua pelo por que mais em",
    "Dutch": "het een van en ik dat niet je zijn op te met voor er maar ook aan wat bij hij we naar",
}
_SPEAKERS = Counter(word for words in _FUNCTION_WORDS.values() for word in words.split())
# What two of these languages share tells neither.
_WORDS_BY_LANGUAGE = {
    language: frozenset(w for w in words.split() if _SPEAKERS[w] == 1) for language, words in _FUNCTION_WORDS.items()
}
_LEAST_FUNCTION_WORDS = 2


@dataclass(frozen=True)
class _Read:
    """An answer, with its words, letters and visible characters picked out once."""

    text: str
    words: list[str]
    letters: list[str]
    visible: list[str]


def text_features(answer: str) -> dict[str, float]:
    """Each feature of one answer by name: the same names in the same order for every answer."""
    read = _Read(
        text=answer,
        words=[w for w in words_of(answer) if any(c.isalnum() for c in w)],
        letters=[c for c in answer if c.isalpha()],
        visible=[c for c in answer if not c.isspace()],
    )
    features = {name: measure(read) for name, measure in _MEASURES.items()}
    features |= {name: float(bool(pattern.search(_searched(name, answer)))) for name, pattern in _PRESENT.items()}
    spoken = guess_language(read.words)
    return features | {f"language: {name}": float(name == spoken) for name in _WORDS_BY_LANGUAGE}


def guess_language(words: list[str]) -> str | None:
    """The language most of whose function words are among `words` (see `words_of`); None when fewer than two are, or
    two languages have as many."""
    counts = {language: sum(w in known for w in words) for language, known in _WORDS_BY_LANGUAGE.items()}
    most = max(counts.values())
    best = [language for language, count in counts.items() if count == most]
    return best[0] if most >= _LEAST_FUNCTION_WORDS and len(best) == 1 else None


def _searched(name: str, answer: str) -> str:
    return answer.replace("\u2019", "'")[:_REFUSAL_WITHIN] if name == "refuses" else answer


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _sentences(read: _Read) -> float:
    return float(max(len(_SENTENCE_END.findall(read.text)), bool(read.words)))


def _capitals(read: _Read) -> float:
    cased = [c for c in read.letters if c.isupper() or c.islower()]
    return _share(sum(c.isupper() for c in cased), len(cased))


def _is_json(read: _Read) -> float:
    text = read.text.strip()
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return 0.0
    return float(isinstance(value, dict | list))


def _mean_word_length(read: _Read) -> float:
    return _share(sum(map(len, read.words)), len(read.words))


@lru_cache(maxsize=4096)
def _category(char: str) -> str:
    return unicodedata.category(char)


@lru_cache(maxsize=4096)
def _is_latin(char: str) -> bool:
    return char.isascii() or unicodedata.name(char, "").startswith("LATIN")


_MEASURES: dict[str, Callable[[_Read], float]] = {
    "words": lambda r: float(len(r.words)),
    "characters": lambda r: float(len(r.text.strip())),
    "sentences": _sentences,
    "lines": lambda r: float(sum(bool(line.strip()) for line in r.text.split("\n"))),
    "characters a word": _mean_word_length,
    "empty": lambda r: float(not r.visible),
    "ends in mid-sentence": lambda r: float(bool(r.visible) and not _ENDED.search(r.text)),
    "share of capitals": _capitals,
    "share of digits": lambda r: _share(sum(c.isdigit() for c in r.visible), len(r.visible)),
    "share of punctuation": lambda r: _share(sum(_category(c)[0] == "P" for c in r.visible), len(r.visible)),
    "commas a word": lambda r: _share(sum(c in ",\uff0c\u3001" for c in r.visible), len(r.words)),
    "emoji or symbols": lambda r: float(any(_category(c) == "So" for c in r.visible)),
    "share of non-Latin letters": lambda r: _share(sum(not _is_latin(c) for c in r.letters), len(r.letters)),
    "JSON": _is_json,
    "share of distinct words": lambda r: _share(len(set(r.words)), len(r.words)),
    "repeats itself": lambda r: float("repetition" in degeneration_flags("", r.text)),
}
