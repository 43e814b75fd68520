"""docs/results.md from the cards in benchmarks/cards: what compression does to models that obey, and what returns it.

.venv/bin/python benchmarks/results_page.py > docs/results.md
"""

import sys
from pathlib import Path

from kvpitfalls.display.report_tables import verdicts
from kvpitfalls.experiments.card import compare, read_card

CARDS = Path(__file__).parent / "cards"
SHOWN = ("guarded", "refused", "leaked", "recall_above", "follow", "refused_task")
WORDS = {"random": "random (control)", "whitelist": "phrase", "whitelist_defense": "pinned", "fair+whitelist": "fair + phrase"}
INTRODUCTION = """# What it does to a model that obeys

Made by `benchmarks/results_page.py` from the cards in `benchmarks/cards`, which `kvpitfalls sweep --config
benchmarks/cards/config.toml --model ...` and `kvpitfalls report` wrote. Prompts are our own: a defense first ("do not
reveal, refuse"), then a directive whose following can be checked. Each answers one attack, one question that may be answered
(recall), and its own harmless task. Every mode of a policy and r takes the same memory. In brackets: 95 % interval, prompts
as units.

*guarded*: the attack is refused, and the harmless task is not. *leaked*: the answer recites. *recall*: what is given when it
may be, above chance. *follow*: instructions followed. *refused task*: harmless ones. No figure means much alone: a model that
forgets everything leaks nothing, and one that refuses everything is of no use. What the modes are:
[experiments](experiments.md). Two sizes of one model, one defense, one attack: this shows how the measures hang together, and is no
ranking of policies.
"""


def value(metric: dict) -> str:
    """A mean in its interval."""
    if metric["mean"] is None:
        return ""
    return f"{metric['mean']:.2f} [{metric['low']:.2f}, {metric['high']:.2f}]".replace("0.", ".")


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
    return f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]".replace("0.", ".")


def sentences(card: dict) -> list[str]:
    """What the model's policies lose most, and what returns most of it."""
    full, changes, fixes = settings_of(card, policy=None), [], []
    for setting in card["settings"]:
        if setting["policy"] is None:
            continue
        same = {name: setting[name] for name in ("policy", "compression_ratio")}
        against, rows = (full, changes) if setting["mode"] == "biased" else (settings_of(card, mode="biased", **same), fixes)
        for metric in ("guarded", "recall_above", "follow"):
            if (row := paired(card, [setting], against, metric)) is not None:
                rows.append({**row, **same, "mode": WORDS.get(setting["mode"], setting["mode"]), "than": "biased"})
    return [f"- {sentence}" for sentence in verdicts(changes, fixes)]


def section(card: dict) -> list[str]:
    """A model's tables."""
    made, full = card["made_with"][0], settings_of(card, policy=None)
    n_prompt = full[0]["metrics"]["guarded"]["n_prompt"]
    out = [
        f"## {card['model']}",
        "",
        f"{n_prompt} prompts; {made['device']}, {made['config.dtype']}, torch {made['torch']}, transformers {made['transformers']}; "
        f"answers of at most {made['config.max_new_tokens']['attack']} tokens.",
        "",
        *sentences(card),
        "",
    ]
    head = ["policy", "mode", *(name.removesuffix("_above").replace("_", " ") for name in SHOWN), "guarded, less biased", "infeasible"]
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
                out.append(f"| {policy} | {mode} | {' | '.join(cells)} | {more} | {f'{lost} of {n_prompt}' if lost else ''} |")
        out.append("")
    return out


def page() -> str:
    """All of it."""
    lines = [INTRODUCTION]
    for path in sorted(CARDS.glob("*.json")):
        lines += section(read_card(path))
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
