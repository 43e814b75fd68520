"""The report of a sweep: CSV files, figures, and one HTML page that needs nothing else."""

import csv
import functools
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from ..experiments.card import cards
from ..experiments.comparisons import composites, differences, fixes, flips, losses, rank_correlations
from ..experiments.metrics import GROUP, ITEM, SETTING, check_records, each_once, joined
from ..experiments.records import META, RECORDS, read_meta, read_records
from ..experiments.summary import attack_families, following, groups, other_scripts, summarize
from ..files import whole
from . import plots
from . import report_tables as tables_of
from .markup import visible
from .progress import progress

_FEW = 20  # prompts: fewer say little
_FIGURES = {
    "outcomes": "Outcomes against the share removed",
    "probes": "Likelihood of given answers against the share removed",
    "kept": "What is kept of each instruction",
    "joint": "Leak against following, along the ratio",
    "ranks": "Whether the kinds of instructions keep their order",
}


def sweep_folders(folder: str | Path) -> list[Path]:
    """The folder itself, or its subfolders, that hold records of a sweep."""
    if folder == "":  # as a path it is the current folder
        raise ValueError("folder is ''; expected the path of a folder")
    folder = Path(folder)
    folders = [f for f in (folder, *sorted(p for p in folder.glob("*") if p.is_dir())) if (f / RECORDS).is_file()]
    if not folders:
        raise FileNotFoundError(
            f"{folder} has no {RECORDS}, and none of its subfolders has; expected the output folder of a sweep"
        )
    return folders


def write_report(folder: str | Path) -> dict:
    """Write ``report/`` into the folder of a sweep.

    Parameters
    ----------
    folder : path
        What ``kvpitfalls sweep --output`` was given.

    Returns
    -------
    dict
        ``page`` (path of index.html), ``cards`` (path of each model's card), ``items`` (planned), ``recorded``,
        ``failed``, ``infeasible``, ``unread`` (a sentence, if some answers are in letters that ROUGE does not see; else
        empty), ``cells`` (as :func:`kvpitfalls.experiments.summary.summarize`).

    Raises
    ------
    FileNotFoundError, ValueError, ImportError
    """
    records, metas, n_read = _read(folder)
    cells, changes, ranked = summarize(records), differences(records), rank_correlations(records)
    families = attack_families(records)
    compared = {"fixes": fixes(records), "losses": losses(records), "flips": flips(records)}
    tables = {
        "summary": _flat(cells),
        "differences": changes,
        "following": following(records),
        "rank_correlation": ranked,
        "composite": composites(records),
        **compared,
        "families": [{"family": f["family"], **row} for f in families for row in _flat([{**f, "kept": {}}])],
        "failures": [{**{n: r[n] for n in ITEM}, "error": r["error"]} for r in records if r["error"]],
        "infeasible": [{**{n: r[n] for n in ITEM}, "reason": r["infeasible"]} for r in records if r.get("infeasible")],
    }
    out = Path(folder) / "report"
    out.mkdir(exist_ok=True)
    for name, rows in tables.items():
        if rows:
            _write(out / f"{name}.csv", _csv(rows))
    paths = _write_cards(out, cards(records, list(metas.values())))
    drawn = _draw(cells, ranked, out)
    figures = [svg for of_group in drawn.values() for _, svg in of_group]
    _remove_older(
        out, tables, {*(name for name, rows in tables.items() if rows), *(p.stem for p in [*paths, *figures])}
    )
    n_planned = sum(meta["items"] for meta in metas.values())
    facts: dict[str, int | str] = {"recorded": len(records), "unread": other_scripts(records)}
    facts["items"] = len(records) + n_planned - n_read  # an item of two sweeps is one
    facts |= {"failed": len(tables["failures"]), "infeasible": len(tables["infeasible"])}
    of_groups = {**compared, "families": families, "changes": changes}
    _write(out / "index.html", _page(facts, metas, cells, of_groups, tables, records, drawn))
    return {"page": str(out / "index.html"), "cards": [str(path) for path in paths], **facts, "cells": cells}


def _read(folder: str | Path) -> tuple[list[Mapping], dict[str, dict], int]:
    """The records of a folder's sweeps, each item once; what each sweep was, by its file; and how many records they
    have."""
    parts = sweep_folders(folder)
    names = [part.relative_to(folder) for part in parts]
    read = {str(name / RECORDS): read_records(part) for name, part in zip(names, parts, strict=True)}
    if not any(read.values()):
        raise ValueError(f"{folder} holds no whole record yet; expected at least one batch of a sweep")
    for of_part in read.values():
        check_records(of_part)
    metas = {str(name / META): read_meta(part) for name, part in zip(names, parts, strict=True)}
    return each_once(read), metas, sum(map(len, read.values()))


def _write_cards(out: Path, of_models: Sequence[Mapping]) -> list[Path]:
    paths = [out / ("card.json" if len(of_models) == 1 else f"card_{n}.json") for n in range(1, len(of_models) + 1)]
    for path, card in zip(paths, of_models, strict=True):
        _write(path, json.dumps(card, separators=(",", ":")))
    return paths


def _write(path: Path, text: str) -> None:
    """Whole, or not at all: an earlier report is not cut off by a disk that is full."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # an error may quote anything


def _remove_older(out: Path, tables: Iterable[str], written: set[str]) -> None:
    """Remove what a report before this one wrote and this one did not, such as the failures of a sweep that was run
    anew, and no file of anybody else."""
    of_us = rf"card(_\d+)?\.json|({'|'.join(tables)})\.csv|({'|'.join(_FIGURES)})(_\w+)?_\d+\.(svg|png)"
    for path in sorted(out.iterdir()):
        if re.fullmatch(of_us, path.name) and path.stem not in written:
            path.unlink()


def _flat(cells: Sequence[Mapping]) -> list[dict]:
    """One row per setting and metric, and per setting and kept span."""
    rows = []
    for cell in cells:
        setting = {name: cell[name] for name in SETTING}
        rows += [{**setting, "metric": name, **summary} for name, summary in cell["metrics"].items()]
        for span, share in cell["kept"].items():
            empty = dict.fromkeys(("n_item", "n_failed", "n_infeasible", "low", "high"))
            known = {"mean": share, "n_prompt": cell["n_prompt_kept"][span]}
            rows.append({**setting, "metric": f"kept_{span}", **empty, **known})
    return rows


def _csv(rows: Sequence[Mapping]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _draw(cells, ranked, out: Path) -> dict[tuple, list[tuple[str, Path]]]:
    """Group -> (name, path of the SVG) of its figures, which are written as SVG and PNG: of the same cells the same
    bytes."""
    drawn: dict[tuple, list[tuple[str, Path]]] = {}
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
                path = out / f"{name}_{number}.svg"
                for to in (path, path.with_suffix(".png")):
                    with whole(to) as temporary:
                        plots.save(figure, temporary, to)
                drawn.setdefault(group, []).append((name, path))
    return drawn


def _inline(path: Path) -> Markup:
    """An SVG file as a part of a page."""
    svg = path.read_text(encoding="utf-8")
    return Markup(svg[svg.index("<svg") :])


def _by_policy(cells: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """Ending of a figure's name -> its cells: all, or where modes are too many to be told apart, those of each
    policy."""
    policies = list(dict.fromkeys(cell["policy"] for cell in cells if cell["policy"] is not None))
    if not policies or len({cell["mode"] for cell in cells if cell["policy"] is not None}) <= plots.FEW_MODES:
        return {"": list(cells)}
    return {f"_{policy}": [cell for cell in cells if cell["policy"] in (None, policy)] for policy in policies}


def _title(figure: str) -> str:
    """A figure's title in words, from its name."""
    name, _, policy = figure.partition("_")
    return _FIGURES[name] + (f", {policy}" if policy else "")


def _page(facts, metas, cells, of_groups: Mapping, tables: Mapping, records, drawn) -> str:
    """The page; ``of_groups`` are shown group by group, and of ``tables`` those that are of all groups together."""
    moved = {tuple(c[n] for n in (*SETTING, "metric")): c for c in of_groups["changes"]}
    of_records = groups(joined(records))  # as the cells' own groups
    shown = []
    for group, of_group in groups(cells).items():
        mine = {name: groups(rows).get(group, []) for name, rows in of_groups.items()}
        one = {
            "title": ", ".join(f"{name} {part}" for name, part in zip(GROUP, group, strict=True)),
            "tables": [table for table in _tables(of_group, mine, moved) if table.rows],
            "figures": [{"title": _title(name), "svg": _inline(path)} for name, path in drawn.get(group, [])],
            "verdicts": tables_of.verdicts(mine["changes"], mine["fixes"]),
            "answers": tables_of.answer_tables(of_records[group]),
            "about_answers": tables_of.about_answers(of_records[group]),
        }
        shown.append(one)
    after = [tables_of.composite_table(tables["composite"])] if tables["composite"] else []
    after += [tables_of.failure_table(tables["failures"])] if tables["failures"] else []
    state = (
        f"{facts['recorded']} of {facts['items']} items recorded, {facts['failed']} failed, {facts['infeasible']} "
        "infeasible"
    )
    return _template().render(
        state=state,
        is_bad=facts["failed"] or facts["recorded"] < facts["items"],
        notes=[note for note in (_few(cells), facts["unread"]) if note],
        verdicts=[
            f"{one['title']}: {verdict}" if len(shown) > 1 else verdict for one in shown for verdict in one["verdicts"]
        ],
        terms=tables_of.terms(cells),
        groups=shown,
        after=after,
        metas=[(name, json.dumps(meta, indent=1)) for name, meta in metas.items()],
    )


def _tables(cells, mine: Mapping, moved: Mapping) -> list[tables_of.Table]:
    """All of a group, in order; those without rows included."""
    several = len({cell["family"] for cell in mine["families"]}) > 1
    return [
        tables_of.outcome_table(cells, moved),
        *([tables_of.family_table(mine["families"])] if several else []),
        tables_of.fixes_table(mine["fixes"]),
        tables_of.loss_table(mine["losses"]),
        tables_of.flip_table(mine["flips"]),
        tables_of.length_table(cells),
        tables_of.probe_table(cells, moved),
        tables_of.turn_table(cells),
    ]


def _few(cells) -> str:
    """A sentence where there are too few prompts to say much; empty where there are enough."""
    n = max((cell["n_prompt"] for cell in cells), default=0)
    if n >= _FEW:
        return ""
    return (
        f"At most {n} prompt{'' if n == 1 else 's'} a setting: too few to say much about a model, and intervals are "
        "as wide as that."
    )


@functools.cache
def _template() -> jinja2.Template:
    text = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    strict = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_visible_but_lines
    )
    return strict.from_string(text)


def _visible_but_lines(value: object) -> object:
    """What the page shows, with what would be invisible or turn other text around spelled out: answers and names are
    anybody's. Their lines and tabs stay."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"[^\n\t]+", lambda part: visible(part[0]), value)
