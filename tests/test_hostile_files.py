"""Files that are cut, changed, forged or in disguise are refused by one sentence, never executed; writes that fail
leave what was there."""

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import build, ids

import kvpitfalls as kvp
from kvpitfalls.experiments import records
from kvpitfalls.hf.load import load
from kvpitfalls.hf.save import _digest

# What a refused file may raise, whatever is in it.
REFUSED = (ValueError, FileNotFoundError)


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A cache of a padded batch, and its file."""
    path = tmp_path_factory.mktemp("saved") / "prompt.safetensors"
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :3] = 0
    with kvp.wrap(model, "snapkv", compression_ratio=0.6, fair=True) as handle:
        handle.compress(ids(), mask, spans={"a": (4, 10), "b": (10, 18)}).save(path)
    return path


def refused(path, model, match="."):
    with pytest.raises(REFUSED, match=match) as error:
        kvp.load_cache(path, model)
    assert type(error.value) in REFUSED and str(path) in str(error.value) and "\n" not in str(error.value)


def parts(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_a_cache_cut_anywhere_is_refused(saved, model, tmp_path):
    data, path = saved.read_bytes(), tmp_path / "cut"
    header = 8 + int.from_bytes(data[:8], "little")
    cuts = {
        0,
        1,
        7,
        8,
        9,
        header - 1,
        header,
        header + 1,
        len(data) // 2,
        len(data) - 1,
        *range(8, header, 211),
        *range(header, len(data), 4096),
    }
    for n in cuts:
        path.write_bytes(data[:n])
        refused(path, model, "is broken")
    path.write_bytes(data + b"\0")
    refused(path, model, "is broken")


def test_a_cache_with_a_flipped_bit_is_refused(saved, model, tmp_path):
    """In the length, the header and the tensors: nothing that differs from what was saved loads."""
    data, path = saved.read_bytes(), tmp_path / "flipped"
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*range(8), *range(8, header, 37), *range(header, len(data), 997), len(data) - 1]
    for n in places:
        changed = bytearray(data)
        changed[n] ^= 1 << (n % 8)
        path.write_bytes(changed)
        refused(path, model)


def test_a_bit_of_a_value_is_seen_by_the_checksum(saved, model, tmp_path):
    changed = bytearray(saved.read_bytes())
    changed[-3] ^= 1
    path = tmp_path / "flipped"
    path.write_bytes(changed)
    refused(path, model, "is broken: its content does not have the sha256 that it names")


def forge(path, tensors, metadata, about):
    """A file whose checksum fits what it holds."""
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(tensors, path, {**metadata, "about": text, "sha256": _digest(text, tensors)})
    return path


def changed_about(about, **changes):
    return {**about, **changes}


def with_plain(about, **changes):
    layers = [{**layer, "plain": {**layer["plain"], **changes}} for layer in about["layers"]]
    return {**about, "layers": layers}


def without_positions(tensors, about, **changes):
    """As of layers of which nothing was evicted."""
    tensors = {name: x for name, x in tensors.items() if not name.endswith("_before")}
    n_slot = tensors["layers.0.keys"].shape[2]
    plain = with_plain(about, pos_before=None, live_before=None, n_after=0, seen=n_slot, prompt_shape=None)
    return tensors, {**with_plain(plain, **changes), "tensors": sorted(tensors)}


FORGED = {
    "no object": lambda t, a: (t, "[]"),
    "no JSON": lambda t, a: (t, "{"),
    "nested": lambda t, a: (t, "[" * 100_000),
    "digits": lambda t, a: (t, "9" * 5000),
    "a part more": lambda t, a: (t, {**a, "more": 1}),
    "a part less": lambda t, a: (t, {k: v for k, v in a.items() if k != "valid"}),
    "a tensor less": lambda t, a: ({k: v for k, v in t.items() if k != "layers.0.keys"}, a),
    "valid of words": lambda t, a: (t, {**a, "valid": [["a", "b"], [0, 30]]}),
    "spans of rows": lambda t, a: (t, {**a, "spans": [[1], [2]]}),
    "spans of three rows": lambda t, a: (t, {**a, "spans": a["spans"][:1] * 3}),
    "peak of a word": lambda t, a: (t, {**a, "peak_bytes": "many"}),
    "layers of numbers": lambda t, a: (t, {**a, "layers": [1, 2, 3]}),
    "a method": lambda t, a: (t, with_plain(a, update=1)),
    "a class": lambda t, a: (t, with_plain(a, __class__="str")),
    "seen of a word": lambda t, a: (t, with_plain(a, seen="all")),
    "seen too few": lambda t, a: (t, with_plain(a, seen=3)),
    "another index": lambda t, a: (t, with_plain(a, index=7)),
    "no prompt": lambda t, a: (t, with_plain(a, prompt_shape=None)),
    "a key that is a digit and no number": lambda t, a: (t, with_plain(a, prompt_shape={"²": 1})),
    "a key of too many digits": lambda t, a: (t, with_plain(a, prompt_shape={"9" * 5000: 1})),
    "the shape of a prompt of which nothing went": lambda t, a: without_positions(t, a, prompt_shape=[2, 2, 3]),
    "a held budget": lambda t, a: (t, with_plain(a, held=[1])),
    "keys of words": lambda t, a: (
        {k: v for k, v in t.items() if k != "layers.0.keys"},
        {**with_plain(a, keys="k"), "tensors": sorted(set(t) - {"layers.0.keys"})},
    ),
    "flat keys": lambda t, a: ({**t, "layers.0.keys": t["layers.0.keys"].flatten()}, a),
    "other values": lambda t, a: ({**t, "layers.0.values": t["layers.0.values"][:, :1].contiguous()}, a),
    "positions of half words": lambda t, a: ({**t, "layers.1.pos_before": t["layers.1.pos_before"].int()}, a),
    "positions outside": lambda t, a: ({**t, "layers.1.pos_before": t["layers.1.pos_before"] + 1000}, a),
    "positions below": lambda t, a: ({**t, "layers.1.pos_before": t["layers.1.pos_before"] - 1000}, a),
    "live numbers": lambda t, a: ({**t, "layers.1.live_before": t["layers.1.live_before"].int()}, a),
    "a prompt of more tokens than came": lambda t, a: (t, with_plain(a, n_prompt=10**9)),
    "a prompt of fewer tokens than none": lambda t, a: (t, with_plain(a, n_prompt=-1)),
    "more newest tokens than slots": lambda t, a: (t, with_plain(a, n_after=10**9)),
    "newest tokens that are no number": lambda t, a: (t, with_plain(a, n_after="2")),
    "fewer positions than slots": lambda t, a: (t, with_plain(a, n_after=2)),
    "a tensor elsewhere": lambda t, a: ({**t, "../../x": torch.ones(1)}, {**a, "tensors": sorted([*t, "../../x"])}),
    "a tensor in a number": lambda t, a: (
        {**t, "layers.0.seen.0": torch.ones(1)},
        {**a, "tensors": sorted([*t, "layers.0.seen.0"])},
    ),
    "a layer too far": lambda t, a: (
        {**t, "layers.9.keys": torch.ones(1)},
        {**a, "tensors": sorted([*t, "layers.9.keys"])},
    ),
    "another fingerprint": lambda t, a: (t, {**a, "fingerprint": "0" * 64}),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_cache_is_refused(saved, model, tmp_path, name):
    tensors, metadata = parts(saved)
    kvp.load_cache(forge(tmp_path / "as it was", tensors, metadata, metadata["about"]), model)
    refused(
        forge(tmp_path / "forged", *_reordered(FORGED[name](tensors, json.loads(metadata["about"])), metadata)), model
    )


def test_a_forged_window_is_refused(tmp_path):
    sliding, path = build("gemma3_text"), tmp_path / "prompt.safetensors"
    with kvp.wrap(sliding, "knorm", compression_ratio=0.6) as handle:
        handle.compress(ids()).save(path)
    tensors, metadata = parts(path)
    tensors["layers.0.cumulative_length.7"] = torch.ones(1)
    about = {**json.loads(metadata["about"]), "tensors": sorted(tensors)}
    about["layers"][0]["plain"]["cumulative_length"] = []
    refused(forge(path, tensors, metadata, about), sliding)


def _reordered(made, metadata):
    return made[0], metadata, made[1]


class Bomb:
    """Unpickling it would leave a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["cache.safetensors", "model.gguf", "cache.pt", "cache.pkl"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_in_disguise_is_never_executed(model, tmp_path, name, zipped):
    path, trace = tmp_path / name, tmp_path / "executed"
    if zipped:
        torch.save(Bomb(trace), path)
    else:
        path.write_bytes(pickle.dumps(Bomb(trace)))
    refused(path, model, "is broken, or not a safetensors file")
    if path.suffix == ".gguf":
        with pytest.raises(ValueError, match="does not start with GGUF"):
            load(str(path))
    assert not trace.exists()


def test_places_that_are_no_file_are_refused(model, tmp_path, saved):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    for path in (
        tmp_path,
        tmp_path / "fifo",
        tmp_path / "loop",
        tmp_path / "gone",
        Path("/dev/zero"),
        Path(f"{tmp_path}/\0"),
        tmp_path / ("x" * 300),
    ):
        with pytest.raises((FileNotFoundError, OSError), match=r"does not exist or is not a file|too long"):
            kvp.load_cache(path, model)
    (tmp_path / "link").symlink_to(saved)
    assert (
        kvp.load_cache(tmp_path / "link", model).report()["kept_share"]
        == kvp.load_cache(saved, model).report()["kept_share"]
    )


def test_saving_over_a_link_replaces_the_link(model, tmp_path, saved):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "link").symlink_to(victim)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        handle.compress(ids()).save(tmp_path / "link")
    assert victim.read_text() == "mine" and not (tmp_path / "link").is_symlink()


def test_a_loaded_cache_does_not_change_with_its_file(saved, model, tmp_path):
    path = tmp_path / "prompt.safetensors"
    shutil.copy(saved, path)
    cache, same = kvp.load_cache(path, model), kvp.load_cache(saved, model)
    with path.open("r+b") as file:  # in place, as cp and rsync --inplace write
        file.truncate(100)
    for one, two in zip(cache.kept_layers, same.kept_layers, strict=True):
        assert torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values) and torch.equal(one.pos, two.pos)


@contextlib.contextmanager
def no_file_over(n_byte):
    """Writes beyond so many bytes of a file fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_byte, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def read_only_folder():
    """A folder with a cache and a record in it that this process may not write to, even if it is root's: it is someone
    else meanwhile."""
    folder, root = Path(tempfile.mkdtemp()), os.geteuid() == 0
    (folder / "prompt.safetensors").write_bytes(b"a cache")
    records.append(folder, [{"key": 1}])
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_full_disk_leaves_the_old_cache(model, saved, tmp_path):
    path = tmp_path / "prompt.safetensors"
    shutil.copy(saved, path)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(ids())
        with (
            no_file_over(5000),
            pytest.raises(OSError, match=r"the cache could not be written to .* expected a folder with space"),
        ):
            cache.save(path)
    assert path.read_bytes() == saved.read_bytes() and os.listdir(tmp_path) == [path.name]


def test_folders_that_are_not_there_or_not_ours(model, tmp_path):
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(ids())
    with pytest.raises(FileNotFoundError, match=r"cannot be written: .*none is no folder; expected one"):
        cache.save(tmp_path / "none" / "prompt.safetensors")
    with read_only_folder() as folder:
        with pytest.raises(OSError, match="could not be written to"):
            cache.save(folder / "prompt.safetensors")
        with pytest.raises(PermissionError):
            records.write_meta(folder, {})
        with pytest.raises(PermissionError), records.locked(folder):
            pass
        assert (folder / "prompt.safetensors").read_bytes() == b"a cache" and records.read_records(folder) == [
            {"key": 1}
        ]
        assert len(os.listdir(folder)) == 2


def test_a_full_disk_leaves_the_earlier_records(tmp_path):
    one, two = [{"key": 1}, {"key": 2}], [{"key": 3, "output": "x" * 5000}]
    records.append(tmp_path, one)
    before = (tmp_path / records.RECORDS).read_bytes()
    with (
        no_file_over(1000),
        pytest.raises(OSError, match=r"of \d+ bytes were written to .*records.jsonl; expected all. Free some space"),
    ):
        records.append(tmp_path, two)
    assert records.read_records(tmp_path) == one
    assert records.recover(tmp_path, [[{"key": 1}, {"key": 2}], [{"key": 3}]]) == 1
    assert (tmp_path / records.RECORDS).read_bytes() == before
    records.write_meta(tmp_path, {"same": {}, "items": 1})
    size = (tmp_path / records.RECORDS).stat().st_size
    with no_file_over(size), pytest.raises(OSError) as full:  # not a byte has room
        records.append(tmp_path, two)
    assert full.value.filename == str(tmp_path / records.RECORDS) and records.read_records(tmp_path) == one
    with no_file_over(3), pytest.raises(OSError):
        records.write_meta(tmp_path, {"same": {}, "items": 1, "more": "x" * 100})
    assert records.read_meta(tmp_path) == {"same": {}, "items": 1} and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("fault", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_by_name(tmp_path, monkeypatch, fault):
    """Lustre's is one, unless it is mounted otherwise."""

    def refuse(*given):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(records.fcntl, "flock", refuse)
    with pytest.raises(OSError, match=rf"\.lock cannot be locked \({os.strerror(fault)}\)"), records.locked(tmp_path):
        pass


BAD_LINES = [
    b"3\n",
    b"[]\n",
    b'"x"\n',
    b"nul\n",
    b"\xff\n",
    b"[" * 100_000 + b"\n",
    b"9" * 5000 + b"\n",
    b"{}{}\n",
    b"\0\n",
    b"\n",
]


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line[:8]))
def test_records_that_are_no_objects_are_refused(tmp_path, line):
    (tmp_path / records.RECORDS).write_bytes(b'{"key": 1}\n' + line)
    with pytest.raises(
        ValueError, match=r"records\.jsonl, record 2, is no JSON object; expected one object a line"
    ) as error:
        records.read_records(tmp_path)
    assert type(error.value) is ValueError


@pytest.mark.parametrize(
    "text",
    [
        b"3",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"9" * 5000,
        b"",
        b"{}",
        b'{"same": []}',
        b'{"same": {}, "items": 1, "sessions": 3}',
        b'{"same": {}}',
    ],
)
def test_a_description_of_a_sweep_that_is_none(tmp_path, text):
    (tmp_path / records.META).write_bytes(text)
    with pytest.raises(
        ValueError, match=r"run_meta\.json is no description of a sweep; expected the file that a sweep wrote"
    ) as error:
        records.read_meta(tmp_path)
    assert type(error.value) is ValueError


def test_records_cut_anywhere_give_a_beginning(tmp_path):
    whole = [{"key": i, "output": "é\n☃" * i} for i in range(4)]
    records.append(tmp_path, whole)
    data = (tmp_path / records.RECORDS).read_bytes()
    for n in range(len(data) + 1):
        (tmp_path / records.RECORDS).write_bytes(data[:n])
        recorded = records.read_records(tmp_path)
        assert recorded == whole[: len(recorded)] and len(recorded) == data[:n].count(b"\n")


def test_gguf_files_that_are_broken(tmp_path, monkeypatch):
    """Cut and changed behind the magic: transformers' readers fail in many ways, which become one."""
    monkeypatch.setenv("KVPITFALLS_CACHE", str(tmp_path / "cache"))
    for n, data in enumerate(
        [b"", b"\x03\0\0\0", b"\x03\0\0\0" + b"\xff" * 16, b"\x03\0\0\0" + b"\0" * 16, b"\x63\0\0\0" + b"\0" * 64]
    ):
        path = tmp_path / f"m{n}.gguf"
        path.write_bytes(b"GGUF" + data)
        with pytest.raises(
            ValueError, match=rf"m{n}\.gguf cannot be read; expected a GGUF file of a model that transformers knows"
        ) as error:
            load(str(path))
        assert type(error.value) is ValueError
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()], "nothing half-made is left"
    link = tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "nowhere")
    for path in (link, tmp_path / ".." / "none.gguf"):
        with pytest.raises(FileNotFoundError, match="does not exist; expected a GGUF file"):
            load(str(path))
