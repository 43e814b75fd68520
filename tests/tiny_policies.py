"""Every listed policy, made for prompts of a few tokens; a new policy is among them without a word here."""

import numpy as np
import torch

from kvpitfalls import (
    RKV,
    ChunkKV,
    DefensiveKV,
    ExpectedAttention,
    KVzip,
    LagKV,
    PyramidKV,
    UnsupportedModelError,
    keep,
    wrap,
)
from kvpitfalls.policies import get_policy, policy_names

_FOR_SHORT_PROMPTS = {
    policy.name: policy
    for policy in (
        LagKV(n_sink=0, lag_size=2),
        ChunkKV(chunks=3),
        PyramidKV(window_size=1, beta=2),
        ExpectedAttention(n_future_positions=16, n_sink=0),
        RKV(window_size=1, kernel_size=3),
        DefensiveKV(window_size=2, kernel_size=3),
        KVzip(chunk_size=11, n_overlap=2, n_sink=0),
    )
}
EVERY = [_FOR_SHORT_PROMPTS.get(name, get_policy(name)) for name in policy_names()]
HELD = [policy for policy in EVERY if policy.holds]
EQUAL = [
    policy for policy in EVERY if policy.allocation == "uniform"
]  # every layer and head keeps as much as any other


def _picked(x, tokens):
    """Tokens of (H, T, D). Floats of 8 bits go as bytes: torch 2.6 picks and stacks no others of them."""
    small = isinstance(x, torch.Tensor) and x.is_floating_point() and x.itemsize == 1
    return x.view(torch.uint8)[:, tokens].view(x.dtype) if small else x[:, tokens]


def read_after(policy, keys, queries, valid=None):
    """What a policy reads after each row, as if a token read again had its own query and key: for ``again=``."""
    if not policy.needs_again:
        return None
    valid = [(0, keys.shape[2])] * len(keys) if valid is None else valid
    rows = [[[begin + t for t in turn] for turn in policy.again(range(end - begin))] for begin, end in valid]
    turns = []
    for i in range(max(map(len, rows))):
        width = max(len(row[i]) for row in rows if i < len(row))
        picked = [(row[i] if i < len(row) else []) for row in rows]
        padded = [row + [0] * (width - len(row)) for row in picked]
        library = torch if isinstance(keys, torch.Tensor) else np
        turns.append(
            tuple(library.stack([_picked(x[b], row) for b, row in enumerate(padded)]) for x in (queries, keys))
        )
    return turns


def kept_by(policy, keys, queries=None, **given):
    """``kvp.keep``, with what the policy reads after the prompt."""
    policy = get_policy(policy)
    voters = keys if queries is None else queries
    return keep(policy, keys, queries, again=read_after(policy, keys, voters, given.get("valid")), **given)


def is_defined(policy, n_token: int, n_kept: int) -> bool:
    """Whether a policy takes a row of this length and budget."""
    try:
        if n_kept < n_token:
            policy.check(n_token, n_kept)
    except ValueError:
        return False
    return True


def takes(model, policy) -> bool:
    """Whether a policy is defined for a model: one that reads how queries are turned refuses models that turn none,
    and one that has the model read on refuses linear attention."""
    policy = get_policy(policy)
    if not policy.needs_rotary and not policy.needs_output and not policy.needs_again:
        return True
    try:
        with wrap(model, policy, budget=4) as handle:
            handle.compress(torch.arange(3, 11)[None])
    except UnsupportedModelError as reason:
        told = ("undoes rotary embedding", "weighs values by the output projection", "then forget that")
        assert any(
            words in str(reason) for words in told
        ) or f"policy {policy.name!r} is not defined for capped logits" in str(reason)
        return False
    return True


def rkv_by_hand(keys, queries, policy):
    """R-KV's scores of keys (n, D) but the last ones, which queries (G, W, D) are of: by its formula, pair by pair."""
    n, width = len(keys), queries.shape[1]
    logits = (queries @ keys[: n - width].T / keys.shape[-1] ** 0.5).amax(0)
    shares = [sum(row.softmax(-1)[k] for row in logits) / width for k in range(n - width)]
    reach = policy.kernel_size // 2
    important = torch.stack([max(shares[max(0, k - reach) : k + reach + 1]) for k in range(n - width)])
    alike = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1).fill_diagonal_(0)
    for i in range(n):
        later = [j for j in range(n) if j != i and alike[i, j] > policy.threshold]
        alike[i, later[-1:]] = 0
    redundant = alike.mean(0).softmax(-1)[: n - width]
    return policy.mix_lambda * important - (1 - policy.mix_lambda) * redundant
