"""Kept sets against kvpress 0.5.5's own presses on the same keys and values (benchmarks/kvpress_golden.py recorded
them)."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import kvpitfalls as kvp
from kvpitfalls.eviction.allocation import Ada
from kvpitfalls.eviction.budget import kept_tokens

ROOT = Path(__file__).parent.parent
RECORDED = np.load(Path(__file__).parent / "data" / "kvpress.npz")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
NEAR_TIE = 1e-6  # scores this close on both sides of the cut: rounding decides, and theirs is another


def recorder():
    """The script itself, without kvpress: it says what was drawn."""
    spec = importlib.util.spec_from_file_location("kvpress_golden", ROOT / "benchmarks" / "kvpress_golden.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kvpress", MagicMock())
        spec.loader.exec_module(module)
    return module


SCRIPT = recorder()


def test_keydiff_keeps_what_kvpress_keeps():
    n_head, n_tie = 0, 0
    for seed, heads, n_token, n_dim, _, kind in SCRIPT.CASES:
        theirs = RECORDED[f"keydiff_{seed}"]
        keys = SCRIPT.keys_of(seed, heads, n_token, n_dim, kind)
        ours = kvp.keep("keydiff", keys, budget=theirs.shape[1])
        for head in range(heads):
            order = np.sort(ours.scores[0, head])[::-1]
            is_tie = order[theirs.shape[1] - 1] - order[theirs.shape[1]] <= NEAR_TIE
            n_head, n_tie = n_head + 1, n_tie + is_tie
            assert is_tie or np.array_equal(ours.positions[0, head], theirs[head]), (seed, head)
    assert n_head >= 2000 and n_tie <= n_head / 500


def spread(x: np.ndarray, lag_size: int) -> np.ndarray:
    """LagKV's weights of the tokens of all chunks but the last, in float64, from the paper's formula: (H, chunks - 1,
    lag_size)."""
    chunks = x.astype(np.float64).reshape(len(x), -1, lag_size, x.shape[-1])
    low, high = chunks[:, 1:].min(2, keepdims=True), chunks[:, 1:].max(2, keepdims=True)
    powers = np.exp(((chunks[:, :-1] - low) / (high - low)).std(-1, ddof=1))
    return powers / powers.sum(-1, keepdims=True)


def test_lagkv_keeps_what_kvpress_keeps():
    """And both what the formula says: of every chunk that has one after it, equally many."""
    n_head, n_tie = 0, 0
    for case in SCRIPT.LAGKV_CASES:
        (keys, values, budget), theirs = SCRIPT.lagkv_of(case), RECORDED[f"lagkv_{case[0]}"]
        seed, heads, n_token, _, n_sink, lag_size, n_best, _ = case
        ours = kvp.keep(kvp.LagKV(n_sink, lag_size), keys, values=values, budget=budget).positions[0]
        last = n_token - (n_token - n_sink) % lag_size
        weights = sum(spread(x[0, :, n_sink:last], lag_size) for x in (keys, values))
        order = np.sort(weights, -1)[..., ::-1]
        is_tie = (order[..., n_best - 1] - order[..., n_best] <= NEAR_TIE / lag_size).any(-1)
        best = (
            np.sort(np.argsort(-weights, -1)[..., :n_best], -1)
            + n_sink
            + lag_size * np.arange(weights.shape[1])[:, None]
        )
        always = [*range(n_sink), *range(last - lag_size, n_token)]
        for head in range(heads):
            defined = sorted([*best[head].ravel().tolist(), *always])
            assert is_tie[head] or ours[head].tolist() == theirs[head].tolist() == defined, (seed, head)
        n_head, n_tie = n_head + heads, n_tie + is_tie.sum()
    assert n_head >= 2000 and n_tie <= n_head / 500


def test_chunkkv_keeps_what_kvpress_keeps():
    n_prompt, n_tie = 0, 0
    for case in SCRIPT.CHUNKKV_CASES:
        keys, recorded, length, scorer = SCRIPT.chunkkv_of(case), RECORDED[f"chunkkv_{case[0]}"], *case[7:]
        for prompt, theirs in zip(keys, recorded, strict=True):
            theirs = theirs[theirs >= 0]
            ours = kvp.keep(kvp.ChunkKV(scorer, length), prompt[None], budget=len(theirs))
            kept = {t // length for t in theirs.tolist()}
            of_chunks = [
                (float(ours.scores[0, 0, at]), at // length in kept) for at in range(0, len(prompt[0]), length)
            ]
            is_tie = (
                min(x for x, there in of_chunks if there) - max(x for x, there in of_chunks if not there) <= NEAR_TIE
            )
            n_prompt, n_tie = n_prompt + 1, n_tie + is_tie
            assert is_tie or (ours.positions[0] == theirs).all(), case
    assert n_prompt >= 2000 and n_tie <= n_prompt / 500


def masks(name: str, n_token: int) -> np.ndarray:
    """Which tokens kvpress kept, bool (..., T)."""
    return np.unpackbits(RECORDED[name], axis=-1, count=n_token).astype(bool)


def in_mask(kept: kvp.Kept | SimpleNamespace, row: int = 0) -> np.ndarray:
    """Which tokens are kept of a row, bool (H, T)."""
    mask = np.zeros((kept.positions.shape[1], kept.scores.shape[2] + 1), bool)
    np.put_along_axis(mask, kept.positions[row], True, -1)
    return mask[:, :-1]


def test_adakv_keeps_what_kvpress_keeps():
    n_head, n_tie = 0, 0
    for case in SCRIPT.ADAKV_CASES:
        keys, theirs = SCRIPT.adakv_of(case), masks(f"adakv_{case[0]}", case[3])
        for prompt, of_prompt in zip(keys, theirs, strict=True):
            ours = kvp.keep("knorm", prompt[None], compression_ratio=case[5], allocation=Ada(case[7]))
            n_differ = (in_mask(ours) ^ of_prompt).sum()
            n_head, n_tie = n_head + case[2], n_tie + (n_differ > 0)
            if n_differ:  # then one token changed places with another of the same score
                places = np.argwhere(in_mask(ours) ^ of_prompt)
                assert (
                    n_differ == 2
                    and np.ptp([ours.scores[0, h, t] for h, t in places]) <= NEAR_TIE * np.abs(ours.scores).max()
                ), case
    assert n_head >= 2000 and n_tie <= n_head / 500


def test_pyramidkv_keeps_what_kvpress_keeps_where_it_is_defined():
    """Its press rounds every layer by itself, so that its layers together keep more or less than the budget; ours
    differ by a rounding."""
    n_head, n_tie, n_refused = 0, 0, 0
    for case in SCRIPT.PYRAMIDKV_CASES:
        _, n_layer, heads, _, n_token, _, ratio, window_size, beta = case
        theirs, policy = masks(f"pyramidkv_{case[0]}", n_token), kvp.PyramidKV(window_size, beta=beta)
        layers = [{"layer": i, "n_layer": n_layer, "compression_ratio": ratio} for i in range(n_layer)]
        is_whole = n_token * (1 - ratio) % 1 == 0  # else the press shares out a part of a token more
        try:
            budgets = policy.allocation.layers(n_token, kept_tokens(n_token, ratio), n_layer)
        except kvp.BudgetError:
            assert not theirs.any() or not is_whole, case
            with pytest.raises(kvp.BudgetError, match=r"allocation Pyramid\(.*\) expects at"):
                kvp.keep(policy, *SCRIPT.pyramidkv_of(case)[0], **layers[0])
            n_refused += 1
            continue
        assert theirs.any() or len(set(budgets)) == 1, case
        if not theirs.any():
            continue
        for (keys, queries), settings, of_layer in zip(SCRIPT.pyramidkv_of(case), layers, theirs, strict=True):
            ours = kvp.keep(policy, keys, queries, **settings)
            mask, n_ours, n_theirs = in_mask(ours), int(ours.counts[0, 0]), int(of_layer[0].sum())
            assert abs(n_ours - n_theirs) <= (1 if is_whole else 2), case
            n_extra = (mask & ~of_layer).sum(-1), (of_layer & ~mask).sum(-1)
            is_tie = (n_extra[0] > max(0, n_ours - n_theirs)) | (n_extra[1] > max(0, n_theirs - n_ours))
            n_head, n_tie = n_head + heads, n_tie + is_tie.sum()
    assert n_head >= 2000 and n_tie <= n_head / 500 and n_refused >= 5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_expected_attention_keeps_what_kvpress_keeps(device):
    """From queries that were turned: what it undoes is what the press is given. By kernels where heads have 64
    channels, on a GPU."""
    n_head, n_tie = 0, 0
    for case in SCRIPT.EXPECTED_CASES:
        n_token, settings = case[3], case[7]
        keys, values, queries = SCRIPT.expected_of(case)
        theirs = masks(f"expected_{case[0]}", n_token)
        n_kept = int(theirs[0].sum())
        before, rotary = torch.from_numpy(queries), kvp.Rotary(SCRIPT.THETA)
        turned = rotary.turned(before, *rotary.angles(torch.arange(n_token)[None], before))
        keys, turned, values = (torch.as_tensor(x, device=device) for x in (keys, turned, values))
        ours = kvp.keep(kvp.ExpectedAttention(**settings), keys, turned, values=values, rotary=rotary, budget=n_kept)
        ours = SimpleNamespace(positions=ours.positions.cpu().numpy(), scores=ours.scores.cpu().numpy())
        order = np.sort(ours.scores[0], -1)[:, ::-1]
        is_tie = order[:, n_kept - 1] - order[:, n_kept] <= NEAR_TIE * order[:, n_kept]
        n_head, n_tie = n_head + case[1], n_tie + is_tie.sum()
        assert (is_tie | (in_mask(ours) == theirs).all(-1)).all(), case
    assert n_head >= 2000 and n_tie <= n_head / 500


def test_kvzip_keeps_what_kvpress_keeps():
    """Layer by layer, of prompts without a template's beginning, which the press never repeats."""
    first, later, n_overlap = SCRIPT.KVZIP_REQUESTS
    n_head, n_tie = 0, 0
    for case in SCRIPT.KVZIP_CASES:
        theirs = masks(f"kvzip_{case[0]}", case[4])
        policy = kvp.KVzip((0,) * first, (0,) * later, chunk_size=case[8], n_overlap=n_overlap)
        for layer, of_layer in enumerate(theirs):
            keys, turns = SCRIPT.kvzip_of(case, layer)
            ours = kvp.keep(policy, keys, again=turns, compression_ratio=case[6], allocation=Ada(0))
            places = np.argwhere(in_mask(ours) ^ of_layer)
            n_head, n_tie = n_head + case[2], n_tie + (len(places) > 0)
            if len(places):  # then one token changed places with another of the same score
                of_places = [ours.scores[0, h, t] for h, t in places]
                assert len(places) == 2 and np.ptp(of_places) <= NEAR_TIE * max(of_places), case
    assert n_head >= 2000 and n_tie <= n_head / 500
