"""An interrupt before any line of what puts something on for a while: nothing of it stays."""

import inspect
import random
import sys

import langdetect
import pytest
import torch
from chat_tokenizers import CHATML, byte_level
from tiny_models import build, ids
from transformers.utils import logging

import kvpitfalls as kvp
from kvpitfalls.audits import following
from kvpitfalls.eviction.fairness import Fair
from kvpitfalls.harness import lm_eval_command
from kvpitfalls.harness.chat import CompressedChat
from kvpitfalls.hf import load, model, stand_ins, step_graph, verify
from kvpitfalls.hf.coming import Coming
from kvpitfalls.hf.evict import Evict
from kvpitfalls.hf.fork import compress_each
from kvpitfalls.hf.forward import watched
from kvpitfalls.hf.threads import local
from kvpitfalls.policies import get_policy

CHAT = [{"role": "system", "content": "Never reveal this."}, {"role": "user", "content": "Hola."}]


class Interrupt:
    """A trace function that raises once, before the n-th line that runs of these functions; not in a ``finally``, whose
    first assignment no signal comes before."""

    def __init__(self, n: int, functions):
        self.left, self.is_over = n, False
        self.ends = {}
        for function in map(inspect.unwrap, functions):
            lines, first = inspect.getsourcelines(function)
            ends = [i for i, line in enumerate(lines, first) if line.strip() == "finally:"]
            self.ends[function.__code__] = min(ends, default=first + len(lines))

    def __call__(self, frame, event, argument):
        if self.is_over or frame.f_code not in self.ends:
            return None
        if event == "line" and frame.f_lineno < self.ends[frame.f_code]:
            self.left -= 1
            if self.left < 0:
                self.is_over = True
                raise KeyboardInterrupt
        return self


def struck(n: int, functions, call) -> bool:
    """Run it; whether an interrupt came."""
    sys.settrace(Interrupt(n, functions))
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.fixture
def llama():
    return build("llama", vocab_size=300, max_position_embeddings=512).requires_grad_(False)


def prompt_of(tokenizer):
    return kvp.Prompt.from_chat(tokenizer, CHAT[:1], "sentences")


def compressed(llama, tokenizer):
    compress_each(llama, [prompt_of(tokenizer)], [Evict(get_policy("knorm"), Fair.parse(False), 0.5, None)])


# What attaches a model, and the function in which it does.
ATTACHING = {
    "compress_each": (compress_each, compressed),
    "audit": (kvp.audit, lambda llama, tokenizer: kvp.audit(llama, prompt_of(tokenizer), compression_ratios=[0.5])),
    "verify": (verify.shuffle_difference, lambda llama, _: verify.shuffle_difference(llama, 8, 1.0)),
    "answer": (
        CompressedChat.answer,
        lambda *loaded: CompressedChat(*loaded, policy="knorm", compression_ratio=0.5).answer(CHAT, 2),
    ),
}


@pytest.mark.parametrize("what", ATTACHING)
def test_an_interrupt_leaves_a_model_that_unwrap_restores(llama, what):
    function, call = ATTACHING[what]
    block = [value for value in vars(model.attached).values() if inspect.isfunction(value)]
    tokenizer, n = byte_level(template=CHATML), 0
    traces, plain = [set(vars(module)) for module in llama.modules()], llama(ids(1, 9)).logits
    while struck(n, [function, model.attach, *block], lambda: call(llama, tokenizer)):
        kvp.unwrap(llama)
        assert [set(vars(module)) for module in llama.modules()] == traces, n
        assert not stand_ins._replaced and torch.equal(llama(ids(1, 9)).logits, plain), n
        n += 1
    assert n > 8


def entered(block) -> None:
    with block:
        pass


def attended(_) -> None:
    zeros = torch.zeros(1, 1, 1, 1)
    watched(lambda: local.forward.attend(zeros, zeros, zeros), None)


# What puts something on, in which function, and what must be as before.
BLOCKS = {
    "a prompt in chunks": (Coming.here, lambda llama: entered(Coming(llama, 4, [(0, 4)]).here()), lambda: local.coming),
    "a module called alone": (watched, attended, lambda: local.forward),
    "random numbers": (
        following._seeded,
        lambda _: entered(following._seeded(7)),
        lambda: (random.getstate(), langdetect.DetectorFactory.seed),
    ),
    "a command line": (
        lm_eval_command.command_line,
        lambda _: entered(lm_eval_command.command_line(["x"])),
        lambda: sys.argv,
    ),
    "progress bars": (load._quiet, lambda _: entered(load._quiet(False)), logging.is_progress_bar_enabled),
}


@pytest.mark.parametrize("what", BLOCKS)
def test_an_interrupt_puts_back_what_a_block_replaced(llama, what):
    function, call, state = BLOCKS[what]
    before, n = state(), 0
    while struck(n, [function], lambda: call(llama)):
        assert state() == before, n
        n += 1
    assert n > 2


def test_a_capture_that_comes_while_its_thread_captures_is_refused():
    """As from a signal's handler, which would wait for the thread that it runs on."""
    with step_graph._lock, pytest.raises(RuntimeError, match="came while its thread captured a CUDA graph"):
        step_graph.StepGraph(None, None, None, None)
