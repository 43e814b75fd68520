"""What fair means: how a budget is shared between instructions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from ..numbers import as_meant, as_written, check_whole, is_real


@dataclass(frozen=True)
class Fair:
    """How the budget is shared between instructions.

    Quotas are for the instructions' own tokens; text that none of them claims is shared out in stretches of its own. So
    any two instructions of equal weight keep shares that differ by less than one token of the shorter, if nothing is
    protected and strength is 1. (By one token, if they are of equal length and the stretches of unmarked text, one
    token each, cannot take the odd ones.)

    Parameters
    ----------
    strength : float
        lambda in [0, 1]: 0 is the policy as published (biased), 1 gives every segment its fair quota. Between them each
        head's quotas are ``(1 - lambda) * what the biased policy keeps of the segment + lambda * the fair quota``,
        rounded by largest remainder; inside a segment the scores are the fair ones.
    weights : mapping of str to float, optional
        Relative share kept per token of an instruction, 1 each by default.
    min_tokens : int
        Every instruction keeps at least so many of its own tokens (or all it has) in every head, at any strength and
        under a held budget; protected ones count. Strength 0 is then the biased policy with that floor: in each head
        the best so many of every instruction come first, and the policy's own ranking decides on the rest of the
        budget. So the floor is for the head and layer that keeps least of an instruction, where quotas of a share hold
        for the mean as well.
    template : {"separate", "absorb"}
        Unmarked text, that is, tokens outside all instructions: segments of their own, stretch by stretch, each with
        its proportional quota; or part of the neighbour (those before the first instruction of it, a gap and the end of
        the instruction before), whose quota is then for both, and may be spent on either.
    rule : {"proportional", "paper"}
        "proportional": quotas by largest remainder, votes inside each segment. "paper": the authors' code to the
        letter, which is for exactly two touching instructions: rounded-down quota for the earlier one and the rest for
        the later, their H2O spans, their StreamingLLM ramps; its template is "absorb".

    Notes
    -----
    Source: arXiv 2510.00231, section 5.2 and appendix E (Algorithm 1).

    Examples
    --------
    Of two instructions of 5 tokens each, the first shall keep twice the share:

    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 1, 10, 8), dtype=np.float32)
    >>> fair = kvp.Fair(weights={"a": 2.0})
    >>> kvp.keep("knorm", keys, budget=6, spans={"a": (0, 5), "b": (5, 10)}, fair=fair).quotas.tolist()
    [[[4, 2]]]
    """

    strength: float = 1.0
    weights: Mapping[str, float] | None = None
    min_tokens: int = 0
    template: str = "separate"
    rule: str = "proportional"

    def __post_init__(self) -> None:
        _check_share("strength", self.strength, 1)
        if self.weights is not None and not isinstance(self.weights, Mapping):
            raise TypeError(f"weights is {self.weights!r}; expected a mapping of instruction names to numbers")
        for name, weight in (self.weights or {}).items():
            if not isinstance(name, str):
                raise TypeError(f"weights name {name!r}; expected names of instructions")
            _check_share(f"weights[{name!r}]", weight, 1e9)
        check_whole("min_tokens", self.min_tokens, 0)
        if self.template not in ("separate", "absorb"):
            raise ValueError(f"template is {self.template!r}; expected 'separate' or 'absorb'")
        if self.rule not in ("proportional", "paper"):
            raise ValueError(f"rule is {self.rule!r}; expected 'proportional' or 'paper'")
        if self.rule == "paper" and (self.weights or self.min_tokens):
            raise ValueError("rule='paper' takes no weights or min_tokens; the authors' code has none")
        if self.min_tokens and self.template == "absorb":
            raise ValueError(
                "min_tokens counts an instruction's own tokens; expected template='separate', not 'absorb'"
            )
        object.__setattr__(self, "strength", as_meant(self.strength))
        if self.weights is not None:
            object.__setattr__(self, "weights", {name: as_written(x) for name, x in self.weights.items()})
        if self.rule == "paper":
            object.__setattr__(self, "template", "absorb")  # the authors' instructions own the whole row

    @classmethod
    def parse(cls, fair: "Fair | bool | float | str") -> "Fair":
        """A Fair from what ``fair=`` accepts: False, True, lambda in [0, 1], "paper", "floor", "floor=M", or a Fair.

        "floor=M" is ``Fair(strength=0, min_tokens=M)``; "floor" is "floor=4".
        """
        if isinstance(fair, Fair):
            return fair
        if isinstance(fair, (bool, np.bool_)):  # as a column of a table has them
            return _FAIR if fair else _BIASED
        if is_real(fair):
            return cls(strength=float(as_meant(fair)))
        if isinstance(fair, str) and fair == "paper":
            return cls(rule="paper")
        if isinstance(fair, str) and (floor := re.fullmatch(r"floor(?:=([1-9]\d{0,8}))?", fair)):
            return cls(strength=0.0, min_tokens=int(floor[1] or FLOOR))
        raise ValueError(
            f"fair is {fair!r}; expected False, True, a number in [0, 1], 'paper', 'floor', 'floor=M' or a "
            "kvpitfalls.Fair"
        )

    def __hash__(self) -> int:
        weights = None if self.weights is None else frozenset(self.weights.items())
        return hash((self.strength, weights, self.min_tokens, self.template, self.rule))

    @cached_property
    def is_biased(self) -> bool:
        """Whether no instruction is promised anything: the policy as published."""
        return self.strength == 0 and not self.min_tokens

    @property
    def label(self) -> bool | float | str:
        """How tables name it: False, True, lambda, "paper", "floor=M", or the repr of anything more special."""
        if self == Fair(rule="paper"):
            return "paper"
        if self == Fair(strength=self.strength):
            return bool(self.strength) if self.strength in (0.0, 1.0) else self.strength
        if self == Fair(strength=0.0, min_tokens=self.min_tokens):
            return f"floor={self.min_tokens}"
        return repr(self)


def fairness_name(label: bool | float | str) -> str:
    """How tables and figures call a ``Fair.label``: biased, fair, "fair 0.5", paper, floor=4."""
    if isinstance(label, str):
        return label
    return f"fair {label}" if label not in (0, 1) else "fair" if label else "biased"


def _check_share(name: str, value: object, most: float) -> None:
    if not is_real(value) or not 0 <= as_written(value) <= most:
        raise ValueError(f"{name} is {value!r}; expected a number from 0 to {most:g}")


AnyFair: TypeAlias = Fair | bool | float | str  # what is taken for one
_BIASED, _FAIR = Fair(strength=0.0), Fair()
FLOOR = 4  # tokens of every instruction under fair="floor", where no number is given
