"""The batches of a sweep, in order. The plan depends on config and corpus only, so a resumed sweep has the same one."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from ..hf.evict import Evict
from ..policies import get_policy
from ..policies.random import Random
from .config import SweepConfig
from .corpus import Corpus
from .modes import Mode
from .scenario import WAYS

ALONE = ("probe", "turns")  # kinds that share no batch with others
Request: TypeAlias = tuple[str, str | None]  # kind, and the name of the attack
Requests: TypeAlias = tuple[Request, ...]
FULL = "full"  # the mode of ratio 0, where no policy plays a part


@dataclass(frozen=True)
class Setting:
    """How a cache is compressed. ``policy`` is None at ratio 0."""

    policy: str | None
    mode: str
    compression_ratio: float

    def evict(self, whitelist: str | None) -> Evict:
        """The action; ``whitelist`` is the phrase that mode "whitelist" protects."""
        mode = Mode.parse("biased" if self.mode == FULL else self.mode)
        policy = Random(mode.seed) if mode.is_control else get_policy(self.policy or "streaming_llm")
        return Evict(policy, mode.fair, self.compression_ratio, None, mode.protect(whitelist))


@dataclass(frozen=True)
class Batch:
    """What is generated together: every row under every setting, asked each of its requests. All settings have one
    ratio, but those of a conversation, which is had once.

    Attributes
    ----------
    model, defense, order : str
    rows : tuple of int
        Indices into the corpus.
    settings : tuple of Setting
    requests : tuple of tuple of (str, str or None)
        Of each row, kind and the name of the attack. All rows have the same kinds.
    max_new_tokens : int
    """

    model: str
    defense: str
    order: str
    rows: tuple[int, ...]
    settings: tuple[Setting, ...]
    requests: tuple[Requests, ...]
    max_new_tokens: int

    def items(self, corpus: Corpus) -> list[dict]:
        """What identifies each record, in order: settings, then rows, then requests."""
        return [
            {
                "model": self.model,
                "dataset": corpus.name,
                "defense": self.defense,
                "order": self.order,
                "policy": setting.policy,
                "mode": setting.mode,
                "compression_ratio": setting.compression_ratio,
                "key": corpus.rows[row]["key"],
                "kind": kind,
                "attack": attack,
            }
            for setting in self.settings
            for row, requests in zip(self.rows, self.requests, strict=True)
            for kind, attack in requests
        ]


def settings_of(config: SweepConfig) -> list[Setting]:
    """All ways to compress, by rising ratio."""
    out = []
    for ratio in config.compression_ratios:
        if ratio == 0:
            out.append(Setting(None, FULL, 0.0))
        else:
            out += [Setting(policy, mode, ratio) for policy in config.policies for mode in config.modes]
    return out


def plan(config: SweepConfig, corpus: Corpus) -> Iterator[Batch]:
    """The batches, in the order in which they are run and recorded.

    A step of generating costs much for its first row and little for each further one, and a prefill serves all
    settings: rows that meet different attacks share batches, and all settings of a few rows come before more rows.
    """
    config.check_corpus(corpus)
    for model in config.models:
        for defense, order in _prompts(config):
            asked = _requests_of_rows(config, corpus)
            for chunk in _chunks(range(len(asked)), _n_row(config, asked)):
                for n_group in range(len(asked[0])):
                    yield from _batches(config, (model, defense, order), chunk, [of_row[n_group] for of_row in asked])


def _n_row(config: SweepConfig, asked: Sequence[Sequence[Requests]]) -> int:
    """How many prompts come before others; a conversation goes alone."""
    return 1 if "turns" in config.kinds else max(1, config.batch_size // max(map(_width, asked[0])))


def _batches(
    config: SweepConfig, place: tuple[str, str, str], rows: Sequence[int], asked: Sequence[Requests]
) -> Iterator[Batch]:
    """Some rows under all settings; ``asked`` is what each row of the corpus is asked."""
    kind, width = asked[rows[0]][0][0], _width(asked[rows[0]])
    for _, of_ratio in groupby(settings_of(config), key=lambda s: kind == "turns" or s.compression_ratio):
        same = tuple(of_ratio)
        for few in _chunks(rows, max(1, config.batch_size // (width * len(same)))):
            for settings in _chunks(same, max(1, config.batch_size // (width * len(few)))):
                requests = tuple(asked[row] for row in few)
                yield Batch(*place, few, settings, requests, config.max_new_tokens[kind])


def _requests_of_rows(config: SweepConfig, corpus: Corpus) -> list[list[Requests]]:
    """What each row is asked, in :func:`_request_groups`: all attacks, or ``attacks_per_prompt`` in turn."""
    n_row = len(corpus.rows) if config.n_prompts is None else config.n_prompts
    attacks = tuple(config.chosen_attacks(corpus)) if {"attack", "probe", "turns"} & set(config.kinds) else ()
    if config.attacks_per_prompt is None or not attacks:
        return [_request_groups(config, attacks)] * n_row
    n_each, around = config.attacks_per_prompt, itertools.cycle(attacks)
    return [_request_groups(config, tuple(itertools.islice(around, n_each))) for _ in range(n_row)]


def _request_groups(config: SweepConfig, attacks: tuple[str, ...]) -> list[Requests]:
    """What is asked of a prompt, in groups that are run together: answers of one length limit, probes, and
    conversations."""
    asked = [("attack", name) for name in attacks if "attack" in config.kinds]
    asked += [(kind, None) for kind in config.kinds if kind in ("recall", "follow")]
    asked += [("probe", name) for name in [*attacks, None] if "probe" in config.kinds]
    asked += [("turns", attacks[0])] if "turns" in config.kinds else []

    def group(request):
        return ALONE.index(request[0]) if request[0] in ALONE else -1, config.max_new_tokens[request[0]]

    return [tuple(same) for _, same in groupby(sorted(asked, key=group), key=group)]


def _width(requests) -> int:
    """Rows that one prompt takes up in a batch; a probe forces up to two answers, and after each turn of a conversation
    there are two, for each way to compress it."""
    return sum({"probe": 2, "turns": 2 * len(WAYS)}.get(kind, 1) for kind, _ in requests)


def _prompts(config: SweepConfig) -> list[tuple[str, str]]:
    """Defense and order; without a defense the order makes no difference and the first one stands for both."""
    return [(d, o) for d in config.defenses for o in (config.orders if d != "none" else config.orders[:1])]


def _chunks(items, n: int) -> Iterator[tuple]:
    items = tuple(items)
    yield from (items[at : at + n] for at in range(0, len(items), n))
