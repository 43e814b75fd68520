"""What options of several commands take, and how their help says it."""

import argparse
import os

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


def text(given: str) -> str:
    """A text of the command line. Where the locale's encoding lacks a character, as C's does, Python hands out the
    bytes one by one (PEP 383): they are read as UTF-8, as a file's are."""
    try:
        return os.fsencode(given).decode("utf-8") if any("\udc80" <= c <= "\udcff" for c in given) else given
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"it is not UTF-8 ({error}); expected a text") from None


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
