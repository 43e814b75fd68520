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
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from bench_presses import LENGTHS, SHAPES, Case, Timer, bench_presses, show

import kvpitfalls as kvp
from kvpitfalls import _core, ops

FOLDER = Path(__file__).parent


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
    best = {"float32": threads * c.operations_fma() * n / min(c.time_fma(n64(n), threads) for _ in range(5))}
    if c.has_bf16():
        best["bfloat16"] = threads * 4 * 16 * 12 * n / min(c.time_bf16(n64(n), threads) for _ in range(5))
    return {name: value / 1e9 for name, value in best.items()}


def address(x: torch.Tensor) -> ctypes.c_void_p:
    """For C."""
    return ctypes.c_void_p(x.data_ptr())


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
        "norm / read": lambda: _core.score("norm", case.next()[0], *[None] * 5, scores, None, None, threads),
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
    rows = {"valid": [(0, case.length)], "segments": [[(0, case.length)]], "spans": [[]]}
    inputs = kvp.policies.Inputs(case.keys[0], case.queries, **rows)
    policy, few = kvp.H2O(), Timer(0, 3)
    mine, spread = few(lambda: policy.score(inputs))
    operations = case.heads * case.dim * case.length * (case.length + 1)
    name = str(case.dtype).removeprefix("torch.")
    peak = name if name in machine else "float32"  # a processor without dot products of bfloat16 multiplies in float32
    rows = [{**base, "measure": f"h2o scores / {peak} peak", "ours_ms": mine * 1e3, "spread": spread,
             "ratio": operations / mine / 1e9 / machine[peak]}]  # fmt: skip
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
        "    kvp.policies.Inputs(k[:, :, :n], q[:, :, :n], valid=[(0, n)], segments=[[(0, n)]], spans=[[]]))\n"
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


def main() -> None:
    """Measure everything, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--seconds", type=float, default=0.7, help="at most so long for each measurement")
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
                    new = bench_verbs(case, Timer(args.seconds, 200), base, c) + new
                    new += bench_h2o(case, base, machines[threads]) if length == max(args.lengths) else []
                    show(new)
                    rows += new
    new = extra_memory(SHAPES[0], max(args.lengths))
    show(new)
    rows += new
    about = {"cpu": platform.processor() or platform.machine(), "isa": _core.isa(), "torch": torch.__version__, "kvpress": "0.5.5",
             "transformers": transformers.__version__, "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps({"about": about, "machine": machines, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
