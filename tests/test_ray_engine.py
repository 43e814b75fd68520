"""The same sweep on Ray workers: the same records, also when a worker is killed."""

import os
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest
import tiny_sweep

from kvpitfalls.experiments import ray_engine, records
from kvpitfalls.experiments.corpus import load_corpus
from kvpitfalls.experiments.plan import plan
from kvpitfalls.experiments.sweep import sweep


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


def kill_workers(path: Path, ended: threading.Event, killed: list[int]) -> None:
    """Kill the first worker that is at a batch; after a new record another one, if any is still at work by then."""
    size = path.stat().st_size
    while not ended.is_set() and len(killed) < 2:
        pids = [pid for pid in working() if pid not in killed]
        if pids and (not killed or path.stat().st_size > size):
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])
        time.sleep(0.002)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds Ray's workers by /proc")
def test_a_sweep_begun_here_goes_on_on_two_workers_that_are_killed(local, model, tmp_path):
    lines = (local / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run_meta.json").write_bytes((local / "run_meta.json").read_bytes())
    path, ended, killed = tmp_path / "records.jsonl", threading.Event(), []
    path.write_bytes(b"".join(lines[:20]))
    killer = threading.Thread(target=kill_workers, args=(path, ended, killed))
    killer.start()
    try:
        done = sweep(small(model), tmp_path, engine="ray", workers=2)
    finally:
        ended.set()
        killer.join()
    assert killed, "no worker was killed, so nothing was tested"
    assert done["items"] == len(lines) and done["failed"] == 0 and 14 < done["resumed_at"] <= 20
    assert tiny_sweep.untimed(tmp_path) == tiny_sweep.untimed(local)
    assert [s["engine"] for s in records.read_meta(tmp_path)["sessions"]] == ["local", "ray"]
    assert not working(), "Ray is stopped with the sweep"


@pytest.fixture(scope="module")
def session():
    import ray

    ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


def one_batch(model, same):
    return ray_engine.run_ray(small(model), load_corpus(), list(plan(small(model), load_corpus()))[:1], same, None)


def test_a_worker_that_is_otherwise_refuses(model, local, session):
    same = {**records.read_meta(local)["same"], "core_isa": "another"}
    with pytest.raises(ValueError, match="begun with core_isa = 'another' and would go on with"):
        next(one_batch(model, same))
    with pytest.raises(ValueError, match="workers is 2, but Ray is running in this process already"):
        next(ray_engine.run_ray(small(model), load_corpus(), [], {}, 2))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_worker_keeps_its_model_from_batch_to_batch(session, device):
    """A GPU's, too: the session is told that there is one."""
    import ray

    task = ray_engine._task(device, lambda: os.getpid())
    assert len({ray.get(task.remote()) for _ in range(3)}) == 1


def test_a_batch_that_kills_every_worker_is_one_sentence(model, local, session, monkeypatch):
    def die(*given):  # defined here, so that Ray sends it by value
        os._exit(1)

    monkeypatch.setattr(ray_engine, "RETRIES", 0)  # each takes a new process
    monkeypatch.setattr(ray_engine, "_run", die)
    with pytest.raises(RuntimeError, match=r"Ray gave up on a batch \(.*\); what is recorded is kept"):
        next(one_batch(model, records.read_meta(local)["same"]))


def test_a_sweep_that_is_broken_off_leaves_few_batches_to_somebody_elses_session(model, session, monkeypatch, tmp_path):
    def work(_, batch):  # defined here, so that Ray sends it by value
        Path(tmp_path, uuid.uuid4().hex).touch()
        return []

    monkeypatch.setattr(ray_engine, "_run", work)
    batches = list(plan(small(model), load_corpus()))
    most = 1 + ray_engine.AHEAD  # the one whose records came, and those handed over: the session has one processor
    assert len(batches) > most
    made = ray_engine.run_ray(small(model), load_corpus(), batches, {}, None)
    next(made)
    made.close()
    ray_engine._get(ray_engine._task("cpu", lambda: []).remote())  # waits its turn behind what is left
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) <= most


@pytest.mark.parametrize("slow", [0, 2])
def test_records_come_in_the_order_of_the_plan_whichever_batch_is_slow(model, session, monkeypatch, slow):
    batches = list(plan(small(model), load_corpus()))

    def work(_, batch):
        time.sleep(0.2 * (batch == batches[slow]))
        return [{"batch": repr(batch)}]

    monkeypatch.setattr(ray_engine, "_run", work)
    monkeypatch.setattr(ray_engine, "_n_at_once", lambda device: 4)
    made = ray_engine.run_ray(small(model), load_corpus(), batches, {}, None)
    assert list(made) == [[{"batch": repr(batch)}] for batch in batches]


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
