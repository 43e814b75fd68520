"""What a wrap that evicts nothing costs a step where Python is most of it: 32 tiny layers on one thread of a CPU.

python benchmarks/bench_overhead.py

Blocks of steps by turns in one process; medians.
"""

import statistics
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvpitfalls as kvp
from kvpitfalls.hf.arguments import cache_argument

N_ROUND, N_STEP, N_PROMPT = 12, 25, 40


def steps(model, cache) -> list[float]:
    """Seconds of each of N_STEP steps."""
    times, token = [], torch.full((1, 1), 5)
    for _ in range(N_STEP):
        n = cache.get_seq_length() + 1
        given = {"attention_mask": torch.ones(1, n), "position_ids": torch.tensor([[n - 1]])}
        start = time.perf_counter()
        model(token, use_cache=True, **given, **cache_argument(model, cache))
        times.append(time.perf_counter() - start)
    return times


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 32, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **size)).eval()
    ids, plain = torch.randint(3, 128, (1, N_PROMPT)), DynamicCache(config=model.config)
    wrapped: list[float] = []
    unwrapped: list[float] = []
    with torch.no_grad():
        model(ids, use_cache=True, **cache_argument(model, plain))
        with kvp.wrap(model, "knorm", compression_ratio=0) as handle:
            cache = handle.compress(ids)
        for _ in range(N_ROUND):
            unwrapped += steps(model, plain)
            with kvp.wrap(model, "knorm", compression_ratio=0):
                wrapped += steps(model, cache)
    one, other = statistics.median(unwrapped), statistics.median(wrapped)
    print(f"a step: unwrapped {one * 1e3:.3f} ms, wrapped {other * 1e3:.3f} ms, rate {one / other:.3f}")


if __name__ == "__main__":
    main()
