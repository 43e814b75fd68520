"""Conversations that are compressed turn by turn: laws of what is kept, and the sweep's records against plain calls."""

import copy
import json

import numpy as np
import pytest
import tiny_sweep

import kvpitfalls as kvp
from kvpitfalls.display.tables import turn_table
from kvpitfalls.eviction.fairness import Fair
from kvpitfalls.experiments import records
from kvpitfalls.experiments.corpus import load_corpus
from kvpitfalls.experiments.metrics import GAINS, TURN, TURNS, check_records, turn_metric
from kvpitfalls.experiments.plan import FULL, Setting, plan
from kvpitfalls.experiments.scenario import N_TURN, WAYS, Scenario
from kvpitfalls.experiments.summary import summarize
from kvpitfalls.experiments.sweep import sweep
from kvpitfalls.experiments.turns import compress_turns, converse
from kvpitfalls.hf.evict import Evict
from kvpitfalls.hf.load import load
from kvpitfalls.hf.model import attached
from kvpitfalls.policies import get_policy
from kvpitfalls.policies.random import Random

POLICIES = ["streaming_llm", "snapkv", "h2o", "tova", "knorm", "keydiff", Random()]
LIMIT = 6


@pytest.fixture(scope="module")
def model(tiny_model_folder, tiny_model_loaded_once):
    return tiny_model_folder


@pytest.fixture(scope="module")
def loaded(model):
    return load(model)


@pytest.fixture(scope="module")
def talk(loaded):
    """A conversation of five turns."""
    return had(*loaded, scenario_of(load_corpus().rows[1]))


def scenario_of(row):
    return Scenario.of(load_corpus(), row, "refuse", "directive_first")


def had(model, tokenizer, scenario):
    with attached(model):
        return converse(model, tokenizer, scenario, Setting(None, FULL, 0.0).evict(None), LIMIT)


def biased(policy, ratio):
    return Evict(get_policy(policy), Fair(strength=0.0), ratio, None)


def held(model, prompts, policy, ratio, way):
    """Kept tokens after each turn: by turn and layer (H, K)."""
    with attached(model):
        caches = [compress_turns(model, prompts[:n], biased(policy, ratio), way) for n in range(1, len(prompts) + 1)]
        return [[cache.positions(layer.index)[0] for layer in cache.kept_layers] for cache in caches]


def talking(model, **changes):
    settings = {"kinds": ["turns"], "modes": ["biased"], "n_prompts": 2, "orders": ["directive_first"]}
    settings |= {"compression_ratios": [0.5], "max_new_tokens": {"turns": LIMIT}}
    return tiny_sweep.config(model, **{**settings, **changes})


@pytest.fixture(scope="module")
def talked(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("talked")
    assert sweep(talking(model), folder)["failed"] == 0
    return folder


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_is_held_after_each_turn(loaded, talk, policy, ratio):
    model = loaded[0]
    ends = [0, *map(len, talk.prompts)]
    whole, once = (held(model, talk.prompts, policy, ratio, way) for way in WAYS)
    exact = [int(np.floor(end * (1 - ratio) + 1e-9)) for end in ends]
    again = False
    for n in TURNS:
        new = set(range(ends[n - 1], ends[n]))
        for layer, (here, there) in enumerate(zip(whole[n - 1], once[n - 1], strict=True)):
            assert here.shape[1] == there.shape[1] == exact[n], "both hold the budget of all tokens so far"
            before = whole[n - 2][layer] if n > 1 else [[]] * len(here)
            for head, kept in enumerate(here):
                assert set(kept) <= set(before[head]) | new, "what was gone came back"
                again |= not set(before[head]) <= set(kept)
            for head, kept in enumerate(there):
                for k in range(1, n + 1):
                    of_turn = [t for t in kept if ends[k - 1] <= t < ends[k]]
                    first = [t for t in once[k - 1][layer][head] if t >= ends[k - 1]]
                    assert of_turn == first and len(first) == exact[k] - exact[k - 1], "a finished turn was cut again"
    assert again or ratio < 0.5, "nothing of an earlier turn was lost later, so the ways do not differ"


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_one_turn_is_a_prompt_compressed_at_once(loaded, talk, policy):
    model, prompt = loaded[0], talk.prompts[0]
    with kvp.wrap(model, policy, compression_ratio=0.5) as handle:
        cache = handle.compress(prompt)
        wanted = [cache.positions(layer.index)[0] for layer in cache.kept_layers]
    for way in WAYS:
        assert all(map(np.array_equal, held(model, [prompt], policy, 0.5, way)[0], wanted)), way


def generate(model, tokenizer, ids, **given):
    out = model.generate(ids, max_new_tokens=LIMIT, do_sample=False, **given)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_records_are_plain_calls(loaded, talked):
    """The full cache's by the model alone; the others' by a wrap that is shown the turns, where that keeps as much."""
    model, tokenizer = loaded
    corpus = load_corpus()
    keys = [row["key"] for row in corpus.rows]
    for record in records.read_records(talked):
        at = keys.index(record["key"])
        scenario = scenario_of(corpus.rows[at])
        messages, prompts, said = [{"role": "system", "content": scenario.system}], [], []
        for k in range(N_TURN):
            messages.append(corpus.rows[(at + k) % len(keys)]["messages"][1])
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            said.append(generate(model, tokenizer, ids))
            messages.append({"role": "assistant", "content": said[-1]})
            prompts.append(kvp.Prompt.from_chat(tokenizer, messages))
        assert record["output"] == "\n\n".join(said)
        assert record["n_tokens"] == len(prompts[-1])
        question, begun = scenario.ask("recall", None)
        for way in WAYS:
            for n, turn in enumerate(record["scores"][way]):
                asked = [prompts[n].followed_by(text) for text in (question, corpus.attacks["verbatim-1"])]
                more = tokenizer(begun, add_special_tokens=False, return_tensors="pt").input_ids
                asked[0] = np.concatenate([asked[0], more], 1)
                answers = [answer_of(model, tokenizer, record, way, prompts[: n + 1], ids) for ids in asked]
                assert turn["answers"] == answers, (record["policy"], way, n)
                assert turn["outcome"] == scenario.score("attack", answers[1], 42)["outcome"]
                assert turn["recall"] == scenario.score("recall", answers[0], 42)["recall"]
                assert (turn["kept"]["defense"] < 1) == (record["compression_ratio"] > 0)


def answer_of(model, tokenizer, record, way, prompts, ids):
    import torch

    ids = torch.as_tensor(ids)
    if not record["compression_ratio"]:
        return generate(model, tokenizer, ids)
    with attached(model):
        cache = compress_turns(model, prompts, biased(record["policy"], 0.5), way)
        return generate(model, tokenizer, ids, past_key_values=copy.deepcopy(cache))


def test_the_records_are_the_plan_and_are_completed(talked, model, tmp_path):
    corpus, found = load_corpus(), records.read_records(talked)
    planned = [item for batch in plan(talking(model), corpus) for item in batch.items(corpus)]
    assert [{name: r[name] for name in item} for item, r in zip(planned, found, strict=True)] == planned
    assert len(found) == 2 * (1 + 2) and {r["attack"] for r in found} == {"verbatim-1"}, "the first attack alone"
    whole = (talked / "records.jsonl").read_bytes()
    (tmp_path / "run_meta.json").write_bytes((talked / "run_meta.json").read_bytes())
    (tmp_path / "records.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    assert 0 < sweep(talking(model), tmp_path)["resumed_at"] < len(found)
    assert tiny_sweep.untimed(tmp_path) == tiny_sweep.untimed(talked)


def test_a_conversation_that_fails_is_counted_and_in_no_mean(model, tmp_path):
    """The first prompt's directive holds a token of the chat template."""
    rows = [dict(row) for row in load_corpus().rows[:2]]
    rows[0]["messages"] = [{"role": "system", "content": "Hello. <|im_end|> Bye."}, rows[0]["messages"][1]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = talking(model, dataset=str(tmp_path / "rows.jsonl"), n_prompts=None, policies=["knorm"])
    done = sweep(config, tmp_path / "out")
    recorded = records.read_records(tmp_path / "out")
    check_records(recorded)
    assert done["failed"] == 2 and [r["error"] is None for r in recorded] == [False, False, True, True]
    for cell in summarize(recorded):
        for name in (turn_metric(n, way, what) for n in TURNS for way in WAYS for what in TURN):
            metric = cell["metrics"][name]
            assert (metric["n_item"], metric["n_failed"], metric["n_prompt"]) == (2, 1, 1)
    lines = turn_table(summarize(recorded)).splitlines()
    assert len(lines) == 2 + (1 + 3) * N_TURN and all("  2       1           0" in line for line in lines[2:])


def turns_of(answer, recalled):
    """A record of a conversation whose model answers attacks and controls so, whatever the way."""
    scenario = scenario_of(load_corpus().rows[4])
    score = {**scenario.score("recall", recalled, 42), "outcome": scenario.score("attack", answer, 42)["outcome"]}
    turn = {**score, "kept": {"defense": 0.5}, "answers": [recalled, answer]}
    return dict.fromkeys(WAYS, [turn] * N_TURN)


def test_a_model_that_refuses_everything_has_no_recall(talked):
    scenario = scenario_of(load_corpus().rows[4])
    base = records.read_records(talked)[0]
    mute, right = (
        summarize([{**base, "scores": turns_of(scenario.refusal, recalled)}])[0]["metrics"]
        for recalled in (scenario.refusal, scenario.directive)
    )
    for n in TURNS:
        for way in WAYS:
            assert mute[turn_metric(n, way, "refused")]["mean"] == right[turn_metric(n, way, "refused")]["mean"] == 1
            assert mute[turn_metric(n, way, "recall_above")]["mean"] < 0.1
            assert right[turn_metric(n, way, "recall_above")]["mean"] > 0.5
            assert mute[turn_metric(n, way, "kept_directive")]["mean"] is None, "it is not known"


def test_the_gain_is_once_less_whole_prompt_by_prompt(talked):
    recorded = records.read_records(talked)
    check_records(recorded)
    for cell in summarize(recorded):
        for n in TURNS:
            for what in GAINS:
                whole, once, gain = (cell["metrics"][turn_metric(n, way, what)] for way in (*WAYS, "gain"))
                assert gain["mean"] == pytest.approx(once["mean"] - whole["mean"])
                assert -1 <= gain["low"] <= gain["mean"] <= gain["high"] <= 1
                if cell["policy"] is None:
                    assert gain["mean"] == 0, "the full cache is one, whatever the way"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ["biased", "fair"]}, "kinds hold 'turns', and modes hold 'fair'; expected biased or random"),
        ({"modes": ["whitelist"]}, "kinds hold 'turns', and modes hold 'whitelist'; expected biased or random"),
        ({"policies": ["lagkv"]}, "kinds hold 'turns', which come in chunks, and policy is 'lagkv', which judges"),
        ({"policies": ["adakv"]}, "kinds hold 'turns', which come in chunks, and"),
        ({"policies": ["pyramidkv"]}, "and policy is 'pyramidkv', whose layers share the budget of each length anew"),
    ],
)
def test_what_means_nothing_turn_by_turn_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        talking("default", **changes)
