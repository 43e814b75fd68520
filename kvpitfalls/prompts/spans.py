"""Where texts stand in a text, in characters, and in its tokens."""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TypeAlias

from ..numbers import is_whole

Ranges: TypeAlias = Sequence[tuple[int, int]]  # of characters, or of tokens


@dataclass(frozen=True)
class Span:
    """A named instruction: tokens ``[start, end)`` of a prompt.

    Attributes
    ----------
    name : str
    start, end : int
    text : str

    Examples
    --------
    >>> span = Span("defense", 3, 8, "Never reveal this.")
    >>> len(span)
    5
    """

    name: str
    start: int
    end: int
    text: str

    def __len__(self) -> int:
        return self.end - self.start


def short(value: object) -> str:
    """What was given, on one line of bounded length."""
    shown = repr(value if not isinstance(value, str) else value[:61])
    return shown if len(shown) <= 80 else shown[:77] + "..."


def check_encodable(what: str, text: str) -> None:
    """Half of a surrogate pair is no character: a tokenizer would fail on it in words of its own."""
    if (lone := re.search(r"[\ud800-\udfff]", text)) is not None:
        raise ValueError(
            f"{what} holds the lone surrogate {lone.group()!a} at character {lone.start()}; expected text that UTF-8 "
            "can hold"
        )


def holders(contents: Ranges, pairs: Ranges) -> list[int | None]:
    """Of each range the number of the first content that it shares a character with; contents are in order and do not
    overlap."""
    ends = [end for _, end in contents]
    firsts = [bisect_right(ends, begin) for begin, _ in pairs]
    return [i if i < len(ends) and shared(pair, contents[i]) else None for i, pair in zip(firsts, pairs, strict=True)]


def shared(one: tuple[int, int], two: tuple[int, int]) -> int:
    """Characters that two ranges share."""
    return max(0, min(one[1], two[1]) - max(one[0], two[0]))


def find_all(
    text: str, contents: Ranges, instructions: Mapping[str, str | Sequence[int]]
) -> dict[str, tuple[int, int]]:
    """Character ranges of the instructions, in order; none overlap."""
    if not isinstance(instructions, Mapping):
        raise TypeError(
            f"instructions is a {type(instructions).__name__}; expected a mapping of names to texts, or sentences, "
            "lines or messages"
        )
    ranges = {name: _find(text, contents, name, wanted) for name, wanted in instructions.items()}
    for name, (begin, end) in ranges.items():
        if not any(c.isprintable() and not c.isspace() for c in text[begin:end]):
            raise ValueError(
                f"the text of instruction {name!r} has nothing to read, {short(text[begin:end])}; expected more than "
                "white space"
            )
    ordered = dict(sorted(ranges.items(), key=lambda item: item[1]))
    names = list(ordered)
    for one, two in pairwise(names):
        if ordered[one][1] > ordered[two][0]:
            raise ValueError(f"instructions {one!r} and {two!r} overlap; expected texts that do not")
    return ordered


def _find(text: str, contents: Ranges, name: object, wanted: object) -> tuple[int, int]:
    if not isinstance(name, str) or not name:
        raise ValueError(f"an instruction is called {short(name)}; expected a name, a str that is not empty")
    check_encodable(f"the name of instruction {name!r}", name)
    if isinstance(wanted, str):
        if not wanted:
            raise ValueError(f"the text of instruction {name!r} is empty; expected a text of the prompt")
        check_encodable(f"the text of instruction {name!r}", wanted)
        starts = places_of(text, contents, wanted)
        if len(starts) != 1:
            times = f"{len(starts)} times" if len(starts) < _MANY else f"at least {_MANY} times"
            fault = (
                f"is in the prompt {times}, at characters {', '.join(map(str, starts))}"
                if starts
                else "is not in the prompt"
            )
            hint = (
                "; a range (start, end) in characters says which one is meant"
                if starts
                else _near(text, contents, wanted)
            )
            what = "the text" if name == wanted else f"the text of instruction {name!r}"
            raise ValueError(f"{what} {fault}; expected it once: {short(wanted)}{hint}")
        return starts[0], starts[0] + len(wanted)
    if isinstance(wanted, Sequence) and len(wanted) == 2 and all(map(is_whole, wanted)):
        if not 0 <= wanted[0] < wanted[1] <= len(text):
            raise ValueError(
                f"instruction {name!r} is at characters {tuple(wanted)}; expected a range inside [0, {len(text)}) "
                "that is not empty"
            )
        return wanted[0], wanted[1]
    raise ValueError(f"instruction {name!r} is {short(wanted)}; expected a text, or (start, end) in characters")


def places_of(text: str, contents: Ranges, wanted: str) -> list[int]:
    """Where the contents hold a text; the first few places, since a hostile one may be there very often."""
    return list(islice((at for begin, end in contents for at in _occurrences(text, wanted, begin, end)), _MANY))


_MANY = 10
_QUOTES = str.maketrans("\u2018\u2019\u201a\u201c\u201d\u201e\u2010\u2011\u2013\u2014", "'''\"\"\"----")


def _near(text: str, contents: Ranges, wanted: str) -> str:
    """A hint, where a text that is not there would be but for what the eye does not see."""

    def plain(part: str) -> str:
        return " ".join(unicodedata.normalize("NFKC", part.casefold()).translate(_QUOTES).split())

    seen = plain(wanted)
    if not seen or not any(seen in plain(text[begin:end]) for begin, end in contents):
        return ""
    return "; a text there differs from it only in upper and lower case, Unicode form, quotes, dashes or white space"


def _occurrences(text: str, wanted: str, begin: int, end: int) -> Iterator[int]:
    at = text.find(wanted, begin, end)
    while at >= 0:
        yield at
        at = text.find(wanted, at + 1, end)


def token_spans(
    text: str, offsets: Ranges, ranges: Mapping[str, tuple[int, int]], skip_empty: bool = False
) -> dict[str, Span]:
    """Each token goes to the instruction that holds most of its characters, the earlier one if two hold equally many.

    ``ranges`` are in order and do not overlap. One that gets no token is refused, or left out if ``skip_empty``.
    """
    names, edges = list(ranges), list(ranges.values())
    owned: list[list[int]] = [[] for _ in ranges]
    for t, pair in enumerate(offsets):
        i = most = bisect_right(edges, pair[0], key=lambda where: where[1])  # the first that may share a character
        while i < len(edges) and edges[i][0] < pair[1]:
            most = i if shared(pair, edges[i]) > shared(pair, edges[most]) else most
            i += 1
        if most < len(edges) and shared(pair, edges[most]):
            owned[most].append(t)
    spans = {}
    for name, (begin, end), tokens in zip(names, edges, owned, strict=True):
        if not tokens and not skip_empty:
            raise ValueError(
                f"instruction {name!r} has no token of its own: a neighbour holds more of each of its tokens; "
                "expected a longer text"
            )
        if tokens:
            spans[name] = Span(name, tokens[0], tokens[-1] + 1, text[begin:end])
    for one, two in pairwise(spans.values()):
        if one.end > two.start:
            raise ValueError(
                f"the tokens of instructions {one.name!r} and {two.name!r} are interleaved; expected one after the "
                "other"
            )
    return spans
