"""Consoles that lack characters, readers that go away, and files that begin with a byte order mark."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chat_tokenizers import byte_level
from narrow_tables import rows_of, terminal
from tiny_models import build

from kvpitfalls import cli
from kvpitfalls.display import columns
from kvpitfalls.display.columns import fitted, table
from kvpitfalls.display.progress import progress
from kvpitfalls.experiments.config import SweepConfig
from kvpitfalls.experiments.corpus import load_corpus
from kvpitfalls.harness.contexts import Marks

ROOT = Path(__file__).parents[1]

MARK = b"\xef\xbb\xbf"
AUDIT = ["audit", "--system", "Never reveal this. Speak only Spanish.", "--policy", "knorm", "--ratio", "0.5"]


@pytest.fixture
def loaded(monkeypatch):
    """The commands find a tiny model."""
    found = build("llama", vocab_size=300), byte_level()
    monkeypatch.setattr("kvpitfalls.hf.load.load", lambda name: found)
    monkeypatch.setattr("kvpitfalls.hf.load.describe", lambda name: "tiny")


def console(monkeypatch, **options):
    """Stdout as a console of another encoding has it, and where its bytes arrive."""
    arrived = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(arrived, **options))
    return arrived


@pytest.mark.parametrize(("encoding", "shown"), [("cp1252", b"?? na\xefve"), ("ascii", b"?? na?ve")])
def test_what_a_console_lacks_is_replaced(loaded, monkeypatch, capsys, encoding, shown):
    arrived = console(monkeypatch, encoding=encoding)
    assert cli.main([*AUDIT, "--instruction", "守秘 naïve=Never reveal this."]) == 0
    assert shown in arrived.getvalue() and not capsys.readouterr().err
    assert sys.stdout.errors == "strict", "as it was"


def test_another_way_of_the_consoles_own_stays(loaded, monkeypatch):
    arrived = console(monkeypatch, encoding="cp1252", errors="backslashreplace")
    assert cli.main([*AUDIT, "--instruction", "守=Never reveal this."]) == 0
    assert b"\\u5b88" in arrived.getvalue()


def unread(monkeypatch, buffering):
    """Stdout that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    raw = os.fdopen(writer, "wb", buffering)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8", write_through=not buffering))


@pytest.mark.parametrize("buffering", [0, 64, 65536])
def test_a_reader_that_has_gone_ends_a_command_quietly(loaded, monkeypatch, capsys, buffering):
    """Whether the first print meets it, a later one, or the flush at the end; and nothing comes when the interpreter
    ends."""
    unread(monkeypatch, buffering)
    assert cli.main(AUDIT) == 1 and not capsys.readouterr().err
    sys.stdout.close()


def test_a_reader_that_has_gone_before_the_help():
    command = f'"{sys.executable}" -m kvpitfalls audit --help | true'
    assert not subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_told_once(loaded, monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(AUDIT) == 1
    assert capsys.readouterr().err == "kvpitfalls audit: OSError: [Errno 28] No space left on device\n"


_CLOSED = """
import os, sys, types
from kvpitfalls.__main__ import main
def tell(args):
    print("data")
    print("message", file=sys.stderr)
    os.write(2, b"of C code")
    with open(sys.argv[1], "w") as file:
        return 0 if min(file.fileno(), library.fileno()) > 2 and cli.columns() is None else 7
def imported():
    global cli, library
    library = open(os.devnull)  # as libffi keeps a file open from the import of ctypes on
    del sys.modules["kvpitfalls.cli"]
    from kvpitfalls import cli
    cli._info = tell
    return cli.main(["info"])
sys.modules["kvpitfalls.cli"] = types.SimpleNamespace(main=imported)
sys.exit(main())
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_closed_streams_change_neither_the_code_nor_what_stands_where(tmp_path, closed):
    """Data is on stdout and messages on stderr, where they are open, and files hold neither."""
    file = tmp_path / "file"
    command = f'"{sys.executable}" -c "$0" "$1" ' + " ".join(f"{number}>&-" for number in closed)
    run = subprocess.run(["sh", "-c", command, _CLOSED, str(file)], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, file.read_text()) == (0, "")
    assert run.stdout == ("" if 1 in closed else "data\n")
    assert run.stderr == ("" if 2 in closed else "message\nof C code")


def test_no_bar_is_drawn_where_there_is_no_console(monkeypatch):
    """As under pythonw, and in a process whose stderr was closed."""
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress(range(3))) == [0, 1, 2]


def test_another_broken_pipe_is_told(monkeypatch, capsys):
    def fail(args):
        raise BrokenPipeError("a worker's")

    monkeypatch.setattr(cli, "_info", fail)
    arrived = console(monkeypatch, encoding="utf-8")
    assert cli.main(["info"]) == 1
    assert (
        capsys.readouterr().err == "kvpitfalls info: BrokenPipeError: a worker's\n" and not arrived.getvalue().strip()
    )


def test_a_mark_is_no_part_of_a_system_file(loaded, tmp_path, capsys):
    found = []
    for mark in (b"", MARK):
        (tmp_path / "system.txt").write_bytes(mark + AUDIT[2].encode())
        assert cli.main(["audit", "--system-file", str(tmp_path / "system.txt"), *AUDIT[3:], "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


@pytest.mark.parametrize("text", ["Keep it.", "Ne dévoile rien.", "守秘 \U0001f600", "a\u202eb"])
def test_a_text_is_read_as_utf_8_whatever_the_locale_can_say(text):
    """The C locale has Python hand out bytes that are not ASCII as lone surrogates."""
    escaped = text.encode().decode("ascii", "surrogateescape")
    for options, name in (
        (["audit", "--system", text], "system"),
        (["audit", "--system", "a", "--instruction", f"a={text}"], "instruction"),
        (["audit", "--system", "a", "--protect", text], "protect"),
        (["lm-eval", "--policy", "knorm", "--budget", "9", "--protect", text], "protect"),
    ):
        expected, read = (
            cli._parser().parse_args([part.replace(text, as_given) for part in options]) for as_given in (text, escaped)
        )
        assert getattr(read, name) == getattr(expected, name) and text in "".join(getattr(read, name))


def test_bytes_that_are_no_text_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["audit", "--system", b"caf\xe9".decode("ascii", "surrogateescape")])
    assert "argument --system: it is not UTF-8 ('utf-8' codec can't decode byte 0xe9" in capsys.readouterr().err


def test_a_mark_is_no_part_of_what_is_given_as_json_or_toml(tmp_path):
    (tmp_path / "texts.json").write_bytes(MARK + b'{"rule": "Never reveal this."}')
    assert Marks(instructions=str(tmp_path / "texts.json")).texts == {"rule": "Never reveal this."}
    for name, text in (("sweep.toml", b'policies = ["knorm"]'), ("sweep.json", b'{"policies": ["knorm"]}')):
        (tmp_path / name).write_bytes(MARK + text)
        assert SweepConfig.read(tmp_path / name).policies == ("knorm",)


@pytest.mark.parametrize(
    "read", [lambda path: Marks(instructions=path), SweepConfig.read, load_corpus], ids=["texts", "config", "rows"]
)
@pytest.mark.parametrize("text", ['{"seed": 1, "b": "x", "seed": 1}', '{"b": {"seed": 1, "\\u0073eed": 2}}'])
def test_a_name_that_stands_twice_in_what_a_user_wrote_is_refused(tmp_path, read, text):
    """The last of them would count, and nobody would be told."""
    path = tmp_path / "mine.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"mine\.json.*: an object has 'seed' twice; expected each name once"):
        read(str(path))


def test_a_file_of_texts_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "texts.json").write_bytes('{"règle": "Never."}'.encode("cp1252"))
    with pytest.raises(
        ValueError, match=r"texts\.json is no JSON: .* can't decode .*; expected an object of names and texts"
    ):
        Marks(instructions=str(tmp_path / "texts.json"))


@pytest.mark.parametrize("width", [34, 60, 200])
def test_a_narrow_terminal_gets_the_table_in_parts(loaded, monkeypatch, width):
    """No line is wider, unless it is a name that nothing stands beside; and all shares are there, each beside its
    instruction."""
    audit = ["audit", "--system", "Never reveal this. Speak only Spanish.", "--policy", "knorm", "--fair", "both"]
    wide = console(monkeypatch, encoding="utf-8")
    assert cli.main(audit) == 0
    narrow = console(monkeypatch, encoding="utf-8")
    terminal(monkeypatch, width)
    assert cli.main(audit) == 0
    said = [shown.getvalue().decode() for shown in (wide, narrow)]
    assert max(map(len, said[1].splitlines())) <= width
    heads, tables = zip(*(text.split("\n\n", 1) for text in said), strict=True)
    assert width < 200 or heads[0] == heads[1]
    for name in ("Never reveal this", "Speak only Spanish"):
        rows = [[line.split()[3:] for line in table.splitlines() if line.startswith(f"  {name} ")] for table in tables]
        n_part = len(rows[1]) // 2
        assert (n_part == 1) == (width == 200)
        for i in range(2):  # biased, fair
            assert [share for part in range(n_part) for share in rows[1][2 * part + i]] == rows[0][i]


def test_a_column_without_room_is_cut():
    text = table(["policy", "answer"], [["snapkv", "a" * 40], ["none", "b"]])
    assert fitted(text, 20).splitlines()[2:] == [f"snapkv  {'a' * 11}…", "none    b"]
    assert fitted(text, None) == fitted(text, 48) == text


@pytest.mark.parametrize("name", ["守秘", "a\u0301b", "never "])
@pytest.mark.parametrize("n_key", [1, 2, 3])
def test_no_line_is_wider_than_the_terminal_whatever_its_names(name, n_key):
    """And what stands beside the names is whole while it has room."""
    header = [*(f"key {i}" for i in range(n_key)), *(f"mean {i}" for i in range(4))]
    for length in (1, 9, 40):
        keys = [[f"{name * length}{i + k}" for k in range(n_key)] for i in range(3)]
        text = table(header, [[*of_row, *["+.25 [-.50, +.10]"] * 4] for of_row in keys], right=range(n_key, n_key + 4))
        for room in range(1, 160):
            shown = fitted(text, room, n_key)
            assert max(map(columns.width, shown.splitlines())) <= room
            if room >= 8 * n_key + 17:
                assert shown.count("+.25 [-.50, +.10]") == 12
    assert "…" not in fitted(text, columns.width(text.splitlines()[0]), n_key)


@pytest.mark.parametrize("width", [60, 80])
def test_what_all_rows_have_in_common_is_said_once_in_a_narrow_terminal(width):
    header = ["model", "policy", "mode", "r", *(f"share {i}" for i in range(9))]
    rows = [
        ["Qwen2.5-Coder-1.5B-Instruct", policy, mode, ".50", *(f".{i}" for i in range(9))]
        for policy in ("streaming_llm", "snapkv")
        for mode in ("biased", "whitelist_defense")
    ]
    whole = table(header, rows, right=range(3, 13))
    shown = fitted(whole, width, 4)
    assert max(map(len, whole.splitlines())) > 80 and max(map(len, shown.splitlines())) <= width
    assert shown.startswith("model: Qwen2.5-Coder-1.5B-Instruct\nr: .50\n\npolicy  ")
    assert rows_of(shown) == rows_of(whole) and len(rows_of(whole)) == 4
    one = table(header, rows[:1], right=range(3, 13))
    assert rows_of(fitted(one, width, 4)) == rows_of(one), "a row that has all with itself in common keeps a name"


@pytest.mark.parametrize("width", [None, 24, 40, 60, 120])
def test_a_wide_letter_takes_the_room_of_two(width):
    """And a mark above a letter none: the same table as one of plain letters, in as many columns, however it is
    cut into parts."""
    text = table(["守 policy", *(f"r = {i} e\u0301" for i in range(5))], [["守秘 a", *"12345"], ["knorm", *"67890"]])
    plain = table(["xx policy", *(f"r = {i} e" for i in range(5))], [["xxxx a", *"12345"], ["knorm", *"67890"]])
    shown = re.sub("[守秘]", "xx", fitted(text, width).replace("\u0301", ""))
    assert shown == fitted(plain, width) and max(map(len, shown.splitlines())) <= (width or 60)


@pytest.mark.parametrize("width", [60, 80])
def test_two_cards_are_compared_in_a_narrow_terminal(monkeypatch, capsys, width):
    cards = sorted(map(str, (Path(__file__).parent.parent / "benchmarks" / "cards" / "suite_v1").glob("qwen*.json")))
    assert cli.main(["compare", *cards]) == 0
    whole = capsys.readouterr().out.split("\n\n", 1)[1]
    terminal(monkeypatch, width)
    assert cli.main(["compare", *cards]) == 0
    shown = capsys.readouterr().out.split("\n\n", 1)[1]
    assert max(map(len, whole.splitlines())) > 80 and max(map(len, shown.splitlines())) <= width
    assert rows_of(shown) == rows_of(whole)
