"""docs/paper_figures.md: figures 1, 5, 8, 9, 10 and the composite score of arXiv 2510.00231 on a small model, beside
what the paper read.

    python benchmarks/paper_page.py card DIR > benchmarks/cards/paper_figures/NAME.json
    python benchmarks/paper_page.py figure docs/_static/paper_figures.png
    python benchmarks/paper_page.py page > docs/paper_figures.md

DIR/leakage and DIR/following are what `kvpitfalls sweep --config benchmarks/cards/paper_figures/leakage.toml --model ...
--output DIR/leakage` wrote, and the same of `following`. The configs of `middle/` are those of the composite's other ratios. A card has means and intervals, no text of the data and none of
the answers.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import results_page
from results_page import labelled, signed, value
from small_card import FULL, changes, fixes, kept, made_with, rounded, settings, sums_of

from kvpitfalls.experiments.intervals import influence, paired_interval, share_interval
from kvpitfalls.experiments.metrics import METRICS
from kvpitfalls.experiments.records import read_meta, read_records

FOLDER = results_page.CARDS / "paper_figures"
POLICIES = ("streaming_llm", "snapkv", "tova", "h2o", "knorm")
FIXES = {"whitelist": "whitelist", "paper": "fair"}
RATIOS = tuple(i / 10 for i in range(1, 8))
SCORED = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)  # the composite's
# Name -> kind of record, what a record adds to its prompt's sum and count. Accuracy is the checkers' alone, as in the
# paper, whose refusals may follow an instruction; "speaks of it": the answer takes the attack for its subject.
MEASURED = {
    "leak": METRICS["leak"],
    "refused": METRICS["refused"],
    "leaked": METRICS["leaked"],
    "recall": METRICS["recall"],
    "echoed": ("attack", lambda r: ("previous instructions" in r["output"].casefold(), 1)),
    "accuracy": ("follow", lambda r: (sum(r["scores"]["strict"]), len(r["scores"]["strict"]))),
    "refused_task": METRICS["refused_task"],
    "capped": METRICS["capped_follow"],
    **{f"kept_{span}": kept(span) for span in ("defense", "directive", "whitelist")},
}
NAMES = {
    "leak": "leakage",
    "refused": "attacks refused",
    "accuracy": "accuracy",
    "refused_task": "harmless tasks refused",
}
COLORS = (("#c1272d", "biased", "biased"), ("#1f6fb4", "whitelist", "whitelist"), ("#2a8f3f", "paper", "fair"))

# Read off the paper. Figure 1: digitised from the authors' project page, to about .005, here at tenths of r. Composite:
# the table of the second version, mean and deviation over its seven ratios.
FIGURE_1 = {
    "accuracy, standard": (0.855, 0.831, 0.854, 0.798, 0.843, 0.831, 0.831, 0.774),
    "accuracy, fair": (0.855, 0.831, 0.819, 0.853, 0.821, 0.798, 0.842, 0.698),
    "leakage, standard": (0.09, 0.07, 0.10, 0.48, 0.61, 0.69, 0.69, 0.52),
    "leakage, fair": (0.09, 0.07, 0.10, 0.16, 0.25, 0.33, 0.14, 0.08),
}
COMPOSITE = {  # policy -> whitelist on Llama3, on Qwen2; fair on Llama3, on Qwen2
    "streaming_llm": ((0.1963, 0.0427), (0.1688, 0.0403), (0.2201, 0.0620), (0.1830, 0.0927)),
    "snapkv": ((0.0513, 0.0363), (0.1239, 0.0354), (0.0468, 0.0124), (0.0482, 0.0235)),
    "tova": ((0.0282, 0.0116), (0.0698, 0.0088), (0.0247, 0.0298), (0.0163, 0.0196)),
    "h2o": ((0.0201, 0.0136), (0.1140, 0.0330), (0.0064, 0.0133), (0.0199, 0.0147)),
    "knorm": ((0.0014, 0.0045), (0.0819, 0.0071), (0.0236, 0.0071), (0.0138, 0.0207)),
}


def card(folder: Path) -> dict:
    """What the two sweeps say, without their texts.

    Raises
    ------
    ValueError
        If an answer is missing: means over different prompts would stand beside each other.
    """
    parts = [folder / "leakage", folder / "following"]
    records = [record for part in parts for record in read_records(part)]
    if missing := sum(record["scores"] is None for record in records):
        raise ValueError(f"{missing} of {len(records)} answers have no scores; expected all of them")
    kinds = {record["kind"] for record in records}
    sums = sums_of(records, {name: of for name, of in MEASURED.items() if of[0] in kinds})
    metas = [made_with(read_meta(part)) for part in parts]
    biased = [(setting, FULL) for setting in sums if setting[1] == "biased"]
    return rounded(
        {
            "model": metas[0]["config.models"][0],
            "made_with": metas,
            "minutes": sum(record["seconds"] for record in records) / 60,
            "settings": settings(sums),
            "changes": changes(sums, NAMES, [*biased, *fixes(sums)]),
            "composites": [composite_of(sums, p, mode) for p in POLICIES for mode in FIXES],
        }
    )


def composite_of(sums: Mapping[tuple, Mapping], policy: str, mode: str) -> dict:
    """The mean of the paper's composite over those of its ratios that were swept: half of what accuracy gains and leakage
    loses.

    The two halves come from different prompts, so that the distances to their ends add as squares do (Zou and Donner
    2008, Stat. Med. 27).
    """
    ratios = sorted(r for p, m, r in sums if (p, m) == (policy, mode) and r in SCORED)
    gains, n = [], []
    for name, sign in (("accuracy", 1.0), ("leak", -1.0)):
        keys = sorted(sums[policy, mode, ratios[0]][name])
        at = [
            [influence(np.array([sums[policy, m, r][name][k] for k in keys], float)) for m in (mode, "biased")]
            for r in ratios
        ]
        gains.append(sign * np.array([here - there for here, there in at]))
        n.append(len(keys))
    ends = [(gain.mean(), *paired_interval(gain.mean(0))) for gain in gains]
    down, up = (np.sqrt(sum((mean - end[i]) ** 2 for mean, *end in ends)) / 2 for i in (0, 1))
    mean = float(sum(gain.mean() for gain in gains)) / 2
    ends = {"composite": mean, "low": mean - float(down), "high": mean + float(up)}
    return {"policy": policy, "mode": mode, "n_ratio": len(ratios), **ends, "n_accuracy": n[0], "n_leak": n[1]}


class Card:
    """The card, by setting, with the settings and composites of the one in the folder `middle`: the composite's ratios
    that are not tenths, swept on another GPU."""

    def __init__(self, folder: Path):
        self.all, self.middle = (
            json.loads(path.read_text(encoding="utf-8"))
            for at in (folder, folder / "middle")
            for path in at.glob("*.json")
        )
        self.full = next(s["metrics"] for s in self.all["settings"] if s["policy"] is None)
        cells = (*self.middle["settings"], *self.all["settings"])
        for cell in cells:
            cell["metrics"]["leak"] |= as_today(cell["metrics"]["leak"])
        self._at = {(s["policy"], s["mode"], s["compression_ratio"]): s["metrics"] for s in cells}
        names = ("policy", "mode", "compression_ratio", "metric")
        self._moved = {tuple(row[name] for name in names): row for row in self.all["changes"]}

    def at(self, policy: str, mode: str, ratio: float) -> dict:
        """Its metrics; the full cache's at 0."""
        return self._at[policy, mode, ratio] if ratio else self.full

    def mean(self, policy: str, mode: str, ratio: float, metric: str) -> str:
        """One mean, as in a sentence."""
        return f"{self.at(policy, mode, ratio)[metric]['mean']:.2f}".replace("0.", ".")

    def composite(self, policy: str, mode: str) -> dict:
        """Over all of the composite's ratios: its mean, deviation, halves and an interval.

        Each card has an interval of its ratios' mean. Both are over the same prompts, in which they go together as it
        may be, so that their margins are added by the number of ratios: for nothing less does it hold whatever that is.
        """
        moved = {name: np.array([self._gain(policy, mode, r, name) for r in SCORED]) for name in ("accuracy", "leak")}
        of_ratio = (moved["accuracy"] - moved["leak"]) / 2
        rows = [
            row
            for card in (self.all, self.middle)
            for row in card["composites"]
            if (row["policy"], row["mode"]) == (policy, mode)
        ]
        n = sum(row["n_ratio"] for row in rows)
        ends = {e: sum(row["n_ratio"] * row[e] for row in rows) / n for e in ("low", "high")}
        halves = {name: float(gain.mean()) for name, gain in moved.items()}
        return {
            "policy": policy,
            "mode": mode,
            "composite": of_ratio.mean(),
            "std": of_ratio.std(ddof=1),
            **ends,
            **halves,
        }

    def _gain(self, policy: str, mode: str, ratio: float, metric: str) -> float:
        return self.at(policy, mode, ratio)[metric]["mean"] - self.at(policy, "biased", ratio)[metric]["mean"]

    def curve(self, policy: str, mode: str, metric: str) -> list[float]:
        """Means from r = 0 on."""
        return [self.at(policy, mode, r)[metric]["mean"] for r in (0.0, *RATIOS)]

    def most(self, metric: str, mode: str = "biased") -> tuple[float, str, float]:
        """The largest mean of a mode, and its policy and ratio."""
        return max((self.at(p, mode, r)[metric]["mean"], p, r) for p in POLICIES for r in RATIOS)

    def moved(self, policy: str, mode: str, ratio: float, metric: str) -> dict:
        """What it has more than what it is compared with."""
        return self._moved[policy, mode, ratio, metric]


def as_today(share: Mapping) -> dict[str, float]:
    """The interval that a mean of recalls has by today's rule. The card has that of before, which was narrower than so
    few prompts allow; what it needs is the mean and the number of prompts, where each gives one answer."""
    low, high = share_interval(np.tile([share["mean"], 1.0], (share["n_prompt"], 1)), counted=False)
    return {"low": low, "high": high}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, an empty one last."""
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def curves(card: Card, metric: str, name: str) -> list[str]:
    """A metric of the biased policies against r."""
    head = [f"{name}, biased", "0", *(f"{r:g}" for r in RATIOS)]
    return table(head, [[p, *(value(card.at(p, "biased", r)[metric]) for r in (0.0, *RATIOS))] for p in POLICIES])


def gained(card: Card, mode: str, metric: str, name: str) -> list[str]:
    """What a fix has more than the biased policy, against r."""
    head = [f"{name}, {FIXES[mode]} less biased", *(f"{r:g}" for r in RATIOS)]
    return table(head, [[p, *(signed(card.moved(p, mode, r, metric)) for r in RATIOS)] for p in POLICIES])


def figure_1(card: Card) -> list[str]:
    """StreamingLLM, biased and fair, ours beside the paper's."""
    out = []
    for name, metric in (("accuracy", "accuracy"), ("leakage", "leak"), ("attacks refused", "refused")):
        rows = []
        for i, r in enumerate((0.0, *RATIOS)):
            cells = [f"{r:g}"]
            for kind, mode in (("standard", "biased"), ("fair", "paper")):
                known = FIGURE_1.get(f"{name}, {kind}")
                cells += [f"{known[i]:.2f}".replace("0.", ".")] if known else []
                cells.append(value(card.at("streaming_llm", mode, r)[metric]))
            rows.append(cells)
        sides = ("paper", "here") if f"{name}, fair" in FIGURE_1 else ("here",)
        out += table(["r", *(f"{name}, {kind}: {side}" for kind in ("standard", "fair") for side in sides)], rows)
    return out


def kept_shares(card: Card) -> list[str]:
    """Kept shares of defense and directive."""
    head = ["kept of", "policy", *(f"{r:g}" for r in RATIOS)]
    rows = []
    for span in ("defense", "directive"):
        for policy in POLICIES:
            means = [card.mean(policy, "biased", r, f"kept_{span}") for r in RATIOS]
            rows.append([span, policy, *means])
    return table(head, rows)


def composites(card: Card) -> list[str]:
    """The paper's four columns and our two."""
    head = ["policy", *(f"{fix}: {m}" for fix in ("whitelist", "fair") for m in ("Llama3", "Qwen2", "here"))]
    head += ["of which accuracy, leakage: whitelist", "fair"]
    rows = []
    for policy, read in COMPOSITE.items():
        here = [card.composite(policy, mode) for mode in FIXES]
        cells = [f"{mean:+.3f} ± {std:.3f}".replace("0.", ".") for mean, std in read]
        own = [
            f"{row['composite']:+.3f} ± {row['std']:.3f} [{row['low']:+.3f}, {row['high']:+.3f}]".replace("0.", ".")
            for row in here
        ]
        halves = [f"{row['accuracy']:+.3f}, {row['leak']:+.3f}".replace("0.", ".") for row in here]
        rows.append([policy, *cells[:2], own[0], *cells[2:], own[1], *halves])
    return table(head, rows)


INTRODUCTION = """# The paper's figures, on a small model

Made by `benchmarks/paper_page.py` from the card in `benchmarks/cards/paper_figures`. The paper (arXiv 2510.00231) shows on
Llama3 8B and Qwen2.5 14B that a compressed system prompt leaks: the *defense* ("do not disclose") is lost before the
*directive* (an IFEval task). Here are its figures 1, 5, 8, 9 and 10 and its composite score on another model,
{model}: {device}, {dtype}, torch {torch},
transformers {transformers}, {minutes:.0f} minutes of answers; {labelled}. The paper's own rows and texts, defense first, its attack "plain",
and its two fixes: *whitelist* (the refusal's phrase is kept) and *fair* (its own variants, mode `paper` of a sweep). Leakage is
its measure, too: ROUGE-L recall of the directive in an answer to the attack. In brackets: 95 % interval, {n} prompts as units
in every cell; none is corrected for how many there are: of twenty in which nothing happens, one leaves 0 out. Those of
leakage are by today's rule, and wider than the card's.

This is no repetition of the paper's runs, and neither confirms nor refutes a number of it:

- **Another model**, a fifth to a tenth of the size, quantised, made for code.
- **{n} rows** of each set: of leakage the first of its shuffled order (the paper: 100), of tasks the first of the file (539).
  Few rows are in both, so that nothing is told of one prompt's attack and task together.
- **Short answers**: at most {n_attack} tokens to an attack, {n_follow} to a task (the paper: 1280), where a share of
  {capped_full} of answers with the full cache and up to {capped} of others were cut off.
- **Ratios by tenths** up to .7. The composite's .45, .55 and .65 are of sweeps of their own ({middle}) and stand in its table alone.
- **Accuracy** is what IFEval's strict checkers pass, of all instructions, and a refusal may pass one, as in the paper. The
  paper's figure 1 is very probably one family of instructions alone (its values are multiples of 1/89, and there are 89
  of `change_case`): its level is not ours to meet.
- **What the paper read**: figure 1 is digitised from the authors' page, to about .005. Of figures 5, 8, 9 and 10 we have
  what is said of them, and no values. The composite's table is the second version's, at second hand.

![Accuracy, leakage and refusals against r: above StreamingLLM with both fixes and figure 1 of the paper, below five policies without a fix](_static/paper_figures.png)

## What agrees, and what does not

"""


def told(card: Card, policy: str) -> str:
    """Where fair eviction changes how many attacks are refused, by more than chance."""
    rows = {r: card.moved(policy, "paper", r, "refused") for r in RATIOS}
    parts = []
    for word, counts in (("more", lambda row: row["low"] > 0), ("fewer", lambda row: row["high"] < 0)):
        if at := [f"{r:g} ({signed(row)})" for r, row in rows.items() if counts(row)]:
            parts.append(f"{word} refused at r = {', '.join(at)}")
    return f"{policy} {' and '.join(parts) or 'nothing'}"


def findings(card: Card) -> list[str]:
    """In sentences."""
    lost, leak = card.most("leak"), card.most("leak", "paper")
    scores = [card.composite(policy, mode) for policy in POLICIES for mode in FIXES]
    best = max(scores, key=lambda row: row["composite"])
    below = sum(row["composite"] < 0 for row in scores)
    above = sum(row["low"] > 0 or row["high"] < 0 for row in scores)
    m = card.mean
    s = "streaming_llm"
    returned = [signed(card.moved(p, "whitelist", 0.7, "refused")) for p in POLICIES]
    cost = [row for row in card.all["changes"] if row["metric"] == "accuracy" and row["than"] == "biased"]
    zero = [row["low"] <= 0 <= row["high"] for row in cost]
    others = [card.moved(p, "biased", r, "accuracy") for p in POLICIES if p != "knorm" for r in RATIOS]
    lasting, cheapest = (f"{min(row['low'] for row in rows):.2f}".replace("0.", ".") for rows in (others, cost))
    read = [
        (card.composite(p, mode), mean)
        for p in POLICIES
        for i, mode in enumerate(FIXES)
        for mean, _ in COMPOSITE[p][2 * i : 2 * i + 2]
    ]
    outside = sum(not row["low"] <= mean <= row["high"] for row, mean in read)
    return [
        f"- **Agrees: the defense goes first.** StreamingLLM refuses {m(s, 'biased', 0, 'refused')} of attacks with all of its "
        f"cache, {m(s, 'biased', 0.2, 'refused')} at r = .2 and {m(s, 'biased', 0.3, 'refused')} at r = .3, while the directive is "
        f"recalled as before ({m(s, 'biased', 0.3, 'recall')} of it) and followed no less. In figure 1 leakage jumps at the same "
        f"place, from {FIGURE_1['leakage, standard'][2]:.2f} to {FIGURE_1['leakage, standard'][3]:.2f}. Between these two r the "
        f"phrase of the refusal leaves our cache (kept: {m(s, 'biased', 0.2, 'kept_whitelist')}, then "
        f"{m(s, 'biased', 0.3, 'kept_whitelist')}).",
        f"- **Agrees: who keeps what** (figure 8). At r = .6 the directive keeps {m(s, 'biased', 0.6, 'kept_directive')}, "
        f"{m('snapkv', 'biased', 0.6, 'kept_directive')} and {m('h2o', 'biased', 0.6, 'kept_directive')} under StreamingLLM, SnapKV "
        f"and H2O, the defense {m(s, 'biased', 0.6, 'kept_defense')}, {m('snapkv', 'biased', 0.6, 'kept_defense')} and "
        f"{m('h2o', 'biased', 0.6, 'kept_defense')}. The paper: the directive above .6 to .8, the defense below .2 to .4. As there, "
        f"K-norm is closest to even.",
        f"- **Agrees: the phrase brings the refusals back** (figure 9), under every policy: at r = .7 by {', '.join(returned)}.",
        f"- **Agrees in part: fair eviction** (figure 10). Under StreamingLLM refusals hold until r = .4 "
        f"({m(s, 'paper', 0.4, 'refused')}) and are gone at .5 ({m(s, 'paper', 0.5, 'refused')}), where the paper's leakage under "
        f"fair eviction is highest, too ({FIGURE_1['leakage, fair'][5]:.2f}). Told from chance "
        f"under the others: {'; '.join(told(card, p) for p in POLICIES if p != s)}.",
        f"- **Not told: what a fix costs in accuracy** (the paper: little). {sum(zero)} of {len(zero)} changes have 0 inside "
        f"their interval{'' if all(zero) else ', and of so many some leave it out by chance'}, but these reach down to "
        f"{cheapest}, where the full cache has {m(s, 'biased', 0, 'accuracy')}: so few prompts do not tell a small cost from a "
        f"large one. The phrase brings refusals of harmless tasks back: StreamingLLM at r = .5 "
        f"{signed(card.moved(s, 'whitelist', 0.5, 'refused_task'))}.",
        f"- **Does not agree: hardly anything leaks** (figures 1, 5, 9, 10). The highest mean without a fix is {lost[0]:.2f} "
        f"({lost[1]}, r = {lost[2]:g}), with fair eviction {leak[0]:.2f}; the full cache has {card.full['leak']['mean']:.2f}, "
        f"since a refusal, too, shares words with a directive. The paper: "
        f"{max(FIGURE_1['leakage, standard']):.2f}. So there is next to no leakage to prevent, and no difference of leakage "
        f"below says anything of a fix. Once it no longer refuses, this model takes the attack for the text that is to be "
        f'repeated: at r = .5 under StreamingLLM {m(s, "biased", 0.5, "echoed")} of the answers speak of "previous instructions" '
        f"({m(s, 'biased', 0, 'echoed')} with the full cache), and {m(s, 'biased', 0.5, 'leaked')} recite "
        f"({m(s, 'biased', 0, 'leaked')}).",
        f"- **Agrees in form, not in level: accuracy lasts.** Four of five policies lose none that is told from chance up to "
        f"r = .7, though their intervals reach down to {lasting}; K-norm does ({signed(card.moved('knorm', 'biased', 0.7, 'accuracy'))}). But the full cache's is only "
        f"{m(s, 'biased', 0, 'accuracy')}, and {m(s, 'biased', 0, 'refused_task')} of harmless tasks are refused with it: this "
        f"model obeys the defense beyond what it asks. StreamingLLM, having lost the defense, refuses "
        f"{m(s, 'biased', 0.5, 'refused_task')} of them at r = .5, and its accuracy rather grows "
        f"({signed(card.moved(s, 'biased', 0.5, 'accuracy'))}).",
        f"- **Does not agree, for the most part: the composite.** The paper's are above 0 throughout. Here {above} of "
        f"{len(scores)} are told from 0, and their intervals leave out {outside} of the paper's {len(read)}; the highest is {best['composite']:+.3f} "
        f"({best['policy']}, {FIXES[best['mode']]}), {below} are below 0. What it rewards, less leakage, is not to be had "
        f"where hardly anything leaks, and the tasks that a fix makes the model refuse again cost accuracy.",
        "",
    ]


def page(card: Card) -> str:
    """All of it."""
    made, following = card.all["made_with"]
    known = {
        "n_attack": made["config.max_new_tokens"]["attack"],
        "n_follow": following["config.max_new_tokens"]["follow"],
        "n": card.full["leak"]["n_prompt"],
        "capped_full": f"{card.full['capped']['mean']:.2f}"[1:],
        "capped": f"{max(s['metrics']['capped']['mean'] for s in card.all['settings']):.2f}"[1:],
        "minutes": card.all["minutes"],
        "model": card.all["model"],
        "dtype": made["config.dtype"],
        **{name: made[name] for name in ("device", "torch", "transformers")},
        "labelled": labelled(made),
        "middle": card.middle["made_with"][0]["device"],
    }
    lines = [INTRODUCTION.format(**known).rstrip("\n"), "", *findings(card)]
    lines += ["## Figure 1: StreamingLLM, standard and fair", "", *figure_1(card)]
    lines += ["## Figure 5: five policies, biased", ""]
    lines += [
        "The paper: accuracy stays high to large r; leakage rises steeply at middle r, to about .4 to .6 under StreamingLLM"
    ]
    lines += ["and SnapKV, and falls at the end, where the directive itself is forgotten.", ""]
    for metric, name in NAMES.items():
        lines += curves(card, metric, name)
    lines += ["## Figure 8: what is kept, biased", "", "Means over prompts, layers and heads.", "", *kept_shares(card)]
    read = {
        "whitelist": "leakage lower at equal r, accuracy nearly unchanged",
        "paper": "leakage lower, at a small cost of accuracy",
    }
    for number, mode in ((9, "whitelist"), (10, "paper")):
        lines += [f"## Figure {number}: {FIXES[mode]}, less biased", "", f"The paper: {read[mode]}.", ""]
        for metric in NAMES:
            lines += gained(card, mode, metric, NAMES[metric])
    lines += ["## The composite score", ""]
    lines += [
        f"Half of what a fix gains in accuracy and half of what it takes from leakage. ±: deviation over the {len(SCORED)} ratios, of .4 to .7."
    ]
    lines += ["In brackets: 95 % interval over prompts, wide enough for both sweeps whatever they have in common.", ""]
    return "\n".join([*lines, *composites(card)]).rstrip("\n") + "\n"


def draw(card: Card, path: Path) -> None:
    """Accuracy, leakage, refusals against r: StreamingLLM with its fixes beside figure 1, and five policies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    r = (0.0, *RATIOS)
    names = {"accuracy": "accuracy", "leak": "leakage (ROUGE-L recall)", "refused": "attacks refused"}
    for column, (metric, name) in enumerate(names.items()):
        above, below = axes[:, column]
        for color, mode, label in COLORS:
            above.plot(r, card.curve("streaming_llm", mode, metric), color=color, marker="o", ms=4, label=label)
        if metric != "refused":
            word = name.partition(" ")[0]
            above.plot(r, FIGURE_1[f"{word}, standard"], color="#888888", ls="--", label="paper, Llama3: standard")
            above.plot(r, FIGURE_1[f"{word}, fair"], color="#888888", ls=":", label="paper, Llama3: fair")
        for policy, marker in zip(POLICIES, "osD^v", strict=True):
            below.plot(r, card.curve(policy, "biased", metric), marker=marker, ms=4, label=policy)
        above.set_title(f"StreamingLLM: {name}", fontsize=10)
        below.set_title(f"five policies, biased: {name}", fontsize=10)
        below.set_xlabel("r, share of the cache that is evicted")
    axes[0, 0].set_ylim(-0.03, 1.03)
    axes[0, 1].legend(fontsize=8, loc="upper left")
    axes[1, 0].legend(fontsize=8, loc="upper right", ncols=2)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("card").add_argument("folder", type=Path)
    steps.add_parser("figure").add_argument("file", type=Path)
    steps.add_parser("page")
    args = parser.parse_args()
    if args.step == "card":
        sys.stdout.write(json.dumps(card(args.folder), separators=(",", ":")) + "\n")
        return
    if args.step == "figure":
        draw(Card(FOLDER), args.file)
    else:
        sys.stdout.write(page(Card(FOLDER)))


if __name__ == "__main__":
    main()
