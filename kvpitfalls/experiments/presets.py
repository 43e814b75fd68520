"""Sweeps by name: the paper's figures (arXiv 2510.00231, numbering of its first version), small ones, and the suite.

A preset is one sweep, or two where the paper measures leakage and following on different prompts: leakage on the first
100 rows of its shuffled set, following on all 539.
"""

from collections.abc import Mapping

from .config import SweepConfig
from .corpus import ORDERS, SUITE
from .modes import FIXES

PAPER_MODELS = ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-14B-Instruct")
_TENTHS = tuple(round(0.1 * i, 1) for i in range(10))
_TWENTIETHS = tuple(round(0.05 * i, 2) for i in range(15))  # 0 to 0.7, the grid of figure 1 and of the composite score
_BOTH, _FIRST, _FLIPPED = ORDERS, ORDERS[:1], ORDERS[1:]
_PAPER = {
    "models": PAPER_MODELS,
    "device": "cuda",
    "dtype": "bfloat16",
    "attacks": ("plain",),
    "compression_ratios": _TENTHS,
}
_LEAKAGE = {
    **_PAPER,
    "dataset": "paper_shuffled",
    "n_prompts": 100,
    "defenses": ("paper",),
    "kinds": ("attack", "recall"),
}
_FOLLOWING = {**_PAPER, "dataset": "paper", "defenses": ("paper",), "kinds": ("follow",)}
_PLAIN = {**_FOLLOWING, "defenses": ("none",), "modes": ("biased",)}
# What never changes under this name: a card of one model can be compared with another's, made elsewhere and later.
# Modes that hardly differ from biased eviction on our prompts (boundary, floor), or that few of them have room for
# (pinned), are in preset "fixes".
_SUITE = {
    "dataset": SUITE,
    "orders": _FIRST,
    "policies": ("streaming_llm", "snapkv", "tova", "keydiff"),
    "modes": ("biased", "random", "phrase", "fair", "fair_phrase"),
    "compression_ratios": (0.3, 0.5),
    "attacks": ("verbatim", "translation", "role_play", "formatting"),
    "attacks_per_prompt": 1,
    "max_new_tokens": {"attack": 64, "recall": 64, "follow": 96},
}
_SMALL = {
    **_SUITE,
    "n_prompts": 24,  # each attack twice
    "policies": ("streaming_llm", "snapkv"),
    "modes": ("biased", "phrase", "fair"),
    "compression_ratios": (0.5,),
}


def _both_sides(**same) -> dict[str, dict]:
    return {"leakage": {**_LEAKAGE, **same}, "following": {**_FOLLOWING, **same}}


_PRESETS: Mapping[str, Mapping[str, dict]] = {
    "figure1": _both_sides(
        policies=("streaming_llm",), modes=("biased", "paper"), orders=_FIRST, compression_ratios=_TWENTIETHS
    ),
    "figure2": {"following": {**_PLAIN, "policies": ("streaming_llm",)}},
    "figure3": {"following": {**_PLAIN, "policies": ("streaming_llm",)}},
    "figure4": {"following": _PLAIN},
    "figure5": _both_sides(modes=("biased",), orders=_FIRST),
    "figure6": _both_sides(modes=("biased",), orders=_FLIPPED),
    "figure7": {"leakage": {**_LEAKAGE, "modes": ("biased",), "orders": _BOTH}},
    "figure8": {"leakage": {**_LEAKAGE, "modes": ("biased",), "orders": _BOTH}},
    "figure9": _both_sides(modes=("biased", "whitelist"), orders=_FIRST),
    "figure10": _both_sides(modes=("biased", "paper"), orders=_FIRST),
    "figure11": {"leakage": {**_LEAKAGE, "modes": ("biased",), "orders": _BOTH}},
    "figure12": {"leakage": {**_LEAKAGE, "modes": ("biased", "whitelist"), "orders": _FIRST}},
    "figure13": {"leakage": {**_LEAKAGE, "modes": ("biased", "paper"), "orders": _BOTH}},
    "figure14": {"leakage": {**_LEAKAGE, "modes": ("biased", "whitelist", "paper"), "orders": _FIRST}},
    "figure15": _both_sides(modes=("biased", "paper"), orders=_BOTH),
    "composite": _both_sides(modes=("biased", "whitelist", "paper"), orders=_FIRST, compression_ratios=_TWENTIETHS),
    "smollm2": {
        "all": {
            "n_prompts": 20,
            "policies": ("streaming_llm", "snapkv"),
            "modes": ("biased", "fair", "whitelist"),
            "compression_ratios": (0.3, 0.4, 0.5),
            "attacks": ("verbatim-2",),
            "max_new_tokens": {"attack": 32, "recall": 32, "follow": 32},
        }
    },
    "fixes": {
        "all": {
            "n_prompts": 20,
            "policies": ("streaming_llm", "snapkv"),
            "modes": FIXES,
            "orders": _FIRST,
            "compression_ratios": (0.3, 0.5),
            "attacks": ("verbatim-2",),
            "max_new_tokens": {"attack": 32, "recall": 32, "follow": 32},
        }
    },
    SUITE: {"all": _SUITE},
    f"{SUITE}-small": {"all": _SMALL},
    "probe": {
        "all": {
            "n_prompts": 6,
            "modes": ("biased", "fair", "whitelist"),
            "attacks": ("verbatim-2",),
            "kinds": ("probe",),
        },
    },
    "turns": {
        "all": {
            "n_prompts": 8,
            "orders": _FIRST,
            "policies": ("streaming_llm", "snapkv"),
            "modes": ("biased",),
            "compression_ratios": (0.5,),
            "attacks": ("verbatim-2",),
            "kinds": ("turns",),
            "max_new_tokens": {"turns": 40},
        },
    },
}


def preset_names() -> list[str]:
    """The names :func:`preset` knows."""
    return list(_PRESETS)


def preset(name: str, **changes) -> dict[str, SweepConfig]:
    """The sweeps of a preset.

    Parameters
    ----------
    name : str
        "figure1" to "figure15", "composite"; or, on own prompts with SmolLM2-135M-Instruct, "smollm2" (some minutes on
        two cores), "fixes" (every way to share a budget out, and the random control, at equal memory), "probe" (the
        paper's five policies and all ratios, by the likelihood of given answers), "turns" (conversations of five turns,
        compressed at the end of each); "suite-v1" (what ``kvpitfalls suite`` runs: 200 prompts, one of twelve attacks
        each) or "suite-v1-small" (its first 24 prompts, two policies, three modes, r = .5).
    **changes
        Values of :class:`SweepConfig` to run with instead, such as ``models`` or ``device``.

    Returns
    -------
    dict of str to SweepConfig
        "leakage" and "following", one of them, or "all".

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if name not in _PRESETS:
        raise ValueError(f"preset is {name!r}; expected one of {', '.join(_PRESETS)}")
    return {part: SweepConfig.parse({**values, **changes}) for part, values in _PRESETS[name].items()}
