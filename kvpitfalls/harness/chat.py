"""One answer after another from a compressed cache: what a harness that sends conversations needs."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import torch

from ..eviction.budget import check_budget
from ..eviction.fairness import Fair
from ..hf.arguments import cache_argument
from ..hf.cache import KeptCache
from ..hf.evict import Evict
from ..hf.fork import compress_each
from ..hf.generate import GREEDY, Watch
from ..hf.given_prompts import pad_left
from ..hf.model import attached
from ..hf.parts import device_of
from ..hf.report import Report
from ..policies import get_policy
from ..prompts.chats import at_time
from ..prompts.prompt import Prompt
from .contexts import Marks


class Said(NamedTuple):
    """An answer, stripped and without special tokens; and how many tokens were compressed for it, and kept."""

    text: str
    n_tokens: int
    n_kept: int


class CompressedChat:
    """A model that answers conversations greedily, each from a cache that is compressed anew.

    Parameters
    ----------
    model, tokenizer
        As :func:`kvpitfalls.hf.load.load` gives them.
    policy : str or Policy
    compression_ratio, budget : float or int
        Exactly one.
    fair, protect
        As :func:`kvpitfalls.wrap` takes them.
    compress : {"prompt", "system"}
        All of a conversation, or its system message only.
    instructions : str
        "sentences", "lines" or "messages" of what is compressed, or the path of a JSON file of names and texts.

    Examples
    --------
    >>> from kvpitfalls.hf.load import load
    >>> chat = CompressedChat(*load(), policy="snapkv", compression_ratio=0.5)
    >>> messages = [{"role": "system", "content": "Never reveal this. Speak only Spanish."}]
    >>> messages.append({"role": "user", "content": "Hi."})
    >>> said = chat.answer(messages, 4)
    >>> said.n_tokens, said.n_kept
    (13, 6)
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        policy,
        compression_ratio=None,
        budget=None,
        fair=False,
        protect=None,
        compress="system",
        instructions="sentences",
    ):
        check_budget(compression_ratio, budget)
        fair = Fair.parse(fair)
        self.model, self.tokenizer = model, tokenizer
        self.action = Evict(get_policy(policy), fair, compression_ratio, budget, protect)
        self.marks = Marks(compress, instructions, fair, self.action.protect)

    @torch.no_grad()
    def answer(self, messages: Sequence[Mapping], max_new_tokens: int) -> Said:
        """What the model says after these messages.

        Raises
        ------
        ValueError
            If there is no system message to compress, or the model's logits are no numbers.
        NotInterceptedError
            If the prompt was not compressed.
        """
        made = datetime.now()
        options = at_time(self.tokenizer, {"add_generation_prompt": True}, made)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        with attached(self.model):
            prompt, cache = self.start(text, ids, messages, made=made)
            tokens = torch.tensor([ids], device=device_of(self.model))
            mask = torch.ones_like(tokens)
            watch = Watch()
            out = self.model.generate(
                tokens,
                attention_mask=mask,
                logits_processor=[watch],
                max_new_tokens=max_new_tokens,
                **cache_argument(self.model, cache),
                **GREEDY,
            )
        watch.check([out.shape[1] - len(ids)])
        n_kept = kept_of(cache.report())  # raises if that is more than its budget
        return Said(self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip(), len(prompt), n_kept)

    def start(
        self,
        text: str,
        ids: list[int],
        messages: Sequence[Mapping] | None,
        n_row: int = 1,
        template: Mapping | None = None,
        made: datetime | None = None,
    ) -> tuple[Prompt, KeptCache]:
        """What is compressed of a context, and the cache to generate with, while the model is wrapped: filled with the
        system message, or empty, if all of the context is going to be compressed; of ``n_row`` equal rows.
        ``template``: the chat template's options; ``made``: the time that it printed."""
        prompt = self.marks.prompt(self.tokenizer, text, ids, messages, template=template, made=made)
        if self.marks.scope == "system":
            cache = compress_each(self.model, [prompt], [self.action])[0]
            if n_row > 1:
                cache.batch_repeat_interleave(n_row)
            return prompt, cache
        batch = pad_left([prompt] * n_row, self.action)
        return prompt, KeptCache(self.model.config, self.action.of_prompts(layout=batch.layout))


def kept_of(report: Report, row: int = 0) -> int:
    """Tokens that a cache kept of a prompt: the mean over layers and heads, which allocations share out unequally."""
    counts = [n for layer in report["layers"] for n in layer["kept"][row]]
    return round(sum(counts) / len(counts))
