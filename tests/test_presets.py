"""Presets run what the paper ran, as far as it is known."""

import dataclasses
import math
import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpitfalls.experiments.config import SweepConfig
from kvpitfalls.experiments.corpus import load_corpus
from kvpitfalls.experiments.plan import plan, settings_of
from kvpitfalls.experiments.presets import PAPER_MODELS, preset, preset_names


def test_every_figure_has_a_preset():
    assert preset_names() == [f"figure{i}" for i in range(1, 16)] + [
        "composite",
        "smollm2",
        "fixes",
        "suite-v1",
        "suite-v1-small",
        "probe",
        "turns",
    ]
    with pytest.raises(ValueError, match="preset is 'figure16'; expected one of figure1"):
        preset("figure16")


@pytest.mark.parametrize("name", [f"figure{i}" for i in range(1, 16)] + ["composite"])
def test_paper_presets(name):
    for part, config in preset(name).items():
        assert config.models == PAPER_MODELS and config.attacks == ("plain",)
        follows = "follow" in config.kinds
        assert follows == (part == "following") and (config.dataset, config.n_prompts) == (
            ("paper", None) if follows else ("paper_shuffled", 100)
        )
        assert ("recall" in config.kinds) == ("attack" in config.kinds), "leakage never comes without its control"
        assert {s.policy for s in settings_of(config)} - {None} == (
            {"streaming_llm"}
            if name in ("figure1", "figure2", "figure3")
            else {"streaming_llm", "snapkv", "tova", "h2o", "knorm"}
        )


def test_the_grid_of_the_composite_score():
    ratios = preset("composite")["leakage"].compression_ratios
    assert ratios == tuple(float(f"{i / 20:.2f}") for i in range(15))


def test_changes_are_checked_like_a_config():
    assert preset("figure5", models=["default"], n_prompts=3)["leakage"].n_prompts == 3
    with pytest.raises(ValueError, match="n_prompts is 0"):
        preset("figure5", n_prompts=0)


def test_the_small_preset_is_the_promised_matrix():
    config = preset("smollm2")["all"]
    items = [item for batch in plan(config, load_corpus()) for item in batch.items(load_corpus())]
    assert len(items) == 20 * 2 * 3 * (
        1 + 3 * 2 * 3
    )  # prompts, orders, kinds, full cache and ratios x policies x modes
    assert len({tuple(item.values()) for item in items}) == len(items)


@pytest.mark.parametrize(
    ("name", "n_prompt", "n_setting"),  # the full cache, and policies x modes x ratios
    [("suite-v1", 200, 1 + 4 * 5 * 2), ("suite-v1-small", 24, 1 + 2 * 3 * 1)],
)
def test_the_suite_is_the_promised_matrix(name, n_prompt, n_setting):
    """Every prompt meets one attack, under every setting the same; all twelve are met equally often."""
    config = preset(name)["all"]
    suite = load_corpus(config.dataset)
    items = [item for batch in plan(config, suite) for item in batch.items(suite)]
    assert len(items) == n_prompt * 3 * n_setting and len({tuple(item.values()) for item in items}) == len(items)
    met = {(item["key"], item["attack"]) for item in items if item["kind"] == "attack"}
    assert len(met) == n_prompt
    often = Counter(attack for _, attack in met)
    assert len(often) == 12 and max(often.values()) - min(often.values()) <= 1


@settings(deadline=None)
@given(n_prompt=st.integers(1, 20), n_each=st.integers(1, 6), n_family=st.integers(1, 2), batch_size=st.integers(1, 70))
def test_attacks_go_round_the_prompts(n_prompt, n_each, n_family, batch_size):
    """Each prompt meets so many different attacks; the batch size changes nothing; without the word, it meets all."""
    own, attacks = load_corpus(), ["verbatim", "role_play"][:n_family]
    n_each = min(n_each, 3 * n_family)
    config = SweepConfig(
        n_prompts=n_prompt, attacks=attacks, attacks_per_prompt=n_each, batch_size=batch_size, orders=["defense_first"]
    )

    def attack_items(config):
        items = [item for batch in plan(config, own) for item in batch.items(own)]
        return Counter(
            (item["key"], item["attack"]) for item in items if item["kind"] == "attack" and item["policy"] is None
        )

    met = attack_items(config)
    assert (
        set(met.values()) == {1}
        and set(Counter(key for key, _ in met).values()) == {n_each}
        and len(met) == n_prompt * n_each
    )
    often = Counter(attack for _, attack in met)
    assert max(often.values()) - min(often[name] for name in config.chosen_attacks(own)) <= 1
    every = attack_items(dataclasses.replace(config, attacks_per_prompt=None))
    assert (
        every == attack_items(dataclasses.replace(config, attacks_per_prompt=3 * n_family))
        and met.keys() <= every.keys()
    )
    batches = list(plan(config, own))
    sizes = [[len(b.rows), len(b.settings), len(b.requests[0])] for b in batches]
    assert all(math.prod(size) <= batch_size or size[:2] == [1, 1] for size in sizes)
    alike = dataclasses.replace(config, attacks=list(config.chosen_attacks(own))[:n_each], attacks_per_prompt=None)
    assert sizes == [[len(b.rows), len(b.settings), len(b.requests[0])] for b in plan(alike, own)], (
        "who meets different attacks shares batches as who meets the same"
    )


def test_the_probe_preset_has_all_policies_and_ratios():
    config = preset("probe")["all"]
    items = [item for batch in plan(config, load_corpus()) for item in batch.items(load_corpus())]
    assert len(items) == 6 * 2 * 2 * (
        1 + 9 * 5 * 3
    )  # prompts, orders, one attack and the rest, full cache and ratios x policies x modes
    assert {item["kind"] for item in items} == {"probe"}


def test_the_preset_of_turns_has_each_conversation_once():
    batches = list(plan(preset("turns")["all"], load_corpus()))
    assert [batch.rows for batch in batches] == [(i,) for i in range(8)]
    assert all(len(batch.settings) == 3 and batch.requests == ((("turns", "verbatim-2"),),) for batch in batches)


@pytest.mark.skipif("KVPITFALLS_DATA" not in os.environ, reason="KVPITFALLS_DATA names no folder with the paper's data")
def test_paper_presets_fit_the_papers_data():
    for name in preset_names()[:16]:
        for config in preset(name).values():
            assert next(plan(config, load_corpus(config.dataset))).rows
