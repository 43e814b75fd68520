"""Cards: the numbers of the records, and a comparison that is the plain one."""

import copy
import json
import math

import degenerate
import pytest

from kvpitfalls import cli
from kvpitfalls.display.tables import compare_table
from kvpitfalls.experiments.card import cards, compare, read_card
from kvpitfalls.experiments.comparisons import fixes
from kvpitfalls.experiments.corpus import load_corpus
from kvpitfalls.experiments.metrics import METRICS
from kvpitfalls.experiments.scenario import ANSWERED, Scenario
from kvpitfalls.experiments.summary import summarize

ROWS = [row for row in load_corpus().rows if row["key"] in degenerate.FOLLOWING]


def records_of(model, name, rows=ROWS, mode="biased"):
    scenarios = [Scenario.of(load_corpus(), row, "refuse", "defense_first") for row in rows]
    kinds = ("attack", "recall", "follow")
    return [{**degenerate.record_of(model, s, kind, mode), "model": name} for s in scenarios for kind in kinds]


def card_of(model, name, rows=ROWS):
    (card,) = cards(records_of(model, name, rows), [{"same": {"torch": "2"}}])
    return json.loads(json.dumps(card))


@pytest.fixture(scope="module")
def two():
    return card_of(degenerate.refuses, "mute"), card_of(degenerate.obeys, "good")


def test_a_card_holds_the_summarys_numbers(two):
    (cell,) = summarize(records_of(degenerate.obeys, "good"))
    (setting,) = two[1]["settings"]
    assert all(setting["metrics"][name] == cell["metrics"][name] for name in setting["metrics"])
    for name, found in setting["metrics"].items():
        pairs = setting["prompts"][name]
        assert (
            sum(p[1] for p in pairs) / sum(p[2] for p in pairs) == pytest.approx(found["mean"])
            and len(pairs) == found["n_prompt"]
        )
    many = cards([*records_of(degenerate.obeys, "good"), *records_of(degenerate.novel, "other")], [])
    assert [card["model"] for card in many] == ["good", "other"]


def test_comparing_is_what_two_modes_of_one_sweep_would_give(two):
    """Second way: both models as modes of one."""
    found = {row["metric"]: row for row in compare(*two)}
    as_modes = [*records_of(degenerate.refuses, "m"), *records_of(degenerate.obeys, "m", mode="fix")]
    for row in fixes(as_modes):
        assert all(
            found[row["metric"]][name] == pytest.approx(row[name]) for name in ("difference", "low", "high", "n_prompt")
        )
    assert found["guarded"]["difference"] == 1 and found["refused"]["difference"] == 0
    backwards = {row["metric"]: row["difference"] for row in compare(*two[::-1])}
    assert backwards == {name: pytest.approx(-row["difference"]) for name, row in found.items()}
    assert all(row["difference"] == 0 and row["low"] < 0 < row["high"] for row in compare(two[0], two[0]))


def test_prompts_of_one_card_alone_are_left_out_and_counted(two):
    fewer = card_of(degenerate.refuses, "mute", ROWS[:4])
    assert {(row["n_prompt"], row["n_left_out"]) for row in compare(fewer, two[1])} == {(4, len(ROWS) - 4)}


def test_a_prompt_of_which_an_attack_failed_is_left_out(two):
    """A card has sums of prompts: what is left of its attacks would be compared with all of another card's."""
    twice = records_of(degenerate.obeys, "good")
    twice += [{**record, "attack": "again-1"} for record in twice if record["kind"] == "attack"]
    (whole,) = cards(twice, [])
    failed = {**twice[0], "scores": None, "error": "x"}
    (torn,) = cards([failed, *twice[1:]], [])
    for row in [*compare(whole, torn), *compare(torn, torn)]:
        left_out = int(METRICS[row["metric"]][0] == failed["kind"] == "attack")
        assert (row["difference"], row["n_left_out"], row["n_prompt"]) == (0, left_out, len(ROWS) - left_out)
    assert compare(two[0], whole)[0]["n_prompt"] == 0, "an older card, or other attacks: no prompt was asked the same"


def test_prompts_of_one_name_and_another_text_are_no_pair(two):
    a, b = (copy.deepcopy(card) for card in two)
    for card, digest in ((a, "1" * 64), (b, "2" * 64)):
        card["made_with"] = [{"config.dataset": "own", "corpus_sha256": digest}]
    with pytest.raises(
        ValueError, match=r"the prompts 'own' of the cards differ \(sha256 111111111111... and 222222222222...\)"
    ):
        compare(a, b)
    b["made_with"][0]["config.dataset"] = "mine.jsonl"
    assert compare(a, b) == compare(*two)


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("config.attacks", (["verbatim"], ["translate"]), "attacks"),
        ("config.attacks_per_prompt", (1, None), "attacks_per_prompt"),
        ("config.max_new_tokens", ({"attack": 256}, {"attack": 64}), "max_new_tokens of kind 'attack'"),
        ("scores", (1, 2), "versions of the scores"),
    ],
)
def test_answers_to_other_questions_are_no_pair(two, name, values, what):
    """What the answers depend on beside the model is the same on both sides, or there is no comparison."""
    a, b = (copy.deepcopy(card) for card in two)
    made = {"config.dataset": "own", "config.kinds": ["attack", "recall"], "config.max_new_tokens": {"attack": 256}}
    for card, value in zip((a, b), values, strict=True):
        card["made_with"] = [{**made, name: value}]
    with pytest.raises(
        ValueError, match=rf"the {what} of the cards differ .*, on the prompts 'own'\); expected the same"
    ):
        compare(a, b)
    b["made_with"] = [{**made, name: values[1], "config.dataset": "mine.jsonl"}]
    assert compare(a, b) == compare(*two)
    a["made_with"].append({**made, name: values[1]})  # one card of several sweeps
    b["made_with"] = [{**made, name: values[1]}]
    assert compare(a, b) == compare(*two)


def test_of_many_differences_the_same_one_is_told_every_time(two):
    """The first; which one it was hung on the hashes of names, which each process draws anew."""
    a, b = (copy.deepcopy(card) for card in two)
    for n, card in enumerate((a, b)):
        limits = dict.fromkeys(ANSWERED, n + 1)
        made = {"config.kinds": ANSWERED, "config.attacks": [n], "config.attacks_per_prompt": n, "scores": n}
        card["made_with"] = [
            {**made, "config.dataset": f"{i}.jsonl", "config.max_new_tokens": limits} for i in range(9)
        ]
    with pytest.raises(ValueError, match=r"the versions of the scores of the cards differ .* on the prompts '0.jsonl'"):
        compare(a, b)


def test_a_card_tells_no_folder_of_whoever_made_it(tmp_path):
    """Models are called by their hub ids, or by as much of the ends of their paths as tells them apart."""
    names = {
        "/home/ann/runs/a/final": "a/final",
        "/home/ann/runs/b/final/": "b/final",
        "~/ann/m.gguf": "ann/m.gguf",
        "org/model-1.5": "org/model-1.5",
        "default": "default",
    }
    same = {
        "config.models": list(names),
        "config.dataset": "/home/ann/rows.jsonl",
        "model_sources": [f"{name.rstrip('/')} at 0123" for name in names],
        "corpus_sha256": "1" * 64,
        "torch": "2",
    }
    made = cards([record for name in names for record in records_of(degenerate.obeys, name)], [{"same": same}])
    assert [card["model"] for card in made] == list(names.values())
    for card in made:
        assert card["made_with"] == [
            {
                "config.models": list(names.values()),
                "config.dataset": "rows.jsonl",
                "model_sources": [f"{name} at 0123" for name in names.values()],
                "corpus_sha256": "1" * 64,
                "torch": "2",
            }
        ]
    assert cards(records_of(degenerate.obeys, "/home/ann/final"), [])[0]["model"] == "final"
    elsewhere = copy.deepcopy(made[0])
    elsewhere["made_with"][0] |= {"config.dataset": "/srv/rows.jsonl", "corpus_sha256": "2" * 64}  # of an older version
    with pytest.raises(ValueError, match=r"the prompts 'rows\.jsonl' of the cards differ"):
        compare(made[0], elsewhere)


def test_the_command(two, tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, card in zip(paths, two, strict=True):
        path.write_text(json.dumps(card), "utf-8")
    assert read_card(paths[0]) == two[0] and cli.main(["compare", *map(str, paths)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("What good has more than mute") and "guarded" in said and "+1.00 [" in said
    assert cli.main(["compare", *map(str, paths), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == compare(*two)


def test_ratios_that_look_alike_have_a_line_each(two):
    """A table has two digits of them, by which the later setting took the place of the earlier."""
    changes = compare(*two)
    changes += [{**row, "compression_ratio": row["compression_ratio"] + 0.001} for row in changes]
    lines = compare_table(changes).splitlines()[2:]
    assert len(lines) == 2 * len(compare_table(compare(*two)).splitlines()[2:])


def test_a_card_that_has_something_twice_is_refused(two, tmp_path, capsys):
    """Which of the two counts hung on which card came first: B less A was not A less B with the other sign."""
    path, good = tmp_path / "a.json", tmp_path / "good.json"
    good.write_text(json.dumps(two[0]), "utf-8")
    settings, prompt = copy.deepcopy(two[0]["settings"]), copy.deepcopy(two[0])
    of_first = prompt["settings"][0]["prompts"]["refused"]
    of_first.append([of_first[0][0], 1 - of_first[0][1], 1])
    for card, what in (
        ({**two[0], "settings": settings + settings[:1]}, "setting ("),
        (prompt, f"prompt {of_first[0][0]!r}"),
    ):
        path.write_text(json.dumps(card), "utf-8")
        for pair in ((path, good), (good, path)):
            assert cli.main(["compare", *map(str, pair)]) == 2
            said = capsys.readouterr().err
            assert f"has the {what}" in said and "twice; expected each once" in said


def test_what_is_no_card_is_refused(two, tmp_path, capsys):
    path, good = tmp_path / "a.json", tmp_path / "good.json"
    good.write_text(json.dumps(two[0]), "utf-8")
    broken = []
    for pair in (
        [1, "x", 1],
        [1, math.nan, 1],
        [1, -math.inf, 1],
        [1, 1e308, 1],
        [1, 1.5, 1],
        [1, 0, 0],
        [1, 0, 1e400],
    ):
        broken.append(copy.deepcopy(two[0]))
        broken[-1]["settings"][0]["prompts"]["refused"][0] = pair
    broken.append({**two[0], "settings": [{**two[0]["settings"][0], "policy": ["snapkv"]}]})
    for text in ("", "[]", "{}", '{"format": 1}', "\x00", "[" * 100_000, *map(json.dumps, broken)):
        path.write_text(text, "utf-8")
        assert cli.main(["compare", str(path), str(good)]) == 2
        assert "is no card; expected the card.json that kvpitfalls report wrote" in capsys.readouterr().err
    path.write_text(json.dumps({**two[0], "format": 9}), "utf-8")
    assert (
        cli.main(["compare", str(path), str(good)]) == 2 and "a card of format 9; expected 1" in capsys.readouterr().err
    )
    path.write_text(json.dumps({**two[0], "settings": [{**two[0]["settings"][0], "policy": "tova"}]}), "utf-8")
    assert cli.main(["compare", str(path), str(good)]) == 2 and "no setting in common" in capsys.readouterr().err
