"""Whole sweeps and reports of models whose worth is known: nothing that a report shows rewards refusing everything,
writing a novel or saying nothing, and a fix that changes nothing is worth nothing."""

import json
import math
import re

import degenerate
import pytest
import tiny_sweep
import torch

from kvpitfalls.display.page import write_report
from kvpitfalls.experiments import sweep as sweep_module
from kvpitfalls.experiments.comparisons import COMPOSITE_RATIOS, composites, fixes
from kvpitfalls.experiments.corpus import load_corpus
from kvpitfalls.experiments.metrics import HEADLINES, TURN, TURNS, by_turn
from kvpitfalls.experiments.records import read_records
from kvpitfalls.experiments.scenario import WAYS, Scenario
from kvpitfalls.experiments.summary import summarize
from kvpitfalls.hf.load import load

KEYS = [*degenerate.FOLLOWING, 1, 2, 3, 4, 5, 6]
ROWS = [row for row in load_corpus().rows if row["key"] in KEYS]
LIMITS = dict.fromkeys(("attack", "recall", "follow", "turns"), 400)


def empty(scenario, kind):
    return ""


def by_turns(scenario, kind):
    """Recites where the key is even, and obeys where it is odd."""
    return (degenerate.obeys if scenario.row["key"] % 2 else degenerate.recites)(scenario, kind)


MODELS = {model.__name__: model for model in (*degenerate.MODELS.values(), empty)}


class StandIn:
    """What ``generate`` of a model is replaced by: it reads each row's conversation and says what a function of its
    scenario and of the kind of question says, whatever its cache holds."""

    def __init__(self, model, tokenizer, says, corpus, attacks):
        self.model, self.tokenizer, self.says, self.attacks = model, tokenizer, says, attacks
        self.scenarios = [Scenario.of(corpus, row, "refuse", "defense_first") for row in corpus.rows]

    def __call__(self, tokens, attention_mask, max_new_tokens, **options):
        seen = [self.tokenizer.decode(row[here.bool()]) for row, here in zip(tokens, attention_mask, strict=True)]
        said = [self.tokenizer(self.answer(text))["input_ids"][:max_new_tokens] for text in seen]
        end = self.model.generation_config.eos_token_id
        width = max(map(len, said)) + 1
        new = torch.tensor([[*ids, *[end] * (width - len(ids))] for ids in said])
        return torch.cat([tokens, new], -1)

    def answer(self, text):
        (scenario,) = [scenario for scenario in self.scenarios if scenario.system in text]
        asked = text.rsplit("<|im_start|>user\n", 1)[1]
        if any(asked.startswith(attack) for attack in self.attacks):
            return self.says(scenario, "attack")
        return self.says(scenario, "recall" if asked.startswith(scenario.ask("recall", None)[0]) else "follow")


@pytest.fixture(scope="module")
def folder_of(tiny_model_folder, tmp_path_factory):
    """Runs a sweep of a stand-in; its folder."""
    data = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    model, tokenizer = load(tiny_model_folder)

    def run(says, **changes):
        settings = {"dataset": str(data), "n_prompts": None, "orders": ["defense_first"], "policies": ["streaming_llm"]}
        settings |= {
            "compression_ratios": [0.0, 0.5],
            "max_new_tokens": LIMITS,
            "batch_size": 200,
            "defenses": ["refuse"],
        }
        config = tiny_sweep.config(tiny_model_folder, **{**settings, **changes})
        corpus = load_corpus(str(data))
        attacks = config.chosen_attacks(corpus).values()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweep_module, "load_model", lambda config, name: (model, tokenizer))
            patch.setattr(model, "generate", StandIn(model, tokenizer, says, corpus, attacks), raising=False)
            out = tmp_path_factory.mktemp(says.__name__)
            assert sweep_module.sweep(config, out)["failed"] == 0
        return out

    return run


@pytest.fixture(scope="module")
def reported(folder_of):
    """Model -> the folder of its sweep."""
    return {name: folder_of(model) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def conversed(folder_of):
    """Model -> the folder of its conversations."""
    turns = {"kinds": ["turns"], "modes": ["biased"], "attacks": ["verbatim-1"], "n_prompts": 3}
    return {name: folder_of(MODELS[name], **turns) for name in ("refuses", "recites", "empty", "obeys")}


def means(folder, metrics):
    """By setting, the means of some metrics."""
    cells = summarize(read_records(folder))
    return [{metric: cell["metrics"][metric]["mean"] for metric in metrics} for cell in cells]


@pytest.mark.parametrize("name", ["refuses", "novel", "at_random", "empty"])
def test_a_wrong_model_is_below_one_that_does_its_task_on_every_headline(reported, name):
    wrong, right = means(reported[name], HEADLINES), means(reported["obeys"], HEADLINES)
    assert len(wrong) == len(right) == 3, "the full cache, biased, and fair"
    for here, there in zip(wrong, right, strict=True):
        assert all(here[metric] < there[metric] for metric in HEADLINES)


def test_what_each_of_them_did_to_the_attacks_and_tasks(reported):
    outcomes = {"refuses": "refused", "obeys": "refused", "recites": "leaked", "novel": "complied", "empty": "complied"}
    for name, outcome in outcomes.items():
        metrics = ("refused", "leaked", "complied", "guarded", "follow", "refused_task", "leak_above")
        for found in means(reported[name], metrics):
            assert [found[x] for x in ("refused", "leaked", "complied")] == [
                outcome == x for x in ("refused", "leaked", "complied")
            ]
            assert found["refused_task"] == (name in ("refuses", "empty"))  # who says nothing does no task
            assert found["guarded"] == (name == "obeys")
            assert (found["follow"] > 0.4) == (name == "obeys") and (found["leak_above"] > 0.5) == (name == "recites")
            assert found["follow"] == 0 or name not in ("refuses", "empty")


def test_nobody_leaks_who_says_what_has_nothing_to_do_with_the_prompt(reported):
    """Two hundred words of a novel, or nothing: no leak beyond chance, and no recall."""
    for name in ("novel", "empty"):
        for found in means(reported[name], ("leaked", "leak_above", "recall_above")):
            assert found["leaked"] == 0 and found["leak_above"] <= 0.1 and found["recall_above"] <= 0.1


@pytest.mark.parametrize("name", ["refuses", "empty"])
def test_a_report_of_any_of_them_has_numbers_only(name, reported, conversed):
    """And an interval holds its mean."""
    for folder in (reported[name], conversed[name]):
        for cell in write_report(folder)["cells"]:
            for metric, found in cell["metrics"].items():
                if found["low"] is None:  # lengths that are all alike tell of no other
                    assert found["mean"] is None or metric.startswith("length_")
                else:
                    assert -math.inf < found["low"] <= found["mean"] + 1e-9, metric
                    assert found["mean"] - 1e-9 <= found["high"] < math.inf, metric
        shown = [path for path in (folder / "report").iterdir() if path.suffix in (".html", ".json", ".csv")]
        assert {path.suffix for path in shown} == {".html", ".json", ".csv"}
        for path in shown:
            text = re.sub(r"<script.*?</script>|<svg.*?</svg>", "", path.read_text("utf-8"), flags=re.DOTALL)
            assert not re.search(r"\b(nan|NaN|inf|Infinity)\b", text), path.name


def test_conversations_reward_nobody_for_refusing_or_for_silence(conversed):
    for name, folder in conversed.items():
        for cell in summarize(read_records(folder)):
            shown = by_turn(cell)
            assert {n for _, n, _ in shown} == set(TURNS)
            for way, _, found in shown:
                mean = {what: metric["mean"] for what, metric in found.items()}
                if way == "gain":
                    assert set(mean.values()) == {0}, "it says the same whatever is kept"
                    continue
                assert set(mean) == set(TURN) and way in (*WAYS, "both")
                outcomes = [mean["refused"], mean["leaked"], mean["complied"]]
                assert outcomes == [name in ("refuses", "obeys"), name == "recites", name == "empty"]
                assert mean["recall"] == 0 or name != "empty"
                assert mean["recall_above"] > 0.5 if name in ("obeys", "recites") else mean["recall_above"] < 0.1


def test_a_fix_that_does_nothing_scores_nothing_with_an_interval_around_it(folder_of):
    """Some of whose prompts leak and some do not: the composite, and every difference to biased."""
    folder = folder_of(by_turns, compression_ratios=[0.0, *COMPOSITE_RATIOS], attacks=["verbatim-1"])
    records = read_records(folder)
    (found,) = composites(records)
    assert found["mode"] == "fair" and found["composite"] == found["as_published"] == 0
    assert found["low"] < 0 < found["high"] and found["n_prompt"] == len(ROWS)
    moved = fixes(records)
    assert {row["metric"] for row in moved} >= set(HEADLINES)
    for row in moved:
        assert row["difference"] == 0 and row["low"] < 0 < row["high"], row["metric"]
