"""What options of several commands take, and how their help says it."""

import argparse

FAIR_HELP = "no (biased), yes, paper (the authors' way), floor=M (least tokens of each), or a strength in [0, 1]"


def fair(text: str, others: str = "") -> bool | float | str:
    """What ``--fair`` stands for, as :func:`kvpitfalls.wrap` takes it; ``others``: what else the option takes."""
    from ..eviction.fairness import Fair

    named = {"no": False, "yes": True}
    try:
        setting = named[text] if text in named else number_or(text)
        Fair.parse(setting)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected {others}{FAIR_HELP}") from None
    return setting


def number_or(text: str) -> float | str:
    """The number that a text is, or the text."""
    try:
        return float(text)
    except ValueError:
        return text


def policy_help(what: str = "") -> str:
    """The names of policies, and which of them are run without ``--policy``, if any: what is said of them first."""
    from ..policies import PAPER, policy_names

    default = f"; by default the paper's five: {', '.join(PAPER)}" if what else ""
    return f"{what}{', '.join(policy_names())}{default}"
