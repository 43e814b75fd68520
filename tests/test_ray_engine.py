"""The same sweep on Ray workers: the same records, also when a worker is killed."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import tiny_sweep

from kvpitfalls.experiments import records
from kvpitfalls.experiments.sweep import sweep

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def model(tmp_path_factory, smollm2):
    return tiny_sweep.save_tiny_model(tmp_path_factory.mktemp("tiny"), smollm2[1])


def small(model):
    return tiny_sweep.config(model, n_prompts=2, batch_size=6)


@pytest.fixture(scope="module")
def local(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("local")
    assert sweep(small(model), folder)["failed"] == 0
    return folder


def children(pid: int) -> list[int]:
    """All processes below one, by /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    found = [pid]
    for above in found:
        found += [child for child, parent in parents.items() if parent == above]
    return found[1:]


def working() -> list[int]:
    """Ray workers of this process that are at a batch."""
    names = {}
    for pid in children(os.getpid()):
        try:
            names[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [pid for pid, name in names.items() if name.startswith(b"ray::_run")]


def kill_one(path: Path, killed: list[int]) -> None:
    """When there is a new record, kill a worker that is at another batch."""
    deadline, size = time.monotonic() + 240, path.stat().st_size
    while time.monotonic() < deadline and not killed:
        if path.stat().st_size > size and (pids := working()):
            os.kill(pids[-1], signal.SIGKILL)
            killed.append(pids[-1])
        time.sleep(0.002)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds Ray's workers by /proc")
def test_a_sweep_begun_here_goes_on_on_two_workers_one_of_them_killed(local, model, tmp_path):
    lines = (local / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run_meta.json").write_bytes((local / "run_meta.json").read_bytes())
    path, killed = tmp_path / "records.jsonl", []
    path.write_bytes(b"".join(lines[:20]))
    killer = threading.Thread(target=kill_one, args=(path, killed))
    killer.start()
    done = sweep(small(model), tmp_path, engine="ray", workers=2)
    killer.join()
    assert killed, "no worker was killed, so nothing was tested"
    assert done["items"] == len(lines) and done["failed"] == 0 and 14 < done["resumed_at"] <= 20
    assert tiny_sweep.untimed(tmp_path) == tiny_sweep.untimed(local)
    assert [s["engine"] for s in records.read_meta(tmp_path)["sessions"]] == ["local", "ray"]
    assert not working(), "Ray is stopped with the sweep"


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({"engine": "slurm"}, {}, "engine is 'slurm'; expected one of local, ray"),
        ({"workers": 2}, {}, "workers is 2, with the engine 'local'"),
        ({"engine": "ray", "workers": 0}, {}, "workers is 0; expected a whole number"),
        ({"engine": "ray"}, {"device": "cuda:1"}, "expected 'cuda' with the engine 'ray'"),
    ],
)
def test_bad_engines_are_refused(model, tmp_path, given, changes, message):
    with pytest.raises(ValueError, match=message):
        sweep(tiny_sweep.config(model, **changes), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_missing_ray_is_one_sentence(model, tmp_path, monkeypatch):
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    with pytest.raises(ImportError, match=r"needs the package ray; expected pip install 'kvpitfalls\[ray\]'"):
        sweep(tiny_sweep.config(model), tmp_path / "out", engine="ray")
