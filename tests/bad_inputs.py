"""What the tables of bad inputs (bad_*.py) are made of. A row is what is called, the exact type of the exception, and
words that name the argument and what is wrong with it."""

import functools
import types

import numpy as np
import torch
from chat_tokenizers import byte_level
from tiny_models import build, tiny_prompt

import kvpitfalls as kvp
from kvpitfalls import ops

KEYS = np.random.default_rng(0).standard_normal((1, 2, 20, 8), dtype=np.float32)
QUERIES = np.random.default_rng(1).standard_normal((1, 4, 20, 8), dtype=np.float32)
SCORES, POSITIONS = KEYS[..., 0].copy(), np.array([[[0, 2], [1, 3]]], np.int32)
VOTES = np.array([[[0, 20, 0, 20, 0, 0, 0, 0, 0, 0]]])
SPANS = {"a": (2, 10), "b": (10, 18)}
HUGE = torch.empty(1).expand(1, 2, 2**31, 8)  # 2^31 tokens in one number's memory
UNALIGNED = np.frombuffer(b"x" + KEYS.tobytes(), np.uint8)[1:].view(np.float32).reshape(KEYS.shape)
LOWER = {"key": 1, "prompt": "x", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]}
SAID = [{"role": "user", "content": "abc"}]


def attention(keys=KEYS, queries=QUERIES, **params):
    """Scores by one vote of all queries on all keys."""
    return ops.score("attention", keys, queries=queries, votes=VOTES, **params)


def expected(queries, budget=8, **given):
    """Expected Attention of everything."""
    return kvp.keep("expected_attention", KEYS, queries, values=KEYS, rotary=kvp.Rotary(), budget=budget, **given)


def torched(x):
    """The same numbers as a tensor."""
    return torch.from_numpy(x)


@functools.cache
def place():
    """A tiny model, wrapped, with a cache and an audit of a prompt with two instructions; and a model for the small
    tokenizer."""
    e = types.SimpleNamespace(
        model=build("llama"), chatty=build("llama", vocab_size=300), tok=byte_level(), prompt=tiny_prompt()
    )
    e.handle = kvp.wrap(e.model, "knorm", budget=4)
    e.cache = e.handle.compress(e.prompt)
    e.audit = kvp.audit(e.model, e.prompt, policies=["knorm"], compression_ratios=[0.5])
    e.text, e.chat = kvp.Prompt.from_text(e.tok, "abc"), kvp.Prompt.from_chat(e.tok, SAID)
    return e
