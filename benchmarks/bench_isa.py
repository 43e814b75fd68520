"""Instruction sets beside each other in one process, on the same tensors: all that this processor has, over the first.

Times are medians of interleaved calls, the ratio is "so many times as fast as the first set shown", and the difference
is the largest between their scores.
"""

import argparse
import statistics
import time

import torch

import kvpitfalls as kvp
from kvpitfalls import _core
from kvpitfalls.policies import Inputs

CASES = [
    (kvp.H2O(), 2048),
    (kvp.H2O(), 4096),
    (kvp.SnapKV(window_size=64), 2048),
    (kvp.SnapKV(window_size=64), 8192),
    (kvp.TOVA(), 8192),
]


def inputs(heads: int, key_heads: int, dim: int, length: int, dtype: torch.dtype) -> Inputs:
    """One row without instructions."""
    make = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(1, n, length, dim, generator=make).to(dtype) for n in (key_heads, heads))
    return Inputs(keys, queries, valid=[(0, length)], segments=[[(0, length)]], spans=[[]])


def is_here(isa: str) -> bool:
    """Whether this processor has an instruction set, which is in use then."""
    try:
        _core.isa_set(isa)
    except ValueError:
        return False
    return True


def compare(policy, given: Inputs, isas: list[str], repeats: int) -> dict[str, tuple[float, torch.Tensor]]:
    """Name -> median seconds and scores."""
    times, scores = {isa: [] for isa in isas if is_here(isa)}, {}
    for _ in range(repeats + 1):  # the first is not counted
        for isa in times:
            _core.isa_set(isa)
            start = time.perf_counter()
            scores[isa] = policy.score(given)
            times[isa].append(time.perf_counter() - start)
    return {isa: (statistics.median(times[isa][1:]), scores[isa]) for isa in times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--isas",
        nargs="+",
        default=[name for name in _core.isas() if name != "scalar"],
        help="the first is compared with",
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 8, 128), metavar=("HEADS", "KEY_HEADS", "DIM"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for policy, length in CASES:
        found = compare(policy, inputs(*args.shape, length, getattr(torch, args.dtype)), args.isas, args.repeats)
        first, wanted = next(iter(found.values()))
        name = type(policy).__name__
        for isa, (seconds, scores) in found.items():
            apart = (scores - wanted).abs().max().item()
            what = f"{name:7} n={length:<5} {args.dtype}  {isa:12}"
            print(f"{what} {seconds * 1e3:10.2f} ms  {first / seconds:5.2f}x  difference {apart:.1e}", flush=True)


if __name__ == "__main__":
    main()
