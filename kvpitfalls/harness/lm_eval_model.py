"""lm-eval's Hugging Face model with a compressed cache: at ratio 0 it is lm-eval's ``hf``, above it scores do
change."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm

from .. import __version__, _core
from ..eviction.budget import check_budget
from ..eviction.fairness import Fair
from ..eviction.layout import read_once
from ..hf.arguments import cache_argument
from ..hf.cache import KeptCache
from ..hf.evict import Evict
from ..hf.fork import compress_each
from ..hf.generate import batches, logits_after
from ..hf.given_prompts import pad_left, pad_token
from ..hf.load import transformers_name
from ..hf.model import attach
from ..policies import get_policy
from ..prompts.chats import at_time
from ..prompts.prompt import Prompt
from .chat import kept_of
from .contexts import Marks

_HFLM: Any = HFLM  # its decorator hides from type checkers what class it is


class CompressedHFLM(_HFLM):
    """The lm-eval model type ``kvpitfalls``.

    Parameters
    ----------
    pretrained : str or transformers model, optional
        As lm-eval's ``hf`` takes it, or a ``.gguf`` file; SmolLM2-135M-Instruct by default.
    policy : str or Policy
    compression_ratio, budget : float or int
        Exactly one. At ratio 0 nothing is intercepted: this is lm-eval's ``hf``.
    fair : bool, float, "paper", "floor", "floor=M" or Fair
    protect : str, int, or list of them, optional
        As :func:`kvpitfalls.wrap` takes them.
    compress : {"prompt", "system"}
        The whole context, or its system message only.
    instructions : str
        What an instruction is, for ``fair`` and ``protect``: "sentences", "lines" or "messages" of what is compressed,
        or the path of a JSON file, name -> text.
    **kwargs
        As lm-eval's ``hf`` takes them.

    Raises
    ------
    ValueError, UnsupportedModelError
        At once for what cannot be compressed; for a request when it comes.

    Notes
    -----
    Generation with ``compress="prompt"`` is that of a wrapped ``model.generate``: the first token is predicted before
    the eviction. With "system" it is that of ``kvpitfalls ifeval``. A likelihood is that of the continuation after the
    compressed context: of a whole context the last token stays, since it predicts the continuation's first token, or
    one-token answers would score as without compression.
    """

    def __init__(
        self,
        pretrained=None,
        *,
        policy,
        compression_ratio=None,
        budget=None,
        fair=False,
        protect=None,
        compress="prompt",
        instructions="sentences",
        **kwargs,
    ):
        check_budget(compression_ratio, budget)
        fair = Fair.parse(fair)
        self.action = Evict(get_policy(policy), fair, compression_ratio, budget)
        self.marks = Marks(compress, str(instructions), fair, read_once(protect))
        self.totals = {"prompts": 0, "prompts_within_budget": 0, "tokens": 0, "kept_tokens": 0}
        self.chats: dict[str, list[dict]] = {}
        self.texts: list[str] = []
        self.has_template, self.made = False, datetime.now()
        if self.action.evicts:
            _refuse(kwargs)
        super().__init__(
            transformers_name(pretrained) if pretrained is None or isinstance(pretrained, str) else pretrained, **kwargs
        )
        if self.action.evicts:
            if getattr(self.tokenizer, "chat_template", None):  # of one time: contexts are rendered again, much later
                self.chat_template_args = at_time(self.tokenizer, self.chat_template_args, self.made)
            attach(self.model, self)

    # What lm-eval says about its contexts, kept for when they come.

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """As lm-eval's; remembers whose text it is."""
        text = super().apply_chat_template(chat_history, add_generation_prompt)
        self.chats[text] = [dict(message) for message in chat_history]
        return text

    def chat_template(self, chat_template=False):
        """As lm-eval's."""
        self.has_template = bool(chat_template)
        return super().chat_template(chat_template)

    def set_cache_hook(self, cache_hook) -> None:
        """Refused with ``--use_cache``: lm-eval looks answers up by their request alone, so that another setting's
        would be given."""
        if self.action.evicts and cache_hook.dbdict is not None:
            raise ValueError(
                "use_cache is on, which finds answers by the request, whatever the compression; expected it off"
            )
        super().set_cache_hook(cache_hook)

    def prompt_of(self, text: str, ids: Sequence[int], n_token: int | None = None) -> Prompt:
        """What is compressed of a context."""
        messages = self.chats.get(text)
        if messages is None and self.has_template:
            raise ValueError(f"a context was not rendered in this run; expected --cache_requests off: {text[:60]!r}")
        return self.marks.prompt(
            self.tokenizer, text if n_token is None else text.rstrip(), ids, messages, n_token, made=self.made
        )

    # Generation.

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        """As lm-eval's; a context that is too long is refused, since what would be cut off is the instructions."""
        if not self.action.evicts:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        self.texts = list(strings)
        ids, mask = super().tok_batch_encode(strings, padding_side)
        if left_truncate_len and ids.shape[1] > left_truncate_len:
            raise ValueError(
                f"a context has {ids.shape[1]} tokens; expected at most {left_truncate_len}, the model's length "
                "without max_gen_toks: "
                "cutting its beginning off would remove instructions"
            )
        return ids, mask

    def _model_generate(self, context, max_length, stop, **kwargs):
        if not self.action.evicts:
            return super()._model_generate(context, max_length, stop, **kwargs)
        mask = kwargs.pop("attention_mask")
        rows = [ids[real.bool()].tolist() for ids, real in zip(context, mask, strict=True)]
        prompts = [self.prompt_of(text, ids) for text, ids in zip(self.texts, rows, strict=True)]
        if self.marks.scope == "system":
            return self._generate_after(prompts, rows, context, max_length, stop, **kwargs)
        batch = pad_left(prompts, self._setting())
        cache = KeptCache(self.model.config, self.action.of_prompts(layout=batch.layout))
        of_cache = cache_argument(self.model, cache)
        out = super()._model_generate(context, max_length, stop, attention_mask=mask, **of_cache, **kwargs)
        self._count(cache)
        return out

    def _generate_after(self, prompts, rows, context, max_length, stop, **kwargs):
        """What follows the contexts, of whose system messages caches are made."""
        cache = compress_each(self.model, prompts, [self._setting()])[0]
        self._count(cache)
        n_new = max_length - context.shape[1]
        new = context.new_full((len(rows), n_new), pad_token(self.tokenizer))
        for batch in batches(prompts, rows, cache, n_new):
            tokens, mask = (x.to(self.device) for x in (batch.tokens, batch.mask))
            width, of_cache = tokens.shape[1], cache_argument(self.model, batch.cache)
            out = super()._model_generate(tokens, width + n_new, stop, attention_mask=mask, **of_cache, **kwargs)
            new[list(batch.rows), : out.shape[1] - width] = out[:, width:]
        return torch.cat([context, new], 1)  # lm-eval takes what follows the context it gave

    def generate_until(self, requests, disable_tqdm: bool = False):
        """As lm-eval's."""
        out = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._check_totals()
        return out

    # Likelihoods.

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs=None):
        if not self.action.evicts:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        groups = defaultdict(list)
        for i, ((text, _), ids, _) in enumerate(requests):
            groups[text, tuple(ids)].append(i)
        out: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for (text, ids), members in groups.items():
            prompt = self.prompt_of(text, ids, _all_but_one(text, ids) if self.marks.scope == "prompt" else len(ids))
            cache = compress_each(self.model, [prompt], [self._setting()])[0]
            self._count(cache)
            for at in range(0, len(members), int(self.batch_size)):
                chunk = members[at : at + int(self.batch_size)]
                answers = [requests[i][2] for i in chunk]
                for i, scored in zip(chunk, self._score(copy.deepcopy(cache), prompt, list(ids), answers), strict=True):
                    out[i] = scored
                bar.update(len(chunk))
        bar.close()
        self._check_totals()
        return out

    @torch.no_grad()
    def _score(
        self, cache: KeptCache, prompt: Prompt, ids: list[int], answers: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        """Log-probability of each answer after a context whose beginning, ``prompt``, is in the cache; and whether it
        is the greedy one."""
        if len(ids) + max(map(len, answers)) > self.max_length + 1:
            raise ValueError(
                f"context and continuation have more than {self.max_length} tokens; expected them to fit the model"
            )
        cache.batch_repeat_interleave(len(answers))
        conversations = [(ids + answer)[:-1] for answer in answers]
        rows = logits_after(self.model, [prompt] * len(answers), conversations, cache, max(map(len, answers)))
        out = []
        for row, answer in zip(rows, answers, strict=True):
            logprobs = row[-len(answer) :].log_softmax(-1, dtype=self.softmax_dtype)
            wanted = torch.tensor(answer, device=logprobs.device)
            out.append((float(logprobs.gather(-1, wanted[:, None]).sum()), bool((logprobs.argmax(-1) == wanted).all())))
        return out

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        """Refused above ratio 0: a text that is scored from its first token on has no context to compress."""
        if self.action.evicts:
            raise ValueError(
                "loglikelihood_rolling scores a text without any context; expected tasks that have one, or "
                "compression_ratio=0"
            )
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _model_call(self, inps, attn_mask=None, labels=None):
        if self.action.evicts:
            raise ValueError(
                "lm-eval asks for logits of whole texts, which are not compressed; expected a task of another output "
                "type"
            )
        return super()._model_call(inps, attn_mask, labels)

    # What was really compressed.

    def _setting(self) -> Evict:
        return replace(self.action, protect=self.marks.protect)

    def _count(self, cache: KeptCache) -> None:
        """Add up what a cache kept; raises if that is more than its budget."""
        report = cache.report()
        for row, (begin, end) in enumerate(cache.valid or ()):
            kept = kept_of(report, row)
            self.totals["prompts"] += 1
            self.totals["prompts_within_budget"] += kept == end - begin
            self.totals["tokens"] += end - begin
            self.totals["kept_tokens"] += kept

    def _check_totals(self) -> None:
        if self.action.evicts and self.totals["kept_tokens"] == self.totals["tokens"]:
            raise RuntimeError(
                f"none of {self.totals['prompts']} prompts was compressed: each has at most {self.action.budget} "
                "tokens, the budget; "
                "expected a smaller budget, or compression_ratio"
            )

    def get_model_info(self) -> dict:
        """As lm-eval's; and how the cache was compressed, counted, which lm-eval writes into its results."""
        a, marks = self.action, self.marks
        amount = {"compression_ratio": a.compression_ratio} if a.budget is None else {"budget": a.budget}
        about = {
            "version": __version__,
            "core_isa": _core.isa(),
            "policy": repr(a.policy),
            "fair": a.fair.label,
            **amount,
        }
        about |= {"protect": marks.protect, "compress": marks.scope, "instructions": marks.instructions, **self.totals}
        return {**super().get_model_info(), "kvpitfalls": about}


def _refuse(kwargs: dict) -> None:
    """Raise for options of lm-eval's ``hf`` under which a request would not be compressed as it is asked for."""
    for name, why in {
        "truncation": "cut contexts lose instructions",
        "mixed_precision_dtype": "prompts are compressed in the model's own",
    }.items():
        if kwargs.get(name):
            raise ValueError(f"{name} is {kwargs[name]!r}; expected it unset: {why}")
    if str(kwargs.get("batch_size", 1)).startswith("auto"):
        raise ValueError(
            f"batch_size is {kwargs['batch_size']!r}; expected a number: a trial run would not be compressed as "
            "requests are"
        )


def _all_but_one(text: str, ids: Sequence[int]) -> int:
    if len(ids) < 3:
        raise ValueError(
            f"a context has {len(ids)} tokens ({text[:60]!r}); expected at least 3: there is nothing to compress"
        )
    return len(ids) - 1
