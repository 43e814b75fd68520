"""One model's results on one page of JSON, and two of them compared prompt by prompt."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..numbers import is_real, is_whole
from .comparisons import change
from .metrics import GROUP, METRICS, SETTING, TOGETHER, by_setting, most_change, per_prompt
from .scenario import ANSWERED
from .summary import summarize

_VERSIONS = "versions of the scores"
FORMAT = 1
WHERE = SETTING[1:]  # what a setting is called where the model goes without saying
_PROMPTS = GROUP[1:]  # of that, what says which prompts they are
_HUB_ID = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")  # or a path that tells nothing of whose it is


def cards(records: Sequence[Mapping], metas: Sequence[Mapping]) -> list[dict]:
    """The card of each model.

    Parameters
    ----------
    records : list of dict
        As a sweep writes them.
    metas : list of dict
        The ``run_meta.json`` of each sweep that they are from.

    Returns
    -------
    list of dict
        ``format``; ``model``; ``made_with``: all that the records depend on, of each sweep; ``settings``: for each,
        what names it, ``metrics`` (as :func:`kvpitfalls.experiments.summary.summarize` gives them) and ``prompts``:
        metric -> [key, sum, count] of every prompt of which nothing failed, so that two cards can be compared prompt by
        prompt, each by the same attacks. Of the paths of
        models and prompts only the ends are told: cards are for others, and records and ``run_meta.json`` have it all.
    """
    called = _called(
        [*(record["model"] for record in records), *(name for meta in metas for name in _models(meta["same"]))]
    )
    made_with = [_told(meta["same"], called) for meta in metas]
    sums = {setting: _sums(by_kind) for setting, by_kind in by_setting(records).items()}
    out: dict[str, dict] = {}
    for cell in summarize(records):
        of_model = out.setdefault(
            cell["model"],
            {"format": FORMAT, "model": called[cell["model"]], "made_with": made_with, "settings": []},
        )
        setting = tuple(cell[name] for name in SETTING)
        metrics = {name: cell["metrics"][name] for name in TOGETHER if name in cell["metrics"]}
        of_model["settings"].append(
            {**{name: cell[name] for name in WHERE}, "metrics": metrics, "prompts": sums[setting]}
        )
    return list(out.values())


def _models(made: Mapping) -> Sequence[str]:
    return made.get("config.models") or ()


def _called(names: Iterable[str]) -> dict[str, str]:
    """What models are called: by their hub ids, or by as much of the ends of their paths as tells them apart."""
    parts = {name: (name,) if _HUB_ID.fullmatch(name) else Path(name).parts for name in names}
    ends: dict[str, str] = {}
    for n in range(1, max(map(len, parts.values()), default=0) + 1):
        ends = {name: "/".join(of_name[-n:]) for name, of_name in parts.items()}
        if len(set(ends.values())) == len(ends):
            break
    return ends


def _told(made: Mapping, called: Mapping[str, str]) -> dict[str, Any]:
    """All that records depend on, less the folders of whoever made them."""
    told = {**made, "config.models": [called[name] for name in _models(made)], "config.dataset": _dataset(made)}
    told["model_sources"] = [
        source if called[name] == name else f"{called[name]} at {source.rpartition(' at ')[2]}"
        for name, source in zip(_models(made), made.get("model_sources") or (), strict=False)
    ]
    return {name: value for name, value in told.items() if name in made}


def _dataset(made: Mapping) -> str | None:
    """As records call it: a file by its name alone."""
    name = made.get("config.dataset")
    return None if name is None else Path(name).name


def _sums(by_kind: Mapping[str, list]) -> dict[str, list]:
    kinds = {name: METRICS[name] for name in TOGETHER}
    sums = {name: per_prompt(by_kind[kind], parts) for name, (kind, parts) in kinds.items() if kind in by_kind}
    torn = {kind: {r["key"] for r in of_kind if r["scores"] is None} for kind, of_kind in by_kind.items()}
    return {
        name: [[key, *pair] for key, pair in pairs.items() if key not in torn[kinds[name][0]]]
        for name, pairs in sums.items()
    }


def read_card(path: str | Path) -> dict:
    """A card from its file.

    Raises
    ------
    ValueError
        If the file is no card, or one of another format.
    """
    wrong = f"{path} is no card; expected the card.json that kvpitfalls report wrote"
    try:
        card = json.loads(Path(path).read_bytes())
        if card["format"] != FORMAT:
            raise ValueError(
                f"{path} is a card of format {card['format']!r}; expected {FORMAT}, which this version reads"
            )
        for made in card["made_with"]:
            _dataset(made)
            _asked(made)
        for setting in card["settings"]:
            hash(_place(setting))
            for pairs in setting["prompts"].values():
                for key, total, count in pairs:
                    good = isinstance(key, (str, int)) and is_real(total) and is_whole(count)
                    if not (good and abs(total) <= count and count >= 1):  # no metric of a card is beyond 1, or NaN
                        raise TypeError(key)
        if not isinstance(card["model"], str):
            raise TypeError(card["model"])
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(wrong) from error
    _check_once(path, card["settings"])
    return card


def _check_once(path: str | Path, settings: Sequence[Mapping]) -> None:
    """Raise if a setting stands twice on a card, or a prompt twice in what one is compared by: one would count."""
    named = [("setting", [_place(setting) for setting in settings])]
    named += [("prompt", [key for key, *_ in pairs]) for of in settings for pairs in of["prompts"].values()]
    for what, known in named:
        if len(set(known)) < len(known):
            twice = next(one for one in known if known.count(one) > 1)
            raise ValueError(f"{path} has the {what} {twice!r} twice; expected each once")


def _check_prompts(a: Mapping, b: Mapping) -> None:
    """Raise if a set of prompts has one name and two contents: their keys would pair what is not alike."""
    known = {_dataset(made): made.get("corpus_sha256") for made in a["made_with"]}
    for made in b["made_with"]:
        name, digest = _dataset(made), made.get("corpus_sha256")
        if known.get(name, digest) != digest:
            raise ValueError(
                f"the prompts {name!r} of the cards differ (sha256 {str(known[name])[:12]}... and "
                f"{str(digest)[:12]}...); expected the same"
            )


def _asked(made: Mapping) -> dict[str, Any]:
    """What a sweep's answers depend on beside its model, machine and prompts."""
    kinds, limits = set(made.get("config.kinds") or ()), made.get("config.max_new_tokens") or {}
    asked = {_VERSIONS: made.get("scores")}
    asked |= {f"max_new_tokens of kind {kind!r}": limits.get(kind) for kind in ANSWERED if kind in kinds}
    if "attack" in kinds:
        asked |= {name: made.get(f"config.{name}") for name in ("attacks", "attacks_per_prompt")}
    return asked


def _check_asked(a: Mapping, b: Mapping) -> None:
    """Raise if no sweep of one card, on the prompts of a name, was asked as any of the other: what differs is then not
    the model's."""
    known: list[dict[tuple, list]] = [{}, {}]
    for side, card in zip(known, (a, b), strict=True):
        for made in card["made_with"]:
            for what, value in _asked(made).items():
                side.setdefault((_dataset(made), what), []).append(value)
    for place, mine in known[0].items():
        theirs = known[1].get(place, mine)
        if not any(value in theirs for value in mine):
            mend = "; kvpitfalls rescore brings a sweep's records to this version" if place[1] == _VERSIONS else ""
            raise ValueError(
                f"the {place[1]} of the cards differ ({mine[0]!r} and {theirs[0]!r}, on the prompts {place[0]!r}); "
                f"expected the same, else it is not the models that differ{mend}"
            )


def _place(setting: Mapping) -> tuple:
    return tuple(setting[name] for name in WHERE)


def _everyone(*cards: Mapping) -> dict[tuple, set]:
    """Keys of all prompts that have a sum at any setting, by what names the prompts."""
    out: dict[tuple, set] = {}
    for setting in (setting for card in cards for setting in card["settings"]):
        known = out.setdefault(tuple(setting[name] for name in _PROMPTS), set())
        known.update(key for sums in setting["prompts"].values() for key, *_ in sums)
    return out


def compare(a: Mapping, b: Mapping) -> list[dict]:
    """What card ``b`` has more than card ``a``, at the settings of both.

    Returns
    -------
    list of dict
        What names the setting, ``metric``, ``difference``, ``low``, ``high`` (95 %, paired by prompt), ``n_prompt`` and
        ``error``; ``n_left_out``: prompts of either card that not both have there, and whole.

    Raises
    ------
    ValueError
        If they have no setting in common, their prompts are called the same and are not the same, or they were made
        with other attacks, limits of length, or rules of scoring.
    """
    _check_prompts(a, b)
    _check_asked(a, b)
    theirs = {_place(setting): setting["prompts"] for setting in a["settings"]}
    asked = _everyone(a, b)
    out = []
    for setting in b["settings"]:
        if (place := _place(setting)) in theirs:
            for metric in TOGETHER:
                sides = [
                    {key: (total, count) for key, total, count in side[metric]}
                    for side in (setting["prompts"], theirs[place])
                    if metric in side
                ]
                if len(sides) == 2:
                    one, other = sides
                    moved = change(one, other, asked[place[: len(_PROMPTS)]], most_change(metric))
                    out.append({**dict(zip(WHERE, place, strict=True)), "metric": metric, **moved})
    if not out:
        raise ValueError(
            "the cards have no setting in common; expected results on the same prompts, defenses, policies and ratios"
        )
    return out
