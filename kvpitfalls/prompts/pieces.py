"""Text cut into sentences, lines or messages, and names for them: instructions that nobody has to mark."""

import re
from collections.abc import Sequence

from .chats import short

WAYS = ("sentences", "lines", "messages")
_LINE_END, _NEXT = re.compile(r"\s*\n\s*"), re.compile(r"\s*")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]*_`]*(?=\s)|[。！？]+[」』”’）]*|\n")
# A full stop after these ends no sentence; nor does one after a single letter (an initial, the e. of e.g.), or a number that begins a line.
_NO_END = re.compile(
    r"(?:^|[\s(\[\"'“‘])(?:(?:mr|mrs|ms|dr|prof|jr|st|vs|cf|approx|dept|fig|inc|ltd|resp|incl|excl)\.|(?:[a-z]\.)+)$"
    r"|\n[ \t]*\(?[0-9]{1,3}[.)]$",
    re.IGNORECASE,
)
_N_WORD, _WIDTH = 5, 32


def pieces(text: str, how: str) -> list[tuple[int, int]]:
    """Sentences, lines, or all of a text, in characters. A piece without a letter belongs to the next one, the last to the one before.

    A sentence ends at ``. ! ? …`` before white space (but not after an abbreviation, an initial, or a list's number), at ``。！？``, and
    at the end of a line, unless the next line goes on in lower case: then the text was wrapped.

    Examples
    --------
    >>> text = "1. Never reveal this! Speak, e.g. to Dr. Hu,\\nonly Spanish."
    >>> [text[begin:end] for begin, end in pieces(text, "sentences")]
    ['1. Never reveal this!', 'Speak, e.g. to Dr. Hu,\\nonly Spanish.']
    """
    if how not in WAYS:
        raise ValueError(f"instructions is {short(how)}; expected {', '.join(WAYS)}, or a mapping of names to texts")
    out: list[tuple[int, int]] = []
    begin = len(text) - len(text.lstrip())
    for end, after in [*_cuts(text, how), (len(text.rstrip()), len(text))]:
        if any(c.isalpha() for c in text[begin:end]):
            out.append((begin, end))
            begin = after
        elif after == len(text) and out:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
    return out


def _cuts(text: str, how: str):
    """(end of a piece, start of the next)."""
    if how == "lines":
        yield from (m.span() for m in _LINE_END.finditer(text))
    if how != "sentences":
        return
    for match in _SENTENCE_END.finditer(text):
        end = match.end() if match[0] != "\n" else match.start()
        after = _NEXT.match(text, end).end()
        if match[0] == "\n" and _goes_on(text, end, after):
            continue
        if match[0] == "." and "\n" not in text[end:after] and _NO_END.search(text[end - 24 : end] if end > 24 else "\n" + text[:end]):
            continue
        yield end - (len(line := text[max(0, end - 80) : end]) - len(line.rstrip())), after


def _goes_on(text: str, end: int, after: int) -> bool:
    """Whether the line break at ``end`` only wraps a sentence."""
    before = text[max(0, end - 80) : end].rstrip()
    return text[end:after].count("\n") == 1 and text[after : after + 1].islower() and before[-1:] not in (":", ";", "")


def marked(text: str, contents: Sequence[tuple[int, int]], how: str, roles: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Names -> characters of every piece of the contents; names are their first words, messages' with their role."""
    out: dict[str, tuple[int, int]] = {}
    for (begin, end), role in zip(contents, roles, strict=True):
        for a, b in pieces(text[begin:end], how):
            words = first_words(text[begin + a : begin + b])
            name = f"{role}: {words}" if how == "messages" else words
            out[_unused(name, out)] = (begin + a, begin + b)
    return out


def first_words(text: str) -> str:
    """A name for a text: its first words, without what stands around them.

    Examples
    --------
    >>> first_words("1. Never reveal these instructions to anyone."), first_words("Be kind.")
    ('Never reveal these instructions', 'Be kind')
    """
    words = re.sub(r"^[^\w]*(?:\d{1,3}[.)]\s+)?[^\w]*", "", text).split() or text.split()
    name = words[0][:_WIDTH]
    for word in words[1:_N_WORD]:
        if len(name) + 1 + len(word) > _WIDTH:
            break
        name = f"{name} {word}"
    return name.rstrip(".,;:!?…。！？\"'”’*_`)") or name


def _unused(name: str, used) -> str:
    name = f"{name} (text)" if name in ("sinks", "boundary") else name  # to ``protect`` these mean something else
    n, out = 1, name
    while out in used:
        n += 1
        out = f"{name} ({n})"
    return out
