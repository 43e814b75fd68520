"""In kvpress's environment: its presses with our fair selection keep what ours keep, and settings go there and back.
``make kvpress``."""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    LagKVPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import DynamicCache

import kvpitfalls as kvp
from kvpitfalls.harness.kvpress_settings import fair_press, from_kvpress, to_kvpress

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny_models import build

SPANS = {"defense": (2, 14), "task": (14, 37)}
PRESSES = (
    SnapKVPress(0.5, window_size=4),
    StreamingLLMPress(0.5),
    TOVAPress(0.5),
    KnormPress(0.5),
    ObservedAttentionPress(0.5),
    KeyDiffPress(0.5),
    LagKVPress(0.5, n_sink=2, lag_size=6),
    PyramidKVPress(0.5, window_size=4, beta=3),
    ChunkKVPress(KnormPress(0.5), 5),
)
# These need more of the model than kvpress hands to a press, or share over heads: their settings alone.
OTHERS = (
    ExpectedAttentionPress(0.5, n_future_positions=64, n_sink=2, use_covariance=False, epsilon=0.02),
    KVzipPress(0.5, layerwise=True, n_sink=2, chunk_size=99),
    AdaKVPress(SnapKVPress(0.5, window_size=4), 0.4),
)


@torch.no_grad()
def main() -> int:
    model = build("llama")
    tokens = (
        3 + torch.randperm(125, generator=torch.Generator().manual_seed(0))[None, :40]
    )  # all different: keys of equal norm would tie
    wrong = 0
    print("press                   settings  fair press keeps what we keep  biased press differs")
    for press in PRESSES:
        settings = from_kvpress(press)
        back = to_kvpress(**settings) == press and to_kvpress(settings["policy"].name, 0.5) is not None
        with kvp.wrap(model, **settings, fair=True) as handle:
            ours = handle.compress(tokens, spans=SPANS)
        theirs, biased = DynamicCache(), DynamicCache()
        with fair_press(press, SPANS)(model):
            model(tokens, past_key_values=theirs)
        plain = build("llama", "eager" if isinstance(press, ObservedAttentionPress) else "sdpa")  # that asks for it
        with press(plain):
            plain(tokens, past_key_values=biased)
        same = all(
            mine.keys.shape == other.keys.shape
            and torch.allclose(mine.keys, other.keys, atol=1e-5)
            and torch.allclose(mine.values, other.values, atol=1e-5)
            for mine, other in zip(ours.layers, theirs.layers, strict=True)
        )
        shares = [_kept(ours, *span) for span in SPANS.values()]
        differs = any(
            set(map(tuple, a.keys[0, 0].tolist())) != set(map(tuple, b.keys[0, 0].tolist()))
            for a, b in zip(theirs.layers, biased.layers, strict=True)
        )
        print(
            f"{type(press).__name__:22}  {'ok' if back else 'WRONG':8}  {'yes' if same else 'NO':29}  "
            f"{'yes' if differs else 'NO':4}",
            shares,
        )
        wrong += not (back and same and differs)
    for press in OTHERS:
        back = to_kvpress(**from_kvpress(press)) == press
        print(f"{type(press).__name__:22}  {'ok' if back else 'WRONG'}")
        wrong += not back
    print(f"kvpress {version('kvpress')}, transformers {version('transformers')}")
    return 1 if wrong else 0


def _kept(cache, begin: int, end: int) -> str:
    return f"{cache.kept((begin, end)).mean():.2f}"


if __name__ == "__main__":
    sys.exit(main())
