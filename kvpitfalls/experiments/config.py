"""What a sweep runs, as data: read from a TOML or JSON file, or named by a preset."""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..audits.leakage import begun_and_rest, mostly_seen
from ..eviction.allocation import UNIFORM
from ..eviction.budget import check_budget
from ..eviction.fairness import Fair
from ..eviction.selection import allocation_of
from ..files import read_json
from ..numbers import as_meant, check_whole, is_whole
from ..policies import get_policy
from ..prompts.spans import check_encodable, short
from .corpus import NO_DEFENSE, ORDERS, Corpus
from .modes import Mode
from .scenario import ANSWERED, KINDS

_LIMITS = {"attack": 256, "recall": 64, "follow": 1280, "probe": 32, "turns": 64}  # attack and follow: the paper's
_TEXTS = ("models", "defenses", "orders", "attacks", "kinds")  # lists of texts
_LISTS = (*_TEXTS, "policies", "modes", "compression_ratios")


@dataclass(frozen=True)
class SweepConfig:
    """A matrix: models x defenses x orders x policies x modes x ratios x prompts x what is asked.

    Attributes
    ----------
    models : list of str
        Hub ids, local folders, .gguf files, or "default" (SmolLM2-135M-Instruct).
    dataset : str
        As :func:`kvpitfalls.experiments.corpus.load_corpus` takes it.
    n_prompts : int or None
        The first so many rows; all by default.
    defenses, orders : list of str
        Names of the corpus; "none" is the directive alone. Orders: "defense_first", "directive_first".
    policies : list of str
    modes : list of str or float
        "biased", "fair", "paper"; "random" or "random=SEED": the control; a number: lambda between biased and fair;
        "whitelist" or "phrase": the defense's refusal phrase is protected; "whitelist_defense" or "pinned": all of the
        defense is; "boundary": a tenth of the budget at each end is; "floor=M": at least M tokens of each instruction
        are kept in every head and layer; "fair_phrase": fair, and the phrase protected; or parts joined by "+", as
        ``docs/experiments.md`` says.
    compression_ratios : list of float
        Shares removed. 0 is always run, once for all policies: everything is compared to it.
    attacks : list of str
        Names of attacks, or of families.
    attacks_per_prompt : int or None
        Each prompt meets so many of the attacks, in turn: the first prompt the first ones, the next prompt those after
        them, and so on around. All of them by default.
    kinds : list of str
        "attack", "recall" (the control), "follow" (the row's own task); "probe": nothing is generated but the full
        cache's answer to the task, and the likelihood of given answers is measured; "turns": a conversation of five
        turns, compressed at the end of each, is asked for its instructions, and attacked once, after each. The first
        three by default.
    max_new_tokens : dict of str to int
        Per kind; for "probe", of the full cache's answer; for "turns", of each answer.
    batch_size : int
        Conversations that are generated together, at most (one prompt's are never split).
    seed : int
        For the checkers; generation is greedy.
    device, dtype : str
    attn_implementation : str or None
    """

    models: Sequence[str] = ("default",)
    dataset: str = "own"
    n_prompts: int | None = None
    defenses: Sequence[str] = ("refuse",)
    orders: Sequence[str] = ORDERS
    policies: Sequence[str] = ("streaming_llm", "snapkv", "tova", "h2o", "knorm")
    modes: Sequence[str] = ("biased", "fair")
    compression_ratios: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    attacks: Sequence[str] = ("verbatim",)
    attacks_per_prompt: int | None = None
    kinds: Sequence[str] = ANSWERED
    max_new_tokens: Mapping[str, int] = field(default_factory=lambda: dict(_LIMITS))
    batch_size: int = 64
    seed: int = 42
    device: str = "cpu"
    dtype: str = "float32"
    attn_implementation: str | None = None

    def __post_init__(self):
        self._check_types()
        for name, value in self._in_one_way().items():
            object.__setattr__(self, name, value)
        self._check_values()

    def _check_types(self) -> None:
        for name in _LISTS:
            _check_list(name, getattr(self, name))
        for name in _TEXTS:
            for value in getattr(self, name):
                _check_text(f"{name} hold", value)
        for name in ("dataset", "device", "dtype"):
            _check_text(f"{name} is", getattr(self, name))
        if self.attn_implementation is not None:
            _check_text("attn_implementation is", self.attn_implementation)
        if not isinstance(self.max_new_tokens, Mapping):
            raise TypeError(f"max_new_tokens is {self.max_new_tokens!r}; expected a mapping of kinds to numbers")
        for name, low in {"n_prompts": 1, "attacks_per_prompt": 1, "batch_size": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None or name not in ("n_prompts", "attacks_per_prompt"):
                check_whole(name, value, low)
        for ratio in self.compression_ratios:
            check_budget(ratio, None)

    def _in_one_way(self) -> dict[str, object]:
        """The fields that can be written in several ways, as records hold them: lambda as a name, ratio 0 first, every
        kind with its limit."""
        return {
            **{name: tuple(getattr(self, name)) for name in _TEXTS},
            "modes": tuple(Mode.parse(mode).name for mode in self.modes),
            "compression_ratios": tuple(sorted({0.0, *map(float, map(as_meant, self.compression_ratios))})),
            "policies": tuple(get_policy(name).name for name in self.policies),
            "max_new_tokens": {**_LIMITS, **self.max_new_tokens},
        }

    def _check_values(self) -> None:
        _check_names("orders", self.orders, ORDERS)
        _check_names("kinds", self.kinds, KINDS)
        for kind, limit in self.max_new_tokens.items():
            if kind not in KINDS or not is_whole(limit) or limit < 1:
                raise ValueError(
                    f"max_new_tokens[{kind!r}] is {limit!r}; expected one of {', '.join(KINDS)} and a number of at "
                    "least 1"
                )
        for name in ("models", "orders", "policies", "modes", "defenses", "kinds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} is {list(getattr(self, name))}; expected each name once")
        if "turns" in self.kinds:
            _check_turns(self.policies, self.modes)
        if NO_DEFENSE in self.defenses and any("whitelist" in m or "defense" in m or m == "paper" for m in self.modes):
            raise ValueError(
                "modes hold whitelist or paper, and defenses 'none'; expected a defense, since those modes need one"
            )

    @classmethod
    def parse(cls, settings: Mapping) -> "SweepConfig":
        """A config from what a file holds; names that mean nothing are refused."""
        if not isinstance(settings, Mapping):
            raise TypeError(f"the config is a {type(settings).__name__}; expected names and values")
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(settings) - set(known), key=str):
            raise ValueError(f"the config holds {unknown[0]!r}; expected some of {', '.join(known)}")
        return cls(**settings)

    @classmethod
    def read(cls, path: str | Path) -> "SweepConfig":
        """A config from a .toml or .json file."""
        path = Path(path)
        text = path.read_bytes()
        try:
            settings = tomllib.loads(text.decode("utf-8-sig")) if path.suffix == ".toml" else read_json(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {error}; expected a .toml or .json file") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{path} holds a {type(settings).__name__}; expected names and values")
        return cls.parse(settings)

    def to_dict(self) -> dict:
        """Everything, ready for JSON; :meth:`parse` takes it back."""
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def chosen_attacks(self, corpus: Corpus) -> dict[str, str]:
        """Name -> text of the attacks that are meant, families spelled out."""
        chosen: dict[str, str] = {}
        for wanted in self.attacks:
            named = {name: said for name, said in corpus.attacks.items() if wanted in (name, name.rpartition("-")[0])}
            if not named:
                families = dict.fromkeys(name.rpartition("-")[0] for name in corpus.attacks)
                raise ValueError(
                    f"attacks hold {wanted!r}; expected names such as {next(iter(corpus.attacks))}, or "
                    f"{', '.join(families)}"
                )
            chosen.update(named)
        return chosen

    def check_corpus(self, corpus: Corpus) -> None:
        """Raise if the config names what the corpus does not have."""
        _check_names("defenses", self.defenses, tuple(corpus.defenses))
        if {"attack", "probe", "turns"} & set(self.kinds):
            n_attack = len(self.chosen_attacks(corpus))
            if self.attacks_per_prompt is not None and self.attacks_per_prompt > n_attack:
                raise ValueError(
                    f"attacks_per_prompt is {self.attacks_per_prompt}; expected at most {n_attack}, the attacks "
                    "that are named"
                )
        if "follow" in self.kinds and (bare := [row["key"] for row in corpus.rows if not row["instruction_id_list"]]):
            raise ValueError(
                f"kinds hold 'follow', but row {bare[0]!r} has no instruction_id_list; expected checkable instructions"
            )
        unseen = [row["key"] for row in corpus.rows if not mostly_seen(row["messages"][0]["content"])]
        if unseen and {"attack", "recall", "turns"} & set(self.kinds):
            raise ValueError(
                f"ROUGE sees less than half of the directive of row {unseen[0]!r}, only its letters a-z and digits; "
                "expected rows in Latin letters, or kinds that measure neither leak nor recall"
            )
        if {"recall", "turns"} & set(self.kinds):
            _check_halves(corpus)
        if self.n_prompts is not None and self.n_prompts > len(corpus.rows):
            raise ValueError(
                f"n_prompts is {self.n_prompts}; expected at most {len(corpus.rows)}, the rows of {corpus.name}"
            )


def _check_halves(corpus: Corpus) -> None:
    """Raise where ROUGE does not see the half of a directive that the control asks for; of one word there is none, and
    its items fail."""
    for row in corpus.rows:
        directive = row["messages"][0]["content"]
        if len(directive.split()) > 1 and not mostly_seen(rest := begun_and_rest(directive)[1]):
            raise ValueError(
                f"ROUGE sees less than half of {short(rest)}, which the control asks for of row {row['key']!r}; "
                "expected rows in Latin letters, or kinds that measure no recall"
            )


def _check_turns(policies: Sequence[str], modes: Sequence[str]) -> None:
    """Raise where a conversation cannot be compressed turn by turn, or where both ways to do so are the same."""
    from ..hf.chunks import check_chunks

    if wrong := [mode for mode in modes if mode != "biased" and not Mode.parse(mode).is_control]:
        raise ValueError(
            f"kinds hold 'turns', and modes hold {wrong[0]!r}; expected biased or random, which share nothing out "
            "between instructions, so that a turn can lose more at a later one"
        )
    for policy in map(get_policy, policies):
        allocation = allocation_of(policy, None)
        try:
            check_chunks(policy, Fair(strength=0.0), allocation)
        except ValueError as error:
            raise ValueError(f"kinds hold 'turns', which come in chunks, and {error}") from error
        if allocation != UNIFORM:
            raise ValueError(
                f"kinds hold 'turns', and policy is {policy.name!r}, whose layers share the budget of each length "
                "anew; expected one whose layers hold equally much"
            )


def _check_text(what: str, value) -> None:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{what} {value!r}; expected a str that is not empty")
    check_encodable(f"{what} {value!a}, which", value)  # records hold it


def _check_list(name: str, value) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{name} is {value!r}; expected a list that is not empty")


def _check_names(name: str, names, known) -> None:
    if unknown := [x for x in names if x not in known]:
        raise ValueError(f"{name} hold {unknown[0]!r}; expected some of {', '.join(known)}")
