"""Is a splitter of sentences better than the plain rule of ``Prompt.from_chat(..., instructions="sentences")``, on
system prompts?

    python benchmarks/sentence_splitters.py                # 200 prompts laid out from one half of system_sentences.txt
    python benchmarks/sentence_splitters.py --half tune    # from the other half, on which the rule was mended
    python benchmarks/sentence_splitters.py --wrong 10     # and what the plain rule gets wrong

Prompts are sentences, items, headings and labels of ``system_sentences.txt``, drawn and laid out by a seed as people
lay them out, so the places where pieces begin are known. With the paper's data (--data or KVPITFALLS_DATA), 200 of its
system messages are measured, too: their places are those in which all splitters agree, and where they differ what a
reader says (``system_boundaries.json``). Others than the plain rule are used if installed: pysbd, sentencex, blingfire,
syntok. Each is run as it comes, and inside the lines of the plain rule ("in lines": wrapped lines joined), as it would
be if taken over. What has no letter goes to the next piece for all.
"""

import argparse
import importlib
import json
import os
import random
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kvpitfalls.display.columns import table
from kvpitfalls.prompts.pieces import pieces, unwrapped_lines

HERE = Path(__file__).parent
HALVES, N_PROMPTS = ("held-out", "tune"), 200
Starts = Callable[[str], list[int]]


def read_parts(half: str) -> dict[str, list[str]]:
    """Every second line of each part of ``system_sentences.txt``."""
    parts: dict[str, list[str]] = {}
    for line in (HERE / "system_sentences.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            last = parts[line[2:]] = []
        else:
            last.append(line)
    return {name: lines[HALVES.index(half) :: 2] for name, lines in parts.items()}


@dataclass
class Writer:
    """A prompt being written, and where its pieces begin."""

    draw: random.Random
    parts: dict[str, list[str]]
    text: str = ""
    starts: list[int] = field(default_factory=list)

    def add(self, piece: str, before: str = "") -> None:
        self.text += before if self.text else before.lstrip()
        self.starts.append(len(self.text))
        self.text += piece

    def some(self, part: str, least: int, most: int) -> list[str]:
        return self.draw.sample(self.parts[part], self.draw.randint(least, min(most, len(self.parts[part]))))

    def one(self, part: str) -> str:
        return self.draw.choice(self.parts[part])


def paragraph(w: Writer, before: str = "\n\n") -> None:
    gap = w.draw.choice([" ", " ", " ", "  "])
    for i, sentence in enumerate(w.some("sentences", 3, 6)):
        w.add(sentence + (" 🙂" if w.draw.random() < 0.03 else ""), gap if i else before)
    if w.draw.random() < 0.2 and w.text.endswith("."):
        w.text = w.text[:-1]


def paragraphs(w: Writer) -> None:
    for _ in range(w.draw.randint(2, 3)):
        paragraph(w)


def wrapped(w: Writer) -> None:
    """Paragraphs of lines of even width; a break takes the place of a space, so that nothing moves."""
    width, texts = w.draw.randint(60, 100), []
    paragraphs(w)
    for text in w.text.replace("  ", " \u200b").split("\n\n"):  # the second of two spaces stays with its word
        texts.append("\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)))
    w.text = "\n\n".join(texts).replace("\u200b", " ")


def lines(w: Writer) -> None:
    for sentence in w.some("sentences", 4, 7):
        w.add(sentence, "\n")


def bullets(w: Writer, before: str = "\n\n") -> None:
    """Items with marks or numbers, under a label or not; some of two sentences, some wrapped under themselves."""
    if w.draw.random() < 0.6:
        w.add(w.one("labels"), before)
        before = "\n"
    mark = w.draw.choice(["- ", "- ", "* ", "• ", "{}. ", "{}. ", "{}) ", "({}) ", "{abc}) ", "{abc}. ", "✅ "])
    full, width = w.draw.random() < 0.5, w.draw.choice([0, 0, 48])
    for i, item in enumerate(w.some("sentences" if full else "items", 3, 6)):
        head = mark.format(i + 1, abc="abcdef"[i])
        if width:
            item = textwrap.fill(
                item, width, subsequent_indent=" " * len(head), break_long_words=False, break_on_hyphens=False
            )
        w.add(head + item, "\n" if i else before)
        if full and w.draw.random() < 0.2:
            w.add(w.one("sentences"), " ")


def sections(w: Writer) -> None:
    """Headings, and under each a paragraph or items."""
    head = w.draw.choice(["# {}", "## {}", "### {}", "**{}**", "**{}:**", "{}:", "[{}]", "<{}>"])
    for name in w.some("headings", 2, 3):
        w.add(head.format(name), "\n\n")
        w.draw.choice([paragraph, bullets])(w, w.draw.choice(["\n", "\n\n"]))
        if head == "<{}>":
            w.add(f"</{name}>", "\n")


def in_a_row(w: Writer) -> None:
    """Rules with numbers in one paragraph. A colon ends no sentence."""
    w.add(w.one("labels"))
    for i, sentence in enumerate(w.some("sentences", 3, 5), 1):
        w.text += f" {i}. {sentence}" if i == 1 else ""
        if i > 1:
            w.add(f"{i}. {sentence}", " ")


def chinese(w: Writer) -> None:
    for sentence in w.some("chinese", 3, 5):
        w.add(sentence)


LAYOUTS = (paragraph, paragraphs, wrapped, wrapped, lines, bullets, bullets, sections, sections, in_a_row, chinese)


def prompts(half: str, n: int = N_PROMPTS) -> list[tuple[str, str, list[int]]]:
    """(layout, text, where its pieces begin)."""
    out = []
    for seed in range(n):
        layout = LAYOUTS[seed % len(LAYOUTS)]
        w = Writer(random.Random(f"{half} {seed}"), read_parts(half))
        layout(w)
        out.append((layout.__name__, w.text, w.starts))
    return out


def real_prompts(folder: str) -> list[tuple[str, str, list[int]]]:
    """System messages of the paper's data, and where their pieces begin."""
    rows = (Path(folder) / "sys_ifeval.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {str(row["key"]): row["messages"][0]["content"] for row in map(json.loads, rows)}
    starts = json.loads((HERE / "system_boundaries.json").read_text(encoding="utf-8"))
    return [("IFEval", texts[key], places) for key, places in starts.items()]


def plain(text: str) -> list[int]:
    return [begin for begin, _ in pieces(text, "sentences")]


def located(text: str, sentences: Iterable[str]) -> list[int]:
    """Where sentences begin, counted in what is not white space: some splitters change that."""
    black, at, out = [i for i, c in enumerate(text) if not c.isspace()], 0, []
    for sentence in sentences:
        out.append(black[at]) if at < len(black) else None
        at += sum(not c.isspace() for c in sentence)
    return out


def installed() -> dict[str, Starts]:
    """The splitters that are here."""

    def pysbd(module):
        segmenter = module.Segmenter(language="en", clean=False)
        return lambda text: located(text, segmenter.segment(text))

    def sentencex(module):
        return lambda text: located(text, module.segment("en", text))

    def blingfire(module):
        return lambda text: located(text, module.text_to_sentences(text).split("\n"))

    def syntok(_):
        process = importlib.import_module("syntok.segmenter").process
        return lambda text: [sentence[0].offset for paragraph in process(text) for sentence in paragraph if sentence]

    out: dict[str, Starts] = {"plain rule": plain}
    for make in (pysbd, sentencex, blingfire, syntok):
        try:
            module = importlib.import_module(make.__name__)
        except ImportError:
            print(f"{make.__name__}: not installed")
        else:
            out[make.__name__] = merged(make(module))
            out[f"{make.__name__}, in lines"] = merged(in_lines(make(module)))
    return out


def in_lines(splitter: Starts) -> Starts:
    """The splitter inside what the plain rule takes for a line, without its breaks."""

    def starts(text: str) -> list[int]:
        out = []
        for begin, end in unwrapped_lines(text):
            out += [begin, *(begin + at for at in splitter(text[begin:end].replace("\n", " ")))]
        return out

    return starts


def merged(splitter: Starts) -> Starts:
    """What has no letter goes to the next piece, the last to the one before, as in the plain rule."""

    def starts(text: str) -> list[int]:
        out, begin = [], None
        found = sorted({0, *splitter(text)})
        for a, b in zip(found, [*found[1:], len(text)], strict=True):
            begin = a if begin is None else begin
            if any(c.isalpha() for c in text[begin:b]):
                out.append(begin)
                begin = None
        return [a + len(text[a:]) - len(text[a:].lstrip()) for a in out]

    return starts


def score(cases, splitter: Starts) -> dict:
    """Precision, recall and F1 of the places where pieces begin (the first place of a prompt is given), and prompts
    without a mistake."""
    hits = said = true = right = 0
    for _, text, starts in cases:
        found, wanted = set(splitter(text)[1:]), set(starts[1:])
        hits, said, true, right = (
            hits + len(found & wanted),
            said + len(found),
            true + len(wanted),
            right + (found == wanted),
        )
    return {
        "precision": hits / max(1, said),
        "recall": hits / true,
        "F1": 2 * hits / (said + true),
        "prompts right": right / len(cases),
    }


def print_scores(what: str, cases, splitters: dict[str, Starts]) -> None:
    rows = []
    for name, splitter in splitters.items():
        rows.append([name, *(f"{x:.3f}" for x in score(cases, splitter).values())])
    print(f"\n{what}: {len(cases)} prompts, {sum(len(starts) - 1 for *_, starts in cases)} places")
    print(table(["splitter", "precision", "recall", "F1", "prompts right"], rows, right=range(1, 5)))


def print_layouts(cases, splitters: dict[str, Starts]) -> None:
    """Prompts right, by layout."""
    names = dict.fromkeys(layout for layout, *_ in cases)
    rows = []
    for name, splitter in splitters.items():
        by_layout = [[case for case in cases if case[0] == layout] for layout in names]
        rows.append([name, *(f"{score(some, splitter)['prompts right']:.2f}" for some in by_layout)])
    print("\nPrompts right, by layout")
    print(table(["splitter", *names], rows, right=range(1, 1 + len(names))))


def print_wrong(cases, n: int) -> None:
    """Mistakes of the plain rule: where it begins a piece and should not, and the other way round."""
    wrong = [(text, at, said) for _, text, true in cases for said, at in mistakes(set(plain(text)), set(true))]
    print(f"\nThe plain rule: {len(wrong)} mistakes")
    for text, at, said in wrong[:n]:
        print(f"  {said} {text[max(0, at - 40) : at]!r} | {text[at : at + 30]!r}")


def mistakes(found: set[int], true: set[int]) -> list[tuple[str, int]]:
    return [("too many", at) for at in sorted(found - true)] + [("missing", at) for at in sorted(true - found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--half", choices=HALVES, default=HALVES[0])
    parser.add_argument("--wrong", type=int, default=0, metavar="N", help="show so many mistakes of the plain rule")
    parser.add_argument(
        "--data", default=os.environ.get("KVPITFALLS_DATA"), metavar="DIR", help="folder of the paper's data"
    )
    args = parser.parse_args()
    splitters, cases = installed(), prompts(args.half)
    print_scores(f"Laid out, {args.half} half", cases, splitters)
    print_layouts(cases, splitters)
    print_wrong(cases, args.wrong)
    if args.data is None:
        print("\nThe paper's data: not measured, no --data")
        return
    cases = real_prompts(args.data)
    print_scores("System messages of the paper's data", cases, splitters)
    print_wrong(cases, args.wrong)


if __name__ == "__main__":
    main()
