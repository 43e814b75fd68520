"""A sweep that is begun, broken off anywhere, gone on with, refused, read and rescored in any order: in the end its
folder holds what an unbroken one holds, and at any time a beginning of that."""

import contextlib
import functools
import json
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvpitfalls.experiments import records
from kvpitfalls.experiments import sweep as sweep_module
from kvpitfalls.experiments.config import SweepConfig
from kvpitfalls.experiments.corpus import load_corpus
from kvpitfalls.experiments.rescore import rescore
from kvpitfalls.experiments.scenario import Scenario
from kvpitfalls.experiments.summary import summarize
from kvpitfalls.experiments.sweep import sweep

CORPUS = load_corpus()


class Kill(BaseException):
    """Ends a sweep at once, as a signal does."""


def records_of(batch):
    """What a model might have answered."""
    return [answered(tuple(item.items())) for item in batch.items(CORPUS)]


@functools.cache
def answered(item):
    """An item's record, in letters of two bytes, too; always the same."""
    item = dict(item)
    row = next(row for row in CORPUS.rows if row["key"] == item["key"])
    text = f"né {item['key']} {item['mode']} {item['compression_ratio']} " + row["messages"][0]["content"][:40]
    scores = Scenario.of(CORPUS, row, item["defense"], item["order"]).score(item["kind"], text, 42)
    kept = {"n_tokens": 9, "n_kept": 5, "kept": {"directive": 0.5}}
    answer = {"output": text, "n_new": 3, "ended": True, "scores": scores, "error": None, "infeasible": None}
    return {**item, "inputs_sha256": None, "seed": 42, **kept, **answer, "seconds": 0.5}


class Folder(RuleBasedStateMachine):
    """A folder of a sweep without a model."""

    model: str
    patch: pytest.MonkeyPatch

    @initialize(batch_size=st.sampled_from([1, 3, 8, 50]))
    def begin(self, batch_size):
        self.root = Path(tempfile.mkdtemp())
        self.folder, self.n_folder, self.n_session = self.root / "0", 0, 0
        self.options = {"n_prompts": 2, "policies": ["knorm"], "modes": ["biased", "fair"], "orders": ["defense_first"]}
        self.options |= {"models": [self.model], "compression_ratios": [0.3, 0.5], "kinds": ["attack", "recall"]}
        self.options |= {"attacks": ["verbatim-1"], "batch_size": batch_size}
        self.config = SweepConfig(**self.options)
        self.batches = [records_of(batch) for batch in sweep_module.plan(self.config, CORPUS)]
        self.whole = records.lines_of([record for batch in self.batches for record in batch])

    def teardown(self):
        if hasattr(self, "root"):
            self.go_on()
            assert self.bytes() == self.whole
            shutil.rmtree(self.root)

    @property
    def path(self):
        return self.folder / records.RECORDS

    def bytes(self):
        return self.path.read_bytes() if self.path.exists() else b""

    @contextlib.contextmanager
    def killed(self, at, where, n_byte):
        """A block in which a sweep is killed at its batch ``at``: before it, in its write or after it."""
        made = iter(range(10**6))

        def append(folder, of_batch):
            lines = records.lines_of(of_batch)
            is_last = next(made) == at
            part = {"before": b"", "in": lines[: 1 + n_byte % len(lines)], "after": lines}[where] if is_last else lines
            with self.path.open("ab") as file:
                file.write(part)
            if is_last:
                raise Kill

        with self.patch.context() as patch:
            patch.setattr(sweep_module, "append", append)
            yield

    def n_whole(self, content):
        """How many batches are there as a whole."""
        sizes = [len(records.lines_of(batch)) for batch in self.batches]
        return max(n for n in range(len(sizes) + 1) if sum(sizes[:n]) <= len(content))

    @rule()
    def go_on(self):
        n_held = sum(map(len, self.batches[: self.n_whole(self.bytes())]))
        done = sweep(self.config, self.folder)
        n_item = sum(map(len, self.batches))
        assert done == {"items": n_item, "failed": 0, "infeasible": 0, "resumed_at": n_held}
        self.n_session += 1

    @rule(at=st.integers(0, 9), where=st.sampled_from(["before", "in", "after"]), n_byte=st.integers(0, 10**6))
    def go_on_and_be_killed(self, at, where, n_byte):
        n_left = len(self.batches) - self.n_whole(self.bytes())
        with self.killed(at, where, n_byte), pytest.raises(Kill) if at < n_left else contextlib.nullcontext():
            sweep(self.config, self.folder)
        self.n_session += 1

    @rule(before=st.sampled_from(["write_meta", "recover", "run_local"]))
    def be_killed_early(self, before):
        def kill(*args):
            raise Kill

        is_done = self.n_whole(self.bytes()) == len(self.batches)
        with self.patch.context() as patch, pytest.raises(Kill):
            patch.setattr(sweep_module, before, kill)
            sweep(self.config, self.folder)
        self.n_session += before == "run_local"
        assert not is_done or self.bytes() == self.whole

    @rule(n_byte=st.integers(0, 10**6))
    def lose_the_end(self, n_byte):
        """Of the file, as where a machine loses power."""
        if content := self.bytes():
            self.path.write_bytes(content[: n_byte % len(content)])

    @rule(changed=st.sampled_from([{"seed": 7}, {"batch_size": 4}, {"attacks": ["formatting-2"]}, {"n_prompts": 1}]))
    def go_on_as_another(self, changed):
        if self.path.exists():
            before = {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}
            with pytest.raises(ValueError, match=r"the sweep was begun with config\."):
                sweep(SweepConfig(**{**self.options, **changed}), self.folder)
            assert {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()} == before

    @rule()
    def go_on_while_another_runs(self):
        self.folder.mkdir(exist_ok=True)
        before = self.bytes()
        with records.locked(self.folder), pytest.raises(RuntimeError, match="another sweep is running"):
            sweep(self.config, self.folder)
        assert self.bytes() == before

    @rule()
    def read(self):
        """What a report reads: all whole lines, the last batch's, too."""
        content = self.bytes()
        lines = self.whole.splitlines()[: content.count(b"\n")]
        if self.path.exists():
            read = records.read_records(self.folder)
            assert read == [json.loads(line) for line in lines]
            if read:
                assert summarize(read) == summarize([json.loads(line) for line in lines])
        assert self.bytes() == content

    @rule()
    def rescore(self):
        """And go on with what it gives, whose rules are the same: whole batches."""
        if not self.path.exists():
            return
        content, self.n_folder = self.bytes(), self.n_folder + 1
        n_record = sum(map(len, self.batches[: self.n_whole(content)]))
        done = rescore(self.folder, self.root / str(self.n_folder))
        assert (done["recorded"], done["changed"]) == (n_record, 0) and self.bytes() == content
        with pytest.raises(ValueError, match="holds a sweep; expected a new folder"):
            rescore(self.folder, self.root / str(self.n_folder))
        self.folder, self.n_session = self.root / str(self.n_folder), self.n_session + 1

    @rule()
    def move(self):
        """A folder is no place."""
        self.n_folder += 1
        if self.folder.exists():
            self.folder = self.folder.rename(self.root / str(self.n_folder))

    @invariant()
    def holds_a_beginning(self):
        if hasattr(self, "whole"):
            assert self.whole.startswith(self.bytes())
            if (self.folder / records.META).exists():
                assert len(records.read_meta(self.folder)["sessions"]) == self.n_session
            assert not [*self.root.rglob(".run_meta.json*")] + [*self.root.rglob(".records*")]


def test_a_sweep_of_any_history_is_an_unbroken_one(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(sweep_module, "load_model", lambda config, name: (None, None))
    monkeypatch.setattr(sweep_module, "run_batch", lambda model, tokenizer, corpus, config, batch: records_of(batch))
    some = settings(max_examples=15, stateful_step_count=15, deadline=None, derandomize=True, database=None)
    whole = {"phases": [Phase.generate], "report_multiple_bugs": False}
    some = settings(some, suppress_health_check=list(HealthCheck), **whole)
    kind = type("Folder", (Folder,), {"model": str(tmp_path), "patch": monkeypatch})
    run_state_machine_as_test(kind, settings=some)
