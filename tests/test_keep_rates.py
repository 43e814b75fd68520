"""StreamingLLM's keep rates on the paper's 539 prompts, against those of the authors' code. Needs the paper's data."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import kvpitfalls as kvp
from kvpitfalls.experiments.corpus import ORDERS, load_corpus

RECORDED = json.loads((Path(__file__).parent / "data" / "streaming_keep_rates_smollm2.json").read_text())
DATA = os.environ.get("KVPITFALLS_DATA")
pytestmark = pytest.mark.skipif(
    DATA is None, reason="KVPITFALLS_DATA names no folder with sys_ifeval.jsonl and defense_template.json"
)
RECORDED_ORDERS = ("standard_defense", "flipped_defense")  # our ORDERS, as the authors call them
RATIOS = ("0.1", "0.3", "0.5", "0.7", "0.9")
# What the authors' code keeps, mean over all 539 rows in percent: directive and all other tokens, at RATIOS.
ALL_ROWS = {
    ("standard_defense", "base"): [(100, 85.5), (100, 57.1), (100, 29.0), (90.0, 5.9), (22.3, 4.8)],
    ("standard_defense", "fair"): [(88.7, 90.2), (67.4, 70.6), (46.6, 51.2), (25.3, 31.5), (4.1, 11.9)],
    ("flipped_defense", "base"): [(63.2, 100), (5.7, 95.5), (2.0, 69.6), (2.0, 41.2), (2.0, 12.9)],
    ("flipped_defense", "fair"): [(89.6, 89.8), (69.4, 69.9), (49.8, 49.9), (29.6, 29.8), (10.0, 9.6)],
}


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


@pytest.fixture(scope="module", params=RECORDED_ORDERS)
def measured(request, smollm2):
    """Order, kept shares (directive, other, defense, phrase) of every row at every mode and ratio, and lengths."""
    tokenizer, order, paper = smollm2[1], request.param, load_corpus("paper")
    defense_text = paper.defenses["paper"]
    template = defense_text.templates[ORDERS[RECORDED_ORDERS.index(order)]]
    recorded = RECORDED["orders"][order]
    rates = {(mode, r): [] for mode in ("base", "fair") for r in dict.fromkeys([*recorded[mode], *RATIOS])}
    lengths = []
    for row in paper.rows:
        directive = paper.prefix + row["messages"][0]["content"]
        prompt = kvp.Prompt.from_chat(
            tokenizer, [{"role": "system", "content": template.replace("$system_prompt", directive)}]
        )
        defense, raw, touching = spans_of(prompt, tokenizer, template, directive)
        n_token, keys = len(prompt), np.zeros((1, 1, len(prompt), 1), np.float32)
        lengths.append((n_token, raw[1] - raw[0]))
        phrase = prompt.find(defense_text.whitelist)
        inside = np.zeros(n_token, bool)
        inside[slice(*raw)] = True
        for mode, ratio in rates:
            fair = {"fair": "paper", "spans": {"defense": defense, "directive": touching}} if mode == "fair" else {}
            kept = np.zeros(n_token, bool)
            kept[kvp.keep("streaming_llm", keys, budget=int(n_token * (1 - float(ratio))), **fair).positions[0, 0]] = (
                True
            )
            shares = (
                kept[inside].mean(),
                kept[~inside].mean(),
                kept[slice(*defense)].mean(),
                kept[slice(*phrase)].mean(),
            )
            rates[mode, ratio].append(shares)
    return order, {key: 100 * np.array(shares) for key, shares in rates.items()}, np.array(lengths)


def test_all_rows_match_the_authors_table(measured):
    order, rates, lengths = measured
    assert len(lengths) == 539
    for mode in ("base", "fair"):
        for ratio, want in zip(RATIOS, ALL_ROWS[order, mode], strict=True):
            recorded = RECORDED["orders"][order][mode].get(ratio, {"rows_with_tie_at_cut": 0})
            # The table has one digit; of rows tied at the cut, where the authors' choice is arbitrary, as many again as
            # in the first 300.
            tied = recorded["rows_with_tie_at_cut"] / 300
            sizes = (lengths[:, 1].min(), (lengths[:, 0] - lengths[:, 1]).min())
            for value, expected, size in zip(rates[mode, ratio].mean(0), want, sizes, strict=False):
                assert abs(value - expected) <= 0.05 + 1e-9 + 100 * tied / size, (mode, ratio, value, expected, tied)


def test_the_first_300_rows_match_to_four_digits(measured):
    order, rates, lengths = measured
    recorded, lengths = RECORDED["orders"][order], lengths[:300]
    assert lengths[:, 0].mean() == pytest.approx(recorded["context_tokens"]["mean"], abs=1e-3)
    for mode in ("base", "fair"):
        for ratio, want in recorded[mode].items():
            ours = rates[mode, ratio][:300].mean(0)
            ties = want["rows_with_tie_at_cut"]
            # A row that is tied at the cut may move one token from one side to the other.
            sizes = (lengths[:, 1].min(), (lengths[:, 0] - lengths[:, 1]).min(), 121, 19)
            for value, field, size in zip(
                ours, ("directive_pct", "other_pct", "defense_span_pct", "phrase_pct"), sizes, strict=True
            ):
                slack = 100 * ties / 300 / size + 6e-5  # the recorded figures have four digits
                assert abs(value - want[field]) <= slack, (mode, ratio, field, value, want[field], ties)
