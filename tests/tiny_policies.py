"""Every listed policy, made for prompts of a few tokens; a new policy is among them without a word here."""

from kvpitfalls import ChunkKV, LagKV, PyramidKV
from kvpitfalls.policies import get_policy, policy_names

_FOR_SHORT_PROMPTS = {
    policy.name: policy for policy in (LagKV(n_sink=0, lag_size=2), ChunkKV(chunks=3), PyramidKV(window_size=1, beta=2))
}
EVERY = [_FOR_SHORT_PROMPTS.get(name, get_policy(name)) for name in policy_names()]
HELD = [policy for policy in EVERY if policy.holds]
EQUAL = [
    policy for policy in EVERY if policy.allocation == "uniform"
]  # every layer and head keeps as much as any other


def is_defined(policy, n_token: int, n_kept: int) -> bool:
    """Whether a policy takes a row of this length and budget."""
    try:
        if n_kept < n_token:
            policy.check(n_token, n_kept)
    except ValueError:
        return False
    return True
