"""A sweep of seconds: a random model of a few layers with SmolLM2's tokenizer, and records to compare."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpitfalls.audits.following import check
from kvpitfalls.experiments import sweep as sweep_module
from kvpitfalls.experiments.config import SweepConfig
from kvpitfalls.experiments.sweep import sweep
from kvpitfalls.hf.load import load


def save_tiny_model(folder: Path, tokenizer) -> str:
    """A Llama of 2 layers in a folder, with a tokenizer that has a chat template."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    config = LlamaConfig(
        **sizes, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                weight.mul_(6.0)  # attention far from uniform, logits far apart
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def config(model: str, **changes) -> SweepConfig:
    """2 policies x 2 modes x 2 ratios, both orders, 4 prompts."""
    options = {
        "models": [model],
        "n_prompts": 4,
        "policies": ["streaming_llm", "snapkv"],
        "modes": ["biased", "fair"],
        "compression_ratios": [0.3, 0.5],
        "attacks": ["verbatim-1", "formatting-2"],
        "max_new_tokens": {"attack": 6, "recall": 4, "follow": 5},
        "batch_size": 20,
    }
    return SweepConfig(**{**options, **changes})


def untimed(folder) -> list[str]:
    """The records' lines without their timings."""
    lines = (Path(folder) / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        json.dumps({name: value for name, value in json.loads(line).items() if name != "seconds"}) for line in lines
    ]


def kill_and_resume(model: str, folder: str, n_kill: int, seed: int) -> None:
    """Run a sweep in a child process, kill it at random moments, go on, and at the end let it finish. Prints what
    happened as JSON.

    The child is forked from this process, so that the libraries are loaded once; it must therefore use one thread.
    """
    torch.set_num_threads(1)
    check(
        {"key": 1, "prompt": "x", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]},
        "warm up the imports",
    )
    loaded = load(model)
    sweep_module.load_model = lambda config, name: loaded  # else most kills would hit the loading
    rng = random.Random(seed)
    _child(model, Path(folder) / "unbroken", None, 0)
    path = Path(folder) / "killed" / "records.jsonl"
    sizes, killed = [], 0
    while killed < n_kill:
        # at once, or after the first or the second new batch, and a random while later: in a batch, in a write, or
        # between
        ended = _child(model, path.parent, killed % 3, rng.uniform(0, 0.15))
        killed += ended == signal.SIGKILL
        sizes.append(_size(path))
        if ended == 0:  # it had finished: start anew, there are kills left
            path.unlink()
    _child(model, path.parent, None, 0)
    print(json.dumps({"killed": killed, "sizes": sizes}))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def draw_nothing(monkeypatch):
    """Reports have no figures from here on, where a test is about all else: they take nearly all of a report's time."""
    monkeypatch.setattr("kvpitfalls.display.page._draw", lambda cells, ranked, out: {})


def _child(model: str, folder: Path, n_batch: int | None, delay: float) -> int:
    """Run the sweep in a fork; 0 if it finished, else the signal that ended it: a kill, ``delay`` seconds after
    ``n_batch`` new batches."""
    pid = os.fork()
    if pid == 0:
        sweep(config(model, n_prompts=2, orders=["defense_first"], batch_size=6), folder)
        os._exit(0)
    status, size = None, _size(folder / "records.jsonl")
    while n_batch:
        time.sleep(0.002)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        size, before = _size(folder / "records.jsonl"), size
        n_batch -= size > before
    else:
        if n_batch is not None:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the child exited with {os.WEXITSTATUS(status)}; expected 0 or a kill")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


if __name__ == "__main__":
    kill_and_resume(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
