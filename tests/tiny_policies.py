"""Every listed policy, made for prompts of a few tokens; a new policy is among them without a word here."""

import torch

from kvpitfalls import ChunkKV, ExpectedAttention, LagKV, PyramidKV, UnsupportedModelError, wrap
from kvpitfalls.policies import get_policy, policy_names

_FOR_SHORT_PROMPTS = {
    policy.name: policy
    for policy in (
        LagKV(n_sink=0, lag_size=2),
        ChunkKV(chunks=3),
        PyramidKV(window_size=1, beta=2),
        ExpectedAttention(n_future_positions=16, n_sink=0),
    )
}
EVERY = [_FOR_SHORT_PROMPTS.get(name, get_policy(name)) for name in policy_names()]
HELD = [policy for policy in EVERY if policy.holds]
EQUAL = [policy for policy in EVERY if policy.allocation == "uniform"]  # every layer and head keeps as much as any other


def is_defined(policy, n_token: int, n_kept: int) -> bool:
    """Whether a policy takes a row of this length and budget."""
    try:
        if n_kept < n_token:
            policy.check(n_token, n_kept)
    except ValueError:
        return False
    return True


def takes(model, policy) -> bool:
    """Whether a policy is defined for a model: one that reads how queries are turned refuses models that turn none."""
    policy = get_policy(policy)
    if not policy.needs_rotary:
        return True
    try:
        with wrap(model, policy, budget=4) as handle:
            handle.compress(torch.arange(3, 11)[None])
    except UnsupportedModelError as reason:
        assert "undoes rotary embedding" in str(reason) or f"policy {policy.name!r} is not defined for capped logits" in str(reason)
        return False
    return True
