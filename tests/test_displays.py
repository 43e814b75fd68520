"""How results show themselves: the numbers are the results' own, texts are escaped, and what is missing is one
sentence."""

import copy
import dataclasses
import html.parser
import json
import re
import sys
import unicodedata

import numpy as np
import pytest
import torch
from tiny_models import build, ids

import kvpitfalls as kvp
from kvpitfalls.display import plots
from kvpitfalls.display.columns import cut, share, width
from kvpitfalls.display.progress import progress, progress_or_lines
from kvpitfalls.display.verdicts import verdicts
from kvpitfalls.experiments.demo import DEFENSE, SPANISH, two_instructions
from kvpitfalls.hf.report import Report


class Cells(html.parser.HTMLParser):
    """The rows of a table, and all tags."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.text, self.inside = [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.inside != "style":
            self.text += data

    def handle_endtag(self, tag):
        self.inside = None


@pytest.fixture(scope="module")
def prompt(smollm2):
    return two_instructions(smollm2[1])


@pytest.fixture(scope="module")
def audited(smollm2, prompt):
    return kvp.audit(smollm2[0], prompt, policies=["snapkv", "knorm"], compression_ratios=[0.3, 0.6])


def test_results_that_hold_arrays_are_compared_and_hashed_as_objects(audited):
    kept = kvp.keep("knorm", np.ones((1, 1, 8, 4), np.float32), compression_ratio=0.5)
    for one in (audited, audited.heatmap(), kept):
        assert one == one and one != copy.deepcopy(one) and one in {one}


def test_an_audits_table(audited):
    shown = Cells(audited._repr_html_())
    assert shown.rows[0] == ["policy", "eviction", "instruction", "r = 0.3", "r = 0.6"]
    kept = {
        (r["policy"], {False: "biased", True: "fair"}[r["fair"]], r["span"], r["compression_ratio"]): r["kept"]
        for r in audited.rows
    }
    assert len(shown.rows) - 1 == len(kept) / 2 == 8
    for policy, fair, span, *shares in shown.rows[1:]:
        assert shares == [f"{100 * kept[policy, fair, span, ratio]:.0f} %" for ratio in (0.3, 0.6)]
    assert all(said in shown.text for said in verdicts(audited.settings()))
    assert "SmolLM2" in repr(audited) and "52 tokens, 2 instructions, 4 settings, 2 ratios" in repr(audited)
    alone = dataclasses.replace(audited, rows=audited.rows[:1], spans=dict(list(audited.spans.items())[:1]))
    assert "1 instruction, 1 setting, 1 ratio>" in repr(alone)


SCRIPTS = ["reveal ", "守秘義務", "لا تكشف", "नियम ", "e\u0301", "\n", "\t\x1b[31m", "\u202e", "👩👧", "\ud800", "_"]


def columns_of(line):
    """How many columns a terminal gives a line."""
    wide = {"W": 2, "F": 2}
    marks = ("Mn", "Me", "Cf")
    return sum(0 if unicodedata.category(c) in marks else wide.get(unicodedata.east_asian_width(c), 1) for c in line)


def made(rng, n_span, settings, ratios):
    """An audit of instructions whose names are of any script and length."""
    names = [f"{i}{''.join(rng.choice(SCRIPTS, rng.integers(0, 40)))}" for i in range(n_span)]
    rows = [
        {"policy": policy, "fair": fair, "compression_ratio": ratio, "span": name, "kept": float(kept)}
        for policy, fair in settings
        for ratio in ratios
        for name, kept in zip(names, rng.random(n_span).round(3), strict=True)
    ]
    spans = {name: (i, i + 1) for i, name in enumerate(names)}
    return kvp.Audit(rows, str(rng.choice(SCRIPTS)) * 50, spans, names, [0, 1])


MANY = [(f"snapkv(window_size={i})" * 5, fair) for i in range(9) for fair in (False, 0.5, True, "floor=4", "paper")]


def test_a_text_takes_the_same_room_in_any_normal_form():
    for text in ("비밀번호 값", "naïve", "がぎ", "守秘"):
        assert {width(unicodedata.normalize(form, text)) for form in ("NFC", "NFD")} == {columns_of(text)}
        assert {cut(unicodedata.normalize(form, text), 3)[-1] for form in ("NFC", "NFD")} == {"…"}


@pytest.mark.parametrize("text", ["守\u0301守\u0301a", "👨\u200d👩\u200d👧 abc", "a\u0301\u0302守b", "守" * 4])
def test_a_text_that_is_cut_is_no_wider_than_its_room_and_no_letter_is_torn(text):
    for room in range(1, width(text) + 2):
        shown = cut(text, room)
        assert columns_of(shown) <= room and text.startswith(shown.removesuffix("…"))
        assert not unicodedata.combining(text[len(shown) - 1]) or shown == text or shown[-1] != "…"


@pytest.mark.parametrize("n_span", [1, 2, 4, 5, 200])
@pytest.mark.parametrize("settings", [[("knorm", False)], MANY])
@pytest.mark.parametrize("ratios", [[0.5], [0.9, 0.1], [r / 100 for r in range(100)]])
def test_a_printed_audit_is_short_and_narrow_and_says_what_it_leaves_out(n_span, settings, ratios):
    audited = made(np.random.default_rng([n_span, len(settings), len(ratios)]), n_span, settings, ratios)
    shown = str(audited)
    lines = shown.split("\n")
    assert max(map(columns_of, lines)) <= 120 and len(lines) <= 120
    assert not {unicodedata.category(c) for line in [*lines, repr(audited)] for c in line} & {"Cc", "Cs", "Zl", "Zp"}
    assert lines[0].rstrip("…") in repr(audited)
    head, verdict, note, table, *left = shown.split("\n\n")
    n_said = {"setting": min(len(settings), 10), "ratio": min(len(ratios), 9)}
    n_left = {"setting": len(settings) - n_said["setting"], "ratio": len(ratios) - n_said["ratio"]}
    more = {what: int(n) for n, what in re.findall(r"(\d+) more (setting|ratio)s?\b", " ".join(left))}
    assert more == {what: n for what, n in n_left.items() if n}
    blocks = re.split(r"\n(?! )", table)[2:]
    assert len(blocks) == n_said["setting"]
    for block, (_, _, by_span) in zip(blocks, audited.settings(), strict=False):
        kept = [[float(x.rstrip("*")) for x in row.split()[-n_said["ratio"] :]] for row in block.split("\n")[1:]]
        means = sorted(np.mean(list(of_span.values())) for of_span in by_span.values())
        if n_span > 4:
            assert re.search(rf"^  {n_span - 3} more, each at least ", block, re.MULTILINE) and len(kept) == 4
            if len(ratios) == n_said["ratio"]:
                assert [np.mean(row) for row in kept[:3]] == pytest.approx(means[:3], abs=0.006)
        else:
            assert len(kept) == n_span
    assert verdict.count("keeps") == n_said["setting"] and "instruction" in note and head == lines[0]


@pytest.mark.parametrize("ratio", [i / 100 for i in range(1, 100)])
def test_a_verdict_counts_what_is_under_half_and_not_what_is_half(ratio):
    """Of ratios as near to one half as another the lower one is told of. In binary (1 - .7) / 2 is above .15, and .7
    nearer to .5 than .3 is."""
    half, other = round((1 - ratio) / 2, 6), round(1 - ratio, 6)
    (said,) = verdicts([("snapkv", False, {"a": {ratio: half}, "b": {ratio: 1.0}})])
    assert "less than" not in said
    (said,) = verdicts([("snapkv", False, {"a": dict.fromkeys((ratio, other), half)})])
    assert said.startswith(f"snapkv at r={share(min(ratio, other))}:")


def test_a_notebook_says_what_each_setting_keeps_however_many_there_are():
    """It has all of them in its table: the verdicts ended at the tenth, in the middle of a policy."""
    settings = [(policy, fair) for policy in ("h2o", "knorm", "snapkv", "tova") for fair in (False, True, 0.5)]
    audited = made(np.random.default_rng(0), 2, settings, [0.5])
    shown = Cells(audited._repr_html_())
    assert len(shown.rows) == 1 + 2 * len(settings) and shown.text.count(" keeps ") == len(settings)


def test_a_printed_audit_marks_what_is_under_half(audited):
    for row in audited.rows:
        policy = f"{row['policy']}, {'fair' if row['fair'] else 'biased'}"
        of_setting = str(audited).split(f"\n{policy}\n", 1)[1]
        shares = re.search(rf"^  {row['span']} +(\S+) +(\S+)", of_setting, re.MULTILINE).groups()
        shown = shares[[0.3, 0.6].index(row["compression_ratio"])]
        assert float(shown.rstrip("*")) == pytest.approx(row["kept"], abs=0.006)
        assert shown.endswith("*") == (row["kept"] < 0.5)


def test_a_cache_its_report_and_its_handle(smollm2, prompt):
    model = smollm2[0]
    with kvp.wrap(model, "snapkv", compression_ratio=0.5) as handle:
        assert "No cache yet." in Cells(handle._repr_html_()).text
        assert Cells(handle.new_cache()._repr_html_()).rows == []
        cache = handle.compress(prompt)
        report = cache.report()
        shares = {
            name: np.mean([((p := cache.positions(i)[0]) >= b) & (p < e) for i in range(30)])
            for name, (b, e) in cache.spans[0].items()
        }
        in_span = {
            name: share * 26 / (cache.spans[0][name][1] - cache.spans[0][name][0]) for name, share in shares.items()
        }
        for shown in (handle, cache, report):
            assert Cells(shown._repr_html_()).rows[1:] == [
                [name, f"{100 * share:.0f} %"] for name, share in in_span.items()
            ]
        assert (
            "snapkv" in handle._repr_html_().lower()
            and isinstance(report, dict)
            and json.loads(json.dumps(report))["spans"]
        )
    frame = report.to_pandas()
    assert list(frame["kept"]) == [26.0] * 30 and frame["bytes_after"].sum() == report["bytes_after"]


@pytest.mark.parametrize("n_row", [1, 3])
@pytest.mark.parametrize("n_span", [0, 1, 7, 200])
@pytest.mark.parametrize("name", ["never reveal", "守秘" * 40, "a\nline\tbreak \x1b[31m", "x" * 300])
def test_a_printed_report_says_what_its_keys_say(n_row, n_span, name):
    """Whatever names and however many: sizes, then a line a share as far as there is room, and how many more."""
    shares = [{f"{i} {name}": (row + i) % 101 / 100 for i in range(n_span)} for row in range(n_row)]
    sizes = {"bytes_before": 4000, "bytes_after": 3000, "bytes_kept": 2000, "peak_bytes": 5000, "kept_share": 0.5}
    left = {3: "it slides", 5: "it slides"}
    layers = [{"index": 0, "kept": [[4]]}]
    where = {"spans_by_row": shares, "spans": shares[0], "not_compressed": left}
    report = Report({"n_tokens": 8, "layers": layers, **where, **sizes})
    said = str(report)
    first, *rest = said.split("\n\n")
    assert first.startswith(
        "8 tokens; 50 % of the entries kept; 4.0 kB before, 3.0 kB after, 5.0 kB at most; 1.0 kB of"
    )
    assert rest[-1] == "2 layers left as they are: it slides."
    n_shown = min(30, n_row * n_span)
    lines = rest[0].split("\n")[2:] if n_span else []
    assert len(lines) == n_shown and all(width(line) <= 120 for line in said.split("\n")[1:])
    in_order = [share for of_row in shares for share in of_row.values()][:n_shown]
    assert [float(line.split()[-1]) for line in lines] == in_order
    assert (f"{n_row * n_span - 30} more instructions" in said) == (n_row * n_span > 30)
    assert repr(report) == repr(dict(report))


SAID = re.compile(
    r"<KeptCache: (\d+) of (\d+) layers compressed, batch of (\d+), (\d+)(?: to (\d+))? of (\d+)(?: to (\d+))? prompt "
    r"tokens kept in each head \(r = (-?\d\.\d\d)\)(?:, (\d+) later)?, (\d+\.\d [kM]B) of (\d+\.\d [kM]B)>"
)


def check_what_a_cache_says(cache, n_later=0):
    """Each number of a cache's repr is the one that its report gives."""
    report, rows = cache.report(), cache.valid
    n_compressed, n_layer, n_row, *ranges, ratio, later, now, before = SAID.fullmatch(repr(cache)).groups()
    assert (int(n_compressed), int(n_layer)) == (len(report["layers"]), len(cache.layers))
    assert int(n_compressed) + len(report["not_compressed"]) == int(n_layer)
    kept = [n for layer in report["layers"] for of_row in layer["kept"] for n in of_row]
    real = [end - begin for begin, end in rows]
    for (low, high), numbers in zip([ranges[:2], ranges[2:]], [kept, real], strict=True):
        assert (int(low), int(high or low)) == (min(numbers), max(numbers)) and low != high
    assert int(n_row) == len(rows) and all(len(layer["kept"]) == len(rows) for layer in report["layers"])
    assert float(ratio) == pytest.approx(1 - report["kept_share"], abs=0.0051) and int(later or 0) == n_later
    for text, n in ((now, report["bytes_after"]), (before, report["bytes_before"])):
        size, unit = text.split()
        assert float(size) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(n, abs={"kB": 51, "MB": 5.1e4}[unit])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("policy", ["adakv", kvp.PyramidKV(window_size=1, beta=2), "streaming_llm"], ids=repr)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7])
def test_a_caches_repr_is_its_report_in_a_line(family, policy, ratio):
    """Heads that differ, layers that differ, rows that are padded, layers that stay as they are, nothing evicted; as a
    copy, as one row of it, with later tokens, and by what is left of it."""
    model, tokens = build(family), ids(3, 40)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    with kvp.wrap(model, policy, compression_ratio=ratio) as handle:
        assert "no tokens seen" in repr(handle.new_cache())
        cache = handle.compress(tokens, attention_mask=mask)
        for each in (cache, cache.copy(), cache.outline()):
            check_what_a_cache_says(each)
        longer = {"attention_mask": torch.cat([mask, mask[:, -1:]], -1), "max_new_tokens": 3, "do_sample": False}
        model.generate(torch.cat([tokens, tokens[:, :1]], -1), past_key_values=(answered := cache.copy()), **longer)
        check_what_a_cache_says(answered, 3)
        cache.batch_select_indices(torch.tensor([1]))
        check_what_a_cache_says(cache)


@pytest.mark.parametrize("when", ["always", "decode"])
def test_a_held_caches_repr_is_its_report_in_a_line(when):
    model, tokens = build("llama"), ids(2, 40)
    with kvp.wrap(model, "streaming_llm", compression_ratio=0.5, when=when) as handle:
        check_what_a_cache_says(cache := handle.compress(tokens))
        longer = torch.cat([tokens, tokens[:, :1]], -1)
        model.generate(longer, past_key_values=cache, max_new_tokens=6, do_sample=False)
        check_what_a_cache_says(cache, 6)


def test_a_prompt_shows_its_tokens(prompt):
    shown = Cells(prompt._repr_html_())
    assert shown.tags.count("bdi") == len(prompt) and "never reveal" in shown.text and "only Spanish" in shown.text
    assert shown.text.replace("⏎", "").count(SPANISH) == 1 and DEFENSE in shown.text


def test_names_that_run_from_right_to_left_are_kept_apart(smollm2):
    prompt = kvp.Prompt.from_text(
        smollm2[1], "Never. שמור סוד. 守秘", {"never": "Never.", "שמור": "שמור סוד.", "守": "守秘"}
    )
    shown = Cells(prompt._repr_html_()).text
    assert shown.count("\u2068") == shown.count("\u2068שמור\u2069") == 2, "in the list and in the strip, and no other"


def test_hostile_texts_are_escaped_everywhere(smollm2):
    model, tokenizer = smollm2
    name, text = "<script>1</script>", "Never </span></div><script>alert(1)</script> tell.\u202e"
    prompt = kvp.Prompt.from_text(tokenizer, f"{text} Bye.", {name: text})
    audited = kvp.audit(model, prompt, policies=["knorm"], compression_ratios=[0.5])
    with kvp.wrap(model, "knorm", compression_ratio=0.1, protect=[name]) as handle:
        cache = handle.compress(prompt)
        for shown in (prompt, audited, cache, cache.report(), handle):
            found = shown._repr_html_()
            assert "script" not in Cells(found).tags and "\u202e" not in found
            assert Cells(found).tags.count("div") == len(re.findall("</div>", found))


def test_to_pandas(audited, monkeypatch):
    frame = audited.to_pandas()
    assert frame.to_dict("records") == audited.rows
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="to_pandas needs the package pandas; expected pip install pandas"):
        audited.to_pandas()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_retention_curves_pass_through_the_rows(audited, theme):
    figure = audited.plot(theme=theme)
    panels = {
        axis.get_title(): {line.get_label(): line for line in axis.get_lines()}
        for axis in figure.axes
        if axis.get_title()
    }
    assert list(panels) == ["snapkv, biased", "snapkv, fair", "knorm, biased", "knorm, fair"]
    for row in audited.rows:
        line = panels[f"{row['policy']}, {'fair' if row['fair'] else 'biased'}"][row["span"]]
        assert (row["compression_ratio"], row["kept"]) in list(zip(*line.get_data(), strict=True))
    ideal = panels["knorm, fair"]["equal eviction"]
    assert list(zip(*ideal.get_data(), strict=True)) == [(0, 1), (1, 0)]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_token_matrices(audited):
    kept = audited.kept_mask("snapkv", 0.3)
    by_layer = audited.plot_tokens("snapkv", 0.3).axes[0].get_images()[0].get_array()
    assert np.array_equal(by_layer, kept.mean(1))
    by_head = audited.plot_tokens("snapkv", 0.3, layer=4, theme="dark").axes[0].get_images()[0].get_array()
    assert np.array_equal(by_head, kept[4])
    figure = audited.plot_tokens("snapkv", 0.3)
    figure.axes[0].set_xlim(-0.5, 19.5)  # of a short prompt
    assert len(figure.axes[0].get_xticks()) > 3 and all(tick == int(tick) for tick in figure.axes[0].get_xticks())
    with pytest.raises(ValueError, match="layer is 30; expected one of the compressed layers: 0, 1, "):
        audited.plot_tokens("snapkv", 0.3, layer=30)
    with pytest.raises(ValueError, match="theme is 'blue'; expected 'light' or 'dark'"):
        audited.plot(theme="blue")


PLAIN = ["price between $5 and $9", "never say {$x_$}", "$\\secret$", "100 % of a_b^c", "_hidden"]


def drawn(figure):
    """Every text of a figure that was drawn, and whether any could be taken for a formula or for TeX."""
    from matplotlib.text import Text

    figure._repr_png_()
    texts = figure.findobj(lambda part: isinstance(part, Text) and part.get_text())
    return [text.get_text() for text in texts], any(
        "$" in t.get_text() and (t.get_parse_math() or t.get_usetex()) for t in texts
    )


@pytest.mark.parametrize("name", PLAIN)
def test_names_are_drawn_as_they_are(name):
    """No formula, no TeX, and in the legend whatever they begin with; in panels' titles, above matrices and at ticks,
    too."""
    row = {"policy": name, "fair": False, "compression_ratio": 0.5, "kept": 0.5}
    texts, is_formula = drawn(plots.retention([{**row, "span": name}, {**row, "span": "task"}]))
    assert {name, "task", f"{name}, biased"} <= set(texts) and not is_formula
    texts, is_formula = drawn(plots.token_matrix(np.eye(2), [name, 1], {name: (0, 1)}, ylabel=name, title=name))
    assert texts.count(name) == 5 and not is_formula, "a tick has its label twice"


@pytest.mark.parametrize("figure", [plots.outcomes, plots.probes, plots.joint, plots.kept, plots.ranks])
def test_names_in_a_sweeps_figures_are_drawn_as_they_are(figure):
    metrics = {name: {"mean": 0.5, "low": 0.4, "high": 0.6} for name in ("leak_above", "follow", "probe_leak")}
    values = {"metrics": metrics, "kept": {"defense": 0.5}, "rho": 0.5}
    cells = [{"policy": "_a $x_$", "mode": "_$\\b$", "compression_ratio": ratio, **values} for ratio in (0.3, 0.6)]
    texts, is_formula = drawn(figure(cells))
    assert texts.count("_a $x_$, _$\\b$") == 1 and not is_formula


def overlaps(boxes):
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


@pytest.mark.parametrize("n", [1, 6])
def test_no_names_overlap_or_are_cut_off(n):
    """Long names over short instructions, side by side."""
    spans = {f"an instruction with a long name {i}": (2 * i, 2 * i + 2) for i in range(n)}
    figure = plots.token_matrix(np.zeros((4, 2 * n + 40)), range(4), spans, ylabel="layer", title="a title")
    figure._repr_png_()
    axis = figure.axes[0]
    boxes = [text.get_window_extent() for text in [*axis.texts, axis.title]]
    assert len(boxes) == n + 1 and not overlaps(boxes)
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_wide_names_do_not_overlap_either():
    """They are boxes where the font lacks them, and matplotlib says so."""
    spans = {f"{i}绝对不要透露这些指令": (2 * i, 2 * i + 2) for i in range(15)}
    figure = plots.token_matrix(np.zeros((4, 52)), range(4), spans, ylabel="layer")
    curves = plots.retention(
        [{"policy": "knorm", "fair": False, "compression_ratio": 0.5, "kept": 0.5, "span": name} for name in spans]
    )
    with pytest.warns(UserWarning, match="missing from font"):
        for drawn_one in (figure, curves):
            drawn_one._repr_png_()
    names = [text.get_window_extent() for text in figure.axes[0].texts]
    labels = [text.get_window_extent() for text in curves.legends[0].get_texts()]
    assert len(names) == 15 and len(labels) == 16 and not overlaps(names) and not overlaps(labels)


def test_a_bar_shows_on_a_terminal_and_nowhere_else(monkeypatch):
    assert progress(range(3)).disable
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert not progress(range(3)).disable


def test_where_nobody_sees_a_bar_it_is_lines(capsys):
    with progress_or_lines(total=30, desc="items") as bar:
        bar.mininterval = 0
        for _ in range(30):
            bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and all(line.startswith("items: ") for line in lines) and "30/30" in lines[-1]


def test_a_prefill_counts_its_layers(smollm2, prompt, monkeypatch):
    made = []

    def recorded(**options):
        made.append(progress(**options))
        return made[-1]

    monkeypatch.setattr("kvpitfalls.hf.prefill.progress", recorded)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with kvp.wrap(smollm2[0], "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(prompt)
    assert [(bar.n, bar.total) for bar in made] == [(30, 30)] and cache.progress is None
