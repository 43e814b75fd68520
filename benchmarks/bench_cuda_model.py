"""What wrapping costs a model of 8 billion parameters on one GPU: time and memory of the prefill, tokens a second and
bytes after it.

    python benchmarks/bench_cuda_model.py --json build/bench_cuda_model.json

The shape is Llama-3.1-8B's in bfloat16, the weights are random: no time depends on them. A prefill runs under each
policy at ratio 0.5 and without a wrap, by turns, in one process, and so do 64 steps after it; the table gives the
medians of the ratios of neighbouring runs. The first prefill of a wrap, which takes a fingerprint of the weights, does
not count. Memory is torch's peak, weights included.
"""

import argparse
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


def decode(model, cache, n_token, n_step=64, n_warm=8):
    """Tokens a second, one row, from a filled cache."""
    ids = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    for step in range(n_warm + n_step):
        if step == n_warm:
            torch.cuda.synchronize()
            begin = time.perf_counter()
        model(ids, past_key_values=cache, position_ids=torch.full((1, 1), n_token + step, device="cuda"))
    torch.cuda.synchronize()
    return n_step / (time.perf_counter() - begin)


def bytes_of(cache):
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def run(model, ids, cache):
    """Seconds and peak of a prefill, tokens a second after it, bytes of the cache."""
    seconds, peak = prefill(model, ids, cache)
    size = bytes_of(cache)
    return {"prefill": seconds, "peak": peak, "decode": decode(model, cache, ids.shape[1]), "bytes": size}


def measure(model, n_token, n_round):
    ids = torch.randint(0, SHAPE["vocab_size"], (1, n_token), device="cuda")
    run(model, ids, DynamicCache(config=model.config))  # warm
    for policy in POLICIES:
        pairs = []
        for _ in range(n_round):
            plain = run(model, ids, DynamicCache(config=model.config))
            with kvp.wrap(model, policy, compression_ratio=0.5) as handle:
                prefill(model, ids[:, :512], handle.new_cache())
                pairs.append((plain, run(model, ids, handle.new_cache())))
        ratios = {
            f"{key}_over_plain": statistics.median(ours[key] / plain[key] for plain, ours in pairs) for key in plain
        }
        yield {"policy": policy, "n": n_token, **ratios, "plain": plain}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[8192, 32768], metavar="N", help="tokens of the prompts"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="pairs of prefills a policy")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows to a file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_cuda_model.py needs a CUDA GPU with 40 GB or more")
    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {kvp.ops.cuda_path(0)[1]}")
    print(
        f"{'policy':14s} {'n':>6s} {'prefill':>9s} {'peak':>7s} {'decode':>7s} {'bytes':>6s}   (each over the model "
        "without a wrap)"
    )
    with torch.inference_mode():
        model = build()
        for n_token in args.lengths:
            for row in measure(model, n_token, args.rounds):
                rows.append(row)
                print(
                    f"{row['policy']:14s} {n_token:6d} {row['prefill_over_plain']:9.4f} {row['peak_over_plain']:7.4f} "
                    f"{row['decode_over_plain']:7.3f} {row['bytes_over_plain']:6.3f}   "
                    f"{row['plain']['prefill']:.3f} s, {row['plain']['decode']:.1f} tokens/s without",
                    flush=True,
                )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
