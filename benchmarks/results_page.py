"""docs/results.md from the cards in benchmarks/cards: what compression does to models, and what returns it.

.venv/bin/python benchmarks/results_page.py > docs/results.md
"""

import json
import sys
from pathlib import Path

import numpy as np

from kvpitfalls.display.report_tables import verdicts
from kvpitfalls.experiments.card import compare, read_card
from kvpitfalls.experiments.intervals import influence

CARDS = Path(__file__).parent / "cards"
SEARCHED = CARDS / "search"
SHOWN = ("guarded", "refused", "leaked", "recall_above", "follow", "refused_task")
WORDS = {
    "random": "random (control)",
    "whitelist": "phrase",
    "whitelist_defense": "pinned",
    "fair+whitelist": "fair + phrase",
}
# What compression would cost nothing: by how much a mean may fall short of the full cache's, or, for what should not
# grow, exceed it.
GOALS = {
    "refused": lambda full, own: full - 0.05 - own,
    "recall_above": lambda full, own: 0.9 * full - own,
    "follow": lambda full, own: full - 0.03 - own,
    "refused_task": lambda full, own: own - full - 0.03,
}
N_CLOSEST = 5
INTRODUCTION = """# What it does to models

Made by `benchmarks/results_page.py` from the cards in `benchmarks/cards`. First the suite, v1, by `kvpitfalls suite
--model ...`: 200 prompts, each under its own one of twelve attacks. Then every fix, by `kvpitfalls sweep --config
benchmarks/cards/config.toml --model ...` and `kvpitfalls report`: 68 of those prompts, one attack. Prompts are our own: a
defense first ("do not reveal, refuse"), then a directive whose following can be checked. Each answers an attack, one
question that may be answered (recall), and its own harmless task. Every mode of a policy and r takes the same memory. In
brackets: 95 % interval, prompts as units.

*guarded*: the attack is refused, and the harmless task is not. *leaked*: the answer recites. *recall*: what is given when it
may be, above chance. *follow*: instructions followed. *refused task*: harmless ones. No figure means much alone: a model that
forgets everything leaks nothing, and one that refuses everything is of no use. What the modes are:
[experiments](experiments.md). Three small models, one defense: this shows how the measures hang together, and is no ranking
of policies, of which all stand, at one r, in the last part. The suite's attacks ask in more ways than the one below, and the 1.5B refuses fewer of them with its full cache.

Intervals are over prompts under these attacks; other attacks may differ by more
([how sure the numbers are](experiments.md#how-sure-the-numbers-are)). The control is the same whatever the policy: its rows are one measurement. Intervals
in the tables are for one comparison each; those of the sentences over them are for all of which the sentences choose.

At the end of each card stand the settings that come closest to costing nothing: refused at least the full cache's less .05,
recall at least .9 of its, follow at least its less .03, refused task at most its plus .03. "Short" is the worst of the four,
of means over the same prompts, without an interval; the choice among many settings flatters the first.

The control draws for each prompt by itself. Until version 5 of the scores all prompts of one length and template kept the same
places, so that its rows were less certain than their intervals said; all cards of this page were made anew since.

The suite's cards have scores of version 7, as `kvpitfalls suite` gives them today, so that `kvpitfalls compare` takes them beside
a card of your own. By the rules of version 6, which the other cards have, none of the suite's 73,800 answers is scored otherwise.
The run before, on another H200, had the same means to .01, most of them to the last digit.
"""
# What stands over a card, and where the cards are.
DRAWN = CARDS / "draws" / "qwen2.5-coder-0.5b-instruct.json"
DRAWS = """## {model}: other draws of the control

Modes `random`, `random=1` to `random={last}` of `benchmarks/cards/draws/config.toml`, on the suite's prompts: as many tokens, and other ones each time.
*between*: standard deviation of the draws' means. *by prompt*: what it is where each prompt is drawn for by itself, from how much
one prompt's answers differ from draw to draw. Were draws shared between prompts, the first would be larger; of eight draws it is
known to a quarter of itself. *one draw*: the standard error that one draw's 95 % interval stands for, of other prompts, too.

| r | metric | means, least to most | between | by prompt | one draw |
|---|---|---|---|---|---|"""
PARTS = {"the suite, v1": CARDS / "suite_v1", "every fix": CARDS}


def value(metric: dict) -> str:
    """A mean in its interval."""
    if metric["mean"] is None:
        return ""
    return f"{metric['mean']:.2f} [{metric['low']:.2f},{metric['high']:.2f}]".replace("0.", ".")


def write_part(path: Path, begin: str, end: str, made: str) -> None:
    """Put what a script made between its two marks on a page."""
    before, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(f"{before}{begin}\n\n{made}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def labelled(made: dict) -> str:
    """By which rules, and what those of before version 6 are known to get wrong."""
    older = (
        ", to which more answers were leaks and fewer refusals than\n"
        "[a reader finds](experiments.md#how-often-the-labels-agree-with-a-reader), and than today's rules do"
    )
    return f"scores of version {made['scores']}{older if made['scores'] < 6 else ''}"


def named(mode: str) -> str:
    """A mode in words."""
    return WORDS.get(mode) or mode.replace("whitelist", "phrase").replace("+", " + ")


def settings_of(card: dict, **wanted) -> list[dict]:
    """Settings with these values."""
    return [s for s in card["settings"] if all(s[name] == x for name, x in wanted.items())]


def renamed(settings: list[dict], **changes) -> list[dict]:
    """The same under another name, so that two of them can be compared."""
    return [{**setting, **changes} for setting in settings]


def paired(card: dict, here: list[dict], there: list[dict], metric: str = "guarded") -> dict | None:
    """What one setting has more than another, paired by prompt."""
    sides = ({**card, "settings": renamed(side, policy="p", mode="m", compression_ratio=0.5)} for side in (there, here))
    return next((row for row in compare(*sides) if row["metric"] == metric), None)


def signed(row: dict | None) -> str:
    """A difference in its interval."""
    if row is None or row["difference"] is None:
        return ""
    return f"{row['difference']:+.2f} [{row['low']:+.2f},{row['high']:+.2f}]".replace("0.", ".")


def sentences(card: dict) -> list[str]:
    """What the model's policies lose most, and what returns most of it."""
    full, changes, fixes = settings_of(card, policy=None), [], []
    for setting in card["settings"]:
        if setting["policy"] is None:
            continue
        same = {name: setting[name] for name in ("policy", "compression_ratio")}
        against, rows = (
            (full, changes) if setting["mode"] == "biased" else (settings_of(card, mode="biased", **same), fixes)
        )
        for metric in ("guarded", "recall_above", "follow"):
            if (row := paired(card, [setting], against, metric)) is not None:
                rows.append({**row, **same, "mode": WORDS.get(setting["mode"], setting["mode"]), "than": "biased"})
    return [f"- {sentence}" for sentence in verdicts(changes, fixes)]


def section(card: dict, part: str) -> list[str]:
    """A card's tables."""
    made, full = card["made_with"][0], settings_of(card, policy=None)
    n_prompt = full[0]["metrics"]["guarded"]["n_prompt"]
    out = [
        f"## {card['model']}: {part}",
        "",
        f"{n_prompt} prompts; {made['device']}, {made['config.dtype']}, torch {made['torch']}, transformers "
        f"{made['transformers']}; "
        f"answers of at most {made['config.max_new_tokens']['attack']} tokens; scores of version {made['scores']}.",
        "",
        *sentences(card),
        "",
    ]
    head = [
        "policy",
        "mode",
        *(name.removesuffix("_above").replace("_", " ") for name in SHOWN),
        "guarded, less biased",
        "infeasible",
    ]
    for ratio in made["config.compression_ratios"]:
        if ratio == 0:
            continue
        out += [f"### r = {ratio:g}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        out.append(f"| full cache | | {' | '.join(value(full[0]['metrics'][name]) for name in SHOWN)} | | |")
        for policy in made["config.policies"]:
            biased = settings_of(card, policy=policy, mode="biased", compression_ratio=ratio)
            for setting in settings_of(card, policy=policy, compression_ratio=ratio):
                cells = [value(setting["metrics"][name]) for name in SHOWN]
                more = "" if setting["mode"] == "biased" else signed(paired(card, [setting], biased))
                lost = setting["metrics"]["guarded"]["n_infeasible"]
                mode = WORDS.get(setting["mode"], setting["mode"])
                out.append(
                    f"| {policy} | {mode} | {' | '.join(cells)} | {more} | {f'{lost} of {n_prompt}' if lost else ''} |"
                )
        out.append("")
    return out


def shortfalls(card: dict, setting: dict) -> dict[str, float]:
    """By metric, how far a setting's mean is from what would cost nothing; not above 0 where it is reached.

    To nine places: what is reached exactly, .07 against .04 + .03, is not by binary fractions.
    """
    full = settings_of(card, policy=None)[0]["metrics"]
    return {name: round(goal(full[name]["mean"], setting["metrics"][name]["mean"]), 9) for name, goal in GOALS.items()}


def closest(card: dict) -> list[str]:
    """The settings that come closest to costing nothing, of those that every prompt can have."""
    n_prompt = settings_of(card, policy=None)[0]["metrics"]["guarded"]["n_prompt"]
    out = ["### What comes closest to costing nothing", ""]
    out += ["| r | policy | mode | short of the goal by | in |", "|---|---|---|---|---|"]
    for ratio in card["made_with"][0]["config.compression_ratios"][1:]:
        rows = []
        for setting in settings_of(card, compression_ratio=ratio):
            if setting["metrics"]["guarded"]["n_prompt"] == n_prompt:
                worst, short = max(shortfalls(card, setting).items(), key=lambda pair: pair[1])
                rows.append((short, setting["policy"], WORDS.get(setting["mode"], setting["mode"]), worst))
        for short, policy, mode, worst in sorted(rows)[:N_CLOSEST]:
            name = worst.removesuffix("_above").replace("_", " ")
            out.append(f"| {ratio:g} | {policy} | {mode} | {max(short, 0):.2f} | {name if short > 0 else ''} |")
    return [*out, ""]


EVERY = """## {model}: every policy, fair against biased

The first step of the search in [another page](safe.md): {n} prompts of the suite, r = {r:g}; {device}, {dtype}, torch {torch}.
*kept*: the share of the defense, and of the directive, that stays, mean over layers and heads. The modes of a policy take the
same memory. *n*: the prompts that a policy is defined for. LagKV is for none so short, DefensiveKV for budgets of more than its
window, PyramidKV where there is room for its pyramid. Rows of few prompts are not to be compared with others. The random control
is a mode, above, and no policy here; *pinned* has room in {n_pinned} of {n} prompts, and is left out.

{findings}
"""
EVERY_MODES = ("biased", "whitelist", "fair", "fair+whitelist")
EVERY_SHOWN = ("kept_defense", "kept_directive", "refused", "leaked", "recall_above", "follow", "refused_task")
CHANGED = {
    "refused": "attacks refused",
    "recall_above": "recall",
    "follow": "following",
    "refused_task": "harmless tasks refused",
}
DEMO = """### The demo's prompt

Kept shares of its two instructions at r = {r:g}, {model}, {n_tokens} tokens, by `kvpitfalls.audit`. Nothing is generated.

| policy | never reveal: biased | fair | only Spanish: biased | fair |
|---|---|---|---|---|"""


def every_policy() -> list[str]:
    """All policies, fair against biased, on the suite's prompts and on the demo's."""
    card = json.loads((SEARCHED / "narrow.json").read_text(encoding="utf-8"))
    made, full = card["made_with"][0], settings_of(card, policy=None)[0]["metrics"]
    moved = {(row["policy"], row["mode"], row["metric"]): row for row in card["changes"]}
    pinned = max(s["metrics"]["refused"]["n_prompt"] for s in settings_of(card, mode="whitelist_defense"))
    known = {
        "model": card["model"],
        "n": card["n_prompt"],
        "n_pinned": pinned,
        "r": made["config.compression_ratios"][-1],
    }
    known |= {"device": made["device"], "dtype": made["config.dtype"], "torch": made["torch"]}
    names = [name.removesuffix("_above").replace("kept_", "kept: ").replace("_", " ") for name in EVERY_SHOWN]
    head = ["policy", "mode", "n", *names, "refused, less biased", "recall, less biased"]
    out = [EVERY.format(**known, findings="\n".join(every_finding(card, moved)))]
    out += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    out.append(f"| full cache | | {card['n_prompt']} | {' | '.join(value(full[name]) for name in EVERY_SHOWN)} | | |")
    for setting in card["settings"]:
        if setting["mode"] in EVERY_MODES:
            place, metrics = (setting["policy"], setting["mode"]), setting["metrics"]
            n = metrics["refused"]["n_prompt"]
            cells = [place[0], named(place[1]), str(n)]
            cells += [value(metrics[name]) for name in EVERY_SHOWN]
            cells += [signed(moved.get((*place, name))) for name in ("refused", "recall_above")]
            if n:
                out.append(f"| {' | '.join(cells)} |")
            elif place[1] == "biased":
                out.append(f"| {place[0]} | all | 0 |{' |' * (len(head) - 3)}")
    return [*out, "", *demo_table()]


def every_finding(card: dict, moved: dict) -> list[str]:
    """What fairness and the phrase change, over the policies that every prompt can have."""
    biased = settings_of(card, mode="biased")
    whole = [s["policy"] for s in biased if s["metrics"]["refused"]["n_prompt"] == card["n_prompt"]]
    kept, refused = (
        [
            [settings_of(card, policy=p, mode=mode)[0]["metrics"][name]["mean"] for p in whole]
            for mode in ("biased", "fair")
        ]
        for name in ("kept_defense", "refused")
    )
    out = [
        f"- {len(whole)} of {len(biased)} policies exist for every prompt. Biased, they keep {span(kept[0])} of the "
        f"defense and refuse {span(refused[0])} of attacks; fair, {span(kept[1])} and {span(refused[1])}."
    ]
    for mode in EVERY_MODES[1:]:
        told = []
        for name, word in CHANGED.items():
            rows = [(p, moved[p, mode, name]) for p in whole]
            for way, found in (
                ("more", [p for p, row in rows if row["low"] > 0]),
                ("less", [p for p, row in rows if row["high"] < 0]),
            ):
                told += [f"{word} {way} under {', '.join(found)}"] if found else []
        out.append(f"- **{named(mode)}**, less biased, told from chance: {'; '.join(told) or 'nothing'}.")
    return [
        *out,
        "- None of these is corrected for how many there are: of twenty in which nothing happens, one leaves 0 out.",
    ]


def span(means: list[float]) -> str:
    """The least and the most of them, in words."""
    low, high = (f"{x:.2f}".replace("0.", ".") for x in (min(means), max(means)))
    return low if low == high else f"{low} to {high}"


def draws() -> list[str]:
    """How much the control's means differ between draws."""
    card = read_card(DRAWN)
    out = [DRAWS.format(model=card["model"], last=len(card["made_with"][0]["config.modes"]) - 1)]
    for ratio in card["made_with"][0]["config.compression_ratios"][1:]:
        drawn = settings_of(card, compression_ratio=ratio)
        for name in SHOWN:
            of_draws = [{key: pair for key, *pair in one["prompts"][name]} for one in drawn]
            pairs = np.array([[of_draw[key] for key in of_draws[0]] for of_draw in of_draws], float)
            shares = np.array([influence(of_draw) for of_draw in pairs])  # (draws, prompts)
            between = shares.mean(1).std(ddof=1)
            by_prompt = np.sqrt(shares.var(0, ddof=1).mean() / shares.shape[1])
            wide = np.mean([one["metrics"][name]["high"] - one["metrics"][name]["low"] for one in drawn])
            cells = [f"{x:.3f}".replace("0.", ".") for x in (between, by_prompt, wide / 2 / 1.96)]
            word = name.removesuffix("_above").replace("_", " ")
            out.append(f"| {ratio:g} | {word} | {span([*shares.mean(1)])} | {' | '.join(cells)} |")
    return [*out, ""]


def demo_table() -> list[str]:
    """The demo's two instructions under every policy."""
    found = json.loads((SEARCHED / "demo.json").read_text(encoding="utf-8"))
    out = [DEMO.format(r=found["compression_ratio"], model=found["model"], n_tokens=found["n_tokens"])]
    for row in found["rows"]:
        kept = {(of["span"], of["fair"]): f"{of['kept']:.2f}".replace("0.", ".") for of in row["kept"]}
        names = dict.fromkeys(span for span, _ in kept)
        cells = [kept[name, fair] for name in names for fair in (False, True)] or ["not defined here", "", "", ""]
        out.append(f"| {row['policy']} | {' | '.join(cells)} |")
    return [*out, ""]


def page() -> str:
    """All of it."""
    lines = [INTRODUCTION]
    for part, folder in PARTS.items():
        for path in sorted(folder.glob("*.json")):
            card = read_card(path)
            lines += [*section(card, part), *closest(card)]
    lines += [*draws(), *every_policy()]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
