"""StreamingLLM's keep rates on the paper's prompts, against those of the authors' code. Needs the paper's data."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import kvpitfalls as kvp

RECORDED = json.loads((Path(__file__).parent / "data" / "streaming_keep_rates_smollm2.json").read_text())
DATA = os.environ.get("KVPITFALLS_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="KVPITFALLS_DATA names no folder with sys_ifeval.jsonl and defense_template.json")


@pytest.fixture(scope="module")
def directives():
    lines = (Path(DATA) / "sys_ifeval.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines[:300]]


def authors_span(ids, tokenizer, text):
    """How the authors find a text: its tokens but the first and the last, one token wider on both sides."""
    inner = tokenizer(text, add_special_tokens=False)["input_ids"][1:-1]
    start = next(i for i in range(len(ids)) if ids[i : i + len(inner)] == inner)
    return start - 1, start + len(inner) + 1


def spans_of(prompt, tokenizer, template, directive):
    defense = authors_span(list(prompt.token_ids), tokenizer, template.replace("$system_prompt", ""))
    raw = authors_span(list(prompt.token_ids), tokenizer, directive)
    touching = (raw[0], defense[0]) if raw[1] == defense[0] + 1 else raw  # a token both hold goes to the defense
    return defense, raw, touching


@pytest.mark.parametrize("order", RECORDED["orders"])
def test_keep_rates(smollm2, directives, order):
    tokenizer, template = smollm2[1], json.loads((Path(DATA) / "defense_template.json").read_text())[order]
    recorded = RECORDED["orders"][order]
    rates = {("base", r): [] for r in recorded["base"]} | {("fair", r): [] for r in recorded["fair"]}
    n_directive, n_other, lengths = [], [], []
    for text in directives:
        directive = RECORDED["P"] + text
        system = template.replace("$system_prompt", directive)
        prompt = kvp.Prompt.from_chat(tokenizer, [{"role": "system", "content": system}])
        defense, raw, touching = spans_of(prompt, tokenizer, template, directive)
        n_token, keys = len(prompt), np.zeros((1, 1, len(prompt), 1), np.float32)
        lengths.append(n_token)
        n_directive.append(raw[1] - raw[0])
        n_other.append(n_token - (raw[1] - raw[0]))
        phrase = prompt.find(RECORDED["phrase"])
        for mode, ratio in rates:
            fair = {"fair": "paper", "spans": {"defense": defense, "directive": touching}} if mode == "fair" else {}
            budget = int(n_token * (1 - float(ratio)))
            kept = np.zeros(n_token, bool)
            kept[kvp.keep("streaming_llm", keys, budget=budget, **fair).positions[0, 0]] = True
            inside = np.zeros(n_token, bool)
            inside[slice(*raw)] = True
            shares = (kept[inside].mean(), kept[~inside].mean(), kept[slice(*defense)].mean(), kept[slice(*phrase)].mean())
            rates[mode, ratio].append(shares)
    assert np.mean(lengths) == pytest.approx(recorded["context_tokens"]["mean"], abs=1e-3)
    for (mode, ratio), shares in rates.items():
        want = recorded[mode][ratio]
        ours = 100 * np.mean(shares, axis=0)
        ties = want["rows_with_tie_at_cut"]
        # A row that is tied at the cut may move one token from one side to the other.
        spans = (np.array(n_directive), np.array(n_other), np.full(300, 121), np.full(300, 19))
        for value, field, size in zip(ours, ("directive_pct", "other_pct", "defense_span_pct", "phrase_pct"), spans, strict=True):
            slack = 100 * ties / 300 / size.min() + 6e-5  # the recorded figures have four digits
            assert abs(value - want[field]) <= slack, (mode, ratio, field, value, want[field], ties)
