"""Which tokens kvpress's own presses keep of random keys: tests/data/kvpress.npz, which tests/test_kvpress_golden.py compares with ours.

Run in kvpress's environment: make kvpress-golden. Keys are drawn anew by the test, from the same seeds.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from kvpress import KeyDiffPress

# (seed, heads, tokens, dimension, share removed, kind of keys)
CASES = [
    (seed, 64, n_token, n_dim, ratio, kind)
    for seed, (n_token, n_dim, ratio, kind) in enumerate(
        (n_token, n_dim, ratio, kind)
        for n_token in (9, 64, 257)
        for n_dim in (16, 64, 80)
        for ratio in (0.3, 0.75)
        for kind in ("normal", "biased")
    )
]


def keys_of(seed: int, n_head: int, n_token: int, n_dim: int, kind: str) -> np.ndarray:
    """Keys (1, H, T, D); "biased" ones share a large part, as keys of real models do, and differ in length."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((1, n_head, n_token, n_dim)).astype(np.float32)
    if kind == "biased":
        keys = (keys + 3 * rng.standard_normal((1, n_head, 1, n_dim)).astype(np.float32)) * rng.uniform(0.1, 9, (1, n_head, n_token, 1))
    return keys.astype(np.float32)


def kept_by(press, keys: np.ndarray, ratio: float) -> np.ndarray:
    """Positions (H, K), ascending, as kvpress chooses them by its scores."""
    given = torch.from_numpy(keys)
    scores = press.score(None, None, given, given, None, {})
    return scores.topk(int(keys.shape[2] * (1 - ratio)), dim=-1).indices.sort(-1).values[0].numpy().astype(np.int16)


if __name__ == "__main__":
    kept = {f"keydiff_{case[0]}": kept_by(KeyDiffPress(), keys_of(*case[:4], case[5]), case[4]) for case in CASES}
    np.savez_compressed(Path(sys.argv[1]), **kept)
    print(f"{sum(len(x) for x in kept.values())} heads of {len(kept)} cases")
