"""`make soak`: four threads compress, generate and audit for an hour; every round must repeat the first, in flat
memory.

Each thread has a model of its own, wrapped anew for every setting, and all share one more that stays wrapped. The
expected results are those of one thread alone, before the others start. Memory is a line fitted to the resident size
after warm-up; it may rise by `BOUND`.
"""

import copy
import os
import sys
import threading
import time

import numpy as np
import torch
from tiny_models import build, ids, tiny_prompt

import kvpitfalls as kvp
from kvpitfalls.hf.wrap import Handle

N_THREAD, N_NEW = 4, 8
BOUND = (
    8 * 2**20
    # bytes of the fitted rise: what threads leave in the allocator's arenas comes and goes by a few MiB, a leak of a
    # cache
    # a round is GiB
)
WARM_UP = 0.2  # share of the run that the fit leaves out
SPANS = {"a": (2, 14), "b": (14, 28)}
SETTINGS = [
    ("snapkv", {"compression_ratio": 0.5, "fair": True}),
    ("tova", {"budget": 9}),
    ("h2o", {"compression_ratio": 0.7, "fair": 0.5}),
    ("streaming_llm", {"budget": 12, "protect": [3, 20]}),
    ("knorm", {"compression_ratio": 0.3, "fair": "paper"}),
    ("snapkv", {"compression_ratio": 0.5, "when": "always"}),
    ("h2o", {"budget": 10, "when": "decode", "fair": True}),
]


def rss() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def compress_and_generate(model, handle: Handle, tokens: torch.Tensor) -> list:
    """Kept positions of all layers, and what is generated from them."""
    cache = handle.compress(tokens[:, :-2], spans=SPANS)
    kept = [cache.positions(layer.index) for layer in cache.kept_layers]
    out = model.generate(
        tokens, past_key_values=copy.deepcopy(cache), max_new_tokens=N_NEW, min_new_tokens=N_NEW, do_sample=False
    )
    return [*kept, out.numpy()]


def one_round(own, shared, handle: Handle, prompt, tokens: torch.Tensor) -> list[np.ndarray]:
    """Everything once; the arrays that must be the same every time."""
    results = compress_and_generate(shared, handle, tokens)
    for policy, given in SETTINGS:
        with kvp.wrap(own, policy, **given) as wrapped:
            results += compress_and_generate(own, wrapped, tokens)
    for model in (own, shared):
        rows = kvp.audit(model, prompt, compression_ratios=[0.5, 0.8]).rows
        results.append(np.array([[row["kept"], row["mass_lost"]] for row in rows]))
    return results


def same(one: list[np.ndarray], two: list[np.ndarray]) -> bool:
    return len(one) == len(two) and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


class Soak:
    """The threads, what they must find, and what went wrong."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        self.models, self.shared = [build("llama") for _ in range(N_THREAD)], build("llama")
        self.handle = kvp.wrap(self.shared, "tova", compression_ratio=0.6, fair=True)
        self.prompt, self.tokens = tiny_prompt(), ids(2)
        self.expected = one_round(self.models[0], self.shared, self.handle, self.prompt, self.tokens)
        self.rounds, self.wrong = [0] * N_THREAD, []

    def work(self, i: int) -> None:
        """One thread: rounds until the time is over, or something is wrong."""
        try:
            while time.monotonic() < self.end and not self.wrong:
                if not same(
                    one_round(self.models[i], self.shared, self.handle, self.prompt, self.tokens), self.expected
                ):
                    self.wrong.append(f"round {self.rounds[i] + 1} of thread {i} found something else than round one")
                self.rounds[i] += 1
        except BaseException as error:  # said at the end: a thread's exception would otherwise only be printed
            self.wrong.append(f"thread {i}, round {self.rounds[i] + 1}: {type(error).__name__}: {error}")
            raise

    def run(self) -> list[tuple[float, int]]:
        """(seconds, resident bytes), a sample every second or so."""
        threads = [threading.Thread(target=self.work, args=(i,), daemon=True) for i in range(N_THREAD)]
        for thread in threads:
            thread.start()
        start, samples = time.monotonic(), []
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            samples.append((time.monotonic() - start, rss()))
            if int(samples[-1][0]) // 300 > int(samples[-2][0] if len(samples) > 1 else 0) // 300:
                print(
                    f"{samples[-1][0]:.0f} s: {sum(self.rounds)} rounds, {samples[-1][1] / 2**20:.1f} MiB", flush=True
                )
        return samples


def rise(samples: list[tuple[float, int]]) -> float:
    """Bytes that the fitted line rises from warm-up to the end."""
    seconds, sizes = np.array(samples, float).T
    after = seconds >= WARM_UP * seconds[-1]
    return np.polyfit(seconds[after], sizes[after], 1)[0] * np.ptp(seconds[after])


def main(minutes: float) -> int:
    """Soak, print, and return the exit code."""
    torch.set_num_threads(1)
    soak = Soak(minutes)
    samples = soak.run()
    rose = rise(samples)
    print(
        f"{sum(soak.rounds)} rounds in {samples[-1][0]:.0f} s by {N_THREAD} threads ({soak.rounds}); resident: "
        f"{samples[0][1] / 2**20:.1f} MiB at the start, {samples[-1][1] / 2**20:.1f} at the end; fitted rise after "
        "warm-up "
        f"{rose / 2**20:+.2f} MiB (bound {BOUND / 2**20:.0f})"
    )
    for wrong in soak.wrong:
        print(wrong, file=sys.stderr)
    if rose > BOUND:
        print(f"memory rises by {rose / 2**20:.2f} MiB; expected at most {BOUND / 2**20:.0f}", file=sys.stderr)
    return 1 if soak.wrong or rose > BOUND else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 60))
