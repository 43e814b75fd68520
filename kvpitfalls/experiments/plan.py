"""The batches of a sweep, in order. The plan depends on config and corpus only, so a resumed sweep has the same one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from ..hf.wrap import Evict
from ..policies import get_policy
from ..policies.random import Random
from .config import SweepConfig
from .corpus import Corpus
from .modes import Mode
from .scenario import WAYS

ALONE = ("probe", "turns")  # kinds that share no batch with others
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
        policy = Random() if mode.is_control else get_policy(self.policy or "streaming_llm")
        return Evict(policy, mode.fair, self.compression_ratio, None, mode.protect(whitelist))


@dataclass(frozen=True)
class Batch:
    """What is generated together: every row under every setting, asked every request. All settings have one ratio, but
    those of a conversation, which is had once.

    Attributes
    ----------
    model, defense, order : str
    rows : tuple of int
        Indices into the corpus.
    settings : tuple of Setting
    requests : tuple of (str, str or None)
        Kind, and the name of the attack.
    max_new_tokens : int
    """

    model: str
    defense: str
    order: str
    rows: tuple[int, ...]
    settings: tuple[Setting, ...]
    requests: tuple[tuple[str, str | None], ...]
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
            for row in self.rows
            for kind, attack in self.requests
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
    """The batches, in the order in which they are run and recorded."""
    config.check_corpus(corpus)
    limit = config.max_new_tokens
    for model in config.models:
        for defense, order in _prompts(config):
            for rows, attacks in _rows_and_attacks(config, corpus):
                groups = _request_groups(config, attacks)
                n_row = 1 if "turns" in config.kinds else max(1, config.batch_size // max(map(_width, groups)))
                for chunk in _chunks(rows, n_row):
                    for requests in groups:
                        n_setting = max(1, config.batch_size // (len(chunk) * _width(requests)))
                        talks = requests[0][0] == "turns"
                        for _, same in groupby(settings_of(config), key=lambda s: talks or s.compression_ratio):
                            for settings in _chunks(same, n_setting):
                                yield Batch(model, defense, order, chunk, settings, requests, limit[requests[0][0]])


def _rows_and_attacks(config: SweepConfig, corpus: Corpus) -> Iterator[tuple[range, tuple[str, ...]]]:
    """Rows that meet the same attacks, and these: all rows and all attacks, or ``attacks_per_prompt`` in turn."""
    n_row = len(corpus.rows) if config.n_prompts is None else config.n_prompts
    attacks = tuple(config.chosen_attacks(corpus)) if {"attack", "probe", "turns"} & set(config.kinds) else ()
    if config.attacks_per_prompt is None or not attacks:
        yield range(n_row), attacks
        return
    n_turn = len(attacks) // math.gcd(len(attacks), config.attacks_per_prompt)  # so many prompts, and it begins anew
    for turn in range(min(n_turn, n_row)):
        first = turn * config.attacks_per_prompt
        yield (
            range(turn, n_row, n_turn),
            tuple(attacks[(first + i) % len(attacks)] for i in range(config.attacks_per_prompt)),
        )


def _request_groups(config: SweepConfig, attacks: tuple[str, ...]) -> list[tuple]:
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
