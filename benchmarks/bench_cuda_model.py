"""What wrapping costs a model of 8 billion parameters on one GPU: time and memory of the prefill, tokens a second and bytes after it.

    python benchmarks/bench_cuda_model.py --json build/bench_cuda_model.json

The shape is Llama-3.1-8B's in bfloat16, the weights are random: no time depends on them. A prefill runs under each policy at ratio 0.5 and
without a wrap, by turns, in one process; the table gives the median of the ratios of neighbouring runs. Memory is torch's peak.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvpitfalls as kvp

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
POLICIES = ("streaming_llm", "knorm", "snapkv", "tova", "h2o")


def build():
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa"))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def prefill(model, ids, cache):
    """Seconds and bytes at the peak, weights included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated()


def decode(model, cache, n_token, n_step=32):
    """Tokens a second, one row, from a filled cache."""
    ids = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    for step in range(n_step + 4):
        if step == 4:
            torch.cuda.synchronize()
            begin = time.perf_counter()
        model(ids, past_key_values=cache, position_ids=torch.full((1, 1), n_token + step, device="cuda"))
    torch.cuda.synchronize()
    return n_step / (time.perf_counter() - begin)


def bytes_of(cache):
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def measure(model, n_token, n_round):
    ids = torch.randint(0, SHAPE["vocab_size"], (1, n_token), device="cuda")
    prefill(model, ids, DynamicCache(config=model.config))  # warm
    full = DynamicCache(config=model.config)
    prefill(model, ids, full)
    whole = {"decode": decode(model, full, n_token), "bytes": bytes_of(full)}
    del full
    for policy in POLICIES:
        ratios, peaks = [], []
        for turn in range(n_round + 1):  # the first warms the policy
            plain = prefill(model, ids, DynamicCache(config=model.config))
            with kvp.wrap(model, policy, compression_ratio=0.5) as handle:
                cache = handle.new_cache()
                wrapped = prefill(model, ids, cache)
                if turn == n_round:
                    rate, size = decode(model, copy.deepcopy(cache), n_token), bytes_of(cache)
                del cache
            if turn:
                ratios.append(wrapped[0] / plain[0])
                peaks.append(wrapped[1] / plain[1])
        yield {
            "policy": policy,
            "n": n_token,
            "prefill_seconds": plain[0],
            "prefill_over_plain": statistics.median(ratios),
            "peak_over_plain": statistics.median(peaks),
            "decode_over_full": rate / whole["decode"],
            "bytes_over_full": size / whole["bytes"],
            "decode_tokens_per_second": rate,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], metavar="N", help="tokens of the prompts")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="pairs of prefills a policy")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows to a file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_cuda_model.py needs a CUDA GPU with 40 GB or more")
    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {kvp.ops.cuda_path(0)[1]}")
    print(f"{'policy':14s} {'n':>6s} {'prefill':>9s} {'peak':>7s} {'decode':>7s} {'bytes':>6s}   (each over the model without a wrap)")
    with torch.inference_mode():
        model = build()
        for n_token in args.lengths:
            for row in measure(model, n_token, args.rounds):
                rows.append(row)
                print(
                    f"{row['policy']:14s} {n_token:6d} {row['prefill_over_plain']:9.4f} {row['peak_over_plain']:7.4f} "
                    f"{row['decode_over_full']:7.3f} {row['bytes_over_full']:6.3f}   {row['prefill_seconds']:.3f} s plain, "
                    f"{row['decode_tokens_per_second']:.1f} tokens/s",
                    flush=True,
                )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
