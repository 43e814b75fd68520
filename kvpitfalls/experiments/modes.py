"""How a budget is shared out, written as one word: "fair", "floor=4", "random", "lambda=0.5",
"fair+separate+sinks=1+whitelist"."""

import re
from dataclasses import dataclass
from decimal import Decimal

from ..eviction.fairness import FLOOR, Fair
from ..numbers import as_meant, is_real

MODES = ("biased", "fair", "paper", "random", "whitelist", "whitelist_defense", "boundary", "floor")
#: Side by side: what is fixed, the control, and the fixes.
FIXES = ("biased", "random", "phrase", "pinned", "boundary", "floor", "fair", "fair_phrase")
_CONTROL = r"random(?:=(\d{1,9}))?"
_NUMBER, _WHOLE = r"\d{1,10}(?:\.\d+)?", r"\d{1,9}"
# part -> (what it decides, its pattern); a mode decides each at most once, and is written in this order
_PARTS = {
    "share": rf"biased|fair|floor=[1-9]\d{{0,5}}|lambda=({_NUMBER})",
    "template": r"separate|absorb",
    "min": rf"min=({_WHOLE})",
    "defense": rf"defense=({_NUMBER})",
    "directive": rf"directive=({_NUMBER})",
    "sinks": rf"sinks=({_WHOLE})",
    "boundary": r"boundary",
    "phrase": r"whitelist|whitelist_defense",
}
_SYNONYMS = {"floor": f"floor={FLOOR}", "phrase": "whitelist", "pinned": "whitelist_defense"}


@dataclass(frozen=True)
class Mode:
    """A mode of a sweep.

    Attributes
    ----------
    name : str
        What :meth:`parse` was given, written in one way only.
    fair : Fair
    phrase : str or None
        "whitelist": the defense's refusal phrase is protected; "whitelist_defense": all of the defense is.
    n_sink : int
        So many first tokens are protected.
    boundary : bool
        A tenth of the budget at each end of the prompt is protected.
    is_control : bool
        Tokens are drawn at random, whatever the policy says.
    seed : int
        Of that draw.
    """

    name: str
    fair: Fair
    phrase: str | None = None
    n_sink: int = 0
    boundary: bool = False
    is_control: bool = False
    seed: int = 0

    @classmethod
    def parse(cls, mode: str | float) -> "Mode":
        """A mode from its name, or from a number lambda.

        Parameters
        ----------
        mode : str or float
            "paper"; "random", the control: as many tokens, drawn at random, and "random=SEED" for another draw;
            "fair_phrase" (fair+whitelist); or parts joined by "+": "biased" (which may be left out), "fair", "lambda=X"
            or "floor=M" (biased, but at least M tokens of each instruction in every head and layer; "floor" is
            "floor=4"); "whitelist", also called "phrase", or "whitelist_defense", also called "pinned"; "boundary";
            "sinks=N"; and, with "fair" or "lambda=X", "separate" (unmarked text is a segment of its own, as without a
            word) or "absorb" (it goes to a neighbour), "min=N" (least tokens of each instruction), "defense=W" and
            "directive=W" (weight of its tokens).

        Raises
        ------
        ValueError
            For anything else.
        """
        if is_real(mode):
            if not 0 <= mode <= 1:
                raise _error(mode)
            mode = f"lambda={_digits(abs(as_meant(mode)))}"  # -0.0 is 0
        mode = "fair+whitelist" if mode == "fair_phrase" else mode
        if mode == "paper":
            return cls("paper", Fair.parse("paper"))
        if isinstance(mode, str) and (control := re.fullmatch(_CONTROL, mode)):
            seed = int(control[1] or 0)
            return cls(f"random={seed}" if seed else "random", Fair(strength=0.0), is_control=True, seed=seed)
        parts = _parts(mode)
        share = parts.get("share", "biased")
        floor = int(_number(share)) if share.startswith("floor=") else 0
        strength = 0.0 if floor else {"biased": 0.0, "fair": 1.0}.get(share, _number(share))
        options = {part: _number(parts[part]) for part in ("min", "defense", "directive", "sinks") if part in parts}
        weights = {name: options[name] for name in ("defense", "directive") if name in options}
        if strength > 1 or (strength == 0 and (weights or "min" in parts or "template" in parts)):
            raise _error(mode)
        template = parts.get("template", "separate")
        fair = Fair(
            strength=strength, weights=weights or None, min_tokens=int(options.get("min", floor)), template=template
        )
        said = {part: word for part, word in parts.items() if (part, word) != ("share", "biased")} or {
            "share": "biased"
        }
        name = "+".join(said[part] for part in _PARTS if part in said)
        return cls(name, fair, parts.get("phrase"), int(options.get("sinks", 0)), "boundary" in parts)

    def protect(self, whitelist: str | None) -> list | None:
        """What is protected, where the defense's phrase is ``whitelist``; None if nothing is."""
        if self.phrase == "whitelist" and whitelist is None:
            raise ValueError(
                f"mode {self.name!r} protects the defense's phrase, and there is none; expected a defense that has one"
            )
        phrase = {None: [], "whitelist": [whitelist], "whitelist_defense": ["defense"]}[self.phrase]
        return [*phrase, *range(self.n_sink), *["boundary"] * self.boundary] or None


def _parts(name) -> dict[str, str]:
    """What each part of a mode's name decides."""
    parts: dict[str, str] = {}
    for word in name.split("+") if isinstance(name, str) else [""]:
        word = _SYNONYMS.get(word, word)
        part = next((part for part, pattern in _PARTS.items() if re.fullmatch(pattern, word)), None)
        if part is None or part in parts:
            raise _error(name)
        parts[part] = word if "=" not in word else f"{word.partition('=')[0]}={_digits(_number(word))}"
    return parts


def _number(word: str) -> float:
    return float(word.partition("=")[2] or 0)


def _digits(number: float) -> str:
    """A number without an exponent, with which a name would be no mode."""
    return f"{Decimal(f'{number:.12g}'):f}"


def _error(mode) -> ValueError:
    return ValueError(
        f"modes hold {mode!r}; expected some of {', '.join(MODES)}, a number lambda from 0 to 1, or parts joined by "
        "+, such as "
        "fair+separate+min=4+defense=2+sinks=1+whitelist"
    )
