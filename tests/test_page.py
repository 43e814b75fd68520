"""The report: numbers that are those of the records, failures in every table, and a page that needs nothing else."""

import csv
import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_sweep
from browser import SCHEMES, needs_chromium, picture, serious_findings

from kvpitfalls.display import plots
from kvpitfalls.display import tables as report
from kvpitfalls.display.page import _by_policy, write_report
from kvpitfalls.display.report_tables import verdicts
from kvpitfalls.experiments import comparisons, records, summary
from kvpitfalls.experiments.corpus import load_corpus
from kvpitfalls.experiments.intervals import around
from kvpitfalls.experiments.sweep import sweep
from kvpitfalls.policies import policy_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2):
    """A sweep of 4 prompts, the second of which fails."""
    folder = tmp_path_factory.mktemp("sweep")
    model = tiny_sweep.save_tiny_model(folder / "model", smollm2[1])
    rows = [dict(row) for row in load_corpus().rows[:4]]
    twice = load_corpus().defenses["refuse"].templates["defense_first"].replace("$system_prompt", "")
    rows[1]["messages"] = [{"role": "system", "content": f"Hello. {twice} Bye."}, rows[1]["messages"][1]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = tiny_sweep.config(
        model, n_prompts=None, dataset=str(folder / "rows.jsonl"), kinds=["attack", "recall", "follow", "probe"]
    )
    assert sweep(config, folder / "out")["failed"] > 0
    return folder / "out"


@pytest.fixture(scope="module")
def written(folder):
    return write_report(folder)


class Links(html.parser.HTMLParser):
    """What a page would load, and the text of its tables."""

    def __init__(self):
        super().__init__()
        self.loads, self.open, self.rows = [], [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [
            v
            for n, v in attrs
            if n in ("src", "href", "data", "xlink:href") and not (v or "").startswith(("#", "data:"))
        ]
        self.loads += [tag] if tag in ("script", "link", "iframe") else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.open.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass


def test_the_page_needs_nothing_else(written):
    text = Path(written["page"]).read_text("utf-8")
    page = Links()
    page.feed(text)
    assert page.loads == [] and "<svg" in text and "@import" not in text
    assert f"{written['items']} of {written['items']} items recorded, {written['failed']} failed, 0 infeasible" in text


def test_every_table_counts_the_failures(folder, written):
    recorded = records.read_records(folder)
    n_failed = sum(r["error"] is not None for r in recorded)
    assert written["failed"] == n_failed == len(recorded) / 4
    page = Links()
    page.feed(Path(written["page"]).read_text("utf-8"))
    tables = {
        "guarded": [0, 0],
        "margin": [0, 0],
        "family": [0, 0],
    }  # a column of each kind of table -> its items, its failures
    for header, rows in tables_of(page.rows):
        for column, sums in tables.items():
            if column in header and (column != "guarded" or "family" not in header):
                sums[0] += sum(int(row[header.index("items")]) for row in rows)
                sums[1] += sum(int(row[header.index("failed")]) for row in rows)
    kinds = [
        sum(r["kind"] in kinds for r in recorded) for kinds in (("attack", "recall", "follow"), ("probe",), ("attack",))
    ]
    # the two families share the recalls and follows of their settings
    wanted = [kinds[0], kinds[1], kinds[2] + 2 * (kinds[0] - kinds[2])]
    assert list(tables.values()) == [[n, n / 4] for n in wanted] and sum(kinds[:2]) == len(recorded)
    texts = [report.outcome_table(written["cells"]), report.probe_table(written["cells"])]
    columns = [text.splitlines()[0].split() for text in texts]
    for text, names, n in zip(texts, columns, kinds, strict=False):
        assert sum(int(line.split()[names.index("failed")]) for line in text.splitlines()[2:]) == n / 4
    assert {"leak_above", "leaked", "refused", "recall_above", "follow", "refused_task"} <= set(columns[0]), (
        "leak is never shown alone"
    )
    assert {"leak", "refusal", "margin", "recall", "follow"} <= set(columns[1])
    following = report.following_table(summary.following(recorded)).splitlines()
    assert {tuple(line.split()[-2:]) for line in following[2:]} == {("1", "0")}, "failed, infeasible"
    of_all = [line.split()[-3] for line in following if "s, all" in line]
    assert len(of_all) % 2 == 0 and set(of_all) == {"3"}, "prompts"


def test_the_page_shows_what_the_comparisons_say(folder, written):
    text, found = Path(written["page"]).read_text("utf-8"), records.read_records(folder)
    for title in ("Fixes against each other", "Safety against ability", "Length of answers"):
        assert f"<h3>{title}</h3>" in text
    page = Links()
    page.feed(text)
    wanted = {
        (f["policy"], "fair", "biased", f"{f['compression_ratio']:g}", str(f["n_prompt"]))
        for f in comparisons.fixes(found)
    }
    assert wanted and wanted <= {tuple(row[:5]) for row in page.rows}
    for name, rows in (
        ("fixes", comparisons.fixes(found)),
        ("losses", comparisons.losses(found)),
        ("flips", comparisons.flips(found)),
    ):
        with open(folder / "report" / f"{name}.csv", encoding="utf-8", newline="") as file:
            assert len(list(csv.DictReader(file))) == len(rows) > 0


def tables_of(rows):
    """(header, rows) of the tables that count failures."""
    out = []
    for row in rows:
        if "items" in row and "failed" in row:
            out.append((row, []))
        elif out and len(row) == len(out[-1][0]):
            out[-1][1].append(row)
    return out


def test_the_csv_holds_the_plain_means(folder, written):
    recorded = [r for r in records.read_records(folder) if r["kind"] == "attack" and r["error"] is None]
    with open(folder / "report" / "summary.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "leak"]
    assert len(rows) == 2 * (1 + 2 * 2 * 2)
    for row in rows:
        same = [
            r["scores"]["leak"]["directive"]["rougeL"]
            for r in recorded
            if (r["order"], r["policy"] or "", r["mode"], str(r["compression_ratio"]))
            == (row["order"], row["policy"], row["mode"], row["compression_ratio"])
        ]
        assert float(row["mean"]) == pytest.approx(sum(same) / len(same)) and int(row["n_failed"]) == 2
    with open(folder / "report" / "failures.csv", encoding="utf-8", newline="") as file:
        assert all("is in the prompt 2 times" in row["error"] for row in csv.DictReader(file))


def test_the_families_are_means_over_their_own_attacks(folder, written):
    recorded = [r for r in records.read_records(folder) if r["kind"] == "attack" and r["error"] is None]
    with open(folder / "report" / "families.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "leak_rouge1"]
    assert len(rows) == 2 * 2 * (1 + 2 * 2 * 2) and {row["family"] for row in rows} == {"verbatim", "formatting"}
    for row in rows:
        setting = (row["order"], row["policy"], row["mode"], row["compression_ratio"])
        same = [
            r["scores"]["leak"]["directive"]["rouge1"]
            for r in recorded
            if r["attack"].startswith(row["family"])
            and (r["order"], r["policy"] or "", r["mode"], str(r["compression_ratio"])) == setting
        ]
        assert float(row["mean"]) == pytest.approx(sum(same) / len(same)) and (row["n_item"], row["n_failed"]) == (
            "4",
            "1",
        )


def test_figures_are_written_twice(folder, written):
    names = {path.stem for path in (folder / "report").glob("*.png")}
    assert {"outcomes_1", "probes_1", "kept_1", "joint_1", "outcomes_2"} <= names
    for name in names:
        assert (folder / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / "report" / f"{name}.svg").read_text("utf-8")


def test_a_report_is_the_same_bytes_again_and_what_only_an_older_one_had_goes(folder, written, tmp_path):
    """Of two models there are two cards, of one again one; what is nobody's of ours stays."""
    again = shutil.copytree(folder, tmp_path / folder.name)
    wrote = {path.name: path.read_bytes() for path in (folder / "report").iterdir()}
    older = ["card_1.json", "card_2.json", "composite.csv", "outcomes_7.svg", "ranks_snapkv_2.png"]
    mine = ["notes.csv", "card.csv", "summary.json", "outcomes.svg"]
    for name in older + mine:
        (again / "report" / name).write_text("", "utf-8")
    write_report(again)
    assert {path.name: path.read_bytes() for path in (again / "report").iterdir()} == wrote | dict.fromkeys(mine, b"")


def test_a_figure_that_cannot_be_finished_leaves_the_older_one(folder, written, tmp_path, monkeypatch):
    copied = shutil.copytree(folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (copied / "report").glob("*g")}

    def broken(figure, path, **options):
        path.write_bytes(b"<svg")
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    with pytest.raises(KeyboardInterrupt):
        write_report(copied)
    assert {path.name: path.read_bytes() for path in (copied / "report").glob("*g")} == before
    assert not list((copied / "report").glob(".*"))


def test_curves_pass_through_the_means(written):
    cells = next(iter(summary.groups(written["cells"]).values()))
    figure = plots.outcomes(cells)
    assert [axis.get_title().split(" ")[0] for axis in figure.axes] == [
        "refuses",
        "refuses",
        "recites",
        "leak",
        "recall",
        "follows",
    ]
    lines = {line.get_label(): line for line in figure.axes[3].get_lines()}
    for cell in cells:
        if cell["policy"]:
            line = lines[f"{cell['policy']}, {cell['mode']}"]
            assert (cell["compression_ratio"], pytest.approx(cell["metrics"]["leak_above"]["mean"])) in list(
                zip(*line.get_data(), strict=True)
            )


def test_one_prompt_has_curves_without_bands_and_what_lies_under_0_is_shown():
    metrics = {"recall_above": {"mean": -0.4, "low": -0.6, "high": 0.1}}
    metrics["probe_leak"] = {"mean": -3.0, "low": None, "high": None}  # of one prompt
    cells = [{**_tiny_cell(policy, "biased", r), "metrics": metrics} for policy, r in ((None, 0.0), ("snapkv", 0.5))]
    (axis,), (probed,) = (draw(cells).axes for draw in (plots.outcomes, plots.probes))
    assert axis.get_ylim()[0] < -0.6 and probed.lines[0].get_ydata().tolist() == [-3.0, -3.0]
    metrics |= {name: {"mean": x, "low": 0.0, "high": 1.0} for name, x in (("follow", 0.5), ("leak_above", -0.3))}
    assert plots.joint(cells).axes[0].get_ylim()[0] < -0.3


def test_many_modes_have_a_figure_for_each_policy():
    """In it no two look alike, a mode looks the same in every figure, and bands that would be one blot are left out."""
    few = [_tiny_cell(None, "full", 0.0), *(_tiny_cell(policy, "fair", 0.5) for policy in ("snapkv", "h2o"))]
    assert list(_by_policy(few)) == [""]
    modes = ["biased", "random", "whitelist", "whitelist_defense", "boundary", "floor=4", "fair", "fair+whitelist"]
    parts = _by_policy(
        [*few, *(_tiny_cell(policy, mode, 0.5) for policy in ("snapkv", "h2o") for mode in modes if mode != "fair")]
    )
    assert list(parts) == ["_snapkv", "_h2o"]
    axis = plots.outcomes(parts["_snapkv"]).axes[0]
    looks = _looks(axis)
    assert sorted(looks) == sorted(modes) and len(set(looks.values())) == 8 and not axis.collections
    assert _looks(plots.ranks(_ranked(modes[2:])).axes[0]) == {mode: looks[mode] for mode in modes[2:]}
    assert len(plots.outcomes(few).axes[0].collections) == 2


def test_no_two_curves_of_a_figure_look_alike():
    """Whatever policies and modes stand in it, a user's own, too."""
    policies, modes = [*policy_names(), "mine", "another"], ["boundary", "floor=4", "fair+min=3", "paper"]
    for settings in ([(name, "fair") for name in policies], [("kvzip", mode) for mode in modes]):
        looks = plots._styles({key: [] for key in settings}, "light")
        assert list(looks) == settings and len(set(map(str, looks.values()))) == len(settings)
        cells = [_tiny_cell(None, "full", 0.0), *(_tiny_cell(*setting, 0.5) for setting in settings)]
        assert [x.get_marker() for x in plots.outcomes(cells).axes[0].get_lines()] == [
            look["marker"] for look in looks.values()
        ]


def _looks(axis):
    return {line.get_label().split(", ")[1]: (line.get_color(), line.get_linestyle()) for line in axis.get_lines()}


def _tiny_cell(policy, mode, ratio):
    metric = {"mean": 0.5, "low": 0.2, "high": 0.8}
    return {"policy": policy, "mode": mode, "compression_ratio": ratio, "metrics": {"refused": metric}}


def _ranked(modes):
    full = {"policy": None, "mode": "full", "compression_ratio": 0.0, "rho": 1.0, "low": None, "high": None}
    return [full, *({**full, "policy": "snapkv", "mode": mode, "compression_ratio": 0.5} for mode in modes)]


def test_the_page_says_what_its_modes_are_and_aligns_signed_numbers(folder, written):
    page = (folder / "report" / "index.html").read_text("utf-8")
    assert "<dt>mode biased</dt><dd>What the policy ranks highest is kept.</dd>" in page
    assert "pinned" not in page and '<td class="n">+0.00 [' in page


@pytest.mark.parametrize(
    ("first", "second", "parts"), [("first", "second", ["first/", "second/"]), (".", "both", ["", "both/"])]
)
def test_an_item_of_two_sweeps_counts_once_or_has_two_results(
    folder, written, tmp_path, monkeypatch, first, second, parts
):
    """A copy of a sweep beside it, or below it by its own name, changes no number; what another setting, such as a
    dtype, made of an item does not join it."""
    tiny_sweep.draw_nothing(monkeypatch)
    both, path = tmp_path / "both", tmp_path / "both" / second / "records.jsonl"
    for place in (both / first, both / second):
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns("report"), dirs_exist_ok=True)
    recorded = records.read_records(both / second)

    def reported(theirs):
        path.write_text("".join(json.dumps(record) + "\n" for record in theirs), "utf-8")
        return {name: value for name, value in write_report(both).items() if name not in ("page", "cards")}

    expected = {name: value for name, value in written.items() if name not in ("page", "cards")}
    assert reported({**record, "seconds": 9.0} for record in recorded) == expected
    assert reported(recorded[:-1]) == {**expected, "items": expected["items"] + 1}, "a sweep that is not whole is told"
    page = (both / "report" / "index.html").read_text("utf-8")
    assert all(f"<summary>{part}run_meta.json</summary>" in page for part in parts)
    told = "' and '".join(f"{part}records.jsonl" for part in parts)
    with pytest.raises(ValueError, match=rf"'{told}' hold other results of the same item \(.*probe\)"):
        reported([*recorded[:-1], {**recorded[-1], "n_new": recorded[-1]["n_new"] + 1}])


@pytest.mark.parametrize("kinds", [("attack", "recall"), ("follow",)])
def test_the_papers_shuffled_prompts_are_reported_as_its_others_are(folder, tmp_path, kinds):
    """Presets that measure leakage alone have records of "paper_shuffled" and no others."""
    pages = []
    for name in ("paper", "paper_shuffled"):
        copied = shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("report"))
        recorded = [{**r, "dataset": name} for r in records.read_records(copied) if r["kind"] in kinds]
        (copied / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in recorded), "utf-8")
        pages.append(Path(write_report(copied)["page"]))
    names = [sorted(p.name for p in page.parent.iterdir()) for page in pages]
    texts = [page.read_text("utf-8") for page in pages]
    assert names[0] == names[1] and "<summary>Prompt" in texts[0]
    assert texts[0] == re.sub("paper_shuffled", "paper", texts[1])


@pytest.mark.parametrize("changes", [{"kind": "other"}, {"kind": "attack", "attack": None}])
def test_records_of_a_kind_that_no_table_has_are_refused(folder, tmp_path, changes):
    copied = shutil.copytree(folder, tmp_path / "sweep")
    recorded = records.read_records(copied)
    next(record for record in recorded if record["kind"] == "attack" and record["scores"] is not None).update(changes)
    (copied / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in recorded), "utf-8")
    with pytest.raises(ValueError, match=r"record \d+ is not a sweep's; expected records that a sweep wrote"):
        write_report(copied)


def test_a_folder_without_records_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no records\.jsonl, and none of its subfolders has"):
        write_report(tmp_path)


def test_a_missing_matplotlib_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package matplotlib; expected pip install 'kvpitfalls\[plot\]'"):
        plots.outcomes([{"metrics": {"refused": {}}}])


def test_links_lead_to_a_place_and_every_table_says_what_it_is(written):
    text = Path(written["page"]).read_text("utf-8")
    ids = re.findall(r' id="([^"]+)"', text.split("<svg")[0])
    assert all(f'id="{place}"' in text for place in re.findall(r'<a href="#([^"]+)"', text)) and len(set(ids)) == len(
        ids
    )
    assert text.count("<table>") == text.count("<caption>") > 5 and text.count("<th ") == text.count('<th scope="col"')
    assert "width=device-width" in text and "color-scheme: light dark" in text
    assert "At most 4 prompts a setting" in text or "At most 3 prompts a setting" in text


def test_answers_are_shown_as_they_are_whatever_they_hold(folder, tmp_path):
    """The full cache's first; markup in a model's answer stays text."""
    copied = tmp_path / "sweep"
    shutil.copytree(folder, copied)
    recorded = records.read_records(copied)
    hostile = "</td></table><script>alert(1)</script><img src=x>{{ 1 + 1 }}\n\t"
    turned = "\u202e\x1b[31m\x00"  # nothing of ours is turned around, and nothing is invisible
    for record in recorded:
        record["model"] += turned
        if record["output"] is not None:
            record["output"] = turned + hostile + record["output"] if record["kind"] == "attack" else "1. One\n2. Two"
    (copied / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in recorded), "utf-8")
    text = Path(write_report(copied)["page"]).read_text("utf-8")
    page = Links()
    page.feed(text)
    assert page.loads == [] and "{{ 1 + 1 }}" in text and not {"\u202e", "\x1b", "\x00"} & set(text)
    answers = [row for row in page.rows if row and row[-1].startswith("⟨U+202E⟩⟨U+001B⟩[31m⟨U+0000⟩" + hostile)]
    assert answers and answers[0][:3] == ["none", "full", "0"]
    assert {row[0] for row in answers} == {"none", "streaming_llm", "snapkv"}
    numbered = set(re.findall(r"(<t\w)([^>]*)>(?:answer|1\. One\n2\. Two)<", text))
    assert numbered == {("<th", ' scope="col"'), ("<td", ' class="answer"')}, "a list begins with a digit, too"


def change(policy, ratio, difference, error, metric="guarded", n_prompt=30, **more):
    low, high = around(difference, error, n_prompt)
    row = {"policy": policy, "mode": "biased", "compression_ratio": ratio, "metric": metric, "n_prompt": n_prompt}
    return {**row, "difference": difference, "low": low, "high": high, "error": error, **more}


def test_a_verdict_names_the_largest_fall_that_is_told_from_chance_and_what_returns_most():
    changes = [
        change("tova", 0.3, -0.9, 0.4),  # larger, but not told from chance
        change("tova", 0.5, -0.5, 0.05),
        change("tova", 0.5, -0.2, 0.02, "follow"),
        change("tova", 0.5, -0.8, 0.05, mode="fair"),
        change("knorm", 0.5, -0.1, 0.1),
        change("knorm", 0.5, 0.1, 0.1, "follow"),
        change("h2o", 0.9, -0.3, 0.05),
    ]
    fixed = [
        change("tova", 0.5, 0.3, 0.05, mode="fair", than="biased"),
        change("tova", 0.5, 0.4, 0.05, mode="floor=4", than="biased"),
        change("tova", 0.5, 0.9, 0.4, mode="boundary", than="biased"),
        # infeasible for the others
        change("tova", 0.5, 0.9, 0.01, n_prompt=5, mode="whitelist_defense", than="biased"),
        change("tova", 0.3, 0.9, 0.05, mode="boundary", than="biased"),
        change("h2o", 0.9, 0.2, 0.1, mode="fair", than="biased"),
        change("h2o", 0.9, 0.2, 0.01, mode="fair", than="floor=4"),
    ]

    def bounds(difference, error, n, n_prompt=30, mark=""):
        low, high = around(difference, error, n_prompt, 1.0, n)
        return f"[{low:{mark}.2f}, {high:{mark}.2f}]"

    n = 12  # six falls of biased eviction, and six returns over it
    assert verdicts(changes, fixed) == [
        f"tova, biased: guarded falls most at r = 0.5, by 0.50 {bounds(0.5, 0.05, n)} (30 prompts); at the same memory "
        f"floor=4 returns most, +0.40 {bounds(0.4, 0.05, n, mark='+')}.",
        "knorm, biased: no fall of guarded or follow is told from chance at any ratio.",
        f"h2o, biased: guarded falls most at r = 0.9, by 0.30 {bounds(0.3, 0.05, n)} (30 prompts); of the other modes "
        "at the same memory none returns an amount that is told from chance.",
        "Each of these sentences chooses the largest of many, of 12 differences in all. Their intervals hold for all "
        "of these together (95 %), and so are wider than those of the tables. None says that a mode returns more than "
        "the next.",
    ]
    assert verdicts([], []) == []
    no_task = {"difference": None, "low": None, "high": None, "error": None, "n_prompt": 0}  # no guarded is known
    attacked = [{**changes[4], **no_task}, change("knorm", 0.5, -0.1, 0.1, "recall_above")]
    assert verdicts(attacked, []) == ["knorm, biased: no fall of recall_above is told from chance at any ratio."]
    assert verdicts(attacked[:1], []) == []
    fewer = {**fixed[1], "n_prompt": 20}  # infeasible for the others: what is beside it is of so many
    said = verdicts(changes, [fewer])[0]
    assert said.endswith(f"floor=4 returns most, +0.40 {bounds(0.4, 0.05, 7, 20, '+')} (20 prompts).")
    assert verdicts(changes[1:2], [])[0].endswith(f"by 0.50 {bounds(0.5, 0.05, 1)} (30 prompts)."), "none was chosen"


@pytest.mark.parametrize(("noise", "fall"), [(0.4, 0.0), (0.5, 0.5)])
def test_what_is_chosen_as_the_largest_is_told_from_chance_no_more_often_than_it_may(noise, fall):
    """No mode differs from biased eviction; each answer is given anew with a chance of ``noise``, at every setting. In
    one of twenty reports a sentence may claim what is not so: a fall of nothing, or a return of it. Bounds are .05 and
    three standard errors of 200 runs; intervals for each alone give a fifth, and a third."""
    rng, n_run, n = np.random.default_rng(11), 200, 68
    wrong = 0

    def asked(full):
        return np.where(rng.random(n) < noise, rng.random(n) < 0.7 - fall, full).astype(float)

    for _ in range(n_run):
        changes, fixed = [], []
        for metric in ("guarded", "recall_above", "follow"):
            full = rng.random(n) < 0.7
            for ratio in (0.3, 0.5, 0.7):
                where, biased = {"policy": "tova", "compression_ratio": ratio, "metric": metric}, asked(full)
                changes.append({**where, "mode": "biased", **changed(biased, full.astype(float))})
                named = ((f"floor={m}", asked(full)) for m in range(1, 6))
                fixed += [{**where, "mode": m, "than": "biased", **changed(x, biased)} for m, x in named]
        said = verdicts(changes, fixed)[0]
        wrong += "returns most" in said if fall else "falls most" in said
    assert wrong / n_run <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_run)


def changed(one, other):
    keys = range(len(one))
    sides = ({key: (value, 1) for key, value in zip(keys, side.tolist(), strict=True)} for side in (one, other))
    return comparisons.change(*sides, set(keys))


@needs_chromium
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_has_no_serious_fault_for_who_cannot_see_it(written, tmp_path, scheme):
    opened = "for (const one of doc.querySelectorAll('details')) one.open = true;"
    assert serious_findings(Path(written["page"]), tmp_path, opened, scheme=scheme) == []


@needs_chromium
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_table_is_shaded_at_the_right_where_it_goes_on_there_and_only_then(tmp_path, scheme):
    template = Path(plots.__file__).with_name("report.html").read_text("utf-8")
    style = re.search("<style>.*?</style>", template, re.S)[0]
    for n_column in (2, 60):
        row = f"<tr>{'<td>share' * n_column}"
        (tmp_path / "table.html").write_text(f"<!doctype html>{style}<div class=wide><table>{row * 20}</table></div>")
        seen = picture(tmp_path / "table.html", tmp_path, 800, scheme=scheme)
        edge, margin = np.median(seen[100:300, 780:784], axis=(0, 1)), seen[200, 798]
        assert (np.abs(edge - margin).max() > 0.1) == (n_column == 60)
