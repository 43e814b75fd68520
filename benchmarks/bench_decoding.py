"""What a step of ``generate`` takes, on a growing cache without a wrap, on a compressed one (by Python, and as it
comes: on a GPU as a CUDA graph), and on a compressed one of fixed size.

    python benchmarks/bench_decoding.py --json build/bench_decoding.json

The shape is Llama-3.1-8B's in bfloat16 (``--small``: SmolLM2-135M's in float32, on the CPU), the weights are random: no
time depends on them. A step is what ``model.generate`` takes from one token to the next, greedy, by the clock: the
median over a run, and of runs by turns in one process. *busy* is how long the GPU works for a step of the model without
a wrap (its kernels' times, by torch's profiler): what that step would take if Python cost nothing.
"""

import argparse
import copy
import json
import statistics
import time
import unittest.mock
from pathlib import Path

import torch
from bench_cuda_model import SHAPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

import kvpitfalls as kvp
from kvpitfalls.hf import one_token

HELD = [(8, 16384, 4096, policy) for policy in ("streaming_llm", "tova", "h2o")]
CASES = [(8, 16384, 0.75), (1, 32768, 0.75), (32, 8192, 0.75), (8, 4096, 0.0), (1, 4096, 0.0)]
OTHERS = {
    "gemma3_text": {  # Gemma 3 4B's
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
    },
    "lfm2": {},  # LFM2 1.2B's
}
SMALL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}


class Clock(StoppingCriteria):
    """Notes when each token has been asked for; stops nothing. ``generate`` waits for each, so that from one to the
    next is a step; a wait of the clock's own would be one more."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def step(self, n_warm: int) -> float:
        """Median seconds from one token to the next."""
        return statistics.median(b - a for a, b in zip(self.times[n_warm:], self.times[n_warm + 1 :], strict=False))


def build(small: bool):
    dtype, device = (torch.float32, "cpu") if small else (torch.bfloat16, "cuda")
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**(SMALL if small else SHAPE), attn_implementation="sdpa"))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def build_other(kind: str):
    """A model whose layers are not all compressed, in bfloat16 on a GPU."""
    config = AutoConfig.for_model(kind, **OTHERS[kind])
    config.eos_token_id = None
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def random_cache(model, n_row: int, n_token: int) -> DynamicCache:
    """As a prompt would leave it: what a step takes does not depend on the numbers."""
    cache, config = DynamicCache(config=model.config), model.config
    rows = torch.zeros(
        n_row, config.num_key_value_heads, n_token, config.head_dim, dtype=model.dtype, device=model.device
    )
    for layer in range(config.num_hidden_layers):
        cache.update(rows, rows, layer)
    return cache


def generate(model, ids, cache, n_step: int) -> float:
    """Median seconds of a step."""
    clock = Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=n_step,
        min_new_tokens=n_step,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return clock.step(n_warm=8)


def busy(model, ids, cache, n_step: int = 8, mask=None) -> float:
    """Seconds of a GPU's kernels in a step of the model. ``mask``: of more tokens than will come."""
    step = ids[:, -1:]

    def run(n):
        for _ in range(n):
            seen = None if mask is None else mask[:, : cache.get_seq_length() + 1]
            model(step, past_key_values=cache, attention_mask=seen)
        torch.cuda.synchronize()

    run(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(n_step)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / n_step


def measure(model, n_row: int, n_token: int, ratio: float, policy: str, n_step: int, n_round: int) -> dict:
    """A cache that is compressed once."""
    ids, settings = random_ids(model, n_row, n_token), {"compression_ratio": ratio}
    with kvp.wrap(model, policy, **settings) as handle:
        parts = [handle.compress(ids[row : row + 1, :-1]) for row in range(n_row)]
        kept = kvp.KeptCache.join(parts)
    del parts
    row = {"rows": n_row, "n": n_token, "ratio": ratio, "policy": policy}
    return row | steps_of(model, ids, kept, policy, settings, n_step, n_round)


def measure_held(model, n_row: int, n_token: int, budget: int, policy: str, n_step: int, n_round: int) -> dict:
    """A cache whose budget is held; caches of single rows could not be joined."""
    ids, settings = random_ids(model, n_row, n_token), {"budget": budget, "when": "always"}
    with kvp.wrap(model, policy, **settings) as handle:
        kept = handle.compress(ids[:, :-1])
    row = {"rows": n_row, "n": n_token, "budget": budget, "policy": policy}
    return row | steps_of(model, ids, kept, policy, settings, n_step, n_round)


def measure_other(kind: str, n_row: int, n_token: int, ratio: float, policy: str, n_step: int, n_round: int) -> dict:
    """Plain ``generate``, whose prompt is compressed on the way."""
    model = build_other(kind)
    ids = random_ids(model, n_row, n_token)
    steps: dict[str, list[float]] = {"unwrapped": [], "growing": [], "as it comes": []}
    for _ in range(n_round):
        steps["unwrapped"].append(generate(model, ids, None, n_step))
        for name, use_graph in (("growing", False), ("as it comes", True)):
            with kvp.wrap(model, policy, compression_ratio=ratio, use_graph=use_graph):
                steps[name].append(generate(model, ids, None, n_step))
    row = {"model": kind, "rows": n_row, "n": n_token, "ratio": ratio, "policy": policy}
    return row | {name: statistics.median(seconds) for name, seconds in steps.items()}


def random_ids(model, n_row: int, n_token: int) -> torch.Tensor:
    """A prompt and one token that follows it."""
    prompt = torch.randint(0, model.config.vocab_size, (n_row, n_token), device=model.device)
    return torch.cat([prompt, prompt[:, :1]], 1)


def steps_of(model, ids, kept, policy: str, settings: dict, n_step: int, n_round: int) -> dict:
    """Seconds of a step on every kind of cache, and of the GPU's work without a wrap."""
    n_row, n_token = len(ids), ids.shape[1] - 1
    steps: dict[str, list[float]] = {"unwrapped": [], "growing": [], "as it comes": [], "fixed": []}
    row = {}
    for _ in range(n_round):
        plain = random_cache(model, n_row, n_token)
        if model.device.type == "cuda" and "busy" not in row:
            row["busy"] = busy(model, ids, plain)
            plain.crop(n_token - plain.get_seq_length())
        steps["unwrapped"].append(generate(model, ids, plain, n_step))
        del plain
        with kvp.wrap(model, policy, use_graph=False, **settings):
            steps["growing"].append(generate(model, ids, copy.deepcopy(kept), n_step))
        with kvp.wrap(model, policy, **settings):
            steps["as it comes"].append(generate(model, ids, copy.deepcopy(kept), n_step))
            steps["fixed"].append(generate(model, ids, kept.fixed(n_step + 1), n_step))
    return row | {name: statistics.median(seconds) for name, seconds in steps.items()}


def measure_padded(model, n_row: int, n_token: int, ratio: float, policy: str) -> dict:
    """A GPU's time for a step on a growing cache whose rows are half padding, by our attention of one token and by
    transformers'."""
    prompt = torch.randint(0, model.config.vocab_size, (n_row, n_token), device=model.device)
    mask = torch.ones_like(prompt)
    mask[:, : n_token // 2] = 0
    mask[0] = 1  # one row is whole, or there would be no padding to compress
    row = {"rows": n_row, "n": n_token, "ratio": ratio, "policy": policy}
    longer = torch.cat([mask, mask.new_ones(n_row, 64)], 1)
    with kvp.wrap(model, policy, compression_ratio=ratio) as handle:
        cache = handle.compress(prompt, mask)
        row["ours"] = busy(model, prompt, cache, mask=longer)
        with unittest.mock.patch.object(one_token, "serves", return_value=False):
            row["transformers"] = busy(model, prompt, cache, mask=longer)
    return row


def show(row: dict) -> None:
    """One line."""
    kept = f"r={row['ratio']:<5}" if "ratio" in row else f"{row['budget']} held by {row['policy']}"
    where = f"{row['rows']:3d} rows, n={row['n']:<6} {kept}"
    if "ours" in row:
        ours, theirs = row["ours"] * 1e3, row["transformers"] * 1e3
        both = f"busy {ours:.2f} ms, by transformers' attention {theirs:.2f} ms ({ours / theirs:.2f})"
        print(f"{where} padded, growing: {both}", flush=True)
        return
    if "model" in row:
        parts = [f"{name} {row[name] * 1e3:.2f} ms" for name in ("unwrapped", "growing", "as it comes")]
        print(f"{row['model']:12} {where} {'   '.join(parts)}", flush=True)
        return
    against = {name: row.get(name) for name in ("busy", "unwrapped", "growing", "as it comes")}
    parts = [
        f"{name} {seconds * 1e3:8.2f} ms ({seconds / row['fixed']:5.2f}x)"
        for name, seconds in against.items()
        if seconds
    ]
    print(f"{where} fixed {row['fixed'] * 1e3:8.2f} ms   {'   '.join(parts)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="SmolLM2-135M's shape in float32 on the CPU: 8 rows of 4096 tokens"
    )
    parser.add_argument("--cases", nargs="+", metavar="ROWS,TOKENS,RATIO", help="instead of the usual ones")
    parser.add_argument("--padded", action="store_true", help="a padded batch on a growing cache instead")
    parser.add_argument("--held", action="store_true", help="budgets that are held while generating instead")
    parser.add_argument("--others", action="store_true", help="models with windows or states (Gemma 3, LFM2) instead")
    parser.add_argument("--policy", default="snapkv", help="but for --held, which has its own")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows to a file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [(8, 4096, 0.75)] if args.small else CASES
    if args.cases:
        cases = [
            (int(rows), int(tokens), float(ratio)) for rows, tokens, ratio in (case.split(",") for case in args.cases)
        ]
    often, rows = (args.steps, args.rounds), []
    if args.others:
        for kind in OTHERS:
            rows.append(measure_other(kind, 4, 8192, 0.75, args.policy, *often))
            show(rows[-1])
        write(args.json, rows)
        return
    if args.held:
        held = [(8, 4096, 1024, policy) for *_, policy in HELD] if args.small else HELD
        calls = [(measure_held, *case, *often) for case in held]
    elif args.padded:
        calls = [(measure_padded, *case, args.policy) for case in (cases if args.cases else [(8, 8192, 0.5)])]
    else:
        calls = [(measure, *case, args.policy, *often) for case in cases]
    with torch.inference_mode():
        model = build(args.small)
        for run, *how in calls:
            rows.append(run(model, *how))
            show(rows[-1])
    write(args.json, rows)


def write(path: Path | None, rows: list[dict]) -> None:
    """The rows as a file, if one is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
