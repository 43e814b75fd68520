"""Is there a setting at r = 0.5 that costs nothing? A search over all policies and mixtures of the fixes, on prompts
that do not choose for themselves.

    python benchmarks/safe_search.py search DIR --model M --device cuda --dtype bfloat16 --batch-size 1024
    python benchmarks/safe_search.py causes DIR --model M --device cuda --dtype bfloat16
    python benchmarks/safe_search.py recall DIR --model M      # on a CPU, minutes
    python benchmarks/safe_search.py card DIR     # what DIR has, into benchmarks/cards/search
    python benchmarks/safe_search.py demo         # kept shares of the demo's prompt, into the same folder

`search` runs, or resumes, three steps on the suite's 200 prompts, every second one for each half. Narrow: every policy
under every mode of MODES, on the first prompts of the train half. Finalists: the best of those, on the whole train
half. Held out: the best of these, on the other half, once. What a setting is judged by is its worst shortfall of the
goal in results_page.py, over refused, recall, follow and refused task. `--narrow benchmarks/cards/search/narrow.json`
begins with the second step, by what the first one found. `causes`, after it, puts one instruction's evicted rows back,
on held-out prompts, and measures how far the full cache's answers return. `recall` does so for the control's answers,
which begin with the directive's first half, and writes its card at once. Search and causes write JSON into DIR; each
policy's sweep of a step is a folder there, and where some are whole `search` goes on with the others. `safe_page.py`
tells what came of it.
"""

import argparse
import json
from pathlib import Path

import results_page
from small_card import FULL, WHERE, changes, fixes, kept, made_with, rounded, settings, sums_of

from kvpitfalls.audits.leakage import RECALL_QUESTION
from kvpitfalls.audits.retention import audit
from kvpitfalls.errors import BudgetError
from kvpitfalls.experiments import demo
from kvpitfalls.experiments.config import SweepConfig
from kvpitfalls.experiments.corpus import SUITE, load_corpus
from kvpitfalls.experiments.effects import effects
from kvpitfalls.experiments.metrics import METRICS, TOGETHER, by_setting, counts
from kvpitfalls.experiments.records import read_meta, read_records
from kvpitfalls.experiments.scenario import Scenario
from kvpitfalls.experiments.sources import load_model
from kvpitfalls.experiments.sweep import sweep
from kvpitfalls.hf.load import load
from kvpitfalls.policies import policy_names

SEARCHED = results_page.SEARCHED
MEASURED = {
    **{name: METRICS[name] for name in TOGETHER},
    "kept_defense": kept("defense"),
    "kept_directive": kept("directive"),
}
RATIO = 0.5
N_NARROW, N_FINALISTS, N_HELD_OUT, N_CAUSES = 32, 12, 3, 24
# What stands beside the held-out settings, under the same policies.
USUAL = ("biased", "whitelist", "fair", "fair+whitelist")
MODES = (
    *USUAL,
    "whitelist_defense",
    "sinks=4+whitelist",
    "boundary+whitelist",
    "floor=4",
    "floor=4+whitelist",
    "lambda=0.5",
    "lambda=0.5+whitelist",
    "fair+absorb+whitelist",
    "fair+directive=2+whitelist",
    "fair+directive=4+whitelist",
)


def write_halves(folder: Path) -> None:
    """``train.jsonl`` and ``held_out.jsonl``."""
    rows = load_corpus(SUITE).rows
    for name, half in (("train", rows[0::2]), ("held_out", rows[1::2])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in half)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def run(folder: Path, step: str, half: str, n_prompts: int | None, pairs, where: dict) -> dict:
    """Answers of some (policy, mode) pairs on some prompts; the card of all of them."""
    for policy in dict.fromkeys(policy for policy, _ in pairs):
        config = SweepConfig(
            dataset=str(folder / f"{half}.jsonl"),
            n_prompts=n_prompts,
            orders=["defense_first"],
            policies=[policy],
            modes=[mode for one, mode in pairs if one == policy],
            compression_ratios=[RATIO],
            attacks=["verbatim", "translation", "role_play", "formatting"],
            attacks_per_prompt=1,
            max_new_tokens={"attack": 64, "recall": 64, "follow": 96},
            **where,
        )
        sweep(config, folder / f"{step}_{policy}")
    return card(folder, step)


def records_of(folder: Path, step: str) -> tuple[list[dict], list[dict]]:
    """All records of a step, and what its sweeps were made with. Each has the full cache's answers: the first's
    stand."""
    parts = sorted(folder.glob(f"{step}_*"))
    of_parts = [read_records(part) for part in parts]
    records = [r for i, of_part in enumerate(of_parts) for r in of_part if i == 0 or r["policy"] is not None]
    return records, [read_meta(part) for part in parts]


def complete(records) -> set:
    """Prompts that have every answer of every setting."""
    wanted = {(r["policy"], r["mode"], r["kind"]) for r in records}
    have: dict = {}
    for r in records:
        have.setdefault(r["key"], set()).add((r["policy"], r["mode"], r["kind"]))
    return {key for key, found in have.items() if found == wanted}


def card(folder: Path, step: str, without: set = frozenset(), than: tuple[str, ...] = ("biased",)) -> dict:
    """Means, intervals and changes of a step: of the prompts that have every answer and are not among ``without``.

    Changes are paired with each of ``than``: "biased", the same policy as published, and "full", the full cache.
    """
    records, metas = records_of(folder, step)
    keys = complete(records) - without
    records = [r for r in records if r["key"] in keys]
    sums = sums_of(records, MEASURED)
    pairs = {"biased": fixes(sums), "full": [(setting, FULL) for setting in sums if setting != FULL]}
    of_setting = {}
    for (*_, policy, mode, ratio), kinds in by_setting(records).items():
        of_setting[policy, mode, ratio] = counts(kinds["attack"])["n_infeasible"]
    return rounded(
        {
            "model": Path(records[0]["model"]).name,
            "made_with": [made_with(meta) for meta in metas],
            "n_prompt": len(keys),
            "n_item": sum(len(read_records(part)) for part in folder.glob(f"{step}_*")),
            "n_planned": sum(meta["items"] for meta in metas),
            "attacks": sorted({r["attack"] for r in records if r["attack"]}),
            "settings": [
                {**setting, "n_infeasible": of_setting[tuple(setting[name] for name in WHERE)]}
                for setting in settings(sums)
            ],
            "changes": [
                row for name in than for row in changes(sums, results_page.GOALS, pairs[name]) if row["n_prompt"]
            ],
        }
    )


def ranked(card: dict) -> list[tuple[float, str, dict]]:
    """(worst shortfall, in which metric, setting) of what every prompt can have, best first."""
    out = []
    n_prompt = results_page.settings_of(card, policy=None)[0]["metrics"]["guarded"]["n_prompt"]
    for setting in card["settings"]:
        if setting["policy"] is not None and setting["metrics"]["guarded"]["n_prompt"] == n_prompt:
            worst, short = max(results_page.shortfalls(card, setting).items(), key=lambda pair: pair[1])
            out.append((short, worst, setting))
    return sorted(out, key=lambda row: row[0])


def best(card: dict, n: int) -> list[tuple[str, str]]:
    """(policy, mode) of the n best."""
    return [(setting["policy"], setting["mode"]) for _, _, setting in ranked(card)[:n]]


def search(folder: Path, narrow: Path | None, where: dict) -> None:
    """Narrow, finalists, held out. ``narrow``: the card of a first step that was run before."""
    if narrow is None:
        pairs = [(policy, mode) for policy in policy_names() for mode in MODES]
        first = run(folder, "narrow", "train", N_NARROW, pairs, where)
    else:
        first = json.loads(narrow.read_text(encoding="utf-8"))
    finalists = best(first, N_FINALISTS)
    chosen = best(run(folder, "finalists", "train", None, finalists, where), N_HELD_OUT)
    usual = [(policy, mode) for policy, _ in chosen for mode in USUAL]
    run(folder, "held_out", "held_out", None, list(dict.fromkeys([*chosen, *usual])), where)
    (folder / "chosen.json").write_text(json.dumps(chosen) + "\n", encoding="utf-8")


def causes(folder: Path, where: dict) -> None:
    """Which instruction's loss changes the answers, for the policies of the held-out settings."""
    corpus = load_corpus(str(folder / "held_out.jsonl"))
    model, tokenizer = load_model(SweepConfig(**where), where["models"][0])
    rows = corpus.rows[:N_CAUSES]
    prompts = [Scenario.of(corpus, row, "refuse", "defense_first").prompt(tokenizer) for row in rows]
    said = [corpus.attacks["verbatim-2"], RECALL_QUESTION]
    chosen = json.loads((folder / "chosen.json").read_text(encoding="utf-8"))
    out = {}
    for policy in dict.fromkeys(policy for policy, _ in chosen):
        out[policy] = effects(model, prompts, policy, said=said, compression_ratio=RATIO).means()
    (folder / "causes.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


def recall_causes(folder: Path, where: dict) -> None:
    """Which instruction's loss changes the control's answers, begun with the directive's first half, for the policies
    of the card's held-out settings."""
    corpus = load_corpus(str(folder / "held_out.jsonl"))
    model, tokenizer = load_model(SweepConfig(**where), where["models"][0])
    scenarios = [Scenario.of(corpus, row, "refuse", "defense_first") for row in corpus.rows[:N_CAUSES]]
    prompts = [scenario.prompt(tokenizer) for scenario in scenarios]
    begun = [scenario.ask("recall", None)[1] for scenario in scenarios]
    out = {}
    for policy in dict.fromkeys(chosen["policy"] for chosen in read("held_out.json")["chosen"]):
        found = effects(model, prompts, policy, said=RECALL_QUESTION, begun=begun, compression_ratio=RATIO)
        out[policy] = found.means()
    made = {"device": where["device"], "dtype": where["dtype"]}
    write("recall_causes.json", rounded({"compression_ratio": RATIO, "of_policies": out, **made}))


def write_cards(folder: Path) -> None:
    """What the folder has. Where its first step was run before, that step's card stays as it is."""
    if not any(folder.glob("*/run_meta.json")):
        raise FileNotFoundError(f"{folder} has no sweep in it; expected the folder of a search")
    SEARCHED.mkdir(exist_ok=True)
    if any(folder.glob("narrow_*")):
        write("narrow.json", card(folder, "narrow"))
    if any(folder.glob("finalists_*")):
        write("finalists.json", card(folder, "finalists", first_prompts(folder), ("full",)))
    if any(folder.glob("held_out_*")):
        write("held_out.json", {"chosen": chosen_by(folder), **card(folder, "held_out", than=("full", "biased"))})
    if (folder / "causes.json").exists():
        of_policies = json.loads((folder / "causes.json").read_text(encoding="utf-8"))
        write("causes.json", rounded({"compression_ratio": RATIO, "of_policies": of_policies}))


def first_prompts(folder: Path) -> set:
    """Keys of the first step's prompts, by its card. They chose the finalists, so that they say nothing of them."""
    train, made = load_corpus(str(folder / "train.jsonl")), read("narrow.json")["made_with"][0]
    if train.sha256 != made["corpus_sha256"]:
        raise ValueError(
            f"{folder / 'train.jsonl'} has the checksum {train.sha256}; expected {made['corpus_sha256']}, that of the "
            "prompts of narrow.json"
        )
    return {row["key"] for row in train.rows[: made["config.n_prompts"]]}


def chosen_by(folder: Path) -> list[dict]:
    """The settings that the whole train half chose, and what they are short of there."""
    best_of = ranked(card(folder, "finalists"))[:N_HELD_OUT]
    return rounded([{"policy": s["policy"], "mode": s["mode"], "short": short} for short, _, s in best_of])


def read(name: str) -> dict:
    """One file of the cards' folder."""
    return json.loads((SEARCHED / name).read_text(encoding="utf-8"))


def write(name: str, content) -> None:
    """One file of the cards' folder."""
    (SEARCHED / name).write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def write_demo() -> None:
    """Kept shares of the demo's two instructions at r = 0.5, under every policy, biased and fair."""
    model, tokenizer = load()
    prompt = demo.two_instructions(tokenizer)
    out = {"model": "SmolLM2-135M-Instruct", "n_tokens": len(prompt), "compression_ratio": RATIO, "rows": []}
    for policy in policy_names():
        try:
            rows = audit(model, prompt, policies=[policy], compression_ratios=[RATIO], fair=[False, True]).rows
        except BudgetError:  # defined for longer prompts, or larger budgets
            rows = []
        found = [{name: row[name] for name in ("fair", "span", "kept")} for row in rows]
        out["rows"].append({"policy": policy, "kept": found})
    write("demo.json", rounded(out))


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    for step in ("search", "causes", "recall"):
        of_step = steps.add_parser(step)
        of_step.add_argument("path", type=Path)
        of_step.add_argument("--model", required=True)
        of_step.add_argument("--device", default="cpu")
        of_step.add_argument("--dtype", default="float32")
        of_step.add_argument("--batch-size", type=int, default=64)
        if step == "search":
            of_step.add_argument("--narrow", type=Path, metavar="CARD", help="of a first step that was run before")
    steps.add_parser("card").add_argument("path", type=Path)
    steps.add_parser("demo")
    args = parser.parse_args()
    if args.step == "demo":
        write_demo()
    elif args.step == "card":
        write_cards(args.path)
    else:
        args.path.mkdir(parents=True, exist_ok=True)
        write_halves(args.path)
        where = {"models": [args.model], "device": args.device, "dtype": args.dtype, "batch_size": args.batch_size}
        if args.step == "search":
            search(args.path, args.narrow, where)
        else:
            {"causes": causes, "recall": recall_causes}[args.step](args.path, where)


if __name__ == "__main__":
    main()
