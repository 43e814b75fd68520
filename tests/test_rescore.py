"""Rescoring: other scores for the same answers, nothing else, and the sweep that was there stays as it is."""

import json
import shutil

import pytest
import tiny_sweep

from kvpitfalls import cli
from kvpitfalls.experiments import records, scenario
from kvpitfalls.experiments import rescore as rescore_module
from kvpitfalls.experiments.rescore import rescore
from kvpitfalls.experiments.sweep import sweep

WAYS = {
    "answers": {},
    "probes": {"kinds": ["probe"], "n_prompts": 2},
    "turns": {
        "kinds": ["turns"],
        "modes": ["biased"],
        "attacks": ["verbatim-1"],
        "n_prompts": 1,
        "orders": ["defense_first"],
        "max_new_tokens": {"turns": 4},
        "compression_ratios": [0.5],
    },
}


@pytest.fixture(scope="module", params=WAYS)
def made(request, tmp_path_factory, tiny_model_folder, tiny_model_loaded_once):
    """A sweep's folder and its config."""
    config = tiny_sweep.config(tiny_model_folder, **WAYS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    assert sweep(config, folder)["failed"] == 0
    return folder, config


@pytest.fixture(scope="module")
def answered(tmp_path_factory, tiny_model_folder, tiny_model_loaded_once):
    """The same of answers alone."""
    config = tiny_sweep.config(tiny_model_folder, n_prompts=3, compression_ratios=[0.5])
    folder = tmp_path_factory.mktemp("answered")
    assert sweep(config, folder)["failed"] == 0
    return folder, config


def contents(folder) -> dict:
    """Bytes of a folder's files."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def copy(folder, to, change=lambda record: record, n=None, **same):
    """A sweep's folder with other records, the first ``n``, or with another description of what they were made with."""
    to.mkdir()
    made = [change(dict(record)) for record in records.read_records(folder)][:n]
    (to / records.RECORDS).write_bytes(records.lines_of(made))
    meta = records.read_meta(folder)
    records.write_meta(to, {**meta, "same": {**meta["same"], **same}})
    return to


def test_the_same_rules_give_the_same_records(made, tmp_path):
    folder, _ = made
    before = contents(folder)
    done = rescore(folder, tmp_path / "new")
    meta, old = records.read_meta(tmp_path / "new"), records.read_meta(folder)
    assert (tmp_path / "new" / records.RECORDS).read_bytes() == before[records.RECORDS] and contents(folder) == before
    assert done == {"items": old["items"], "recorded": old["items"], "changed": 0, "failed": 0, "infeasible": 0}
    assert meta["same"] == old["same"] and [s["engine"] for s in meta["sessions"]] == ["local", "rescore"]


def test_scores_of_an_older_version_become_those_of_this_one(answered, tmp_path):
    """Also where scoring failed then; an item without an answer keeps its error."""
    folder, _ = answered

    def older(record):
        if record["kind"] == "attack":
            return {**record, "scores": {"outcome": "of an older version"}}
        if record["kind"] == "recall":
            return {**record, "scores": None, "error": "ValueError: of an older version"}
        return {**record, "scores": {**record["scores"], "refused": not record["scores"]["refused"]}}

    old = copy(folder, tmp_path / "old", older, scores=1, langdetect="0")
    done = rescore(old, tmp_path / "new")
    assert (tmp_path / "new" / records.RECORDS).read_bytes() == (folder / records.RECORDS).read_bytes()
    assert records.read_meta(tmp_path / "new")["same"] == records.read_meta(folder)["same"] and done["changed"] > 0

    def failed(record):
        nothing = {"output": None, "scores": None, "n_new": None, "ended": None, "kept": None}
        return {**record, **nothing, "error": "RuntimeError: no room"} if record["kind"] == "follow" else record

    lost = copy(folder, tmp_path / "lost", failed)
    done = rescore(lost, tmp_path / "newer")
    assert done["failed"] == sum(r["kind"] == "follow" for r in records.read_records(folder)) and done["changed"] == 0
    assert (tmp_path / "newer" / records.RECORDS).read_bytes() == (lost / records.RECORDS).read_bytes()


def test_another_rule_changes_scores_and_nothing_else(answered, tmp_path, monkeypatch):
    folder, _ = answered
    monkeypatch.setattr(scenario, "refuses", lambda output, refusal: True)
    done = rescore(folder, tmp_path / "new")
    old, new = (records.read_records(f) for f in (folder, tmp_path / "new"))
    for was, now in zip(old, new, strict=True):
        assert {**now, "scores": None} == {**was, "scores": None}
        if was["kind"] == "follow":
            assert now["scores"] == {**was["scores"], "refused": True}
        else:
            assert now["scores"] == was["scores"]
    assert done["changed"] == sum(r["kind"] == "follow" and not r["scores"]["refused"] for r in old) > 0


def test_a_rule_that_fails_is_told_of_in_its_records(answered, tmp_path, monkeypatch):
    def breaks(output, refusal):
        raise ValueError("no such rule")

    monkeypatch.setattr(scenario, "refuses", breaks)
    done = rescore(answered[0], tmp_path / "new")
    of_task = [r for r in records.read_records(tmp_path / "new") if r["kind"] == "follow"]
    assert done["failed"] == len(of_task) and {r["error"] for r in of_task} == {"ValueError: no such rule"}
    assert all(r["scores"] is None and r["output"] is not None for r in of_task)


@pytest.mark.parametrize("fault", [NameError, AttributeError, KeyboardInterrupt])
def test_a_fault_of_a_program_ends_it_and_writes_nothing(answered, tmp_path, monkeypatch, fault):
    def breaks(output, refusal):
        raise fault("no such name")

    monkeypatch.setattr(scenario, "refuses", breaks)
    with pytest.raises(fault):
        rescore(answered[0], tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("cut", [0, 1, -1])
def test_what_was_recorded_of_an_interrupted_sweep_is_scored_and_gone_on_with(answered, tmp_path, cut):
    folder, config = answered
    n = len(records.read_records(folder))
    old = copy(folder, tmp_path / "old", n=n // 2 + cut)
    before = contents(old)
    done = rescore(old, tmp_path / "new")
    assert 0 < done["recorded"] <= n // 2 + cut and done["items"] == n and contents(old) == before
    went_on = sweep(config, tmp_path / "new")
    assert went_on["resumed_at"] == done["recorded"] and went_on["failed"] == 0
    assert tiny_sweep.untimed(tmp_path / "new") == tiny_sweep.untimed(folder)


def test_an_interruption_leaves_nothing(answered, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(rescore_module, "check_records", stop)
    with pytest.raises(KeyboardInterrupt):
        rescore(answered[0], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_no_scoring_mends_is_refused(answered, tmp_path, tiny_model_folder):
    folder, _ = answered
    config = records.read_meta(folder)["same"]
    cases = {
        "answers to other prompts": {"corpus_sha256": "0" * 64},
        "scores of version 99; expected one from 0 to": {"scores": 99},
        "scores of version None": {"scores": None},
        "which draws otherwise than since version 5": {"scores": 4, "config.modes": ["biased", "random"]},
        "is not the one that this sweep makes": {"config.modes": [*config["config.modes"], "floor=4"][::-1]},
        "expected some of": {"config.colour": "red"},
    }
    for i, (message, same) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message):
            rescore(copy(folder, tmp_path / f"old{i}", **same), tmp_path / "new")
    no_record = copy(folder, tmp_path / "torn", lambda record: {**record, "kept": 3})
    with pytest.raises(ValueError, match="record 1 is not a sweep's"):
        rescore(no_record, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="expected the output folder of a sweep"):
        rescore(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    for held in (folder, no_record):
        before = contents(held)
        with pytest.raises(ValueError, match="holds a sweep; expected a new folder"):
            rescore(folder, held)
        assert contents(held) == before
    with pytest.raises(ValueError, match="output is ''"):
        rescore(folder, "")


@pytest.mark.parametrize("fault", ["is not read", "is interrupted"])
def test_of_several_sweeps_all_are_scored_before_one_is_written(answered, tmp_path, monkeypatch, fault):
    """Whether the second cannot be scored, or its records are not written whole: no folder holds a sweep, and the same
    command can be given again."""
    several = tmp_path / "several"
    several.mkdir()
    copy(answered[0], several / "first")
    copy(answered[0], several / "second", **({"scores": 99} if fault == "is not read" else {}))
    wrote = []

    def writes(lines):
        wrote.append(lines)
        if len(wrote) == 2:
            raise KeyboardInterrupt
        return records.lines_of(lines)

    with monkeypatch.context() as patch:
        patch.setattr(rescore_module, "lines_of", writes)
        assert cli.main(["rescore", str(several), "--output", str(tmp_path / "new")]) == (
            2 if fault == "is not read" else 130
        )
    assert [path for path in (tmp_path / "new").rglob("*") if path.is_file()] == []
    copy(answered[0], tmp_path / "good")
    shutil.rmtree(several / "second")
    (tmp_path / "good").rename(several / "second")
    assert cli.main(["rescore", str(several), "--output", str(tmp_path / "new")]) == 0


def test_the_command(answered, tmp_path, capsys):
    """Of one sweep, and of a folder of several, none of which is scored where one cannot be."""
    folder, _ = answered
    assert cli.main(["rescore", str(folder), "--output", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    n = len(records.read_records(folder))
    assert f"{n} of {n} items, 0 with other scores than before; 0 failed, 0 infeasible" in out and "report" in out
    several = tmp_path / "several"
    several.mkdir()
    copy(folder, several / "leakage"), copy(folder, several / "following")
    assert cli.main(["rescore", str(several), "--output", str(tmp_path / "all"), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert [*done] == [str(tmp_path / "all" / name) for name in ("following", "leakage")]
    assert cli.main(["rescore", str(several), "--output", str(tmp_path / "all")]) == 2
    assert "holds a sweep; expected a new folder" in capsys.readouterr().err
    lost = copy(folder, tmp_path / "lost", lambda r: {**r, "output": None, "scores": None, "error": "RuntimeError: x"})
    assert cli.main(["rescore", str(lost), "--output", str(tmp_path / "found")]) == 1
    assert f"kvpitfalls rescore: {n} items failed" in capsys.readouterr().err
