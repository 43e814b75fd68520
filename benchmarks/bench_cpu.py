"""Timings on the CPU, side by side in one process: what the machine can do, our verbs, our whole presses, and kvpress
on the same tensors.

``make bench`` makes the environment (kvpress 0.5.5 needs transformers 4.57) and runs this; benchmarks/README.md says
how to read it.
"""

import argparse
import ctypes
import json
import logging
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, eager_attention_forward

import kvpitfalls as kvp
from kvpitfalls import _core, ops
from kvpitfalls.eviction.allocation import Ada

try:
    import kvpress
except ModuleNotFoundError:
    sys.exit("kvpress is not installed here; expected the environment that `make bench` makes")

SHAPES = ((32, 8, 128), (9, 3, 64))  # query heads, key heads, head dimension
LENGTHS = (256, 2048, 8192)
RATIO = 0.5
WINDOW = 64
LAYER, N_LAYER = 16, 32  # where a pyramid over layers keeps about as much as without one
PART = 2048  # tokens that KVzip has the model repeat at once
CACHE_BYTES = 256e6  # more than any cache: inputs rotate through so much memory, so that every call reads it from there
FOLDER = Path(__file__).parent


class Timer:
    """Medians and spreads of interleaved calls, in seconds."""

    def __init__(self, seconds: float, repeats: int):
        self.seconds, self.repeats = seconds, repeats

    def __call__(self, function) -> tuple[float, float]:
        """The median, and the distance between the quartiles over it."""
        function()
        times = []
        until = time.perf_counter() + self.seconds
        while len(times) < 3 or (len(times) < self.repeats and time.perf_counter() < until):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        low, middle, high = statistics.quantiles(times, n=4)
        return middle, (high - low) / middle


def build_ceilings() -> ctypes.CDLL:
    """benchmarks/ceilings.c, compiled for this machine."""
    library = FOLDER.parent / "build" / "ceilings.so"
    library.parent.mkdir(exist_ok=True)
    source = FOLDER / "ceilings.c"
    subprocess.run(
        ["cc", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)], check=True
    )
    c = ctypes.CDLL(str(library))
    for name in ("time_fma", "time_bf16", "time_read", "time_copy"):
        getattr(c, name).restype = ctypes.c_double
    return c


def arithmetic(c: ctypes.CDLL, threads: int) -> dict[str, float]:
    """GFLOP/s of float32 and bfloat16 multiply-adds; the best of several."""
    n, n64 = 20_000_000, ctypes.c_int64
    best = {"float32": threads * 2 * 16 * 12 * n / min(c.time_fma(n64(n), threads) for _ in range(5))}
    if c.has_bf16():
        best["bfloat16"] = threads * 4 * 16 * 12 * n / min(c.time_bf16(n64(n), threads) for _ in range(5))
    return {name: value / 1e9 for name, value in best.items()}


def address(x: torch.Tensor) -> ctypes.c_void_p:
    """For C."""
    return ctypes.c_void_p(x.data_ptr())


class Case:
    """One shape, length and dtype: tensors that rotate, and kvpress's module around them."""

    def __init__(self, heads: int, key_heads: int, dim: int, length: int, dtype: torch.dtype):
        make = torch.Generator().manual_seed(0)
        one = key_heads * length * dim * dtype.itemsize
        n_copy = 1 + int(CACHE_BYTES / one) if length > 256 else 1  # short prompts are in the cache after their prefill
        self.heads, self.length, self.dim, self.dtype = heads, length, dim, dtype
        self.keys = [torch.randn(1, key_heads, length, dim, generator=make).to(dtype) for _ in range(n_copy)]
        self.values = [torch.randn(1, key_heads, length, dim, generator=make).to(dtype) for _ in range(n_copy)]
        self.queries = torch.randn(1, heads, length, dim, generator=make).to(dtype)
        # A hidden size of 64 makes the query projection, which kvpress repeats and we do not, cost next to nothing.
        config = transformers.LlamaConfig(
            hidden_size=64,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=dim,
            num_hidden_layers=N_LAYER,
            attn_implementation="eager",
        )
        self.module = LlamaAttention(config, layer_idx=LAYER).to(dtype).eval()
        self.module.rotary_emb = LlamaRotaryEmbedding(config)
        self.hidden = torch.randn(1, length, 64, generator=make).to(dtype)
        angle = torch.randn(1, length, dim, generator=make)
        self.rotation = {"position_embeddings": (angle.cos().to(dtype), angle.sin().to(dtype))}
        self.turn = 0

    def next(self):
        """Keys and values that were not used just before."""
        self.turn = (self.turn + 1) % len(self.keys)
        return self.keys[self.turn], self.values[self.turn]

    def ours(self, policy, n_query: int, **given):
        """Score, select and gather."""
        queries = self.queries[:, :, self.length - n_query :] if n_query else None
        policy = kvp.policies.get_policy(policy)
        given |= {"layer": LAYER, "n_layer": N_LAYER}

        def press():
            keys, values = self.next()
            kept = kvp.keep(policy, keys, queries, compression_ratio=RATIO, values=values, **given)
            return ops.gather(keys, values, kept.positions)

        return press

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
        ones, zeros = (make(1, self.length, self.dim, dtype=self.dtype) for make in (torch.ones, torch.zeros))

        def compress():
            press.score_val = torch.zeros(1, 1, n_head, self.length, dtype=self.dtype)
            press.score_kvzip(module, hidden, both, both, None, {"position_embeddings": (ones, zeros)})
            press.compress_post(model)

        return compress

    def their_h2o(self):
        """Eager attention, which H2O needs there, and the press."""
        press = kvpress.ObservedAttentionPress(RATIO)
        causal = torch.full((self.length, self.length), torch.finfo(self.dtype).min, dtype=self.dtype).triu(1)[
            None, None
        ]

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


def bench_presses(case: Case, timer: Timer, base: dict) -> list[dict]:
    rows = []
    for name, (ours, theirs) in presses(case).items():
        slow = (name == "h2o" and case.length > 2048) or (name == "kvzip" and case.length > 256)
        mine, spread = (Timer(0, 3) if slow else timer)(ours)
        row = {**base, "measure": f"press {name}", "ours_ms": mine * 1e3, "spread": spread}
        if theirs is not None:
            other, spread_of_other = (Timer(0, 3) if slow else timer)(theirs)
            row |= {"kvpress_ms": other * 1e3, "kvpress_spread": spread_of_other, "times_faster": other / mine}
        rows.append(row)
    return rows


def bench_verbs(case: Case, timer: Timer, base: dict, c: ctypes.CDLL) -> list[dict]:
    """The verbs against reading and copying as many bytes of the same memory, and against torch where it has the same
    thing."""
    keys, _ = case.next()
    n_head, threads, n_kept = keys.shape[1], base["threads"], case.length // 2
    scores = ops.score("norm", keys)
    positions, _ = ops.select(scores, n_kept)
    first = torch.stack([torch.arange(n_kept, dtype=torch.int32)] * n_head)[None]
    out = torch.empty(2, 1, n_head, n_kept, case.dim, dtype=case.dtype)
    row = scores[:, :1].contiguous()
    edges, quotas = ops.np.array([[0, case.length]], "int32"), ops.np.array([[[n_kept]]], "int32")
    kept, count = ops.select(row, n_kept)
    n_byte = ctypes.c_int64(keys.nbytes)
    calls = {
        "read": lambda: c.time_read(address(case.next()[0]), n_byte, threads),
        "copy": lambda: c.time_copy(address(out), address(case.next()[0]), n_byte, threads),
        "norm / read": lambda: _core.score("norm", case.next()[0], None, None, None, None, scores, None, None, threads),
        "gather, random half / copy": lambda: _core.gather(*case.next(), positions, out[0], out[1], threads),
        "gather, first half / copy": lambda: _core.gather(*case.next(), first, out[0], out[1], threads),
        "topk": lambda: row.topk(n_kept),
        "select one row / torch.topk": lambda: _core.select(row, edges, quotas, None, None, kept, count, None, threads),
    }
    times = {name: timer(call) for name, call in calls.items()}
    rows = []
    for name in [name for name in calls if "/" in name]:
        against = {"read": "read", "copy": "copy", "torch.topk": "topk"}[name.split(" / ")[1]]
        kind = "times_faster" if against == "topk" else "ratio"
        seconds, spread = times[name]
        rows.append(
            {**base, "measure": name, "ours_ms": seconds * 1e3, "spread": spread, kind: times[against][0] / seconds}
        )
    rows[0] |= {f"{name}_gb_per_s": n * keys.nbytes / times[name][0] / 1e9 for name, n in (("read", 1), ("copy", 2))}
    return rows


def bench_h2o(case: Case, base: dict, machine: dict) -> list[dict]:
    """Exact H2O against the multiply-adds that QK^T alone needs (causal half), and against a whole forward of torch's
    attention."""
    inputs = kvp.policies.Inputs(
        case.keys[0], case.queries, case.dim**-0.5, 0.0, [(0, case.length)], [[(0, case.length)]], [[]]
    )
    policy, few = kvp.H2O(), Timer(0, 3)
    mine, spread = few(lambda: policy.score(inputs))
    operations = case.heads * case.dim * case.length * (case.length + 1)
    name = str(case.dtype).removeprefix("torch.")
    rows = [{**base, "measure": f"h2o scores / {name} peak", "ours_ms": mine * 1e3, "spread": spread,
             "ratio": operations / mine / 1e9 / machine.get(name, machine["float32"])}]  # fmt: skip
    if case.dtype == torch.float32:
        group = case.heads // case.keys[0].shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (case.keys[0], case.values[0]))
        sdpa, _ = few(
            lambda: torch.nn.functional.scaled_dot_product_attention(case.queries, keys, values, is_causal=True)
        )
        rows.append(
            {
                **base,
                "measure": "h2o scores / sdpa forward (time)",
                "ours_ms": mine * 1e3,
                "spread": spread,
                "ratio": mine / sdpa,
            }
        )
    return rows


def reads_no_more_than_queries(name: str) -> bool:
    """Whether keys and queries are all that a policy reads."""
    policy = kvp.policies.get_policy(name)
    return not (policy.needs_values or policy.needs_rotary or policy.needs_output or policy.needs_again)


def extra_memory(shape, length: int) -> list[dict]:
    """What a process that scores once needs at most, over what it holds before, in MB; Linux only."""
    heads, key_heads, dim = shape
    code = (
        "import sys, re, torch, kvpitfalls as kvp; from kvpitfalls.policies import get_policy\n"
        f"torch.set_num_threads(2); q, k = torch.randn(1, {heads}, {length}, {dim}), torch.randn(1, {key_heads}, "
        f"{length}, {dim})\n"
        "def memory(name): return int(re.search(name + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "def score(n): return get_policy(sys.argv[1]).score(\n"
        "    kvp.policies.Inputs(k[:, :, :n], q[:, :, :n], 0.1, 0.0, [(0, n)], [[(0, n)]], [[]]))\n"
        "score(64); open('/proc/self/clear_refs', 'w').write('5'); before = memory('VmRSS')\n"
        f"score({length}); print((memory('VmHWM') - before) / 1e3)"
    )
    rows = []
    for policy in filter(reads_no_more_than_queries, kvp.policies.policy_names()):
        out = subprocess.run([sys.executable, "-c", code, policy], capture_output=True, text=True, check=True).stdout
        rows.append(
            {
                "shape": "/".join(map(str, shape)),
                "length": length,
                "measure": f"extra memory, {policy}",
                "mb": float(out),
            }
        )
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


def main() -> None:
    """Measure everything, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--seconds", type=float, default=0.7, help="at most so long for each measurement")
    parser.add_argument("--presses", action="store_true", help="whole presses alone, without the verbs and the memory")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzipPress says at each making that it is slow
    c, machines, rows = build_ceilings(), {}, []
    for threads in args.threads:
        torch.set_num_threads(threads)
        machines[threads] = arithmetic(c, threads)
        print(
            f"{threads} thread(s): "
            + ", ".join(f"{name} {value:.1f} GFLOP/s" for name, value in machines[threads].items())
        )
        for heads, key_heads, dim in SHAPES:
            for length in args.lengths:
                for dtype in (torch.float32, torch.bfloat16):
                    case = Case(heads, key_heads, dim, length, dtype)
                    base = {
                        "shape": f"{heads}/{key_heads}/{dim}",
                        "length": length,
                        "dtype": str(dtype)[6:],
                        "threads": threads,
                    }
                    new = bench_presses(case, Timer(args.seconds, 200), base)
                    if not args.presses:
                        new = bench_verbs(case, Timer(args.seconds, 200), base, c) + new
                        new += bench_h2o(case, base, machines[threads]) if length == max(args.lengths) else []
                    show(new)
                    rows += new
    if not args.presses:
        new = extra_memory(SHAPES[0], max(args.lengths))
        show(new)
        rows += new
    about = {"cpu": platform.processor() or platform.machine(), "isa": _core.isa(), "torch": torch.__version__, "kvpress": "0.5.5",
             "transformers": transformers.__version__, "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps({"about": about, "machine": machines, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
