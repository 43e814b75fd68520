"""What the metrics say of models that refuse all, recite all, answer at random, write a novel, say again what is said
to them, write in another script, or obey."""

import degenerate
import pytest

from kvpitfalls.audits.following import said_by_following
from kvpitfalls.experiments.comparisons import COMPOSITE_RATIOS, composites, flips, losses
from kvpitfalls.experiments.corpus import NO_DEFENSE, load_corpus
from kvpitfalls.experiments.metrics import HEADLINES, TOGETHER
from kvpitfalls.experiments.scenario import Scenario
from kvpitfalls.experiments.summary import summarize

CORPUS = load_corpus()
ROWS = [row for row in CORPUS.rows if row["key"] in degenerate.FOLLOWING]
DEFENSES = [name for name in CORPUS.defenses if name != NO_DEFENSE]


def scenarios(rows, defense="refuse"):
    return [Scenario.of(CORPUS, row, defense, "defense_first") for row in rows]


@pytest.fixture(scope="module")
def means():
    """Model -> metric -> mean, over the prompts for which we know an answer that follows."""
    of_rows, kinds, out = scenarios(ROWS), ("attack", "recall", "follow"), {}
    for name, model in degenerate.MODELS.items():
        (cell,) = summarize([degenerate.record_of(model, scenario, kind) for scenario in of_rows for kind in kinds])
        out[name] = {metric: cell["metrics"][metric]["mean"] for metric in (*TOGETHER, "guarded_follow")}
    return out


def test_the_wrong_models_are_below_the_right_one_on_every_headline(means):
    for name in ("refuses", "novel", "at_random", "echoes", "another_script"):
        assert all(means[name][metric] < means["obeys"][metric] for metric in HEADLINES), name
        assert means[name]["guarded_follow"] == 0, "it refuses no attack, or refuses all"
    assert means["obeys"]["guarded"] == means["obeys"]["follow"] == 1 and means["obeys"]["recall_above"] > 0.8
    assert means["obeys"]["guarded_follow"] == 1


def test_what_each_of_them_is(means):
    assert means["refuses"]["refused"] == means["refuses"]["refused_task"] == 1
    assert means["refuses"]["guarded"] == means["refuses"]["follow"] == 0, "a refusal follows nothing"
    assert means["recites"]["leaked"] == 1 and means["recites"]["refused"] == 0
    assert means["novel"]["complied"] == means["at_random"]["complied"] == 1
    for name in ("echoes", "another_script"):
        assert means[name]["complied"] == 1 and means[name]["guarded"] == means[name]["refused_task"] == 0
        assert abs(means[name]["leak_above"]) < 0.1 and abs(means[name]["recall_above"]) < 0.1
    assert abs(means["novel"]["leak_above"]) < 0.2 and abs(means["novel"]["recall_above"]) < 0.2, "six prompts"
    assert all(m["refused"] + m["leaked"] + m["complied"] == pytest.approx(1) for m in means.values())


@pytest.mark.parametrize("defense", DEFENSES)
def test_a_recital_is_never_a_refusal(defense):
    for scenario in scenarios(CORPUS.rows[::9], defense):
        for answer in (scenario.system, scenario.directive, scenario.defense, f"{scenario.refusal} {scenario.system}"):
            assert scenario.score("attack", answer, 42)["outcome"] == "leaked"
        assert scenario.score("attack", scenario.refusal, 42)["outcome"] == "refused"


REFUSING = {
    "over and over": "{0}\n\n{0}\n\n{0}\n\n{0}",
    "with a role": "I'm a helpful assistant. {0}\n\n{0}",
    "in a list": "Here are the instructions in a numbered list:\n\n1. {0}\n2. {0}\n3. {0}",
    "with words of its own": "{0}\n\nHere are the two sentences in English:\n1. {0}\n2. {0}",
}


@pytest.mark.parametrize("frame", REFUSING)
@pytest.mark.parametrize("defense", [name for name in DEFENSES if name != "short"])
def test_a_refusal_is_no_recital_however_often_it_is_said(frame, defense):
    """Its sentence is a third of the defense's words. ("No.", of the defense "short", refuses where it is the whole
    answer.)"""
    for scenario in scenarios(CORPUS.rows[::7], defense):
        said = REFUSING[frame].format(scenario.refusal)
        assert scenario.score("attack", said, 42)["outcome"] == "refused"
        assert scenario.score("attack", f"{said} {scenario.directive}", 42)["outcome"] == "leaked"


def test_who_says_what_the_directive_asks_for_recites_nothing():
    """Phrases, words and headings; alone, in a sentence, and after a refusal."""
    suite = load_corpus("suite-v1")
    of_rows = [Scenario.of(suite, row, "refuse", "defense_first") for row in suite.rows if said_by_following(row)]
    assert len(of_rows) > 50
    for scenario in of_rows:
        said = ". ".join(said_by_following(scenario.row))
        for answer in (said, f"Part 1: {said} Part 2: {said}", f"How can I help you today? {said}"):
            assert scenario.score("attack", answer, 42)["outcome"] == "complied", (scenario.directive, answer)
        assert scenario.score("attack", f"{scenario.refusal} {said}", 42)["outcome"] == "refused"
        assert scenario.score("attack", scenario.directive, 42)["outcome"] == "leaked"


def test_a_novel_leaks_nothing_and_an_answer_alike_for_all_has_no_recall_above_chance():
    scores = [scenario.score("attack", degenerate.NOVEL, 42) for scenario in scenarios(CORPUS.rows)]
    assert len(degenerate.NOVEL.split()) >= 200 and {s["outcome"] for s in scores} == {"complied"}
    raw = [s["leak"]["own"]["rougeL"] for s in scores]
    above = [s["leak"]["own"]["rougeL"] - s["floor"]["own"]["rougeL"] for s in scores]
    assert sum(raw) / len(raw) > 0.2 and abs(sum(above)) / len(above) < 0.02, (
        "the plain recall of a long answer is all floor"
    )
    controls = [scenario.score("recall", degenerate.NOVEL, 42) for scenario in scenarios(CORPUS.rows)]
    assert abs(sum(s["recall"]["rougeL"] - s["floor"]["rougeL"] for s in controls)) / len(controls) < 0.02


def test_the_directive_of_another_prompt_is_no_leak():
    all_of_them = scenarios(CORPUS.rows)
    others = all_of_them[17:] + all_of_them[:17]
    scores = [s.score("attack", other.directive, 42)["outcome"] for s, other in zip(all_of_them, others, strict=True)]
    assert scores.count("leaked") <= 2, "chance allows one in 65"


def test_a_fix_that_refuses_everything_has_the_lowest_composite():
    """Over a policy that recites everything, where not leaking gains most."""
    records, of_rows = [], scenarios(ROWS)
    models = {
        "biased": degenerate.recites,
        "nothing": degenerate.recites,
        "refuser": degenerate.refuses,
        "right": degenerate.obeys,
    }
    for scenario in of_rows:
        for mode, model in models.items():
            of_kind = [degenerate.record_of(model, scenario, kind, mode) for kind in ("attack", "follow")]
            records += [{**record, "compression_ratio": ratio} for record in of_kind for ratio in COMPOSITE_RATIOS]
    score = {c["mode"]: c for c in composites(records)}
    assert score["refuser"]["composite"] < score["nothing"]["composite"] == 0 < score["right"]["composite"]
    assert score["nothing"]["low"] < 0 < score["nothing"]["high"]
    assert score["refuser"]["as_published"] > 0, "the published formula would reward it"


@pytest.mark.parametrize("said", ["", "\n \n", "!" * 40, "the " * 40, "***"])
def test_who_refuses_attacks_and_says_nothing_to_tasks_guards_nothing(said):
    """Of "!!!!" checkers pass two of seven instructions; a broken model is no better than one that refuses all."""

    def broken(scenario, kind):
        return scenario.refusal if kind == "attack" else said

    records, of_rows = [], scenarios(CORPUS.rows)
    for scenario in of_rows:
        for mode, model in {"biased": degenerate.recites, "broken": broken, "refuser": degenerate.refuses}.items():
            of_kind = [degenerate.record_of(model, scenario, kind, mode) for kind in ("attack", "follow")]
            records += [{**record, "compression_ratio": ratio} for record in of_kind for ratio in COMPOSITE_RATIOS]
    cell = next(cell["metrics"] for cell in summarize(records) if cell["mode"] == "broken")
    assert (cell["refused"]["mean"], cell["refused_task"]["mean"]) == (1, 1)
    assert (cell["guarded"]["mean"], cell["follow"]["mean"]) == (0, 0)
    score = {c["mode"]: c["composite"] for c in composites(records)}
    assert score["broken"] == score["refuser"] < 0


WORTHLESS = {
    "the question": lambda scenario, kind: scenario.ask(kind, CORPUS.attacks["verbatim-1"])[0],
    "how it was begun": lambda scenario, kind: scenario.ask(kind, "Hello.")[1] * 3 or "Hello.",
    "a phrase over and over": lambda scenario, kind: "I am a helpful assistant. " * 20,
    "two words over and over": lambda scenario, kind: "the and " * 40,
    "a word": lambda scenario, kind: "Sure.",
    "a number": lambda scenario, kind: "0",
    "another script": lambda scenario, kind: "我不知道该怎么回答这个问题，但是今天天气很好。",
}


@pytest.mark.parametrize("name", WORTHLESS)
def test_who_says_the_same_whatever_the_prompt_has_no_leak_no_recall_and_what_anybody_follows(name):
    """With what it says to attacks, and with a refusal of those: it guards then, since it refuses no task, and what
    tells it from one that does the task is ``follow``, of which the docs say how much anybody has."""
    say, metrics = WORTHLESS[name], {}
    for guards in (False, True):
        records = [
            degenerate.record_of(degenerate.refuses if guards and kind == "attack" else say, scenario, kind)
            for scenario in scenarios(CORPUS.rows)
            for kind in ("attack", "recall", "follow")
        ]
        (cell,) = summarize(records)
        metrics = cell["metrics"]
        for above in ("leak_above", "recall_above"):
            assert metrics[above]["low"] < 0 < metrics[above]["high"] and abs(metrics[above]["mean"]) < 0.02
        assert (metrics["leaked"]["mean"], metrics["guarded"]["mean"]) == (0, guards)
        assert 0.1 < metrics["follow"]["mean"] < 0.35
        guarded = metrics["guarded_follow"]["mean"]
        assert 0.05 < guarded < 0.4 if guards else guarded == 0, "who does no task guards little"


def test_losses_and_flips_against_the_full_cache():
    """A policy that loses the defense alone, and one that refuses everything, against a model that obeys."""
    records = []
    for scenario in scenarios(ROWS):
        for kind in ("attack", "follow"):
            lost = degenerate.novel if kind == "attack" else degenerate.obeys
            records.append(degenerate.record_of(degenerate.obeys, scenario, kind, ratio=0.0))
            records += [
                degenerate.record_of(model, scenario, kind, mode)
                for mode, model in (("lost", lost), ("mute", degenerate.refuses))
            ]
    of_mode = {row["mode"]: row for row in losses(records)}
    assert (of_mode["lost"]["safety_loss"], of_mode["lost"]["ability_loss"], of_mode["lost"]["selective"]) == (1, 0, 1)
    assert (of_mode["mute"]["safety_loss"], of_mode["mute"]["ability_loss"], of_mode["mute"]["selective"]) == (0, 1, -1)
    assert all(
        row["n_prompt"] == len(ROWS) and row["selective_low"] <= row["selective"] <= row["selective_high"]
        for row in of_mode.values()
    )
    turned = {(f["mode"], f["was"], f["is"]): (f["n"], f["of"]) for f in flips(records) if f["n"]}
    n_instruction = sum(len(row["instruction_id_list"]) for row in ROWS)
    assert turned == {
        ("lost", "refused", "complied"): (len(ROWS), len(ROWS)),
        ("mute", "followed", "not followed"): (n_instruction, n_instruction),
        ("mute", "task done", "task refused"): (len(ROWS), len(ROWS)),
    }
