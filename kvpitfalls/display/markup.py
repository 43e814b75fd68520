"""Small pieces of HTML that the rich displays share. Every text that comes in is escaped here, and shows what would be
invisible."""

import html
import unicodedata
from collections.abc import Mapping, Sequence

from ..numbers import is_real

# Outlines of instructions, and white names on them: told apart with any colour vision, 4.5 : 1 or more against white, 3
# : 1 against black.
SPAN_COLORS = ("#4477aa", "#c8374f", "#227a33", "#836500", "#aa3377", "#007a99")
_SHOWN = {"\n": "⏎\n", "\t": "⇥\t"}
_JOINERS = "\u200c\u200d"  # parts of ordinary words and emoji
# Letters and marks that show nothing: fillers, a joiner, a blank, and 240 selectors of variants, by which one text can
# hide another.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0").union(map(chr, range(0xE0100, 0xE01F0)))

# Backgrounds are translucent, so that one colour serves light and dark pages, whatever made them so. Colours that tell
# instructions and shares apart stand in the elements: a notebook that nobody trusts is shown without this sheet. Rules
# of tables name the box around them, too: JupyterLab's own would win over less. On paper nothing scrolls.
STYLE = """
.kvp-tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2.1; margin: .6em 0;
  padding-right: 10px; font-size: 15px }
.kvp-tokens bdi { background: rgb(68 119 170 / calc(var(--k, 0) * .65)); padding: .15em 0; print-color-adjust: exact;
  -webkit-print-color-adjust: exact }
.kvp-tokens .kvp-template { opacity: .75; font-size: 85% }
.kvp-span { border-radius: 4px; padding: .1em .15em; margin: 0 .1em; -webkit-box-decoration-break: clone; box-decoration-break: clone }
.kvp-span > b { font-size: 75%; padding: .1em .4em; border-radius: 2px;
  text-shadow: 0 0 2px #000; print-color-adjust: exact; -webkit-print-color-adjust: exact }
.kvp-wide .kvp-table { border-collapse: collapse; margin: .6em 0; font-size: 13px }
.kvp-wide .kvp-table :is(th, td) { padding: .15em .55em; border-bottom: 1px solid rgb(128 128 128 / .35); text-align: left }
.kvp-wide .kvp-table :is(th, td).n { text-align: right; font-variant-numeric: tabular-nums;
  print-color-adjust: exact; -webkit-print-color-adjust: exact }
.kvp-wide .kvp-table td.n { white-space: nowrap }
.kvp-wide { overflow-x: auto }
.kvp > div:not(.kvp-wide) { overflow-wrap: anywhere }
@media print { .kvp-wide .kvp-table { font-size: 10px } .kvp-wide .kvp-table :is(th, td) { padding: .15em .25em } }
"""


def visible(text: str) -> str:
    """The text, with what would be invisible or move other text (controls, direction marks, lone surrogates, letters
    that show nothing) spelled out.

    Examples
    --------
    >>> visible("a\\u202eb\\n")
    'a⟨U+202E⟩b⏎\\n'
    """
    return "".join(_visible_character(c) for c in text)


def _visible_character(c: str) -> str:
    if c in _SHOWN:
        return _SHOWN[c]
    if c in _BLANK or (unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in _JOINERS):
        return f"⟨U+{ord(c):04X}⟩"
    return c


def escape(text) -> str:
    """Any text, as text of an HTML page or of an attribute in quotes."""
    return html.escape(visible(str(text)), quote=True)


def isolated(name: str) -> str:
    """A name, escaped; one that runs from right to left does not turn the numbers after it around."""
    runs_left = any(unicodedata.bidirectional(c) in ("R", "AL") for c in name)
    return f"\u2068{escape(name)}\u2069" if runs_left else escape(name)


def percent(share: float) -> str:
    """A share for people; a space between the number and its sign, as in the rest of the project."""
    return f"{100 * share:.0f} %"


PERCENT_SCRIPT = """\
const percent = (share) => {  // a half to the even number, as Python does
  const x = 100 * share, low = Math.floor(x);
  return (x - low === 0.5 ? low + (low % 2) : Math.round(x)) + " %";
};
"""  # :func:`percent` in pages that move


def block(title: str, *parts: str) -> str:
    """What a ``_repr_html_`` returns: a title, and pieces of HTML."""
    return f"<div class='kvp'><style>{STYLE}</style><div><b>{escape(title)}</b></div>{''.join(parts)}</div>"


def note(text: str) -> str:
    """A line of plain text."""
    return f"<div>{escape(text)}</div>"


def table(header: Sequence, rows: Sequence[Sequence], shares: Sequence[int] = ()) -> str:
    """A table; the columns in ``shares`` hold shares in [0, 1] or None, and are shaded by them."""
    head = "".join(f"<th{' class=n' if i in shares else ''}>{escape(cell)}</th>" for i, cell in enumerate(header))
    lines = ["".join(_cell(cell, i in shares) for i, cell in enumerate(row)) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='kvp-wide'><table class='kvp-table'><tr>{head}</tr>{body}</table></div>"


def _cell(value, is_share: bool) -> str:
    if is_share and value is not None:
        return f"<td class='n' style='background-color: rgba(68, 119, 170, {0.65 * value:.3f})'>{percent(value)}</td>"
    number = is_real(value)
    return f"<td{' class=n' if number else ''}>{'' if value is None else escape(value)}</td>"


def span_color(i: int) -> str:
    """The colour of the i-th instruction."""
    return SPAN_COLORS[i % len(SPAN_COLORS)]


def token_strip(
    tokens: Sequence[str],
    spans: Mapping[str, tuple[int, int]],
    shares: Sequence[float] | None = None,
    is_template: Sequence[bool] | None = None,
    notes: Mapping[str, str] | None = None,
    linked: bool = False,
) -> str:
    """The prompt, token by token: instructions outlined and named, tokens shaded by their share if there are any.

    ``notes`` stand beside the names. ``linked``: an instruction can be linked to (``#span-0``) and the keyboard reaches
    the tokens; a page has one such strip at most.

    Each token is isolated (``bdi``): text that runs from right to left cannot move its neighbours. Tokens always run
    from left to right.
    """
    starts = {begin: (name, end, i) for i, (name, (begin, end)) in enumerate(spans.items())}
    ends = {end for _, end in spans.values()}
    out = []
    for t, token in enumerate(tokens):
        if t in ends:
            out.append("</span>")
        if t in starts:
            name, end, i = starts[t]
            said = f"<i class='kvp-share'>{escape(notes[name])}</i>" if notes is not None else ""
            place = f" id='span-{i}'" if linked else ""
            color = span_color(i)
            out.append(f"<span class='kvp-span'{place} style='border: 2px solid {color}' data-edges='{t},{end}'>")
            out.append(f"<b style='background-color: {color}; color: #ffffff'>{isolated(name)}{said}</b> ")
        kind = " class='kvp-template'" if is_template is not None and is_template[t] else ""
        shade = f" style='--k: {shares[t]:.3f}'" if shares is not None else ""
        out.append(f"<bdi{kind}{shade}>{escape(token)}</bdi>")
    if len(tokens) in ends:
        out.append("</span>")
    reached = " tabindex='0' role='group' aria-label='tokens of the prompt'" if linked else ""
    return f"<div class='kvp-tokens' dir='ltr'{reached}>{''.join(out)}</div>"
