"""One batch of a sweep: prompts are compressed, conversations generated, answers scored. What fails becomes a record
with its error."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import cast

import numpy as np
from tqdm.auto import tqdm

from ..errors import BudgetError
from ..eviction.budget import kept_tokens
from ..hf.cache import KeptCache, mean_kept_shares, n_compressed
from ..hf.evict import Evict
from ..hf.fork import compress_each
from ..hf.generate import Answer, answers
from ..hf.given_prompts import check_fits
from ..hf.model import attached
from ..prompts.prompt import Prompt
from .config import SweepConfig
from .corpus import Corpus
from .metrics import MOST
from .plan import ALONE, FULL, Batch, Request, Requests, Setting
from .probe import answer_ids, answer_logprobs
from .scenario import Scenario, conversation
from .turns import Conversation, ask_turns, converse


def run_batch(model, tokenizer, corpus: Corpus, config: SweepConfig, batch: Batch) -> list[dict]:
    """The records of a batch, in the order of ``batch.items(corpus)``.

    Parameters
    ----------
    model, tokenizer
        As :func:`kvpitfalls.hf.load.load` gives them.
    corpus : Corpus
    config : SweepConfig
    batch : Batch

    Returns
    -------
    list of dict
        What identifies the item, then ``inputs_sha256``, ``seed``, ``n_tokens``, ``n_kept``, ``kept`` (share of each
        instruction and of the whitelisted phrase, mean over layers and heads), ``output``, ``n_new``, ``ended``,
        ``scores``, ``error``, ``infeasible``, ``seconds`` (the batch's, shared out). After an error (type and message),
        and where the setting cannot exist for the prompt (its reason), output and scores are None. A probe's output is
        the full cache's answer to the task, which is forced; a conversation's, the full cache's answers.
    """
    start = time.perf_counter()
    work = _Work(model, tokenizer, corpus, config, batch)
    with attached(model):
        work.run()
    records = [work.record(item, request) for item in work.items for request in item.row.requests]
    seconds = (time.perf_counter() - start) / len(records)
    return [
        {**names, **record, "seconds": round(seconds, 4)}
        for names, record in zip(batch.items(corpus), records, strict=True)
    ]


# What a model says of a prompt that it cannot read or hold. Anything else, such as a name that is not there, is a fault
# of a program: it ends the sweep, which goes on from its records once that is mended.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, MemoryError, OSError)


@dataclass(eq=False)
class _Row:
    """A prompt of the batch, and what it is asked. The last three are known once it is prepared."""

    scenario: Scenario
    requests: Requests
    prompt: Prompt = field(init=False)
    conversations: list[list[int]] = field(init=False)  # ids, request by request; of probes, those of the task alone
    talk: Conversation | None = field(init=False)  # the one with the full cache, if conversations are compressed


@dataclass(eq=False)
class _Item:
    """A prompt under a setting, and what came of it."""

    setting: Setting
    row: _Row
    error: Exception | None = None
    infeasible: BudgetError | None = None
    kept: dict = field(default_factory=lambda: {"n_tokens": None, "n_kept": None, "kept": None})
    answers: dict[Request, Answer] = field(default_factory=dict)
    scores: dict[Request, dict] = field(default_factory=dict)  # likelihoods, or turns: what no answer's text tells

    @property
    def evict(self) -> Evict:
        """How the prompt is compressed."""
        return self.setting.evict(self.row.scenario.whitelist)

    @property
    def is_feasible(self) -> bool:
        """Whether nothing has failed so far."""
        return self.error is None and self.infeasible is None


class _Work:
    """A batch, and what is known of its items so far: settings, then rows."""

    def __init__(self, model, tokenizer, corpus: Corpus, config: SweepConfig, batch: Batch):
        self.model, self.tokenizer, self.config, self.limit = model, tokenizer, config, batch.max_new_tokens
        self.probes, self.talks = (batch.requests[0][0][0] == kind for kind in ALONE)
        is_attacked = any(attack for of_row in batch.requests for _, attack in of_row)
        self.attacks = config.chosen_attacks(corpus) if is_attacked else {}
        self.rows = [
            _Row(Scenario.of(corpus, corpus.rows[row], batch.defense, batch.order), requests)
            for row, requests in zip(batch.rows, batch.requests, strict=True)
        ]
        self.items = [_Item(setting, row) for setting in batch.settings for row in self.rows]

    def run(self) -> None:
        for row in self.rows:
            try:
                self.prepare(row)
            except Exception as error:
                for item in self.items:
                    item.error = error if item.row is row else item.error
        for item in self.items:
            if item.error is None:
                _check_room(item, self.model)
        # Settings that lose the same rows go on together; usually none loses any, and there is one group.
        groups: dict[tuple[_Row, ...], list[_Item]] = {}
        for _, of_setting in groupby(self.items, key=lambda item: item.setting):
            feasible = [item for item in of_setting if item.is_feasible]
            if feasible:
                groups.setdefault(tuple(item.row for item in feasible), []).extend(feasible)
        for items in groups.values():
            try:
                self.generate(items)
            except FAILURES as error:  # said here, and each item that fails alone has a record with its error
                tqdm.write(
                    f"a batch of {len(items)} failed ({type(error).__name__}: {error}); its prompts are run one by one",
                    file=sys.stderr,
                )
                self.one_by_one(items)

    def one_by_one(self, items: Sequence[_Item]) -> None:
        """After a failure: each prompt alone, so that only those that fail by themselves are lost."""
        for item in items:
            try:
                self.generate([item])
            except FAILURES as error:  # its record holds the error and no answer, and every table counts it as failed
                item.error = error

    def prepare(self, row: _Row) -> None:
        prompt = row.scenario.prompt(self.tokenizer)
        kinds = [("follow", None)] if self.probes else row.requests
        asked = [row.scenario.ask(kind, self.attacks.get(attack or "")) for kind, attack in kinds]
        row.prompt, row.conversations = prompt, [conversation(prompt, *one) for one in asked]
        full = Setting(None, FULL, 0.0).evict(None)
        row.talk = converse(self.model, self.tokenizer, row.scenario, full, self.limit) if self.talks else None

    def compress(self, items: Sequence[_Item]) -> tuple[KeptCache, list[dict]]:
        """One cache of all items, and what it kept of each."""
        rows, evicts = _axes(items)
        cache = KeptCache.join(compress_each(self.model, [row.prompt for row in rows], evicts))
        positions = [cache.positions(layer.index) for layer in cache.kept_layers]  # once: each table waits for the GPU
        return cache, [_kept_of(item, cache, positions, i) for i, item in enumerate(items)]

    def generate(self, items: Sequence[_Item]) -> None:
        """Answers, of rows that all have the same settings; of probes and conversations, what takes their place."""
        if self.probes:
            return self.force(items)
        if self.talks:
            return self.talk(items)
        cache, kept = self.compress(items)
        n_request = len(items[0].row.requests)
        cache.batch_repeat_interleave(n_request)
        contexts = [item.row.prompt for item in items for _ in range(n_request)]
        conversations = [ids for item in items for ids in item.row.conversations]
        replies = iter(answers(self.model, contexts, conversations, cache, self.limit))
        for item, of_item in zip(items, kept, strict=True):
            item.kept, item.answers = of_item, {request: next(replies) for request in item.row.requests}

    def force(self, items: Sequence[_Item]) -> None:
        """What :meth:`generate` is for answers: the likelihood of given ones."""
        rows, _ = _axes(items)
        prompts, tasks = [row.prompt for row in rows], [row.conversations[0] for row in rows]
        full, _ = self.compress([_Item(Setting(None, FULL, 0.0), row) for row in rows])
        followed = dict(zip(rows, answers(self.model, prompts, tasks, full, self.limit), strict=True))
        of_rows = {row: self.to_force(row, answer.text) for row, answer in followed.items()}
        cache, kept = self.compress(items)
        cache.batch_repeat_interleave(len(of_rows[rows[0]]))
        every = [(item, *of_answer) for item in items for of_answer in of_rows[item.row]]
        contexts, asked, forced = zip(*((item.row.prompt, asked, ids) for item, _, _, asked, ids in every), strict=True)
        means = answer_logprobs(self.model, contexts, asked, forced, cache)
        for item, of_item in zip(items, kept, strict=True):
            item.kept, item.answers, item.scores = of_item, dict.fromkeys(item.row.requests, followed[item.row]), {}
        for (item, request, name, *_), mean in zip(every, means, strict=True):
            item.scores.setdefault(request, {})[name] = mean

    def talk(self, items: Sequence[_Item]) -> None:
        """What :meth:`generate` is for answers: conversations, and what they leave after each turn."""
        for row in _axes(items)[0]:
            (request,), whole = row.requests, cast(Conversation, row.talk)
            of_row = [item for item in items if item.row is row]
            evicts, said = [item.evict for item in of_row], self.attacks[request[1] or ""]
            turns = ask_turns(self.model, whole, row.scenario, said, evicts, self.limit, self.config.seed)
            n_token = len(whole.prompts[-1])
            for item, evict, of_item in zip(of_row, evicts, turns, strict=True):
                item.answers, item.scores = {request: whole.together}, {request: of_item}
                item.kept = {"n_tokens": n_token, "n_kept": evict.limit(n_token), "kept": None}

    def to_force(self, row: _Row, full_answer: str) -> list[tuple[Request, str, list[int], list[int]]]:
        """Request, name, token ids before, and token ids of each given answer of a row."""
        out = []
        for request in row.requests:
            of_request = row.scenario.given_answers(self.attacks.get(request[1] or ""), full_answer)
            for name, (said, begun, text) in of_request.items():
                if not (ids := answer_ids(self.tokenizer, text)):
                    raise ValueError(
                        f"the answer to force for {name!r} is empty, and no token ends it; expected at least one token"
                    )
                out.append((request, name, conversation(row.prompt, said, begun), ids))
        return out

    def record(self, item: _Item, request: Request) -> dict:
        error, answer, scores = item.error, None, None
        if error is None and (answer := item.answers.get(request)) is not None:
            try:
                scores = self.scores(item, request, answer)
            except Exception as failure:
                error = failure
        return {
            "inputs_sha256": self.inputs(item.row.scenario, request),
            "seed": self.config.seed,
            **item.kept,
            "output": None if answer is None else answer.text,
            "n_new": None if answer is None else answer.n_token,
            "ended": None if answer is None else answer.ended,
            "scores": scores,
            "error": None if error is None else f"{type(error).__name__}: {error}",
            "infeasible": None if item.infeasible is None else str(item.infeasible),
        }

    def scores(self, item: _Item, request: Request, answer: Answer) -> dict:
        """Of an answer, by its text or by what was measured."""
        if self.talks:
            return item.scores[request]
        if self.probes:
            return {"probe": _finite(item.scores[request])}
        return item.row.scenario.score(request[0], answer.text, self.config.seed)

    def inputs(self, scenario: Scenario, request: Request) -> str | None:
        """The hash of what goes in; None where the inputs themselves cannot be made, which is then the record's
        error."""
        try:
            return scenario.inputs_sha256(request[0], self.attacks.get(request[1] or ""))
        except ValueError:
            return None


def _axes(items: Sequence[_Item]) -> tuple[list[_Row], list[Evict]]:
    """The rows of items, and how each of their settings compresses."""
    rows = list(dict.fromkeys(item.row for item in items))
    return rows, [item.evict for item in items if item.row is rows[0]]


def _check_room(item: _Item, model) -> None:
    """Note why a prompt cannot be compressed so. Where what is protected does not fit it cannot, and that is no
    error."""
    try:
        check_fits(item.row.prompt, item.evict, n_compressed(model.config))
    except BudgetError as reason:
        item.infeasible = reason
    except ValueError as error:
        item.error = error


def _kept_of(item: _Item, cache: KeptCache, positions: Sequence[np.ndarray], i: int) -> dict:
    """Tokens, kept tokens, and kept share of each instruction and of the whitelisted phrase, in row i of the cache,
    which holds the item's prompt.

    ``positions``: of each compressed layer, what :meth:`KeptCache.positions` gives.
    """
    prompt, whitelist = item.row.prompt, item.row.scenario.whitelist
    spans = dict(cache.spans[i])
    start = cache.n_prompt - len(prompt)  # prompts are padded on their left
    if whitelist is not None:
        begin, end = prompt.find(whitelist)
        spans["whitelist"] = (start + begin, start + end)
    # allocations may give layers and heads different numbers, of the same sum
    n_kept = kept_tokens(len(prompt), item.setting.compression_ratio)
    means = [float((kept[i] >= start).sum(-1).mean()) for kept in positions]  # layers may differ in heads, too
    if not math.isclose(sum(means), n_kept * len(means)):
        raise RuntimeError(f"layers and heads keep {np.mean(means)} tokens in the mean; expected {n_kept}")
    return {
        "n_tokens": len(prompt),
        "n_kept": n_kept,
        "kept": mean_kept_shares([kept[i] for kept in positions], spans),
    }


def _finite(likelihoods: dict[str, float]) -> dict[str, float]:
    """These likelihoods; raises where one is no finite number, as after an overflow in half precision, or none that a
    report takes."""
    for name, value in likelihoods.items():
        if not abs(value) < MOST:
            raise ValueError(
                f"the log-probability of {name!r} is {value}; expected a finite number, at least {-MOST:g}, try dtype "
                "float32"
            )
    return likelihoods
