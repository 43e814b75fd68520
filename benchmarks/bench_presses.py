"""Whole presses, ours beside kvpress's on the same tensors in one process, on a CPU or on a GPU.

    python benchmarks/bench_presses.py --device cuda --lengths 4096 32768 --dtypes bfloat16

kvpress 0.5.5 needs transformers 4.57: `make .venv-bench/ready` makes such an environment. Times are by the clock; on a
GPU from the call until the GPU has done it, Python's launches included, as whoever presses a layer waits for it.
"""

import argparse
import json
import logging
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, eager_attention_forward

import kvpitfalls as kvp
from kvpitfalls.eviction.allocation import Ada
from kvpitfalls.eviction.budget import kept_tokens
from kvpitfalls.eviction.fairness import Fair
from kvpitfalls.eviction.layer_inputs import LayerInputs
from kvpitfalls.eviction.layout import Layout
from kvpitfalls.eviction.needed import turns_of
from kvpitfalls.eviction.selection import allocation_of, budgets_of, evict, press, rank

try:
    import kvpress
except ModuleNotFoundError:
    sys.exit("kvpress is not installed here; expected the environment that `make bench` makes")

SHAPES = ((32, 8, 128), (9, 3, 64))  # query heads, key heads, head dimension
LENGTHS = (256, 2048, 8192)
RATIO = 0.5
BIASED = Fair.parse(False)
WINDOW = 64
LAYER, N_LAYER = 16, 32  # where a pyramid over layers keeps about as much as without one
PART = 2048  # tokens that KVzip has the model repeat at once
CACHE_BYTES = 256e6  # more than any cache: inputs rotate through so much memory, so that every call reads it from there


def wait() -> None:
    """Until a GPU has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Timer:
    """Medians and spreads of interleaved calls, in seconds."""

    def __init__(self, seconds: float, repeats: int):
        self.seconds, self.repeats = seconds, repeats

    def __call__(self, function) -> tuple[float, float]:
        """The median, and the distance between the quartiles over it. A call of over 10 seconds is the only one: its
        spread is not known."""
        start = time.perf_counter()
        function()
        wait()
        if (first := time.perf_counter() - start) > 10:
            return first, math.nan
        times = []
        until = time.perf_counter() + self.seconds
        while len(times) < 3 or (len(times) < self.repeats and time.perf_counter() < until):
            start = time.perf_counter()
            function()
            wait()
            times.append(time.perf_counter() - start)
        low, middle, high = statistics.quantiles(times, n=4)
        return middle, (high - low) / middle


class Case:
    """One shape, length and dtype: tensors that rotate, and kvpress's module around them."""

    def __init__(self, heads: int, key_heads: int, dim: int, length: int, dtype: torch.dtype, device="cpu"):
        make = torch.Generator().manual_seed(0)
        one = key_heads * length * dim * dtype.itemsize
        n_copy = 1 + int(CACHE_BYTES / one) if length > 256 else 1  # short prompts are in the cache after their prefill
        self.heads, self.length, self.dim, self.dtype, self.device = heads, length, dim, dtype, device
        self.keys = [torch.randn(1, key_heads, length, dim, generator=make).to(device, dtype) for _ in range(n_copy)]
        self.values = [torch.randn(1, key_heads, length, dim, generator=make).to(device, dtype) for _ in range(n_copy)]
        self.queries = torch.randn(1, heads, length, dim, generator=make).to(device, dtype)
        # A hidden size of 64 makes the query projection, which kvpress repeats and we do not, cost next to nothing.
        config = transformers.LlamaConfig(
            hidden_size=64,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=dim,
            num_hidden_layers=N_LAYER,
            attn_implementation="eager",
        )
        self.module = LlamaAttention(config, layer_idx=LAYER).to(device, dtype).eval()
        self.module.rotary_emb = LlamaRotaryEmbedding(config).to(device)
        self.hidden = torch.randn(1, length, 64, generator=make).to(device, dtype)
        angle = torch.randn(1, length, dim, generator=make)
        self.rotation = {"position_embeddings": (angle.cos().to(device, dtype), angle.sin().to(device, dtype))}
        self.turn = 0

    def next(self):
        """Keys and values that were not used just before."""
        self.turn = (self.turn + 1) % len(self.keys)
        return self.keys[self.turn], self.values[self.turn]

    def ours(self, policy, n_query: int, **given):
        """Score, select and gather, as a wrapped layer does: by one call of the core where the policy permits."""
        queries = self.queries[:, :, self.length - n_query :] if n_query else None
        policy, layout = kvp.policies.get_policy(policy), Layout.of(1, self.length)
        allocation = allocation_of(policy, given.pop("allocation", None))
        budgets = budgets_of(layout, partial(kept_tokens, compression_ratio=RATIO), allocation, N_LAYER)
        split, again = layout.split(BIASED), given.pop("again", None)

        def press_layer():
            keys, values = self.next()
            layer = LayerInputs(keys, queries, values, layer=LAYER, n_layer=N_LAYER, **given)
            if (made := press(policy, split, layer, budgets, allocation)) is None:
                made = evict(rank(policy, split, layer), keys, values, budgets, allocation)
            return made.keys, made.values

        def press_after_reading():
            keys, values = self.next()
            ranked = None
            for turn in turns_of(policy, layout, keys, again):
                layer = LayerInputs(keys, queries, values, layer=LAYER, n_layer=N_LAYER, again=turn, **given)
                ranked = rank(policy, split, layer, ranked)
            made = evict(ranked, keys, values, budgets, allocation)
            return made.keys, made.values

        return press_layer if again is None else press_after_reading

    def theirs(self, press):
        """kvpress's score, topk and gather."""

        def compress():
            keys, values = self.next()
            return press.compress(self.module, self.hidden, keys, values, None, self.rotation)

        return compress

    def their_adakv(self):
        """Score and choice: the press masks what it evicts, and gathers nothing. It refuses eager attention, which it
        does not run."""
        press, config = kvpress.AdaKVPress(kvpress.SnapKVPress(RATIO, window_size=WINDOW)), self.module.config

        def compress():
            keys, values = self.next()
            config._attn_implementation = "sdpa"
            try:
                press.compress(self.module, self.hidden, keys, values, None, self.rotation)
            finally:
                config._attn_implementation = "eager"

        return compress

    def their_kvzip(self):
        """Scores of one layer from what was read, the prompt's own tokens, and its choice; like AdaKVPress it gathers
        nothing."""
        n_head = self.keys[0].shape[1]
        config = SimpleNamespace(
            num_attention_heads=self.heads, num_key_value_heads=n_head, _attn_implementation="sdpa"
        )
        module = SimpleNamespace(config=config, head_dim=self.dim, layer_idx=0, q_proj=lambda hidden: hidden)
        model = SimpleNamespace(model=SimpleNamespace(layers=[SimpleNamespace(self_attn=module)]))
        press = kvpress.KVzipPress(RATIO, layerwise=True, chunk_size=PART)
        press.context_length = press.end_idx = self.length
        both = torch.cat([self.keys[0], self.keys[0]], 2)  # as they stand in the cache after it was read
        hidden = self.queries.transpose(1, 2).flatten(2)
        like = {"dtype": self.dtype, "device": self.device}
        ones, zeros = (make(1, self.length, self.dim, **like) for make in (torch.ones, torch.zeros))

        def compress():
            press.score_val = torch.zeros(1, 1, n_head, self.length, **like)
            press.score_kvzip(module, hidden, both, both, None, {"position_embeddings": (ones, zeros)})
            press.compress_post(model)

        return compress

    def their_h2o(self):
        """Eager attention, which H2O needs there, and the press."""
        press = kvpress.ObservedAttentionPress(RATIO)
        least = torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device)
        causal = least.expand(self.length, self.length).triu(1)[None, None]

        def compress():
            keys, values = self.next()
            _, attentions = eager_attention_forward(
                self.module, self.queries, keys, values, causal, scaling=self.dim**-0.5
            )
            return press.compress(self.module, self.hidden, keys, values, attentions, {})

        return compress


def presses(case: Case) -> dict:
    """Name -> (ours, theirs or None)."""
    snap = {"window_size": WINDOW}
    out = {
        "knorm": (case.ours("knorm", 0), case.theirs(kvpress.KnormPress(RATIO))),
        "streaming_llm": (case.ours("streaming_llm", 0), case.theirs(kvpress.StreamingLLMPress(RATIO))),
        "snapkv": (case.ours(kvp.SnapKV(**snap), WINDOW), case.theirs(kvpress.SnapKVPress(RATIO, **snap))),
        "tova": (case.ours("tova", 1), case.theirs(kvpress.TOVAPress(RATIO))),
        "random": (case.ours("random", 0), case.theirs(kvpress.RandomPress(RATIO, seed=0))),
        "keydiff": (case.ours("keydiff", 0), case.theirs(kvpress.KeyDiffPress(RATIO))),
        "lagkv": (case.ours("lagkv", 0), case.theirs(kvpress.LagKVPress(RATIO))),
        "chunkkv": (
            case.ours(kvp.ChunkKV(kvp.SnapKV(**snap)), WINDOW),
            case.theirs(kvpress.ChunkKVPress(kvpress.SnapKVPress(RATIO, **snap))),
        ),
        "pyramidkv": (case.ours(kvp.PyramidKV(**snap), WINDOW), case.theirs(kvpress.PyramidKVPress(RATIO, **snap))),
        "adakv": (case.ours(kvp.AdaKV(**snap), WINDOW), case.their_adakv()),
        "expected_attention": (
            case.ours("expected_attention", case.length, rotary=kvp.Rotary()),
            case.theirs(kvpress.ExpectedAttentionPress(RATIO)),
        ),
        "kvzip": (
            case.ours(kvp.KVzip(chunk_size=PART), 0, again=[(case.queries, case.keys[0])], allocation=Ada(0)),
            case.their_kvzip(),
        ),
    }
    try:
        kvp.LagKV().check(case.length, int(case.length * (1 - RATIO)))
    except ValueError:  # not defined there, and kvpress's press keeps what StreamingLLM would
        del out["lagkv"]
    if case.length > PART:  # as many parts more, each as long, and each of seconds
        del out["kvzip"]
    # Eager attention holds the weights, and their softmax in float32: 8.6 GB and more at 32 heads and 8192 tokens.
    fits = case.heads * case.length**2 * 4 <= 3e9
    out["h2o"] = (case.ours("h2o", case.length), case.their_h2o() if fits else None)
    return out


def bench_presses(case: Case, timer: Timer, base: dict, only=None) -> list[dict]:
    rows = []
    for name, (ours, theirs) in presses(case).items():
        if only and name not in only:
            continue
        slow = (name == "h2o" and case.length > 2048) or (name == "kvzip" and case.length > 256)
        mine, spread = (Timer(0, 3) if slow else timer)(ours)
        row = {**base, "measure": f"press {name}", "ours_ms": mine * 1e3, "spread": spread}
        if theirs is not None:
            other, spread_of_other = (Timer(0, 3) if slow else timer)(theirs)
            row |= {"kvpress_ms": other * 1e3, "kvpress_spread": spread_of_other, "times_faster": other / mine}
        rows.append(row)
    return rows


def show(rows: list[dict]) -> None:
    """One line a measurement."""
    for row in rows:
        where = f"{row['shape']:9} n={row['length']:<5} {row.get('dtype', ''):8} {row.get('threads', ''):>1}"
        parts = [f"{where}  {row['measure']:33}"]
        parts += [f"{row['ours_ms']:10.3f} ms (+-{50 * row['spread']:.0f}%)"] if "ours_ms" in row else []
        parts += [f"kvpress {row['kvpress_ms']:9.3f} ms"] if "kvpress_ms" in row else []
        parts += [f"{row['times_faster']:6.1f}x faster"] if "times_faster" in row else []
        parts += [f"ratio {row['ratio']:.2f}"] if "ratio" in row else []
        parts += (
            [f"(read {row['read_gb_per_s']:.1f}, copy {row['copy_gb_per_s']:.1f} GB/s)"]
            if "read_gb_per_s" in row
            else []
        )
        parts += [f"{row['mb']:.1f} MB"] if "mb" in row else []
        print("  ".join(parts), flush=True)


def shape_of(text: str) -> tuple[int, ...]:
    """``32/8/128``."""
    heads, key_heads, dim = map(int, text.split("/"))
    return heads, key_heads, dim


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="HEADS/KEY_HEADS/DIM", default=SHAPES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these presses; all by default")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--seconds", type=float, default=0.7, help="at most so long for each measurement")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzipPress says at each making that it is slow
    rows = []
    for shape in args.shapes:
        for length in args.lengths:
            for dtype in args.dtypes:
                case = Case(*shape, length, getattr(torch, dtype), args.device)
                base = {"shape": "/".join(map(str, shape)), "length": length, "dtype": dtype, "device": args.device}
                rows += (new := bench_presses(case, Timer(args.seconds, 200), base, args.only))
                show(new)
                del case
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"torch": torch.__version__, "kvpress": "0.5.5", "transformers": transformers.__version__}
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
