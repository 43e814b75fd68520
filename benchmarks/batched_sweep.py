"""How much faster a sweep is in batches than one conversation at a time, on SmolLM2-135M-Instruct, and whether its
outputs are the same.

    python benchmarks/batched_sweep.py [--prompts 8] [--threads 1]

Both do the same work in this process, alternating, three times; prints seconds of each, the ratio of the medians, and
how many outputs differ.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from kvpitfalls.experiments.config import SweepConfig
from kvpitfalls.experiments.records import read_records
from kvpitfalls.experiments.sweep import sweep


def run(n_prompts: int, batch_size: int) -> tuple[float, dict]:
    """Seconds of a sweep, its start-up left out (loading the model), and item -> output."""
    config = SweepConfig(
        n_prompts=n_prompts,
        policies=("streaming_llm", "snapkv"),
        modes=("biased", "fair", "whitelist"),
        compression_ratios=(0.4,),
        attacks=("verbatim-2",),
        kinds=("attack",),  # one conversation a prompt: batch size 1 is then really one by one
        max_new_tokens={"attack": 24},
        batch_size=batch_size,
    )
    with tempfile.TemporaryDirectory() as folder:
        sweep(config, Path(folder))
        records = read_records(folder)
    where = ("order", "policy", "mode", "compression_ratio", "key", "kind")
    return sum(r["seconds"] for r in records), {tuple(r[n] for n in where): r["output"] for r in records}


def main() -> None:
    """Time both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run(2, 64)  # imports and first calls
    seconds: dict[int, list[float]] = {1: [], 64: []}
    for _ in range(args.repeats):
        outputs = {}
        for batch_size, taken in seconds.items():
            inside, outputs[batch_size] = run(args.prompts, batch_size)
            taken.append(inside)
            print(f"batch size {batch_size:3}: {inside:6.1f} s for {len(outputs[batch_size])} items")
        differ = sum(outputs[64][item] != text for item, text in outputs[1].items())
        print(f"outputs that differ: {differ} of {len(outputs[1])}")
    print(f"one by one / batched: {statistics.median(seconds[1]) / statistics.median(seconds[64]):.2f}")


if __name__ == "__main__":
    main()
