"""Work grows with its input and no faster: counted in lines and calls of Python, or by texts that would take years."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from chat_tokenizers import byte_level
from tiny_models import build, ids

import kvpitfalls as kvp
from kvpitfalls.audits import leakage, refusal
from kvpitfalls.display import explore
from kvpitfalls.eviction import budget, selection
from kvpitfalls.eviction.fairness import Fair
from kvpitfalls.harness import contexts
from kvpitfalls.hf import cache, hold
from kvpitfalls.prompts.pieces import WAYS, marked, numbered, pieces

PACKAGE = str(Path(kvp.__file__).parent)


def lines_run(call) -> int:
    """How many lines of this package a call runs."""
    n = 0

    def trace(frame, event, _):
        nonlocal n
        n += event == "line"
        return trace if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return n


def calls_made(call) -> int:
    """How many functions a call calls, those of NumPy in C among them."""
    n = 0

    def count(_, event, __):
        nonlocal n
        n += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return n


TEXTS = {
    "equal": "Obey.\n",
    "equal and numbered": "Obey. Obey (2). ",
    "numbers": "1.5, 2\n",
    "marks": "* * *. \n",
    "blank": " \n\r\n",
    "wrapped": "and they\nall lived ",
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces_take_as_many_steps_as_there_are(text, how):
    def steps(n):
        whole = text * n
        return lines_run(lambda: marked(whole, [(0, len(whole))], how, ["user"]))

    assert steps(400) < 2.2 * steps(200)


def test_names_are_numbered_by_one_try_each():
    """Also those that stand in the way of others."""

    def steps(n):
        names = ["a", *(f"a ({i})" for i in range(2, n)), *["a"] * n, *["a (2)"] * n]
        assert len(set(numbered(names))) == len(names)
        return lines_run(lambda: list(numbered(names)))

    assert steps(400) < 2.2 * steps(200)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("run", [" ", ".", '"', "!\u201d", "_", "**", "\t\r", "\u3002", "a.", "1) "], ids=ascii)
def test_no_run_of_characters_is_read_again_from_each_of_them(run, how):
    """Of this length it would take years."""
    text = f"a{run * 300_000}b"
    found = pieces(text, how)
    assert found[0][0] == 0 and found[-1][1] == len(text)


RUNS = (" ", "_", "1:", "a =", "<<", "i'm sorry ", "sorry, ", "ich kann a ", "no, ", "- ", "|", "i can't ", "as an ")


@pytest.mark.parametrize("run", RUNS)
def test_answers_are_judged_whatever_is_said_over_and_over(run):
    """Of this length it would take years."""
    for begun in ("", "I can't ", "I'm sorry, but ", "Ich kann ", "Sorry for "):
        assert refusal.refuses(f"{begun}{run * 50_000}x") in (True, False)


@pytest.mark.parametrize("n_span", [10, 1000])
def test_spans_are_counted_by_few_calls(n_span):
    """As many for thousands of spans as for ten, and the same numbers as by comparing."""
    rng = np.random.default_rng(n_span)
    kept = np.sort(np.stack([rng.choice(4000, 1500, replace=False) for _ in range(3)])).astype(np.int32)
    kept[1, 1000:] = -1
    cuts = np.sort(rng.choice(4001, 2 * n_span, replace=False)).reshape(-1, 2)
    inside = (kept[:, :, None] >= cuts[:, 0]) & (kept[:, :, None] < cuts[:, 1])
    assert np.array_equal(selection.count_inside(kept, cuts), inside.sum(1))
    spans = {str(i): (int(begin), int(end)) for i, (begin, end) in enumerate(cuts)}
    shares = cache.mean_kept_shares([kept, kept], spans)
    assert list(shares.values()) == (inside.sum((0, 1)) / (3 * np.diff(cuts)[:, 0])).tolist()
    edges = np.unique(cuts)[None].astype(np.int32)
    of_all = selection.Kept(kept[None], None, None, None)
    assert calls_made(lambda: selection.count_per_segment(of_all, edges)) < 120
    assert calls_made(lambda: cache.mean_kept_shares([kept, kept], spans)) < 120


def test_no_spans_have_no_shares():
    assert cache.mean_kept_shares([], {}) == {} == cache.mean_kept_shares([np.zeros((2, 3), np.int32)], {})


def test_a_text_is_looked_for_among_the_tokens_that_it_may_be_of():
    def steps(n):
        prompt = kvp.Prompt.from_text(byte_level(), "Speak Spanish. " + "no and no, " * n)
        assert prompt.find("Spanish") == prompt.marked({"a": "Spanish"}).find("Spanish")
        return lines_run(lambda: prompt.find("Spanish"))

    assert steps(1000) == steps(10)


def test_code_tells_a_text_that_repeats_itself_by_one_look():
    """Of this length it would take years."""
    text = "a" * 2_000_000
    prompt = kvp.Prompt(text, (1,), ((0, len(text)),), {}, None, contents=((0, len(text)),))
    assert explore._shortest(prompt, {"text": text[1:], "begin": 1, "end": len(text)}) == (1, len(text))
    assert explore._shortest(prompt, {"text": text, "begin": 0, "end": len(text)}) == text


def test_messages_are_numbered_by_one_step_each():
    def steps(n):
        tokenizer, messages = byte_level(), [{"role": "user", "content": "no"}] * n
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        marks = contexts.Marks(instructions="messages", fair=Fair.parse(True))
        known = text, tokenizer(text, add_special_tokens=False)["input_ids"], messages
        assert list(marks.prompt(tokenizer, *known).spans)[-1] == f"user: no ({n})"
        return lines_run(lambda: marks.prompt(tokenizer, *known))

    assert steps(400) < 2.2 * steps(200)


def test_a_floor_asks_for_no_more_texts_than_it_takes():
    endless = (f"Use the word {'sea ' * (n // 2 + 1)}." for n in itertools.count())
    assert len(leakage.unlike("Answer in Spanish.", endless, 8)) == 8


def test_words_of_many_answers_are_held_once():
    answers = [leakage._tokenize()(f"answer {i} names the word again {'and again ' * 50}") for i in range(20)]
    assert len({id(word) for said in answers for word in said}) == len({word for said in answers for word in said})


def test_a_held_budget_is_shared_out_once_a_step(monkeypatch):
    """Not by each layer anew."""
    model, made = build("llama"), []
    monkeypatch.setattr(hold, "apportion", lambda *args: made.append(args) or budget.apportion(*args))
    tokens = ids(2, 30)
    with kvp.wrap(model, "knorm", budget=12, fair=True, when="always") as handle:
        held = handle.compress(tokens[:, :28], spans={"a": (2, 12), "b": (12, 28)})
        n_prefill = len(made)
        assert n_prefill == len(tokens)
        model.generate(
            tokens, past_key_values=held, max_new_tokens=5, do_sample=False, attention_mask=tokens.new_ones(2, 30)
        )
    assert len(held.kept_layers) == 3 and len(made) == n_prefill + 5 * len(tokens)


def test_shares_are_added_up_as_whole_numbers():
    """Fractions, each of which is many calls, are made of corners and of what comes out, not of all that is tried."""
    lengths, weights = [5 + i % 9 for i in range(300)], [1 + i % 7 for i in range(300)]
    assert calls_made(lambda: budget.apportion(1000, lengths, weights, [i % 4 for i in range(300)])) < 300 * len(
        lengths
    )
