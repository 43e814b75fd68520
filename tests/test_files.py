"""What is written to a file is there whole or not at all, and can be read by whom the user lets read it."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvpitfalls.experiments.records import META, write_meta
from kvpitfalls.files import cache_folder, made_once, whole

ROOT = Path(__file__).parents[1]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with whole(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    link, file = tmp_path / "link.json", tmp_path / "numbers.json"
    file.write_text("another's")
    link.symlink_to(file)
    with whole(link) as temporary:
        temporary.write_text("made")
    assert not link.is_symlink() and link.read_text() == "made" and file.read_text() == "another's"


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    """So is a device: /dev/null would be a file of numbers from then on, for all of the machine."""
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: read.append(pipe.read_text()))
    thread.start()
    with whole(pipe) as temporary:
        temporary.write_text("numbers")
    thread.join()
    assert read == ["numbers"] and pipe.is_fifo() and [*tmp_path.iterdir()] == [pipe]


_TELL = """
import os, sys
from kvpitfalls.files import made_once, whole
print("before")
with whole(sys.argv[1]) as temporary:
    temporary.write_text("made\\n")
print("after")
"""


@pytest.mark.parametrize("through_link", [False, True])
@pytest.mark.parametrize("mode", ["w", "a"])
def test_what_is_open_is_written_to_in_turn_whatever_it_is(tmp_path, mode, through_link):
    """stdout may be a file: the link /dev/stdout would be a file of numbers from then on, or what was printed before be
    overwritten. Here the link is one of this test, so that a fault harms no machine."""
    place = link = tmp_path / "link" if through_link else Path("/dev/fd/1")
    if through_link:
        link.symlink_to("/dev/fd/1")
    out = tmp_path / "out"
    out.write_text("old\n")
    with out.open(mode) as file:
        subprocess.run([sys.executable, "-c", _TELL, str(place)], check=True, stdout=file, cwd=ROOT)
    assert out.read_text() == {"w": "", "a": "old\n"}[mode] + "before\nmade\nafter\n"
    assert not through_link or os.readlink(link) == "/dev/fd/1"


def test_a_full_device_is_told_by_name_and_links_that_lead_nowhere_are_replaced(tmp_path):
    for full in ("/dev/full", "/dev/fd/{number}"):
        with open("/dev/full", "wb") as device:
            path = full.format(number=device.fileno())
            with pytest.raises(OSError, match=path), whole(path) as temporary:
                temporary.write_text("made")
    (tmp_path / "loop").symlink_to("loop")
    with whole(tmp_path / "loop") as temporary:
        temporary.write_text("made")
    assert (tmp_path / "loop").read_text() == "made"


@pytest.mark.parametrize(
    ("where", "kind", "fault"),
    [
        ("none/page.html", FileNotFoundError, "none/page.html cannot be written: .*none is no folder; expected one"),
        ("file/page.html", FileNotFoundError, "file/page.html cannot be written: .*file is no folder; expected one"),
        ("", IsADirectoryError, "is a folder; expected the path of a file"),
        ("a\0b", ValueError, r"path is '.*a\\x00b'; expected the path of a file"),
    ],
)
def test_a_place_where_no_file_can_be_is_named_as_it_was_given(tmp_path, where, kind, fault):
    (tmp_path / "file").write_text("old")
    with pytest.raises(kind, match=fault) as raised, whole(tmp_path / where):
        raise AssertionError("it was tried")
    assert "/." not in str(raised.value) and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("fault", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("is_read_only", [False, True])
def test_a_disk_s_fault_is_told_of_the_file_that_was_asked_for(tmp_path, monkeypatch, fault, is_named, is_read_only):
    """A write names no file, and opening one that of this package's own, which nobody has heard of. A disk that is only
    read refuses to remove a file that is not there."""

    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    path = tmp_path / "page.html"
    if is_read_only:
        monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="page") as raised, whole(path) as temporary:
        raise OSError(fault, os.strerror(fault), *([str(temporary)] if is_named else []))
    assert (raised.value.errno, raised.value.filename) == (fault, str(path)) and [*tmp_path.iterdir()] == []
    with pytest.raises(OSError, match="other") as raised, whole(path):
        raise OSError(fault, os.strerror(fault), "other")
    assert raised.value.filename == "other"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_others_may_read_what_the_user_lets_them(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_meta(tmp_path, {"same": {}})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / META).stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_who_may_read_a_file_may_read_what_takes_its_place_and_nobody_else(tmp_path, mode):
    path = tmp_path / "page.html"
    path.write_text("old")
    path.chmod(mode)
    with whole(path) as temporary:
        temporary.write_text("new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127])
def test_a_name_may_be_as_long_as_the_system_lets_it(tmp_path, name):
    with whole(tmp_path / name) as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_kept_is_made_once_whole_or_not_at_all(tmp_path):
    folder, begun = tmp_path / "cache" / "tables", threading.Barrier(4)

    def make(into):
        (into / "one").write_text(str(into))
        begun.wait()  # all are at it
        (into / "two").write_text(str(into))

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: made_once(folder, make), range(4))) == {folder}
    assert (folder / "one").read_text() == (folder / "two").read_text() and list(folder.parent.iterdir()) == [folder]
    assert made_once(folder, None) == folder, "it is there"

    def fail(into):
        (into / "one").touch()
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        made_once(folder.with_name("others"), fail)
    assert list(folder.parent.iterdir()) == [folder]
    with pytest.raises(
        OSError, match=r"cannot be made \(\w.*\); expected .*KVPITFALLS_CACHE to name a folder that can be"
    ):
        made_once(folder / "one" / "below", make)


_WRITER = """
import sys, time
from pathlib import Path
from kvpitfalls.files import made_once

def make(into):
    (into / "one").touch()
    print(into, flush=True)
    time.sleep(600)

made_once(Path(sys.argv[1]), make)
"""


def test_what_a_killed_process_left_of_a_folder_goes_and_what_a_living_one_writes_stays(tmp_path):
    folder, other = tmp_path / "cache" / "tables", tmp_path / "cache" / "tables-2.abc.part"
    other.mkdir(parents=True)

    def begun():
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, folder], stdout=subprocess.PIPE, text=True)
        return writer, Path(writer.stdout.readline().strip())

    def end(writer):
        writer.kill()
        writer.communicate()

    (killed, left), (living, written) = begun(), begun()
    end(killed)
    assert left.is_dir() and made_once(folder, lambda into: (into / "one").touch()) == folder
    assert (written / "one").is_file(), "its process lives"
    end(living)
    shutil.rmtree(folder)
    made_once(folder, lambda into: None)
    assert sorted(folder.parent.iterdir()) == [folder, other], "nobody filled one any more"


def test_a_folder_is_made_where_the_disk_has_no_locks_and_nothing_is_taken_for_left(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    left = tmp_path / "tables.abc.part"
    left.mkdir()
    assert made_once(tmp_path / "tables", lambda into: None).is_dir() and left.is_dir()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    for name in ("HOME", "KVPITFALLS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the system does not know the user
    with pytest.raises(OSError, match=r"^the user's home folder is not known; expected .*KVPITFALLS_CACHE to name"):
        cache_folder()
    monkeypatch.setenv("KVPITFALLS_CACHE", "/tmp/own")
    assert cache_folder() == Path("/tmp/own")
