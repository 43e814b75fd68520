"""Times the CUDA kernels beside what torch offers for the same, in one process on one GPU; prints a table and writes
JSON.

    python benchmarks/bench_cuda.py --json build/bench_cuda.json

The shape is one layer of Llama-3.1-8B: batch 1, 32 query heads, 8 key heads, 128 elements, bfloat16, half of the tokens
kept. Everything is reported as a ratio to something measured beside it. Short work is captured in CUDA graphs, whose
replays take inputs by turns that do not fit the second-level cache together; long work runs half a second at a stretch,
of which the first 0.2 s do not count, in two rounds of opposite order. "kvpress" is the sequence of torch operations
that its presses run, written out, without their waits for the GPU.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvpitfalls import H2O, TOVA, Fair, KNorm, SnapKV, ops
from kvpitfalls.eviction.budget import kept_tokens
from kvpitfalls.eviction.layer_inputs import LayerInputs
from kvpitfalls.eviction.layout import Layout
from kvpitfalls.eviction.selection import budgets_of, press
from kvpitfalls.policies import Inputs

N_QUERY_HEAD, N_HEAD, N_DIM, RATIO, WINDOW = 32, 8, 128, 0.5, 64
GROUP = N_QUERY_HEAD // N_HEAD
BIASED = Fair.parse(False)
BEYOND_CACHE = 256 << 20  # bytes of inputs that are taken by turns


def make(n_head, n_token):
    """(1, H, T, D), laid out as a model has it."""
    return torch.randn(1, n_token, n_head, N_DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


def graph_time(calls, seconds=0.3):
    """Microseconds a call, of a graph that holds all ``calls``; the median of its replays."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # results stay, so that no call has another's output
    del kept
    replay, times, spent = graph.replay, [], 0.0
    replay()
    while spent < seconds * 1e3 or len(times) < 10:
        times.append(elapsed(replay, 1))
        spent += times[-1]
    return 1e3 * statistics.median(times) / len(calls)


def elapsed(call, n_call):
    """Milliseconds of a row of calls, on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(n_call):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def sustained_times(calls, seconds=0.5, uncounted=0.2):
    """Milliseconds of each call, at the clock that the card settles to; 20 ms of them at a time, so that the GPU never
    waits for Python."""
    times = {name: [] for name in calls}
    for order in (list(calls), list(reversed(calls))):
        for name in order:
            elapsed(calls[name], 3)
            n_call = max(1, int(20 / (elapsed(calls[name], 3) / 3)))
            spent = 0.0
            while spent < seconds * 1e3:
                took = elapsed(calls[name], n_call)
                if spent >= uncounted * 1e3 or took > uncounted * 1e3:
                    times[name].append(took / n_call)
                spent += took
    return {name: statistics.median(of) for name, of in times.items()}


def extra_memory(call):
    """Bytes beyond inputs and outputs at the peak."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    held = torch.cuda.memory_allocated()
    del out
    return torch.cuda.max_memory_allocated() - max(before, held)


def inputs_of(policy, keys, queries, lse=None):
    n = keys.shape[2]
    given = Inputs(keys, queries, valid=[(0, n)], segments=[[(0, n)]], spans=[[(0, n)]])
    if lse is None:
        return policy.score(given)
    votes = [[0, n, 0, n, 0, 0, 2, n, 0, 0]]
    return ops.score(
        "attention", keys, queries=queries, votes=torch.tensor([votes]).numpy(), lse=lse, scaling=N_DIM**-0.5
    )


# What torch offers


def repeat(keys):
    return keys[:, :, None].expand(-1, -1, GROUP, -1, -1).reshape(1, N_QUERY_HEAD, *keys.shape[2:])


def torch_gather(keys, values, index):
    index = index[..., None].expand(-1, -1, -1, N_DIM)
    return keys.gather(2, index).contiguous(), values.gather(2, index).contiguous()


def evict(scores, keys, values):
    return torch_gather(keys, values, scores.topk(int(keys.shape[2] * (1 - RATIO)), dim=-1).indices)


def kvpress_knorm(keys, values, queries):
    return evict(-keys.norm(dim=-1), keys, values)


def kvpress_snapkv(keys, values, queries):
    n = keys.shape[2]
    weights = queries[:, :, -WINDOW:] @ repeat(keys).transpose(2, 3) / N_DIM**0.5
    mask = torch.ones_like(weights) * float("-inf")
    weights += mask.triu(n - WINDOW + 1)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(queries.dtype)[..., :-WINDOW]
    scores = F.avg_pool1d(weights.mean(-2), 5, 1, 2)
    scores = scores.view(1, N_HEAD, GROUP, n - WINDOW).mean(2)
    padded = F.pad(scores, (0, WINDOW))
    padded[..., -WINDOW:] = scores.max()
    return evict(padded, keys, values)


def kvpress_tova(keys, values, queries):
    weights = queries[:, :, -1:] @ repeat(keys).transpose(2, 3) / N_DIM**0.5
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(queries.dtype)[..., :-1]
    scores = F.pad(
        weights.mean(1).expand(-1, N_HEAD, -1) if weights.ndim == 3 else weights.mean(1).repeat(1, N_HEAD, 1),
        (0, 1),
        value=2,
    )
    return evict(scores, keys, values)


def eager_sums(keys, queries):
    n = keys.shape[2]
    weights = queries @ repeat(keys).transpose(2, 3) * N_DIM**-0.5
    weights = weights + torch.full((n, n), float("-inf"), device="cuda", dtype=keys.dtype).triu(1)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(queries.dtype)
    sums = weights.sum(2) / torch.arange(n, 0, -1, device="cuda")
    return sums.view(1, N_HEAD, GROUP, n).mean(2)


def our_press(policy, keys, values, queries, lse=None):
    """As a wrap does it."""
    layout = Layout.of(1, keys.shape[2])
    split, layer = layout.split(BIASED), LayerInputs(keys, queries, values, lse=lse)
    budgets = budgets_of(layout, partial(kept_tokens, compression_ratio=RATIO))
    pressed = press(policy, split, layer, budgets)
    return pressed.keys, pressed.values


# Measures: (name, n, value, unit, in words)


def measure_h2o(n):
    keys, values, queries = make(N_HEAD, n), make(N_HEAD, n), make(N_QUERY_HEAD, n)
    flash = partial(torch.ops.aten._scaled_dot_product_flash_attention, queries, keys, values, 0.0, True)
    lse = flash()[1]

    def cudnn():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)

    calls = {
        "FLASH": flash,
        "cuDNN": cudnn,
        "sums": lambda: inputs_of(H2O(), keys, queries, lse),
        "sums and LSE": lambda: inputs_of(H2O(), keys, queries),
    }
    ms = sustained_times(calls)
    yield (
        "H2O sums, LSE given, over SDPA FLASH",
        n,
        ms["sums"] / ms["FLASH"],
        f"{ms['sums']:.3f} / {ms['FLASH']:.3f} ms",
    )
    yield (
        "H2O sums, LSE given, over SDPA cuDNN",
        n,
        ms["sums"] / ms["cuDNN"],
        f"{ms['sums']:.3f} / {ms['cuDNN']:.3f} ms",
    )
    yield "H2O with its own LSE, over SDPA FLASH", n, ms["sums and LSE"] / ms["FLASH"], f"{ms['sums and LSE']:.3f} ms"
    if n <= 8192:
        eager = sustained_times({"eager": lambda: eager_sums(keys, queries)})["eager"]
        yield "eager attention and sum, over H2O with its own LSE", n, eager / ms["sums and LSE"], f"{eager:.2f} ms"
        yield "eager attention and sum, over H2O with LSE given", n, eager / ms["sums"], f"{eager:.2f} ms"


def rotated(n, make_call, n_tensor=2):
    """Calls on so many input sets that the second-level cache holds none of them when its turn comes."""
    n_set = max(2, -(-BEYOND_CACHE // (n_tensor * N_HEAD * n * N_DIM * 2)))
    sets = [(make(N_HEAD, n), make(N_HEAD, n)) for _ in range(min(n_set, 32))]
    return [partial(make_call, *each) for each in sets]


def measure_copies(n):
    bytes_of_keys = N_HEAD * n * N_DIM * 2

    def copy(keys, values):
        return torch.add(keys, 0, out=values)  # a kernel; a memcpy node of a graph is slower

    rate = 2 * bytes_of_keys / graph_time(rotated(n, copy))
    scored = (bytes_of_keys + 4 * N_HEAD * n) / graph_time(rotated(n, lambda k, v: ops.score("norm", k), 1))
    yield "K-norm scores, bytes a second over a copy's", n, scored / rate, f"{scored / 1e6:.2f} / {rate / 1e6:.2f} TB/s"
    whole = np.array([[[0, n, *[0] * 8]]])
    unlike = bytes_of_keys / graph_time(rotated(n, lambda k, v: ops.score("keydiff", k, votes=whole), 1))
    yield "KeyDiff scores, keys a second over a copy's", n, unlike / rate, f"{unlike / 1e6:.2f} / {rate / 1e6:.2f} TB/s"
    positions = torch.stack([torch.randperm(n, device="cuda")[: n // 2].sort().values.int() for _ in range(N_HEAD)])[
        None
    ].contiguous()
    gathered = 2 * bytes_of_keys / graph_time(rotated(n, lambda k, v: ops.gather(k, v, positions)))
    yield "gather, bytes a second over a copy's", n, gathered / rate, f"{gathered / 1e6:.2f} / {rate / 1e6:.2f} TB/s"


def measure_select(n):
    scores = [torch.randn(1, N_HEAD, n, device="cuda") for _ in range(16)]
    ours = graph_time([partial(ops.select, s, n // 2) for s in scores])
    theirs = graph_time([partial(torch.topk, s, n // 2, sorted=True) for s in scores])
    yield "torch.topk(sorted) over select", n, theirs / ours, f"{theirs:.1f} / {ours:.1f} us"


def measure_press(name, policy, theirs, n):
    queries = [make(N_QUERY_HEAD, n if n <= 32768 else 4096) for _ in range(1)]
    ours_us = graph_time(rotated(n, lambda k, v: our_press(policy, k, v, queries[0])))
    theirs_us = graph_time(rotated(n, lambda k, v: theirs(k, v, queries[0]))[:4])
    yield f"{name} press: kvpress's operations over ours", n, theirs_us / ours_us, f"{theirs_us:.0f} / {ours_us:.0f} us"
    if policy.needs_queries:  # a forward by FLASH or cuDNN has them, and a wrapped model takes them over
        lse = torch.ops.aten._scaled_dot_product_flash_attention(
            queries[0], make(N_HEAD, n), make(N_HEAD, n), 0.0, True
        )[1]
        ours_us = graph_time(rotated(n, lambda k, v: our_press(policy, k, v, queries[0], lse)))
        yield (
            f"{name} press, LSE given: kvpress's operations over ours",
            n,
            theirs_us / ours_us,
            f"{theirs_us:.0f} / {ours_us:.0f} us",
        )


def measure_memory(n):
    keys, values, queries = make(N_HEAD, n), make(N_HEAD, n), make(N_QUERY_HEAD, n)
    ours = extra_memory(lambda: our_press(SnapKV(window_size=WINDOW), keys, values, queries))
    theirs = extra_memory(lambda: kvpress_snapkv(keys, values, queries))
    yield (
        "SnapKV press: kvpress's extra memory over ours",
        n,
        theirs / ours,
        f"{theirs / 2**20:.0f} / {ours / 2**20:.1f} MB",
    )


def measure_longest():
    for n in (131072, 262144, 524288):
        keys, queries = make(N_HEAD, n), make(N_QUERY_HEAD, n)
        scores = inputs_of(H2O(), keys, queries)
        visible = (scores.double() * torch.arange(n, 0, -1, device="cuda")).sum(-1) / n  # rows of a softmax sum to 1
        yield (
            "H2O at this length: sum of the columns over the number of queries",
            n,
            float(visible.mean()),
            "expected 1",
        )
        del keys, queries, scores


def measure():
    for n in (4096, 8192, 32768, 131072):
        yield from measure_h2o(n)
        torch.cuda.empty_cache()
    for n in (4096, 32768, 131072):
        yield from measure_copies(n)
        yield from measure_select(n)
    for n in (4096, 32768):
        yield from measure_press("K-norm", KNorm(), kvpress_knorm, n)
        yield from measure_press("SnapKV", SnapKV(window_size=WINDOW), kvpress_snapkv, n)
        yield from measure_press("TOVA", TOVA(), kvpress_tova, n)
    yield from measure_memory(32768)
    yield from measure_longest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows to a file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_cuda.py needs a CUDA GPU")
    runs, why = ops.cuda_path(0)
    if not runs:
        sys.exit(f"bench_cuda.py times the CUDA kernels, but they do not run here: {why}")
    torch.manual_seed(0)
    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    with torch.no_grad():
        for name, n, value, detail in measure():
            rows.append({"measure": name, "n": n, "value": value, "detail": detail})
            print(f"{name:68s} {n:7d} {value:8.3f}  {detail}", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
