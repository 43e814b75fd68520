"""What experiments run on: system prompts with checkable directives, defenses in both orders, and attacks.

``own`` ships with the package and was written for it; ``suite-v1`` is that and more, 200 prompts that never change.
``paper`` is the paper's (arXiv 2510.00231): read from a local folder or downloaded by checksum, never shipped. A path
names a user's own file of rows.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..audits.leakage import unlike
from ..files import cache_folder, in_home, read_json
from ..numbers import is_whole
from ..prompts.spans import check_encodable

ORDERS = ("defense_first", "directive_first")
NO_DEFENSE = "none"
SUITE = "suite-v1"
PAPER_COMMIT = "fc0f5df3f1a524a8cac4cf6b56fbec103fcdd1aa"
PAPER_URL = (
    f"https://raw.githubusercontent.com/Itisalex2/pitfalls-of-kv-cache-compression/{PAPER_COMMIT}/kv_cache_compression/"
)
# file in a local folder -> (path in the authors' repository, sha256 of that file)
PAPER_FILES = {
    "sys_ifeval.jsonl": (
        "benchmarks/ifeval/inputs/sys_ifeval.jsonl",
        "1342acbe3979bc54297f504f8fe7449f7456a9c8c1690afaa7346a8dcf8b6fa3",
    ),
    "defense_template.json": (
        "benchmarks/raccoon/defenses/defense_template.json",
        "cea7e98713c2b84ad7e6e9a396d48c3e10ba389f92682ce5b3a44a113ce20c66",
    ),
    "attack_plain.txt": (
        "benchmarks/raccoon/attacks/singular_attacks/Plain/prompt1",
        "896f5bded22d54e4e931e806d60fa99015bfb7af73c00886bbde70ed51643182",
    ),
}
# What is put before every directive is a file in a local folder, with this sha256. The authors have it as an option's
# default in a script,
# from which it is cut after a download.
PREFIX_FILE, PREFIX_SUM = "prefix.txt", "15d2a02bc89b441dc2e753908c7cb31f2aaff6343f4f4bcdfd6e0386c56be8e5"
PREFIX_SCRIPT = (
    "experiments/compressed_context_ifeval.py",
    "67bd0ef453c43d7d7fee1e12093ce458ae6468ea2d13d266927e74cf6df4e793",
)
_PREFIX_LITERAL = rb'system_prompt_prepend: str \| None = \(\s*("(?:[^"\\]|\\.)*")'
# The two templates the paper uses, by the sha256 of their text: a local file may hold other ones beside them.
_TEMPLATE_SUMS = {
    "standard_defense": "78bfb3c7993dd615e962fa7406c4ac7dec09a86dd74f81eff273426114fd83d2",
    "flipped_defense": "ca55eee921fe4965e50687cc9b86f8b75448344b87a3d29ccf16e5b8895cfe15",
}
# Where the phrase that they whitelist stands in the first of them; it is in both.
_WHITELIST = slice(112, 183)
PAPER_NOTICE = (
    "The paper's data: sys_ifeval.jsonl from SystemCheck, (c) 2025 Norman Mu, MIT, itself from Google's IFEval, "
    "Apache-2.0; defense "
    "templates, prefix and attack sentence by A. Chen, R. Geh, A. Grover, G. Van den Broeck and D. Israel, CC BY 4.0 "
    "(arXiv 2510.00231)."
)


@dataclass(frozen=True)
class Defense:
    """A defense in both orders.

    Attributes
    ----------
    name : str
    templates : dict of str to str
        Order -> text that holds ``$system_prompt`` once, at its start or end.
    whitelist : str or None
        The phrase that whitelist eviction protects.
    refusal : str or None
        The sentence that the defense asks for.
    """

    name: str
    templates: Mapping[str, str]
    whitelist: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Rows, defenses and attacks.

    Attributes
    ----------
    name : str
    rows : list of dict
        ``key``, ``prompt``, ``instruction_id_list``, ``kwargs``, ``messages`` (system: the directive; user: the task).
    defenses : dict of str to Defense
    attacks : dict of str to str
        "family-number" -> what the user says.
    prefix : str
        Put before every directive.
    notice : str
        Whose data it is.
    """

    name: str
    rows: Sequence[Mapping]
    defenses: Mapping[str, Defense]
    attacks: Mapping[str, str]
    prefix: str = ""
    notice: str = ""

    @property
    def sha256(self) -> str:
        """Of everything the corpus holds; records made from two corpora that differ are not mixed."""
        parts = [
            self.rows,
            {d.name: [dict(d.templates), d.whitelist, d.refusal] for d in self.defenses.values()},
            self.attacks,
            self.prefix,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def other_directives(self, row: Mapping) -> list[str]:
        """Directives, without the prefix, that a row's answers cannot have seen: of the other rows, then of the shipped
        ones."""
        texts = (r["messages"][0]["content"] for r in (*self.rows, *_shipped().rows))
        return unlike(row["messages"][0]["content"], (text for text in texts if len(text.split()) > 1))

    def other_defenses(self, text: str) -> list[str]:
        """Defenses that are not this one: its own and the shipped ones."""
        defenses = {**self.defenses, **_shipped().defenses}
        texts = [
            d.templates[ORDERS[0]].replace("$system_prompt", "").strip()
            for d in defenses.values()
            if d.name != NO_DEFENSE
        ]
        return unlike(text, texts)


def load_corpus(name: str = "own", data: str | Path | None = None) -> Corpus:
    """The corpus of a name.

    Parameters
    ----------
    name : str
        "own", "suite-v1" (200 prompts, those of "own" among them, in an order that mixes them), "paper" (file order),
        "paper_shuffled" (the order of the paper's leakage runs), or the path of a JSONL file of rows.
    data : path, optional
        Folder that holds the paper's files; by default ``KVPITFALLS_DATA``, and without that they are downloaded once.

    Raises
    ------
    ValueError
        If a file is not what it should be; a row lacks a field.
    FileNotFoundError, ImportError, OSError
        If a file is missing; pooch is not installed; the download fails.
    """
    if name in ("paper", "paper_shuffled"):
        return _paper(name, data)
    own = _own()
    if name == "own":
        return own
    if name == SUITE:
        return _suite(own)
    path = in_home(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"dataset is {name!r}; expected own, {SUITE}, paper, paper_shuffled, or the path of a JSONL file of rows"
        )
    return Corpus(path.name, _rows(path.read_bytes(), path.name), own.defenses, own.attacks)


@functools.cache
def _shipped() -> Corpus:
    return _own()


def _own() -> Corpus:
    folder = files("kvpitfalls.experiments") / "data"
    text = {
        name: (folder / name).read_text(encoding="utf-8") for name in ("prompts.jsonl", "defenses.json", "attacks.json")
    }
    defenses = {NO_DEFENSE: _no_defense()}
    for name, d in json.loads(text["defenses.json"]).items():
        templates = {"defense_first": d["text"] + "\n$system_prompt", "directive_first": "$system_prompt\n" + d["text"]}
        defenses[name] = Defense(name, templates, d["whitelist"], d["refusal"])
    attacks = {
        f"{family}-{i}": said
        for family, all_said in json.loads(text["attacks.json"]).items()
        for i, said in enumerate(all_said, 1)
    }
    return Corpus(
        "own",
        _rows(text["prompts.jsonl"].encode(), "prompts.jsonl"),
        defenses,
        attacks,
        notice="Written for kvpitfalls; Apache-2.0.",
    )


def _suite(own: Corpus) -> Corpus:
    """The suite's 200 prompts: any first ones of them have some of both files."""
    more = (files("kvpitfalls.experiments") / "data" / "suite_v1.jsonl").read_bytes()
    rows = [*own.rows, *_rows(more, "suite_v1.jsonl")]
    random.Random(1).shuffle(rows)
    return dataclasses.replace(own, name=SUITE, rows=rows)


def _no_defense() -> Defense:
    return Defense(NO_DEFENSE, dict.fromkeys(ORDERS, "$system_prompt"))


def _rows(text: bytes, source: str) -> list[dict]:
    rows: list[dict] = []
    for n, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = read_json(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}, line {n}, is no JSON: {error}") from error
        rows.append(_row(row, f"{source}, line {n},"))
    keys = {row["key"] for row in rows}
    if not rows or len(keys) < len(rows):
        raise ValueError(
            f"{source} has {len(rows)} rows and {len(keys)} different keys; expected rows, each with a key of its own"
        )
    return rows


def _row(row, where: str) -> dict:
    """A row whose messages are a system and a user message, with what it may leave out."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
    ):
        messages = None
    roles = None if messages is None else [m.get("role") for m in messages]
    if messages is None or roles != ["system", "user"]:
        raise ValueError(
            f"{where} has messages {roles}; expected an object with key and messages [system, user], each with a text "
            "as content"
        )
    key = row.get("key")
    if not isinstance(key, str) and not is_whole(key):
        raise ValueError(f"{where} has the key {key!r}; expected a text, or a whole number")
    for text in (str(key), *(message["content"] for message in messages)):
        check_encodable(where.removesuffix(","), text)
    whole = {"prompt": messages[1]["content"], "instruction_id_list": [], "kwargs": [], **row}
    ids, arguments = whole["instruction_id_list"], whole["kwargs"]
    if not (
        isinstance(ids, list)
        and all(isinstance(x, str) for x in ids)
        and isinstance(arguments, list)
        and len(arguments) == len(ids)
    ):
        raise ValueError(
            f"{where} has instruction_id_list and kwargs that do not fit; expected a list of names, and an object for "
            "each"
        )
    return whole


def _paper(name: str, data) -> Corpus:
    folder = data or os.environ.get("KVPITFALLS_DATA")
    names = (*PAPER_FILES, PREFIX_FILE)
    paths = {file: in_home(folder) / file for file in names} if folder else _download()
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]} does not exist; expected a folder with {', '.join(names)}")
    _check_sum(str(paths[PREFIX_FILE]), paths[PREFIX_FILE].read_bytes(), PREFIX_SUM)
    for file in ("sys_ifeval.jsonl", "attack_plain.txt"):
        _check_sum(str(paths[file]), paths[file].read_bytes(), PAPER_FILES[file][1])
    templates = json.loads(paths["defense_template.json"].read_text(encoding="utf-8-sig"))
    for template, digest in _TEMPLATE_SUMS.items():
        _check_sum(f"{template} of {paths['defense_template.json']}", str(templates.get(template)).encode(), digest)
    rows = _rows(paths["sys_ifeval.jsonl"].read_bytes(), "sys_ifeval.jsonl")
    if name == "paper_shuffled":
        random.Random(42).shuffle(rows)  # the authors' shuffle
    both = {"defense_first": templates["standard_defense"], "directive_first": templates["flipped_defense"]}
    whitelist = templates["standard_defense"][_WHITELIST]
    refusal = whitelist.partition("'")[2].removesuffix("'")  # which it ends with, in quotes
    paper = Defense("paper", both, whitelist, refusal)
    attack = paths["attack_plain.txt"].read_text(encoding="utf-8").strip()
    prefix = paths[PREFIX_FILE].read_bytes().decode()
    _tell_notice()
    return Corpus(name, rows, {NO_DEFENSE: _no_defense(), "paper": paper}, {"plain-1": attack}, prefix, PAPER_NOTICE)


@functools.cache  # once a process, however often its data is read
def _tell_notice() -> None:
    print(f"kvpitfalls: {PAPER_NOTICE}", file=sys.stderr)


def _check_sum(what: str, content: bytes, digest: str) -> None:
    if (own := hashlib.sha256(content).hexdigest()) != digest:
        raise ValueError(f"{what} has sha256 {own[:16]}...; expected the paper's, {digest[:16]}...")


def _download() -> dict[str, Path]:
    if importlib.util.find_spec("pooch") is None:
        raise ImportError(
            "downloading the paper's data needs the package pooch; expected pip install 'kvpitfalls[eval]', or --data "
            "DIR"
        )
    import pooch

    folder = cache_folder() / "paper" / PAPER_COMMIT[:12]

    def fetched(file: str, where: str, digest: str) -> Path:
        return Path(pooch.retrieve(PAPER_URL + where, known_hash=f"sha256:{digest}", fname=file, path=folder))

    paths = {file: fetched(file, *source) for file, source in PAPER_FILES.items()}
    script = fetched(Path(PREFIX_SCRIPT[0]).name, *PREFIX_SCRIPT)
    paths[PREFIX_FILE] = script.with_name(PREFIX_FILE)
    paths[PREFIX_FILE].write_bytes(cut_prefix(script.read_bytes()))
    return paths


def cut_prefix(script: bytes) -> bytes:
    """The text that the authors' script puts before every directive: the default of its option
    ``system_prompt_prepend``."""
    literal = re.search(_PREFIX_LITERAL, script)
    if literal is None:
        raise ValueError(
            "the authors' script has no default for system_prompt_prepend; expected a text in double quotes"
        )
    return ast.literal_eval(literal[1].decode()).encode()
