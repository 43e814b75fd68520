"""What a GPU's memory holds: the peak of a long prompt's prefill, and how many rows of a length fit beside the weights.

    python benchmarks/bench_memory.py --json build/bench_memory.json

The shape is Llama-3.1-8B's in bfloat16, the weights are random: no byte depends on them. A prompt comes whole without a
wrap, and in chunks (``prefill_chunk_size``), evicted from after each one or not at all (ratio 0). How many rows fit:
what two and four rows take at their peak says how many should, and so many are then run, fewer if they do not.
"""

import argparse
import gc
import json
from pathlib import Path

import torch
from bench_cuda_model import build, prefill
from transformers import DynamicCache

import kvpitfalls as kvp

CHUNK = 4096


def whole(model, n_token: int) -> int:
    """Bytes at the peak of a prefill in one piece, without a wrap."""
    ids = torch.randint(0, model.config.vocab_size, (1, n_token), device=model.device)
    return prefill(model, ids, DynamicCache(config=model.config))[1]


def peak(model, n_row: int, n_token: int, ratio: float, policy: str) -> int | None:
    """Bytes at the peak of a prefill in chunks, the weights included; None if they are not there."""
    gc.collect()  # what the run before left in circles
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, model.config.vocab_size, (n_row, n_token), device=model.device)
    # All rows of a chunk together, and no more of its tokens than keep a layer's activations small beside the caches.
    chunk = max(128, CHUNK // n_row)
    try:
        with kvp.wrap(model, policy, compression_ratio=ratio) as handle:
            cache = handle.compress(ids, prefill_chunk_size=chunk)
        torch.cuda.synchronize()
        del cache
    except torch.cuda.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated()


def rows_that_fit(model, n_token: int, ratio: float, policy: str) -> dict:
    """By the peaks of two and of four rows, then tried."""
    two, four = (peak(model, n, n_token, ratio, policy) for n in (2, 4))
    a_row = (four - two) / 2
    total = torch.cuda.get_device_properties(0).total_memory
    n = int((total * 0.96 - two) / a_row) + 2  # what the driver and the allocator's gaps take is in no peak
    while (most := peak(model, n, n_token, ratio, policy)) is None:
        n -= max(1, n // 16)
    return {"rows": n, "peak": most, "a_row": a_row}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to a file")
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--long", type=int, default=65536, metavar="TOKENS", help="of the one long prompt")
    parser.add_argument("--tokens", type=int, default=32768, help="of each of the rows that are to fit")
    args = parser.parse_args()
    out: dict = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "policy": args.policy,
        "ratio": args.ratio,
    }
    with torch.inference_mode():
        model = build()
        weights = torch.cuda.memory_allocated()
        peaks = {"whole, no wrap": whole(model, args.long)}
        peaks |= {f"chunks, r = {ratio:g}": peak(model, 1, args.long, ratio, args.policy) for ratio in (0, args.ratio)}
        out |= {"weights": weights, "peaks": peaks}
        print(
            f"weights {weights / 1e9:.2f} GB; peaks of {args.long} tokens: "
            + ", ".join(f"{name} {of / 1e9:.2f} GB" for name, of in peaks.items()),
            flush=True,
        )
        for ratio in (args.ratio, 0.0):
            out[f"rows at {ratio}"] = fit = rows_that_fit(model, args.tokens, ratio, args.policy)
            print(f"rows of {args.tokens} at ratio {ratio}: {fit}", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
