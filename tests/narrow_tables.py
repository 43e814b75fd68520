"""Reads the tables of a terminal back: whole ones, and those that came in parts."""

import re


def terminal(monkeypatch, width: int) -> None:
    """Stdout is a terminal so wide."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)


def rows_of(text: str) -> list[dict[str, str]]:
    """Every row of a text's only table, as column -> cell, whichever parts it came in."""
    said, rows = {}, []
    for part in text.strip("\n").split("\n\n"):
        lines = part.split("\n")
        if len(lines) < 2 or set(lines[1]) - {"-", " "}:
            said |= dict(line.split(": ", 1) for line in lines if re.match(r"[a-z]+: ", line))
            continue
        edges = [match.span() for match in re.finditer("-+", lines[1])]
        edges = [
            (begin, end) for (begin, _), end in zip(edges, [begin for begin, _ in edges[1:]] + [None], strict=True)
        ]
        names = [lines[0][begin:end].strip() for begin, end in edges]
        found = [
            {name: line[begin:end].strip() for name, (begin, end) in zip(names, edges, strict=True)}
            for line in lines[2:]
        ]
        rows = rows or [{} for _ in found]
        for row, more in zip(rows, found, strict=True):
            assert all(row[name] == more[name] for name in row.keys() & more.keys()), "the parts' rows are the same"
            row |= more
    return [said | row for row in rows]
