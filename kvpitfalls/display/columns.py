"""Text in columns, as a terminal shows it: a letter of Chinese takes two, a mark above a letter none."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from .markup import visible

_MEAN, _NAME = len("+0.12 [-0.34, +0.56]"), len("naïve…")


def one_line(text: str) -> str:
    """A text without anything that ends a line, moves the cursor or turns the direction: such characters are spelled
    out."""
    return visible(text).replace("\n", "").replace("\t", "")


def _places(text: str) -> list[str]:
    """What stands in each column; "" where the second half of a wide character does."""
    out: list[str] = []
    for c in text:
        if out and (unicodedata.category(c) in ("Mn", "Me", "Cf") or _is_inner(c)):
            out[-1 if out[-1] else -2] += c
        else:
            out += [c, ""] if unicodedata.east_asian_width(c) in "WF" else [c]
    return out


def _is_inner(c: str) -> bool:
    """A vowel or a final of Korean, written in the square of the letter before it."""
    return "\u1160" <= c <= "\u11ff" or "\ud7b0" <= c <= "\ud7ff"


def width(text: str) -> int:
    """How many columns a line of text takes.

    Examples
    --------
    >>> width("naïve"), width("守秘")
    (5, 4)
    """
    return len(_places(text))


def cut(text: str, room: int) -> str:
    """A line of text in at most ``room`` columns; "…" stands for what has no place.

    Examples
    --------
    >>> cut("never reveal", 12), cut("never reveal", 6), cut("守秘守秘", 4)
    ('never reveal', 'never…', '守…')
    """
    places = _places(text)
    if len(places) <= room:
        return text
    begin = room - 1
    while begin > 0 and not places[begin]:  # half a character cannot be shown
        begin -= 1
    return f"{''.join(places[:begin])}…"


def wrapped(text: str, room: int | None) -> str:
    """A sentence in lines of at most ``room`` columns; all but the first are indented. With None it is one line."""
    if room is None:
        return one_line(text)
    lines = [""]
    for word in one_line(text).split(" "):
        word = cut(word, room - 2)
        if lines[-1].strip() and width(lines[-1]) + 1 + width(word) > room:
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}" if lines[-1].strip() else word
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns of equal width; those in ``right`` are aligned to the right."""
    lines = [[one_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(width(row[i]) for row in lines) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        gaps = [" " * (w - width(cell)) for cell, w in zip(row, widths, strict=True)]
        cells = [gap + cell if i in right else cell + gap for i, (cell, gap) in enumerate(zip(row, gaps, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(lines[0]), line(["-" * w for w in widths]), *map(line, lines[1:])])


def fitted(text: str, room: int | None, n_key: int = 1) -> str:
    """A :func:`table` as several, one below the other, each with the first ``n_key`` columns, where a terminal has no
    room for all.

    Of several such columns, those in which all rows are the same are said once, above. A column that has no room of its
    own beside the others is cut, and ends with "…"; and so are the first columns, the widest before others, where they
    leave less than a mean with its interval takes. ``room`` is None where nobody counts columns.
    """
    lines = [_places(line) for line in text.split("\n")]
    longest = max(map(len, lines))
    if room is None or longest <= room:
        return text
    edges = [match.span() for match in re.finditer("-+", "".join(lines[1]))]
    edges[-1] = (edges[-1][0], longest)
    padded = [line + [" "] * (longest - len(line)) for line in lines]
    columns = [["".join(line[begin:end]) for line in padded] for begin, end in edges]
    same = [column for column in columns[:n_key] if len(set(column[2:])) == 1][: n_key - 1]
    others = min(_MEAN, max((end - begin for begin, end in edges[n_key:]), default=0))
    keys = _narrowed([column for column in columns[:n_key] if column not in same], room - 2 - others)
    n_left = _total_width(keys)
    blocks: list[list[list[str]]] = []
    for column in columns[n_key:]:
        if blocks and n_left + 2 + _total_width([*blocks[-1], column]) <= room:
            blocks[-1].append(column)
        else:
            blocks.append([column])
    parts = [[cut(f"{column[0].strip()}: {column[2].strip()}", room) for column in same]] if same else []
    for block in blocks:
        rows = ("  ".join(cells).rstrip() for cells in zip(*keys, *block, strict=True))
        parts.append([cut(row, room) for row in rows])
    return "\n\n".join(map("\n".join, parts))


def _narrowed(columns: Sequence[Sequence[str]], room: int) -> list[Sequence[str]]:
    """Columns side by side in ``room``, each as wide as before or as the widest may be, and no narrower than a few
    letters."""
    widths = [width(column[0]) for column in columns]
    most = next((w for w in range(max(widths), _NAME, -1) if sum(min(w, own) + 2 for own in widths) - 2 <= room), _NAME)
    return [column if own <= most else _cut_column(column, most) for own, column in zip(widths, columns, strict=True)]


def _cut_column(column: Sequence[str], room: int) -> list[str]:
    cells = [cut(cell.rstrip(), room) for cell in column]
    cells[1] = "-" * room
    return [cell + " " * (room - width(cell)) for cell in cells]


def _total_width(columns: Sequence[Sequence[str]]) -> int:
    return sum(width(column[0]) + 2 for column in columns) - 2


def share(x: float) -> str:
    """A share with two digits: 0 -> .00, 1 -> 1.0."""
    return "1.0" if x >= 0.995 else f"{x:.2f}".lstrip("0")


def prompts(means: Iterable[Mapping]) -> str:
    """How many prompts the means of a row are of: "7", or "5 to 7"; those of none are not shown.

    Examples
    --------
    >>> prompts([{"n_prompt": 7}, {"n_prompt": 5}, {"n_prompt": 0}]), prompts([])
    ('5 to 7', '0')
    """
    numbers = {mean["n_prompt"] for mean in means} - {0} or {0}
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))
