"""What must hold of any prompts, spans, policy, fairness, protection, allocation, ratio and side of padding: laws that
need no reference, end to end."""

import contextlib
import re
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from tiny_models import build
from tiny_policies import EVERY

import kvpitfalls as kvp

# Of what is drawn some cases cannot be, which other tests are about. Any other refusal breaks the law.
CANNOT_BE = "fair eviction needs the instructions' places|fair='paper' expects exactly two|has one of its own"
of_any_case = settings(deadline=None, max_examples=15, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    return build(request.param)


@st.composite
def rows_of(draw):
    """Ids and instructions of a batch; spans touch, or cover all, now and then."""
    rows = []
    for n in draw(st.lists(st.integers(2, 40), min_size=1, max_size=3)):
        ids = draw(st.lists(st.integers(3, 120), min_size=n, max_size=n))
        edges = sorted(draw(st.sets(st.integers(0, n), max_size=6)) | draw(st.sampled_from([set(), {0, n}])))
        chosen = draw(st.lists(st.booleans(), min_size=len(edges), max_size=len(edges)))
        pairs = [pair for pair, is_span in zip(pairwise(edges), chosen, strict=False) if is_span]
        rows.append((ids, {f"span {i}": pair for i, pair in enumerate(pairs)}))
    return rows


@contextlib.contextmanager
def cases_that_can_be():
    try:
        yield
    except kvp.BudgetError:
        reject()
    except ValueError as error:
        if re.search(CANNOT_BE, str(error)) is None:
            raise
        reject()


@st.composite
def settings_of(draw):
    return {
        "policy": draw(st.sampled_from(EVERY)),
        "fair": draw(st.sampled_from([False, True, 0.5, "floor=2", "paper"])),
        "allocation": draw(st.sampled_from([None, None, "pyramid", "ada"])),
        "protect": draw(st.sampled_from([None, "sinks", "boundary"])),
        "compression_ratio": draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9])),
    }


def compressed(model, rows, side, **setting):
    n_most = max(len(ids) for ids, _ in rows)
    before = [n_most - len(ids) if side == "left" else 0 for ids, _ in rows]
    ids, mask = torch.zeros(2, len(rows), n_most, dtype=torch.long)
    for b, (of_row, _) in enumerate(rows):
        at = slice(before[b], before[b] + len(of_row))
        ids[b, at], mask[b, at] = torch.tensor(of_row), 1
    spans = [{name: (p + n, q + n) for name, (p, q) in of.items()} for n, (_, of) in zip(before, rows, strict=True)]
    with kvp.wrap(model, **setting) as handle:
        return handle.compress(ids, attention_mask=mask, spans=spans)


def kept(model, rows, side, **setting):
    """Of each row, layer and head: the kept tokens, counted from the row's first."""
    cache = compressed(model, rows, side, **setting)
    starts = [max(len(ids) for ids, _ in rows) - len(ids) if side == "left" else 0 for ids, _ in rows]
    layers = [cache.positions(layer.index) for layer in cache.kept_layers]
    return [[[(head[head >= 0] - start).tolist() for head in x[b]] for x in layers] for b, start in enumerate(starts)]


def of_span(kept_of_row, span):
    return [sum(span[0] <= t < span[1] for t in head) for layer in kept_of_row for head in layer]


@of_any_case
@given(rows_of(), settings_of(), st.sampled_from(["left", "right"]))
def test_a_row_keeps_what_it_keeps_alone(model, rows, setting, side):
    """In any order of rows, on either side of its padding, whatever its spans are called; and the same again."""
    with cases_that_can_be():
        found = kept(model, rows, side, **setting)
    assert kept(model, rows, side, **setting) == found
    assert kept(model, rows, "left" if side == "right" else "right", **setting) == found
    assert kept(model, rows[::-1], side, **setting)[::-1] == found
    renamed = [(ids, {f"{9 - i}": span for i, span in enumerate(spans.values())}) for ids, spans in rows]
    assert kept(model, renamed, side, **setting) == found
    for row, of_row in zip(rows, found, strict=True):
        assert kept(model, [row], side, **setting) == [of_row]


@of_any_case
@given(rows_of(), settings_of(), st.sampled_from(["left", "right"]))
def test_spans_keep_their_share_and_protected_ones_all(model, rows, setting, side):
    setting["protect"] = None
    with cases_that_can_be():
        found = kept(model, rows, side, **setting)
    is_even = setting["fair"] is True and setting["allocation"] is None and setting["policy"].allocation == "uniform"
    for (ids, spans), of_row in zip(rows, found, strict=True):
        for name, span in spans.items():
            n, n_kept = span[1] - span[0], len(of_row[0][0])
            if is_even:
                assert np.abs(np.array(of_span(of_row, span)) - n * n_kept / len(ids)).max() < 1 + 1e-9
            try:
                (pinned,) = kept(model, [(ids, spans)], side, **{**setting, "protect": name})
            except kvp.BudgetError:  # no room for it
                continue
            assert set(of_span(pinned, span)) == {n}


@of_any_case
@given(rows_of(), settings_of())
def test_without_eviction_the_cache_is_the_models_own(model, rows, setting):
    """Bit for bit, of a row alone."""
    with cases_that_can_be():
        cache = compressed(model, rows[:1], "left", **{**setting, "compression_ratio": 0.0})
    with torch.no_grad():
        own = model(torch.tensor([rows[0][0]]), use_cache=True).past_key_values
    for ours, theirs in zip(cache.layers, own.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
