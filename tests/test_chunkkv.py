"""ChunkKV: whole chunks, by the means of what another policy says of their tokens."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import kvpitfalls as kvp
from kvpitfalls.eviction.allocation import UNIFORM

KEYS = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("chunks", [1, 2, 7, np.int64(40), 41, "instructions"])
def test_chunkkv_scores_are_the_means_of_chunks_of_the_sums_over_heads(chunks, library):
    valid, spans = [(0, 40), (3, 37)], [{"a": (0, 5), "b": (20, 33)}, {"a": (3, 37)}]
    for fair in (False,) if chunks == "instructions" else (False, True):
        settings = {"spans": spans, "fair": fair, "valid": valid, "budget": 20}
        keys = KEYS.numpy() if library == "numpy" else KEYS
        made = np.asarray(kvp.keep(kvp.ChunkKV("knorm", chunks), keys, **settings).scores)
        of_tokens = np.asarray(kvp.keep("knorm", keys, **settings).scores, np.float64).sum(1)
        for row, (begin, end), named in zip(range(2), valid, spans, strict=True):
            edges = {begin, end, *(edge for span in named.values() for edge in span)}
            segments = pairwise(sorted(edges if fair or chunks == "instructions" else {begin, end}))
            step = 40 if chunks == "instructions" else int(chunks)
            for a, b in ((a, min(a + step, last)) for first, last in segments for a in range(first, last, step)):
                assert np.array_equal(made[row, :, a:b], np.full((3, b - a), of_tokens[row, a:b].mean(), np.float32))


def test_chunkkv_keeps_whole_chunks_and_no_chunk_lies_in_two_instructions():
    spans = {"a": (3, 14), "b": (14, 30)}
    scores = kvp.keep(kvp.ChunkKV("keydiff", 4), KEYS, budget=20, spans=spans, fair=True).scores
    edges = [0, 3, 7, 11, 14, 18, 22, 26, 30, 34, 38, 40]
    for begin, end in pairwise(edges):
        assert (scores[:, :, begin:end] == scores[:, :1, begin : begin + 1]).all()
    assert all(len(set(row[0].tolist())) == len(edges) - 1 for row in scores)


def test_chunkkv_keeps_instructions_whole_or_not_at_all():
    policy = kvp.ChunkKV("keydiff", "instructions")
    spans = {"a": (3, 14), "b": (14, 30)}
    edges = [(0, 3), (3, 14), (14, 30), (30, 40)]
    for budget in range(1, 40):
        kept = kvp.keep(policy, KEYS, budget=budget, spans=spans).positions
        for head in kept.flatten(0, 1):
            shares = [sum(begin <= t < end for t in head.tolist()) / (end - begin) for begin, end in edges]
            assert sum(0 < share < 1 for share in shares) <= 1
    for fair in (True, 0.5):
        with pytest.raises(
            ValueError, match="was given segments that have quotas; expected instructions, and fair=False or a floor"
        ):
            kvp.keep(policy, KEYS, budget=20, spans=spans, fair=fair)
    with pytest.raises(ValueError, match="was given no instructions; expected instructions"):
        kvp.keep(policy, KEYS, budget=20)
    kept = kvp.keep(policy, KEYS, budget=20, spans=spans, fair="floor=2").positions
    assert all(((kept >= begin) & (kept < end)).sum(-1).min() >= 2 for begin, end in spans.values())
    for wrong in (0, -1, True, 2.0, "sentences"):
        with pytest.raises(ValueError, match=r"^chunks is .*; expected a whole number, at least 1, or 'instructions'"):
            kvp.ChunkKV("keydiff", wrong)
    with pytest.raises(
        ValueError, match=r"^policy is AdaKV.*, which shares its budget by itself; expected one that scores tokens"
    ):
        kvp.ChunkKV("adakv")
    with pytest.raises(ValueError, match=r"^policy is a ChunkKV itself"):
        kvp.ChunkKV(kvp.ChunkKV())


def test_a_policy_that_says_uniform_by_an_object_shares_nothing(registry):
    class Equal(kvp.KNorm):
        name = "equal_knorm"
        allocation = UNIFORM

    kept = kvp.keep(kvp.ChunkKV(Equal(), chunks=3), KEYS, budget=6).positions
    assert np.array_equal(kept, kvp.keep(kvp.ChunkKV("knorm", chunks=3), KEYS, budget=6).positions)
