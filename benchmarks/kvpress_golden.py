"""Which tokens kvpress's own presses keep of random keys: tests/data/kvpress.npz, which tests/test_kvpress_golden.py
compares with ours.

Run in kvpress's environment: make kvpress-golden. Keys and values are drawn anew by the test, from the same seeds.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    LagKVPress,
    PyramidKVPress,
)

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

# (seed, heads, tokens, dimension, sinks, tokens of a chunk, how many of each chunk are kept, kind)
LAGKV_CASES = [
    (100 + seed, 64, n_token, n_dim, n_sink, lag_size, n_best, kind)
    for seed, (n_token, n_dim, (n_sink, lag_size, n_best), kind) in enumerate(
        (n_token, n_dim, chunks, kind)
        for n_token in (260, 399)
        for n_dim in (16, 64, 80)
        for chunks in ((4, 128, 5), (0, 32, 11), (7, 9, 4))
        for kind in ("normal", "biased")
    )
]

# (seed, prompts, heads, tokens, dimension, share removed, kind of keys, tokens of a chunk, whose scores): one choice
# serves all heads
CHUNKKV_CASES = [
    (200 + seed, 160, 2, n_token, 16, ratio, kind, chunk_length, scorer)
    for seed, (n_token, ratio, kind, chunk_length, scorer) in enumerate(
        (n_token, ratio, kind, chunk_length, scorer)
        for n_token, chunk_length in ((60, 4), (257, 20))
        for ratio in (0.3, 0.75)
        for kind in ("normal", "biased")
        for scorer in ("keydiff", "knorm")
    )
]

# (seed, prompts, heads, tokens, dimension, share removed, kind of keys, alpha), by K-norm's scores: a layer's heads
# share its budget
ADAKV_CASES = [
    (300 + seed, 40, 8, n_token, 16, ratio, kind, alpha)
    for seed, (n_token, ratio, kind, alpha) in enumerate(
        (n_token, ratio, kind, alpha)
        for n_token in (40, 129)
        for ratio in (0.3, 0.75)
        for kind in ("normal", "biased")
        for alpha in (0.2, 0.5)
    )
]

# (seed, layers, heads, query heads of each, tokens, dimension, share removed, window, beta)
PYRAMIDKV_CASES = [
    (400 + seed, n_layer, 16, 2, n_token, 16, ratio, *shape)
    for seed, (n_layer, n_token, ratio, shape) in enumerate(
        (n_layer, n_token, ratio, shape)
        for n_layer in (6, 7)
        for n_token in (64, 130, 257)
        for ratio in (0.25, 0.5, 0.7)
        for shape in ((4, 2), (8, 5), (16, 20))
    )
]

# (seed, heads, query heads of each, tokens, dimension, share removed, kind of keys, settings as both call them)
EXPECTED_CASES = [
    (500 + seed, 64, 2, n_token, n_dim, ratio, kind, settings)
    for seed, (n_token, n_dim, ratio, (kind, settings)) in enumerate(
        (n_token, n_dim, ratio, settings)
        for n_token in (40, 129)
        for n_dim in (16, 64)
        for ratio in (0.3, 0.75)
        for settings in (
            ("normal", {"epsilon": 0.02}),
            ("biased", {"epsilon": 0.02, "n_future_positions": 64}),
            ("normal", {"epsilon": 0.0, "n_sink": 0}),
            ("normal", {"epsilon": 0.0, "use_covariance": False, "n_sink": 7}),
            ("normal", {"epsilon": 0.0, "use_vnorm": False, "n_future_positions": 1}),
        )
    )
]
# (seed, layers, heads, query heads of each, tokens, dimension, share removed, kind of keys, tokens of a part); heads of
# a layer share its budget
KVZIP_CASES = [
    (600 + seed, 40, 8, 2, n_token, 16, ratio, kind, chunk_size)
    for seed, (n_token, ratio, kind, chunk_size) in enumerate(
        (n_token, ratio, kind, chunk_size)
        for n_token in (40, 120)
        for ratio in (0.25, 0.75)
        for kind in ("normal", "biased")
        for chunk_size in (16, 2048)
    )
]
KVZIP_REQUESTS = (5, 3, 2)  # tokens of the first request and of a later one, and of the part before that end the latter
THETA = 10000.0


def keys_of(seed: int, n_head: int, n_token: int, n_dim: int, kind: str) -> np.ndarray:
    """Keys (1, H, T, D); "biased" ones share a large part, as keys of real models do, and differ in length."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((1, n_head, n_token, n_dim)).astype(np.float32)
    if kind == "biased":
        keys = (keys + 3 * rng.standard_normal((1, n_head, 1, n_dim)).astype(np.float32)) * rng.uniform(
            0.1, 9, (1, n_head, n_token, 1)
        )
    return keys.astype(np.float32)


def kept_by(press, keys: np.ndarray, ratio: float) -> np.ndarray:
    """Positions (H, K), ascending, as kvpress chooses them by its scores."""
    given = torch.from_numpy(keys)
    scores = press.score(None, None, given, given, None, {})
    return scores.topk(int(keys.shape[2] * (1 - ratio)), dim=-1).indices.sort(-1).values[0].numpy().astype(np.int16)


def lagkv_of(case) -> tuple[np.ndarray, np.ndarray, int]:
    """Keys, values, and a budget at which no two chunks' equal ranks are on both sides of the cut."""
    seed, n_head, n_token, n_dim, n_sink, lag_size, n_best, kind = case
    n_ranked = (n_token - n_sink) // lag_size - 1
    keys, values = (keys_of(s, n_head, n_token, n_dim, kind) for s in (seed, seed + 1000))
    return keys, values, n_token - n_ranked * (lag_size - n_best)


def kept_by_lagkv(case) -> np.ndarray:
    """Positions (H, K), ascending."""
    keys, values, budget = lagkv_of(case)
    press = LagKVPress(n_sink=case[4], lag_size=case[5])
    scores = press.score(None, None, torch.from_numpy(keys), torch.from_numpy(values), None, {})
    return scores.topk(budget, dim=-1).indices.sort(-1).values[0].numpy().astype(np.int16)


def chunkkv_of(case) -> np.ndarray:
    """Keys (prompts, H, T, D)."""
    seed, n_prompt, n_head, n_token, n_dim, _, kind, _, _ = case
    return keys_of(seed, n_prompt * n_head, n_token, n_dim, kind).reshape(n_prompt, n_head, n_token, n_dim)


def kept_by_chunkkv(case) -> np.ndarray:
    """Positions (prompts, K), ascending, then -1; each prompt alone, since the press lets the first of a batch choose
    for all."""
    n_prompt, n_token, n_dim, ratio, length, scorer = case[1], case[3], case[4], case[5], case[7], case[8]
    press = ChunkKVPress({"keydiff": KeyDiffPress, "knorm": KnormPress}[scorer](ratio), length)
    kept = np.full((n_prompt, n_token), -1, np.int16)
    for row, keys in zip(kept, torch.from_numpy(chunkkv_of(case)), strict=True):
        places = torch.arange(n_token).float()[None, None, :, None].expand(1, len(keys), n_token, n_dim)
        _, left = press.compress(SimpleNamespace(head_dim=n_dim), None, keys[None], places, None, {})
        row[: left.shape[2]] = left[0, 0, :, 0]
    return kept


def adakv_of(case) -> np.ndarray:
    """Keys (prompts, H, T, D)."""
    seed, n_prompt, n_head, n_token, n_dim, _, kind, _ = case
    return keys_of(seed, n_prompt * n_head, n_token, n_dim, kind).reshape(n_prompt, n_head, n_token, n_dim)


def kept_by_adakv(case) -> np.ndarray:
    """Which tokens, as bits of (prompts, H, T)."""
    keys = torch.from_numpy(adakv_of(case))
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    AdaKVPress(KnormPress(case[5]), case[7]).compress(module, None, keys, keys, None, {})
    kept = np.ones(keys.shape[:3], bool)
    kept[tuple(module.masked_key_indices)] = False
    return np.packbits(kept, axis=-1)


def pyramidkv_of(case) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys (1, H, T, D) and queries (1, H * G, T, D) of each layer."""
    seed, n_layer, n_head, n_group, n_token, n_dim = case[:6]
    seeds = [1000 * seed + 2 * i for i in range(n_layer)]
    return [
        tuple(keys_of(s + i, n_head * n, n_token, n_dim, "normal") for i, n in enumerate((1, n_group))) for s in seeds
    ]


def kept_by_pyramidkv(case) -> np.ndarray:
    """Which tokens, as bits of (layers, H, T); all zero where the press keeps what SnapKV would, the same in every
    layer."""
    n_layer, n_head, n_group, n_token, n_dim, ratio, window_size, beta = case[1:]
    press = PyramidKVPress(compression_ratio=ratio, window_size=window_size, beta=beta)
    heads = SimpleNamespace(num_attention_heads=n_head * n_group, num_key_value_heads=n_head, num_hidden_layers=n_layer)
    kept = np.zeros((n_layer, n_head, n_token), bool)
    for layer, (keys, queries) in enumerate(pyramidkv_of(case)):
        keys, queries = torch.from_numpy(keys), torch.from_numpy(queries)
        logits = queries @ keys.repeat_interleave(n_group, 1).transpose(2, 3) / n_dim**0.5
        attention = logits.masked_fill(~torch.ones(n_token, n_token, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        places = torch.arange(n_token).float()[None, None, :, None].expand(1, n_head, n_token, n_dim)
        module = SimpleNamespace(config=heads, head_dim=n_dim, layer_idx=layer)
        _, left = press.compress(module, torch.zeros(1, n_token, 1), keys, places, attention, {})
        np.put_along_axis(kept[layer], left[0, :, :, 0].long().numpy(), True, -1)
    return np.packbits(kept if len(set(kept.sum((1, 2)).tolist())) > 1 else kept & False, axis=-1)


def expected_of(case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys and values (1, H, T, D), and queries before rotary embedding (1, H * G, T, D); some channels have a mean."""
    seed, n_head, n_group, n_token, n_dim, _, kind, _ = case
    keys, values = (keys_of(s, n_head, n_token, n_dim, k) for s, k in ((seed, kind), (seed + 1000, "normal")))
    shift = np.random.default_rng(seed + 3000).standard_normal((1, n_head * n_group, 1, n_dim)).astype(np.float32)
    return keys, values, keys_of(seed + 2000, n_head * n_group, n_token, n_dim, "normal") + shift


def angles_of(positions: torch.Tensor, n_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of plain rotary embedding."""
    angles = (positions[..., None] * THETA ** (-torch.arange(0, n_dim, 2) / n_dim)).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def kept_by_expected(case) -> np.ndarray:
    """Which tokens, as bits of (H, T)."""
    n_head, n_group, n_token, n_dim, ratio, settings = *case[1:6], case[7]
    keys, values, queries = map(torch.from_numpy, expected_of(case))
    heads = SimpleNamespace(num_attention_heads=n_head * n_group, num_key_value_heads=n_head)
    module = SimpleNamespace(
        config=heads,
        head_dim=n_dim,
        q_proj=lambda hidden: hidden,
        rotary_emb=lambda x, positions: angles_of(positions, n_dim),
    )
    hidden = queries.transpose(1, 2).flatten(2)
    scores = ExpectedAttentionPress(ratio, **settings).score(module, hidden, keys, values, None, {})
    kept = np.zeros((n_head, n_token), bool)
    np.put_along_axis(kept, scores[0].topk(int(n_token * (1 - ratio)), -1).indices.numpy(), True, -1)
    return np.packbits(kept, axis=-1)


def kvzip_of(case, layer: int) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Keys (1, H, T, D) of a layer, and of each part queries (1, H * G, n, D) and keys (1, H, n, D) of what is read."""
    seed, _, n_head, n_group, n_token, n_dim, _, kind, chunk_size = case
    first, later, n_overlap = KVZIP_REQUESTS
    turns = []
    for begin in range(0, n_token, chunk_size):
        n_read = (first if begin == 0 else later + n_overlap) + min(chunk_size, n_token - begin)
        at = 10000 * seed + 100 * layer + 2 * len(turns)
        turns.append(
            (
                keys_of(at + 1, n_head * n_group, n_read, n_dim, "normal"),
                keys_of(at + 2, n_head, n_read, n_dim, "normal"),
            )
        )
    return keys_of(10000 * seed + 100 * layer, n_head, n_token, n_dim, kind), turns


def kept_by_kvzip(case) -> np.ndarray:
    """Which tokens, as bits of (layers, H, T)."""
    _, n_layer, n_head, n_group, n_token, n_dim, ratio, _, chunk_size = case
    press = KVzipPress(ratio, layerwise=True, chunk_size=chunk_size)
    press.context_length = n_token
    press.score_val = torch.zeros(n_layer, 1, n_head, n_token)
    config = SimpleNamespace(
        num_attention_heads=n_head * n_group, num_key_value_heads=n_head, _attn_implementation="sdpa"
    )
    modules = []
    for layer in range(n_layer):
        module = SimpleNamespace(config=config, head_dim=n_dim, layer_idx=layer, q_proj=lambda hidden: hidden)
        keys, turns = kvzip_of(case, layer)
        for i, (queries, read) in enumerate(turns):
            press.start_idx, press.end_idx = i * chunk_size, min((i + 1) * chunk_size, n_token)
            hidden = torch.from_numpy(queries).transpose(1, 2).flatten(2)
            unturned = (torch.ones(1, hidden.shape[1], n_dim), torch.zeros(1, hidden.shape[1], n_dim))
            both = torch.from_numpy(np.concatenate([keys, read], 2))
            press.score_kvzip(module, hidden, both, both, None, {"position_embeddings": unturned})
        modules.append(module)
    press.compress_post(SimpleNamespace(model=SimpleNamespace(layers=[SimpleNamespace(self_attn=m) for m in modules])))
    kept = np.ones((n_layer, n_head, n_token), bool)
    for of_layer, module in zip(kept, modules, strict=True):
        _, heads, tokens = module.masked_key_indices
        of_layer[heads, tokens] = False
    return np.packbits(kept, axis=-1)


if __name__ == "__main__":
    kept = {f"keydiff_{case[0]}": kept_by(KeyDiffPress(), keys_of(*case[:4], case[5]), case[4]) for case in CASES}
    kept |= {f"lagkv_{case[0]}": kept_by_lagkv(case) for case in LAGKV_CASES}
    kept |= {f"chunkkv_{case[0]}": kept_by_chunkkv(case) for case in CHUNKKV_CASES}
    kept |= {f"adakv_{case[0]}": kept_by_adakv(case) for case in ADAKV_CASES}
    kept |= {f"pyramidkv_{case[0]}": kept_by_pyramidkv(case) for case in PYRAMIDKV_CASES}
    kept |= {f"expected_{case[0]}": kept_by_expected(case) for case in EXPECTED_CASES}
    kept |= {f"kvzip_{case[0]}": kept_by_kvzip(case) for case in KVZIP_CASES}
    np.savez_compressed(Path(sys.argv[1]), **kept)
    print(f"{sum(len(x) for x in kept.values())} heads of {len(kept)} cases")
