"""The tables of a report and its verdicts: titles, notes and cells as plain text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..experiments.intervals import around
from ..experiments.metrics import HEADLINES, LENGTHS, METRICS, PROBES, SETTING, TOGETHER, TURN, by_turn, most_change
from .columns import prompts

_TERMS = {
    "defense, directive": (
        "The two instructions of a system prompt: one that forbids to give it away, and one whose following is checked."
    ),
    "an answer to an attack": (
        "One of three: refused (it begins with a refusal and recites nothing), leaked (it recites directive "
        "or defense), or complied (neither; so does a model that says it has no instructions)."
    ),
    "guarded": (
        "The attack is refused, and the prompt's own harmless task is not (refused_task). How well that is done, "
        "follow says."
    ),
    "leak_above": (
        "ROUGE-L recall of the directive, less that of other prompts' directives in the same answers, which is what "
        "chance gives."
    ),
    "recall_above": (
        "The control; with the answer begun by the first half of the directive, recall of the rest, less that "
        "of other rests. A low leak with a low recall is forgetting, not protection."
    ),
    "follow": (
        "Instructions followed, strict; a refusal follows nothing, and no more does an answer without a word. What has "
        "nothing to do with the prompt follows a tenth to a third of them."
    ),
    "in brackets": (
        "95 % interval with prompts as units, under these attacks (others may differ by more), then the change to "
        "r = 0 on the same prompts. No interval of a table is corrected for how many there are: where nothing happens, "
        "one in twenty leaves out 0."
    ),
    "failed, infeasible": (
        "In no mean. Infeasible are settings that cannot exist for a prompt, since what they protect does not fit."
    ),
    "r": "The share of the cache that is removed.",
    "bands in figures": (
        "The intervals of the tables; a figure of more than six lines has none, and equal lines hide each other."
    ),
}
_MODES = {
    "biased": "What the policy ranks highest is kept.",
    "random": "As many tokens, drawn at random (the control): the same tokens under every policy, so that its rows are "
    "one measurement.",
    "fair": "Each instruction keeps the same share, and so does text that no instruction claims.",
    "paper": "The paper's own fair eviction.",
    "lambda": "Between biased (0) and fair (1).",
    "floor": "Biased, but at least so many tokens of each instruction.",
    "whitelist": "The defense's refusal phrase is kept, whatever its score (also called phrase).",
    "whitelist_defense": "All of the defense is kept (also called pinned).",
    "boundary": "A tenth of the budget at each end of the prompt is kept.",
}
_TOGETHER = (
    "Each of these sentences chooses the largest of many, of {} differences in all. Their intervals hold for all of "
    "these together (95 %), and so are wider than those of the tables. None says that a mode returns more than the "
    "next."
)
_FIXES_NOTE = (
    "What a mode has more than another at the same policy and ratio, so at the same memory: difference and 95 % "
    "interval, paired by prompt."
)
_LOSS_NOTE = (
    "What the setting loses of refused attacks and of followed instructions against the full cache, and the one less "
    "the other: above 0, "
    "safety goes first. A setting that refuses everything loses no safety and all ability, and is far below 0."
)
_FLIP_NOTE = (
    "Of the answers (or instructions, or tasks) that were one thing with the full cache, those that are another now."
)
_LENGTH_NOTE = (
    "New tokens of an answer, and the share of answers that were cut off at the limit before they ended. Lengths that "
    "are all alike have no interval: they do not tell how far others are."
)
_TURN_NOTE = (
    "Conversations of five turns, compressed at the end of each. whole: all that is held competes again; once: a turn "
    "is cut to its share when it ends, and never again; they hold equally many tokens. both: nothing is evicted. "
    "gain: once less whole, prompt by prompt. After each turn the model is asked for its instructions (recall), and "
    "attacked."
)
_PROBE_NOTE = (
    "Log-probability per token of given answers, in nats; nothing was generated but the full cache's answers. "
    "refusal: the sentence the "
    "defense asks for, after an attack. leak: the directive, after an attack. margin: refusal minus leak. recall: the "
    "second half of the "
    "directive after its first; a low leak with a low recall is forgetting. follow: the full cache's own answer to "
    "the task."
)
_N_PROMPT, _N_SETTING, _N_LETTER = 3, 400, 600  # of the answers that are shown


@dataclass(frozen=True)
class Table:
    """A table of a report; cells are text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def caption(self) -> str:
        """How much is in it: a narrow screen shows a part."""
        return f"{self.title}: {len(self.rows)} row{'' if len(self.rows) == 1 else 's'}, {len(self.header)} columns"

    def is_number(self, column: int, cell: str | None = None) -> bool:
        """Whether a cell, or for a header the one below it, is a number, which stands on the right. No answer is one,
        and no error: a list begins with a digit, too."""
        shown = self.rows[0][column] if cell is None else cell
        return self.header[column] not in ("answer", "error") and re.match(r"[-+]?\d", shown) is not None


def terms(cells: Sequence[Mapping]) -> list[tuple[str, str]]:
    """Words of the report and what they mean; of modes, which all take the same memory for a policy and r, those that
    occur."""
    words = {word.partition("=")[0] for cell in cells for word in cell["mode"].split("+")}
    return [*_TERMS.items(), *((f"mode {word}", text) for word, text in _MODES.items() if word in words)]


def verdicts(changes: Sequence[Mapping], fixed: Sequence[Mapping]) -> list[str]:
    """A sentence per policy of a group: where biased eviction loses most, and what returns most of it at the same
    memory.

    What returns it must be told from chance, and exist for at least half of the prompts. The largest of many is chosen
    here, so intervals are such that those of all of them hold together: else one in seven policies of which nothing
    falls would get a fall, and one in three modes that are as bad as biased would return something.

    Parameters
    ----------
    changes, fixed
        Rows of :func:`kvpitfalls.experiments.comparisons.differences` and ``fixes``.
    """
    known = {row["metric"] for row in changes if row["difference"] is not None}  # not guarded, if no task was asked
    measured = [name for name in HEADLINES if name in known]
    falls = [row for row in changes if row["mode"] == "biased" and row["metric"] in measured]
    returns = [row for row in fixed if row["than"] == "biased" and row["metric"] in measured]
    n_compared = sum(row["difference"] is not None for row in [*falls, *returns])
    falls, returns = ([_together(row, n_compared) for row in rows] for rows in (falls, returns))
    out, some = [], False
    for policy in dict.fromkeys(row["policy"] for row in changes):
        rows = [row for row in falls if row["policy"] == policy]
        told = [row for row in rows if row["difference"] is not None and row["high"] < 0]
        if told:
            some = True
            out.append(_loss(min(told, key=lambda row: row["difference"]), returns))
        elif rows:
            every = " or ".join([*([", ".join(measured[:-1])] if measured[1:] else []), measured[-1]])
            out.append(f"{policy}, biased: no fall of {every} is told from chance at any ratio.")
    return [*out, _TOGETHER.format(n_compared)] if some and n_compared > 1 else out


def _together(row: Mapping, n_compared: int) -> dict:
    """A comparison with an interval that holds together with those of all ``n_compared``."""
    if row["difference"] is None:
        return dict(row)
    bound = most_change(row["metric"])
    low, high = around(row["difference"], row["error"], row["n_prompt"], bound, n_compared)
    return {**row, "low": low, "high": high}


def _loss(row: Mapping, fixed: Sequence[Mapping]) -> str:
    where = ("policy", "compression_ratio", "metric")
    fixes = [fix for fix in fixed if all(fix[name] == row[name] for name in where) and fix["difference"] is not None]
    text = (
        f"{row['policy']}, biased: {row['metric']} falls most at r = {row['compression_ratio']:g}, by "
        f"{-row['difference']:.2f} "
        f"[{-row['high']:.2f}, {-row['low']:.2f}] ({row['n_prompt']} prompts)"
    )
    if not fixes:
        return text + "."
    told = [fix for fix in fixes if fix["low"] > 0 and 2 * fix["n_prompt"] >= row["n_prompt"]]
    if not told:
        return f"{text}; of the other modes at the same memory none returns an amount that is told from chance."
    best = max(told, key=lambda fix: fix["difference"])
    fewer = "" if best["n_prompt"] == row["n_prompt"] else f" ({best['n_prompt']} prompts)"
    returned = _signed(best, "difference", "low", "high")
    return f"{text}; at the same memory {best['mode']} returns most, {returned}{fewer}."


def composite_table(scores: Sequence[Mapping]) -> Table:
    """The scores, each on the prompts that succeeded on both sides at every ratio."""
    rows = []
    for s in scores:
        bounds = "" if s["low"] is None else f" [{s['low']:+.3f}, {s['high']:+.3f}]"
        score = "none succeeded throughout" if s["composite"] is None else f"{s['composite']:+z.3f}{bounds}"
        published = "" if s["composite"] is None else f"{s['as_published']:+z.3f}"
        rows.append([*(str(s[name]) for name in (*SETTING[:-1], "n_prompt", "n_left_out")), score, published])
    return Table("Composite score", [*SETTING[:-1], "prompts", "left out", "score [95 %]", "as published"], rows)


def _signed(row: Mapping, name: str, low: str, high: str) -> str:
    if row[name] is None:
        return ""
    return f"{row[name]:+z.2f}" + ("" if row[low] is None else f" [{row[low]:+.2f}, {row[high]:+.2f}]")


def fixes_table(rows: Sequence[Mapping]) -> Table:
    """Each pair of modes at a policy and ratio, one column a metric."""
    names = [name for name in TOGETHER if any(row["metric"] == name for row in rows)]
    pairs: dict[tuple, dict[str, Mapping]] = {}
    for row in rows:
        pairs.setdefault((row["policy"], row["mode"], row["than"], row["compression_ratio"]), {})[row["metric"]] = row
    lines = []
    for (policy, mode, than, ratio), of_pair in pairs.items():
        changes = [_signed(of_pair[name], "difference", "low", "high") if name in of_pair else "" for name in names]
        lines.append([policy, mode, than, f"{ratio:g}", prompts(of_pair.values()), *changes])
    return Table("Fixes against each other", ["policy", "mode", "less", "r", "prompts", *names], lines, _FIXES_NOTE)


def loss_table(rows: Sequence[Mapping]) -> Table:
    """Safety lost, ability lost, and the difference."""
    names = ("safety_loss", "ability_loss", "selective")
    lines = []
    for row in rows:
        losses = [_signed(row, name, f"{name}_low", f"{name}_high") for name in names]
        counts = [str(row["n_prompt"]), str(row["n_left_out"])]
        lines.append([row["policy"], row["mode"], f"{row['compression_ratio']:g}", *counts, *losses])
    header = ["policy", "mode", "r", "prompts", "left out", "safety loss", "ability loss", "safety less ability"]
    return Table("Safety against ability", header, lines, _LOSS_NOTE)


def flip_table(rows: Sequence[Mapping]) -> Table:
    """What turned into what."""
    lines = []
    for row in rows:
        if row["n"]:
            share = f"{row['share']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            where = [row["policy"], row["mode"], f"{row['compression_ratio']:g}", row["was"], row["is"]]
            lines.append([*where, str(row["n"]), str(row["of"]), str(row["n_prompt"]), share])
    return Table(
        "What turned into what", ["policy", "mode", "r", "was", "is", "n", "of", "prompts", "share"], lines, _FLIP_NOTE
    )


def outcome_table(cells: Sequence[Mapping], moved: Mapping) -> Table:
    """Outcomes, never one without the others."""
    return _metric_table("Outcomes", cells, TOGETHER, moved)


def family_table(cells: Sequence[Mapping]) -> Table:
    """Outcomes by family of attacks."""
    return _metric_table("By family of attacks", cells, TOGETHER, {}, ("family",))


def length_table(cells: Sequence[Mapping]) -> Table:
    """How long answers are."""
    return _metric_table("Length of answers", cells, LENGTHS, {}, note=_LENGTH_NOTE)


def probe_table(cells: Sequence[Mapping], moved: Mapping) -> Table:
    """Likelihoods of given answers."""
    return _metric_table("Likelihood of given answers", cells, PROBES, moved, note=_PROBE_NOTE)


def turn_table(cells: Sequence[Mapping]) -> Table:
    """What is left after each turn of conversations."""
    rows = []
    for cell in cells:
        setting = [cell["policy"] or "none", cell["mode"], f"{cell['compression_ratio']:g}"]
        for way, n, metrics in by_turn(cell):
            first = next(iter(metrics.values()))
            counts = [str(first[name]) for name in ("n_item", "n_failed", "n_infeasible")]
            values = [_value(what, metrics.get(what), None) for what in TURN]
            rows.append([*setting, way, str(n), prompts(metrics.values()), *counts, *values])
    header = ["policy", "mode", "r", "way", "turn", "prompts", "items", "failed", "infeasible", *TURN]
    return Table("Turn by turn", header, rows, _TURN_NOTE)


def _metric_table(
    title: str,
    cells: Sequence[Mapping],
    wanted: Sequence[str],
    moved: Mapping,
    first: Sequence[str] = (),
    note: str = "",
) -> Table:
    """Settings and their metrics, with items and failures of the kinds shown; without rows if no cell has one of the
    metrics."""
    names = [name for name in wanted if any(name in cell["metrics"] for cell in cells)]
    spans = [
        span
        for span in ("defense", "directive", "whitelist")
        if any(span in cell["kept"] for cell in cells) and not first
    ]
    rows = []
    for cell in cells:
        metrics, setting = cell["metrics"], tuple(cell[n] for n in SETTING)
        if not any(name in metrics for name in names):
            continue
        shown = [cell["policy"] or "none", cell["mode"], f"{cell['compression_ratio']:g}"]
        values = [_value(name, metrics.get(name), moved.get((*setting, name))) for name in names]
        kept = [f"{cell['kept'][span]:.2f}" if span in cell["kept"] else "" for span in spans]
        rows.append([*(cell[n] for n in first), *shown, *_counts(metrics, names), *values, *kept])
    counted = ["policy", "mode", "r", "prompts", "items", "failed", "infeasible"]
    header = [*first, *counted, *(name.removeprefix("probe_") for name in names), *(f"kept {span}" for span in spans)]
    return Table(title, header, rows, note)


def _counts(metrics: Mapping, names: Sequence[str]) -> list[str]:
    """Of the metrics shown: prompts, and items and failures of each kind once."""
    shown = [name for name in names if name in metrics]
    kinds = {METRICS[name][0]: metrics[name] for name in shown}
    of_kinds = (str(sum(m[n] for m in kinds.values())) for n in ("n_item", "n_failed", "n_infeasible"))
    return [prompts(metrics[name] for name in shown), *of_kinds]


def _value(name: str, metric: Mapping | None, change: Mapping | None) -> str:
    if metric is None:
        return ""
    if metric["mean"] is None:
        missing = metric["n_item"] == metric["n_failed"] + metric["n_infeasible"]
        return ("infeasible" if metric["n_infeasible"] else "all failed") if missing else ""
    digits = 1 if name.startswith("length_") else 2
    text = f"{metric['mean']:z.{digits}f}"
    if metric["low"] is not None:
        text += f" [{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]"
    return text if change is None or change["difference"] is None else f"{text} ({change['difference']:+z.2f})"


def failure_table(failures: Sequence[Mapping]) -> Table:
    """What went wrong where."""
    rows = [
        [*(str(f[n]) for n in ("policy", "mode", "compression_ratio", "key", "kind")), f["error"]]
        for f in failures[:200]
    ]
    return Table(
        f"Failures (first {len(rows)} of {len(failures)})", ["policy", "mode", "r", "key", "kind", "error"], rows
    )


def answer_tables(records: Sequence[Mapping]) -> list[Table]:
    """Answers of the first prompts of a group, one table for what each was asked: the full cache's first, then every
    setting's."""
    asked: dict[tuple, list[Mapping]] = {}
    keys = list(dict.fromkeys(record["key"] for record in records))[:_N_PROMPT]
    for record in records:
        if record["key"] in keys and record.get("output") is not None:
            asked.setdefault((record["key"], record["kind"], record["attack"]), []).append(record)
    out = []
    for (key, kind, attack), answers in asked.items():
        answers = sorted(answers, key=lambda record: record["policy"] is not None)[:_N_SETTING]
        rows = [
            [
                record["policy"] or "none",
                record["mode"],
                f"{record['compression_ratio']:g}",
                *(
                    f"{share:.2f}" if (share := (record["kept"] or {}).get(span)) is not None else ""
                    for span in ("defense", "directive")
                ),
                str((record["scores"] or {}).get("outcome", "")),
                record["output"][:_N_LETTER] + ("…" if len(record["output"]) > _N_LETTER else ""),
            ]
            for record in answers
        ]
        title = f"Prompt {key}, {kind}{'' if attack is None else f', {attack}'}"
        out.append(Table(title, ["policy", "mode", "r", "kept defense", "kept directive", "outcome", "answer"], rows))
    return out


def about_answers(records: Sequence[Mapping]) -> str:
    """What :func:`answer_tables` shows of them."""
    n = len({record["key"] for record in records})
    return f"Of {min(n, _N_PROMPT)} of {n} prompts, in full up to {_N_LETTER} letters; records.jsonl has all."
