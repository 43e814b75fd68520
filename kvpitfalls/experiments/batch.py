"""One batch of a sweep: prompts are compressed, conversations generated, answers scored. What fails becomes a record
with its error."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tqdm.auto import tqdm

from ..errors import BudgetError
from ..eviction.budget import kept_tokens
from ..hf.cache import KeptCache, mean_kept_share, n_compressed
from ..hf.generate import Answer, answers
from ..hf.given_prompts import protected_in
from ..hf.model import attach, detach
from ..hf.wrap import compress_each
from ..prompts.prompt import Prompt
from .config import SweepConfig
from .corpus import Corpus
from .plan import ALONE, FULL, Batch, Setting
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
    attach(model)
    try:
        work.run()
    finally:
        detach(model)
    items = batch.items(corpus)
    seconds = (time.perf_counter() - start) / len(items)
    return [
        {**item, **work.record(*where), "seconds": round(seconds, 4)}
        for item, where in zip(items, work.places(), strict=True)
    ]


class _Work:
    """What is known of a batch so far, by (setting, row) and by (setting, row, request)."""

    def __init__(self, model, tokenizer, corpus: Corpus, config: SweepConfig, batch: Batch):
        self.model, self.tokenizer, self.corpus, self.config, self.batch = model, tokenizer, corpus, config, batch
        self.requests = dict(zip(batch.rows, batch.requests, strict=True))
        self.probes, self.talks = (batch.requests[0][0][0] == kind for kind in ALONE)
        is_attacked = any(attack for of_row in batch.requests for _, attack in of_row)
        self.attacks = config.chosen_attacks(corpus) if is_attacked else {}
        self.scenarios = {row: Scenario.of(corpus, corpus.rows[row], batch.defense, batch.order) for row in batch.rows}
        self.prompts: dict[int, Prompt] = {}
        self.conversations: dict[int, list[list[int]]] = {}
        self.errors: dict[tuple, Exception] = {}
        self.infeasible: dict[tuple, BudgetError] = {}
        self.answers: dict[tuple, Answer] = {}
        self.likelihoods: dict[tuple, dict[str, float]] = {}
        self.conversed: dict[int, Conversation] = {}
        self.turns: dict[tuple, dict[str, list[dict]]] = {}
        self.kept: dict[tuple, dict] = {}

    def places(self):
        return [
            (s, row, request) for s in self.batch.settings for row in self.batch.rows for request in self.requests[row]
        ]

    def run(self) -> None:
        for row in self.batch.rows:
            try:
                self.prepare(row)
            except Exception as error:
                self.errors.update({(setting, row): error for setting in self.batch.settings})
        # Settings that lose the same rows go on together; usually none loses any, and there is one group.
        groups: dict[tuple, list[Setting]] = {}
        for setting in self.batch.settings:
            good = tuple(row for row in self.batch.rows if self.fits(setting, row))
            if good:
                groups.setdefault(good, []).append(setting)
        for rows, settings in groups.items():
            try:
                self.generate(settings, rows)
            except (
                Exception
            ) as error:  # whatever it is: said here, and each prompt that fails alone has a record with its error
                n_item = len(settings) * len(rows)
                tqdm.write(
                    f"a batch of {n_item} failed ({type(error).__name__}: {error}); its prompts are run one by one",
                    file=sys.stderr,
                )
                self.one_by_one(settings, rows)

    def one_by_one(self, settings: Sequence[Setting], rows: Sequence[int]) -> None:
        """After a failure: each prompt alone, so that only those that fail by themselves are lost."""
        for setting in settings:
            for row in rows:
                try:
                    self.generate([setting], [row])
                except Exception as error:
                    self.errors[setting, row] = error

    def prepare(self, row: int) -> None:
        scenario = self.scenarios[row]
        prompt = scenario.prompt(self.tokenizer)
        kinds = [("follow", None)] if self.probes else self.requests[row]
        asked = [scenario.ask(kind, self.attacks.get(attack or "")) for kind, attack in kinds]
        self.conversations[row] = [conversation(prompt, *one) for one in asked]
        self.prompts[row] = prompt
        if self.talks:
            full, limit = Setting(None, FULL, 0.0).evict(None), self.batch.max_new_tokens
            self.conversed[row] = converse(self.model, self.tokenizer, scenario, full, limit)

    def fits(self, setting: Setting, row: int) -> bool:
        """Whether this prompt can be compressed so. Where what is protected does not fit it cannot, and that is no
        error."""
        if (setting, row) in self.errors:
            return False
        prompt = self.prompts[row]
        try:
            evict = setting.evict(self.scenarios[row].whitelist)
            protect = None if evict.protect is None else protected_in(prompt, evict.protect, evict.n_sink, evict.limit)
            spans = {s.name: (s.start, s.end) for s in prompt.spans.values()}
            replace(evict, protect=protect, spans=spans).spans_of(
                len(prompt), [(0, len(prompt))], n_compressed(self.model.config)
            )
        except BudgetError as reason:
            self.infeasible[setting, row] = reason
            return False
        except ValueError as error:
            self.errors[setting, row] = error
            return False
        return True

    def compress(self, settings: Sequence[Setting], rows: Sequence[int]) -> tuple[KeptCache, list[dict]]:
        """One cache of all rows under all settings, and what it kept of each."""
        whitelist = self.corpus.defenses[self.batch.defense].whitelist
        prompts = [self.prompts[row] for row in rows]
        cache = KeptCache.join(compress_each(self.model, prompts, [s.evict(whitelist) for s in settings]))
        positions = [cache.positions(layer.index) for layer in cache.kept_layers]  # once: each table waits for the GPU
        made = ((setting, row) for setting in settings for row in rows)
        return cache, [self.kept_of(cache, positions, i, *each) for i, each in enumerate(made)]

    def generate(self, settings: Sequence[Setting], rows: Sequence[int]) -> None:
        if self.probes:
            return self.force(settings, rows)
        if self.talks:
            return self.talk(settings, rows)
        cache, kept = self.compress(settings, rows)
        pairs, n_request = [(setting, row) for setting in settings for row in rows], len(self.batch.requests[0])
        cache.batch_repeat_interleave(n_request)
        contexts = [self.prompts[row] for _, row in pairs for _ in range(n_request)]
        conversations = [ids for _, row in pairs for ids in self.conversations[row]]
        replies = answers(self.model, contexts, conversations, cache, self.batch.max_new_tokens)
        for i, pair in enumerate(pairs):
            self.kept[pair] = kept[i]
            for j, request in enumerate(self.requests[pair[1]]):
                self.answers[*pair, request] = replies[i * n_request + j]

    def force(self, settings: Sequence[Setting], rows: Sequence[int]) -> None:
        """What :meth:`generate` is for answers: the likelihood of given ones."""
        full, _ = self.compress([Setting(None, FULL, 0.0)], rows)
        tasks = [self.conversations[row][0] for row in rows]
        followed = answers(self.model, [self.prompts[row] for row in rows], tasks, full, self.batch.max_new_tokens)
        of_rows = [self.to_force(row, answer.text) for row, answer in zip(rows, followed, strict=True)]
        cache, kept = self.compress(settings, rows)
        cache.batch_repeat_interleave(len(of_rows[0]))
        contexts = [self.prompts[row] for row in rows for _ in of_rows[0]] * len(settings)
        asked = [ids for of_row in of_rows for *_, ids, _ in of_row] * len(settings)
        forced = [ids for of_row in of_rows for *_, ids in of_row] * len(settings)
        means = iter(answer_logprobs(self.model, contexts, asked, forced, cache))
        for i, setting in enumerate(settings):
            for j, row in enumerate(rows):
                self.kept[setting, row] = kept[i * len(rows) + j]
                for request, name, *_ in of_rows[j]:
                    self.answers[setting, row, request] = followed[j]
                    self.likelihoods.setdefault((setting, row, request), {})[name] = next(means)

    def talk(self, settings: Sequence[Setting], rows: Sequence[int]) -> None:
        """What :meth:`generate` is for answers: conversations, and what they leave after each turn."""
        limit = self.batch.max_new_tokens
        for row in rows:
            (request,) = self.requests[row]
            said = self.attacks[request[1] or ""]
            talk, scenario = self.conversed[row], self.scenarios[row]
            evicts, n_token = [setting.evict(scenario.whitelist) for setting in settings], len(talk.prompts[-1])
            turns = ask_turns(self.model, talk, scenario, said, evicts, limit, self.config.seed)
            for setting, evict, of_setting in zip(settings, evicts, turns, strict=True):
                self.turns[setting, row] = of_setting
                self.answers[setting, row, request] = talk.together
                self.kept[setting, row] = {"n_tokens": n_token, "n_kept": evict.limit(n_token), "kept": None}

    def to_force(self, row: int, full_answer: str) -> list[tuple]:
        """Request, name, token ids before, and token ids of each given answer of a row."""
        tokenizer, prompt, out = self.tokenizer, self.prompts[row], []
        for request in self.requests[row]:
            for name, (said, begun, text) in (
                self.scenarios[row].given_answers(self.attacks.get(request[1] or ""), full_answer).items()
            ):
                if not (ids := answer_ids(tokenizer, text)):
                    raise ValueError(
                        f"the answer to force for {name!r} is empty, and no token ends it; expected at least one token"
                    )
                out.append((request, name, conversation(prompt, said, begun), ids))
        return out

    def kept_of(self, cache: KeptCache, positions: Sequence[np.ndarray], i: int, setting: Setting, row: int) -> dict:
        """Tokens, kept tokens, and kept share of each instruction and of the whitelisted phrase, in row i of the cache,
        which holds the prompt of row ``row`` under ``setting``.

        ``positions``: of each compressed layer, what :meth:`KeptCache.positions` gives.
        """
        prompt, whitelist = self.prompts[row], self.scenarios[row].whitelist
        spans = dict(cache.spans[i])
        start = cache.n_prompt - len(prompt)  # prompts are padded on their left
        if whitelist is not None:
            begin, end = prompt.find(whitelist)
            spans["whitelist"] = (start + begin, start + end)
        # allocations may give layers and heads different numbers, of the same sum
        n_kept = kept_tokens(len(prompt), setting.compression_ratio)
        counts = np.concatenate([(kept[i] >= start).sum(-1).ravel() for kept in positions])
        if counts.sum() != n_kept * len(counts):
            raise RuntimeError(f"layers and heads keep {counts.mean()} tokens in the mean; expected {n_kept}")
        return {
            "n_tokens": len(prompt),
            "n_kept": n_kept,
            "kept": {name: mean_kept_share([kept[i] for kept in positions], *span) for name, span in spans.items()},
        }

    def record(self, setting: Setting, row: int, request: tuple[str, str | None]) -> dict:
        kind = request[0]
        scenario, error, reason = (
            self.scenarios[row],
            self.errors.get((setting, row)),
            self.infeasible.get((setting, row)),
        )
        answer = self.answers.get((setting, row, request)) if error is None else None
        scores = None
        if answer is not None:
            try:
                if self.talks:
                    scores = self.turns[setting, row]
                elif self.probes:
                    scores = {"probe": _finite(self.likelihoods[setting, row, request])}
                else:
                    scores = scenario.score(kind, answer.text, self.config.seed)
            except Exception as failure:
                error = failure
        known = self.kept.get((setting, row), {"n_tokens": None, "n_kept": None, "kept": None})
        return {
            "inputs_sha256": self.inputs(scenario, request),
            "seed": self.config.seed,
            **known,
            "output": None if answer is None else answer.text,
            "n_new": None if answer is None else answer.n_token,
            "ended": None if answer is None else answer.ended,
            "scores": scores,
            "error": None if error is None else f"{type(error).__name__}: {error}",
            "infeasible": None if reason is None else str(reason),
        }

    def inputs(self, scenario: Scenario, request: tuple[str, str | None]) -> str | None:
        """The hash of what goes in; None where the inputs themselves cannot be made, which is then the record's
        error."""
        try:
            return scenario.inputs_sha256(request[0], self.attacks.get(request[1] or ""))
        except ValueError:
            return None


def _finite(likelihoods: dict[str, float]) -> dict[str, float]:
    """The same; raises where one is no number, as after an overflow in half precision."""
    for name, value in likelihoods.items():
        if not math.isfinite(value):
            raise ValueError(f"the log-probability of {name!r} is {value}; expected a finite number, try dtype float32")
    return likelihoods
