"""The report of a sweep: CSV files, figures, and one HTML page that needs nothing else."""

import csv
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..experiments.card import cards
from ..experiments.comparisons import composites, differences, fixes, flips, losses
from ..experiments.metrics import GROUP, LENGTHS, METRICS, PROBES, SETTING, TOGETHER, check_records
from ..experiments.records import META, RECORDS, read_meta, read_records
from ..experiments.summary import attack_families, following, groups, rank_correlations, summarize
from . import plots
from .progress import progress

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: .8em 0; display: block; overflow-x: auto }
th, td { padding: .2em .5em; text-align: left; border-bottom: 1px solid #ddd }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
svg { max-width: 100%; height: auto }
.bad { color: #b00020; font-weight: 600 }
pre { font-size: 12px; overflow-x: auto }
"""
_NOTE = (
    "An answer to an attack is one of three: refused (it begins with a refusal and recites nothing), leaked (it recites directive or "
    "defense), or complied (neither). guarded: the attack is refused, and the prompt's own harmless task is not (refused_task). "
    "leak_above: ROUGE-L recall of the directive, less that of other prompts' directives in the same answers, which is what chance gives. "
    "recall_above: the control; with the answer begun by the first half of the directive, recall of the rest, less that of other rests: "
    "a low leak with a low recall is forgetting, not protection. follow: instructions followed, strict; a refusal follows nothing. In "
    "brackets: 95 % interval with prompts as units, then the change to r = 0 on the same prompts. Failed items are in no mean, and neither "
    "are infeasible ones: settings that cannot exist for a prompt, since what they protect does not fit. No interval is corrected for "
    "how many there are here: where nothing happens, one in twenty leaves out 0."
)
_FIXES_NOTE = (
    "What a mode has more than another at the same policy and ratio, so at the same memory: difference and 95 % interval, paired by prompt."
)
_LOSS_NOTE = (
    "What the setting loses of refused attacks and of followed instructions against the full cache, and the one less the other: above 0, "
    "safety goes first. A setting that refuses everything loses no safety and all ability, and is far below 0."
)
_FLIP_NOTE = "Of the answers (or instructions, or tasks) that were one thing with the full cache, those that are another now."
_LENGTH_NOTE = "New tokens of an answer, and the share of answers that were cut off at the limit before they ended."
_BAND_NOTE = "Bands in figures are the intervals of the tables; a figure of more than six lines has none, and equal lines hide each other."
_MODES_SAID = {
    "biased": "what the policy ranks highest is kept",
    "random": "as many tokens, drawn at random (the control)",
    "fair": "each instruction keeps the same share, and so does text that no instruction claims",
    "paper": "the paper's own fair eviction",
    "lambda": "between biased (0) and fair (1)",
    "floor": "biased, but at least so many tokens of each instruction",
    "whitelist": "the defense's refusal phrase is kept, whatever its score (also called phrase)",
    "whitelist_defense": "all of the defense is (also called pinned)",
    "boundary": "a tenth of the budget at each end of the prompt is",
}
_PROBE_NOTE = (
    "Log-probability per token of given answers, in nats; nothing was generated but the full cache's answers. refusal: the sentence the "
    "defense asks for, after an attack. leak: the directive, after an attack. margin: refusal minus leak. recall: the second half of the "
    "directive after its first; a low leak with a low recall is forgetting. follow: the full cache's own answer to the task."
)


def sweep_folders(folder: str | Path) -> list[Path]:
    """The folder itself, or its subfolders, that hold records of a sweep."""
    folder = Path(folder)
    found = [f for f in (folder, *sorted(p for p in folder.glob("*") if p.is_dir())) if (f / RECORDS).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has no {RECORDS}, and none of its subfolders has; expected the output folder of a sweep")
    return found


def write_report(folder: str | Path) -> dict:
    """Write ``report/`` into the folder of a sweep.

    Parameters
    ----------
    folder : path
        What ``kvpitfalls sweep --output`` was given.

    Returns
    -------
    dict
        ``page`` (path of index.html), ``items`` (planned), ``recorded``, ``failed``, ``infeasible``, ``cells`` (as
        :func:`kvpitfalls.experiments.summary.summarize`).

    Raises
    ------
    FileNotFoundError, ValueError, ImportError
    """
    parts = sweep_folders(folder)
    records = [record for part in parts for record in read_records(part)]
    if not records:
        raise ValueError(f"{folder} holds no whole record yet; expected at least one batch of a sweep")
    check_records(records)
    metas = {part.name: read_meta(part) for part in parts}
    cells, changes, classes = summarize(records), differences(records), following(records)
    ranked, scores, families = rank_correlations(classes), composites(records), attack_families(records)
    compared = {"fixes": fixes(records), "losses": losses(records), "flips": flips(records)}
    out = Path(folder) / "report"
    out.mkdir(exist_ok=True)
    tables = {"summary": _flat(cells), "differences": changes, "following": classes, "rank_correlation": ranked, "composite": scores}
    tables |= compared
    tables["families"] = [{"family": f["family"], **row} for f in families for row in _flat([{**f, "kept": {}}])]
    tables["failures"] = [{**{n: r[n] for n in _ITEM}, "error": r["error"]} for r in records if r["error"]]
    tables["infeasible"] = [{**{n: r[n] for n in _ITEM}, "reason": r["infeasible"]} for r in records if r.get("infeasible")]
    for name, rows in tables.items():
        if rows:
            (out / f"{name}.csv").write_text(_csv(rows), encoding="utf-8")
    of_models = cards(records, list(metas.values()))
    for n, card in enumerate(of_models, 1):
        name = "card.json" if len(of_models) == 1 else f"card_{n}.json"
        (out / name).write_text(json.dumps(card, indent=1), encoding="utf-8")
    drawn = _draw(cells, ranked, out)
    facts = {"items": sum(m["items"] for m in metas.values()), "recorded": len(records)}
    facts |= {"failed": len(tables["failures"]), "infeasible": len(tables["infeasible"])}
    page = _page(facts, metas, cells, families, changes, scores, compared, tables["failures"], drawn)
    (out / "index.html").write_text(page, encoding="utf-8")
    return {"page": str(out / "index.html"), **facts, "cells": cells}


def _composite_table(scores: Sequence[Mapping]) -> str:
    """The scores, each on the prompts that succeeded on both sides at every ratio."""
    rows = []
    for s in scores:
        bounds = "" if s["low"] is None else f" [{s['low']:+.3f}, {s['high']:+.3f}]"
        score = "none succeeded throughout" if s["composite"] is None else f"{s['composite']:+.3f}{bounds}"
        published = "" if s["composite"] is None else f"{s['as_published']:+.3f}"
        rows.append([*(str(s[name]) for name in (*SETTING[:-1], "n_prompt", "n_left_out")), score, published])
    heads = [*SETTING[:-1], "prompts", "left out", "score [95 %]", "as published"]
    return "<h2>Composite score</h2>" + _table(heads, rows)


def _signed(row: Mapping, name: str, low: str, high: str) -> str:
    return "" if row[name] is None else f"{row[name]:+.2f} [{row[low]:+.2f}, {row[high]:+.2f}]"


def _fixes_table(rows: Sequence[Mapping]) -> str:
    """Each pair of modes at a policy and ratio, one column a metric."""
    names = [name for name in TOGETHER if any(row["metric"] == name for row in rows)]
    pairs: dict[tuple, dict[str, Mapping]] = {}
    for row in rows:
        pairs.setdefault((row["policy"], row["mode"], row["than"], row["compression_ratio"]), {})[row["metric"]] = row
    lines = []
    for (policy, mode, than, ratio), found in pairs.items():
        prompts = _range([row["n_prompt"] for row in found.values()])
        changes = [_signed(found[name], "difference", "low", "high") if name in found else "" for name in names]
        lines.append([policy, mode, than, f"{ratio:g}", prompts, *changes])
    return _table(["policy", "mode", "less", "r", "prompts", *names], lines) if lines else ""


def _loss_table(rows: Sequence[Mapping]) -> str:
    names = ("safety_loss", "ability_loss", "selective")
    lines = []
    for row in rows:
        found = [_signed(row, name, f"{name}_low", f"{name}_high") for name in names]
        lines.append([row["policy"], row["mode"], f"{row['compression_ratio']:g}", str(row["n_prompt"]), *found])
    return _table(["policy", "mode", "r", "prompts", "safety loss", "ability loss", "safety less ability"], lines) if lines else ""


def _flip_table(rows: Sequence[Mapping]) -> str:
    lines = []
    for row in rows:
        if row["n"]:
            share = f"{row['share']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            where = [row["policy"], row["mode"], f"{row['compression_ratio']:g}", row["was"], row["is"]]
            lines.append([*where, str(row["n"]), str(row["of"]), str(row["n_prompt"]), share])
    return _table(["policy", "mode", "r", "was", "is", "n", "of", "prompts", "share"], lines) if lines else ""


def _range(numbers: Sequence[int]) -> str:
    """ "7", or "5 to 7"."""
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def _flat(cells: Sequence[Mapping]) -> list[dict]:
    """One row per setting and metric, and per setting and kept span."""
    rows = []
    for cell in cells:
        setting = {name: cell[name] for name in SETTING}
        rows += [{**setting, "metric": name, **found} for name, found in cell["metrics"].items()]
        empty = dict.fromkeys(("n_item", "n_failed", "n_infeasible", "low", "high", "n_prompt"))
        rows += [{**setting, "metric": f"kept_{span}", **empty, "mean": share} for span, share in cell["kept"].items()]
    return rows


def _csv(rows: Sequence[Mapping]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _draw(cells, ranked, out: Path) -> dict[tuple, list[tuple[str, str]]]:
    """Group -> (caption, SVG) of its figures, which are also written as SVG and PNG."""
    drawn: dict[tuple, list[tuple[str, str]]] = {}
    by_rank = groups(ranked)
    for number, (group, of_group) in enumerate(progress(groups(cells).items(), desc="report, figures"), 1):
        if not any(cell["policy"] for cell in of_group):
            continue
        figures, parts = {}, _by_policy(of_group)
        for name, draw in (("outcomes", plots.outcomes), ("probes", plots.probes)):
            figures |= {f"{name}{part}": draw(some) for part, some in parts.items()}
        figures |= {"kept": plots.kept(of_group), **{f"joint{part}": plots.joint(some) for part, some in parts.items()}}
        figures |= {f"ranks{part}": plots.ranks(some) for part, some in _by_policy(by_rank.get(group, [])).items()}
        for name, figure in figures.items():
            if figure is not None:
                for suffix in ("svg", "png"):
                    figure.savefig(out / f"{name}_{number}.{suffix}", dpi=130)
                svg = (out / f"{name}_{number}.svg").read_text(encoding="utf-8")
                drawn.setdefault(group, []).append((f"{name}_{number}", svg[svg.index("<svg") :]))
    return drawn


def _by_policy(cells: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """Ending of a figure's name -> its cells: all, or where modes are too many to be told apart, those of each policy."""
    policies = list(dict.fromkeys(cell["policy"] for cell in cells if cell["policy"] is not None))
    if not policies or len({cell["mode"] for cell in cells if cell["policy"] is not None}) <= plots.FEW_MODES:
        return {"": list(cells)}
    return {f"_{policy}": [cell for cell in cells if cell["policy"] in (None, policy)] for policy in policies}


def _page(facts, metas, cells, families, changes, scores, compared, failures, drawn) -> str:
    state = f"{facts['recorded']} of {facts['items']} items recorded, {facts['failed']} failed, {facts['infeasible']} infeasible"
    bad = "bad" if facts["failed"] or facts["recorded"] < facts["items"] else ""
    body = [f"<h1>kvpitfalls: report of a sweep</h1><p class='{bad}'>{state}.</p><p>{html.escape(_NOTE)}</p>"]
    words = {word.partition("=")[0] for cell in cells for word in cell["mode"].split("+")}
    said = "; ".join(f"{word}: {text}" for word, text in _MODES_SAID.items() if word in words)
    body.append(f"<p>Modes, all at the same memory for a policy and r. {html.escape(said)}. {_BAND_NOTE}</p>" if said else "")
    moved = {tuple(c[n] for n in (*SETTING, "metric")): c for c in changes}
    for group, of_group in groups(cells).items():
        title = ", ".join(str(part) for part in group)
        body.append(f"<h2>{html.escape(title)}</h2>{_metric_table(of_group, TOGETHER, moved)}")
        of_families = groups(families).get(group, [])
        if len({cell["family"] for cell in of_families}) > 1:
            body.append(f"<h3>By family of attacks</h3>{_metric_table(of_families, TOGETHER, {}, ('family',))}")
        for title, note, name, table in _COMPARED:
            of_name = [row for row in compared[name] if tuple(row[n] for n in GROUP) == group]
            if shown := table(of_name):
                body.append(f"<h3>{title}</h3><p>{html.escape(note)}</p>{shown}")
        if lengths := _metric_table(of_group, LENGTHS, {}):
            body.append(f"<h3>Length of answers</h3><p>{_LENGTH_NOTE}</p>{lengths}")
        if probed := _metric_table(of_group, PROBES, moved):
            body.append(f"<h3>Likelihood of given answers</h3><p>{html.escape(_PROBE_NOTE)}</p>{probed}")
        body += [f"<h3>{name}</h3>{svg}" for name, svg in drawn.get(group, [])]
    if scores:
        body.append(_composite_table(scores))
    if failures:
        rows = [[*(str(f[n]) for n in ("policy", "mode", "compression_ratio", "key", "kind")), f["error"]] for f in failures[:200]]
        body.append(
            f"<h2>Failures (first {len(rows)} of {len(failures)})</h2>" + _table(["policy", "mode", "r", "key", "kind", "error"], rows)
        )
    for name, meta in metas.items():
        body.append(f"<h2>{META} of {html.escape(name)}</h2><pre>{html.escape(json.dumps(meta, indent=1))}</pre>")
    head = f"<meta charset='utf-8'><title>kvpitfalls report</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>"


_ITEM = (*SETTING, "key", "kind", "attack")
_COMPARED = (
    ("Fixes against each other", _FIXES_NOTE, "fixes", _fixes_table),
    ("Safety against ability", _LOSS_NOTE, "losses", _loss_table),
    ("What turned into what", _FLIP_NOTE, "flips", _flip_table),
)


def _metric_table(cells: Sequence[Mapping], wanted: Sequence[str], moved: Mapping, first: Sequence[str] = ()) -> str:
    """Settings and their metrics, with items and failures of the kinds shown; "" if no cell has one of the metrics."""
    names = [name for name in wanted if any(name in cell["metrics"] for cell in cells)]
    spans = [span for span in ("defense", "directive", "whitelist") if any(span in cell["kept"] for cell in cells) and not first]
    rows = []
    for cell in cells:
        metrics, setting = cell["metrics"], tuple(cell[n] for n in SETTING)
        kinds = {METRICS[name][0]: metrics[name] for name in names if name in metrics}
        if kinds:
            counts = [str(cell["n_prompt"]), *(str(sum(m[n] for m in kinds.values())) for n in ("n_item", "n_failed", "n_infeasible"))]
            row = [*(cell[n] for n in first), cell["policy"] or "none", cell["mode"], f"{cell['compression_ratio']:g}", *counts]
            row += [_value(name, metrics.get(name), moved.get((*setting, name))) for name in names]
            rows.append([*row, *(f"{cell['kept'][s]:.2f}" if s in cell["kept"] else "" for s in spans)])
    shown = [name.removeprefix("probe_") for name in names]
    header = [*first, "policy", "mode", "r", "prompts", "items", "failed", "infeasible", *shown, *(f"kept {s}" for s in spans)]
    return _table(header, rows) if rows else ""


def _value(name: str, metric: Mapping | None, change: Mapping | None) -> str:
    if metric is None or metric["mean"] is None:
        missing = metric is not None and metric["n_item"] == metric["n_failed"] + metric["n_infeasible"]
        return ("infeasible" if metric["n_infeasible"] else "all failed") if missing else ""
    digits = 1 if name.startswith("length_") else 2
    text = f"{metric['mean']:.{digits}f}"
    if metric["low"] is not None:
        text += f" [{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]"
    return text if change is None or change["difference"] is None else f"{text} ({change['difference']:+.2f})"


def _class(cell: str) -> str:
    """Numbers are aligned to the right."""
    return " class=n" if re.match(r"[-+]?\d", cell) else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th{_class(str(below))}>{html.escape(str(cell))}</th>" for cell, below in zip(header, rows[0], strict=True))
    lines = ["".join(f"<td{_class(str(cell))}>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
