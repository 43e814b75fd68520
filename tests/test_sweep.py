"""Sweeps: records that survive kills, batches that change nothing, and failures that are counted."""

import copy
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_sweep
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import kvpitfalls as kvp
from kvpitfalls import DeviceError
from kvpitfalls.display.page import write_report
from kvpitfalls.experiments import batch as batch_module
from kvpitfalls.experiments import records
from kvpitfalls.experiments import sweep as sweep_module
from kvpitfalls.experiments.config import SweepConfig
from kvpitfalls.experiments.corpus import load_corpus
from kvpitfalls.experiments.modes import FIXES
from kvpitfalls.experiments.plan import plan
from kvpitfalls.experiments.scenario import Scenario, conversation
from kvpitfalls.experiments.sweep import sweep
from kvpitfalls.hf.load import load


@pytest.fixture(scope="module")
def model(tiny_model_folder, tiny_model_loaded_once):
    return tiny_model_folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("unbroken")
    assert sweep(tiny_sweep.config(model), folder)["failed"] == 0
    return folder


def test_the_records_are_the_plan(unbroken, model):
    config = tiny_sweep.config(model)
    recorded = records.read_records(unbroken)
    identities = {
        json.dumps([r[n] for n in ("order", "policy", "mode", "compression_ratio", "key", "kind", "attack")])
        for r in recorded
    }
    # orders x prompts x (full + ratios x policies x modes) x (2 attacks, recall, follow)
    assert len(recorded) == len(identities) == 2 * 4 * (1 + 2 * 2 * 2) * 4
    planned = [item for batch in plan(config, load_corpus()) for item in batch.items(load_corpus())]
    assert [{name: r[name] for name in item} for item, r in zip(planned, recorded, strict=True)] == planned
    meta = records.read_meta(unbroken)
    assert meta["items"] == len(recorded) and len(meta["sessions"]) == 1
    assert meta["same"]["torch"] == importlib.metadata.version("torch")


def test_a_record_is_what_one_plain_call_gives(unbroken, model):
    """Second way: wrap, compress one prompt, generate; no batch, no sweep."""
    loaded, tokenizer = load(model)
    corpus = load_corpus()
    rows = {row["key"]: row for row in corpus.rows}
    for record in random.Random(0).sample(records.read_records(unbroken), 12):
        scenario = Scenario.of(corpus, rows[record["key"]], record["defense"], record["order"])
        prompt = scenario.prompt(tokenizer)
        ids = conversation(prompt, *scenario.ask(record["kind"], corpus.attacks.get(record["attack"])))
        limit = tiny_sweep.config(model).max_new_tokens[record["kind"]]
        fair, policy = record["mode"] == "fair", record["policy"] or "snapkv"
        with kvp.wrap(loaded, policy, compression_ratio=record["compression_ratio"], fair=fair) as handle:
            cache = handle.compress(prompt)
            out = loaded.generate(
                torch.tensor([ids]), past_key_values=copy.deepcopy(cache), max_new_tokens=limit, do_sample=False
            )
            assert record["output"] == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
            assert record["kept"]["directive"] == pytest.approx(cache.kept("directive").mean())
            assert record["kept"]["whitelist"] == pytest.approx(cache.kept(prompt.find(scenario.whitelist)).mean())
            assert record["n_kept"] == cache.positions(0).shape[2] and record["n_tokens"] == len(prompt)
        assert record["scores"] == scenario.score(record["kind"], record["output"], 42)


@pytest.mark.parametrize("batch_size", [1, 7, 400])
def test_batches_change_nothing(unbroken, model, tmp_path, batch_size):
    n_prompts = 1 if batch_size == 1 else 2
    sweep(tiny_sweep.config(model, batch_size=batch_size, n_prompts=n_prompts), tmp_path)
    keys = [row["key"] for row in load_corpus().rows[:n_prompts]]
    same = [line for line in tiny_sweep.untimed(unbroken) if json.loads(line)["key"] in keys]
    assert sorted(tiny_sweep.untimed(tmp_path)) == sorted(same)


def test_prompts_that_meet_different_attacks_share_batches_and_nothing_else(unbroken, model, tmp_path):
    """Their records are those of the sweep in which all meet all."""
    sweep(tiny_sweep.config(model, attacks_per_prompt=1), tmp_path)
    found, every = tiny_sweep.untimed(tmp_path), tiny_sweep.untimed(unbroken)
    assert set(found) < set(every) and len(found) == len(set(found)) == len(every) * 3 // 4
    met = {(r["key"], r["attack"]) for r in map(json.loads, found) if r["attack"] is not None}
    assert len(met) == 4 and len({attack for _, attack in met}) == 2


def test_ten_kills_leave_no_trace(model, tmp_path):
    script = Path(tiny_sweep.__file__)
    out = subprocess.run(
        [sys.executable, str(script), model, str(tmp_path), "10", "3"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr[-2000:]
    happened = json.loads(out.stdout.splitlines()[-1])
    assert happened["killed"] == 10 and len(set(happened["sizes"])) >= 5, (
        "kills that always hit the same moment would test nothing"
    )
    assert tiny_sweep.untimed(tmp_path / "killed") == tiny_sweep.untimed(tmp_path / "unbroken")


def test_a_file_cut_anywhere_is_completed(unbroken, model, tmp_path):
    whole = (unbroken / "records.jsonl").read_bytes()
    for name in ("records.jsonl", "run_meta.json"):
        (tmp_path / name).write_bytes((unbroken / name).read_bytes())
    for at in [1, len(whole) - 1, *random.Random(1).sample(range(len(whole) // 2, len(whole)), 3)]:
        (tmp_path / "records.jsonl").write_bytes(whole[:at])
        done = sweep(tiny_sweep.config(model), tmp_path)
        assert tiny_sweep.untimed(tmp_path) == tiny_sweep.untimed(unbroken)
        assert done["resumed_at"] <= whole[:at].count(b"\n")
    assert sweep(tiny_sweep.config(model), tmp_path)["resumed_at"] == done["items"], (
        "a finished sweep has nothing left to do"
    )


def test_another_sweep_is_not_mixed_in(unbroken, model, tmp_path):
    for name in ("records.jsonl", "run_meta.json"):
        (tmp_path / name).write_bytes((unbroken / name).read_bytes())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"begun with config.seed = 42 and would go on with 43; expected the same"):
        sweep(tiny_sweep.config(model, seed=43), tmp_path)
    with records.locked(tmp_path), pytest.raises(RuntimeError, match="another sweep is running"):
        sweep(tiny_sweep.config(model), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != ".lock"} == before
    lines = (tmp_path / "records.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]), encoding="utf-8")
    swapped = (tmp_path / "records.jsonl").read_bytes()
    with pytest.raises(ValueError, match="record 1, is not the one that this sweep makes"):
        sweep(tiny_sweep.config(model), tmp_path)
    assert (tmp_path / "records.jsonl").read_bytes() == swapped
    assert (tmp_path / "run_meta.json").read_bytes() == before["run_meta.json"], "what is refused changes nothing"
    (tmp_path / "records.jsonl").write_text("".join([lines[0], "{broken\n", *lines[2:]]), encoding="utf-8")
    with pytest.raises(ValueError, match="record 2, is no JSON"):
        sweep(tiny_sweep.config(model), tmp_path)
    (tmp_path / "records.jsonl").write_text("".join([*lines, lines[0]]), encoding="utf-8")
    with pytest.raises(ValueError, match=f"holds {len(lines) + 1} records; expected at most {len(lines)}"):
        sweep(tiny_sweep.config(model), tmp_path)
    (tmp_path / "run_meta.json").unlink()
    with pytest.raises(ValueError, match=r"has records but no run_meta\.json"):
        sweep(tiny_sweep.config(model), tmp_path)


def test_what_no_report_would_take_is_not_gone_on_with(unbroken, model, tmp_path):
    """A record that was edited by hand still says which it is: it is refused at once, and not after hours of work."""
    (tmp_path / "run_meta.json").write_bytes((unbroken / "run_meta.json").read_bytes())
    lines = (unbroken / "records.jsonl").read_text("utf-8").splitlines(keepends=True)
    for wrong in ({"scores": None}, {"kept": "x"}, {"error": 5}, {"infeasible": []}):
        edited = "".join([lines[0], json.dumps({**json.loads(lines[1]), **wrong}) + "\n", *lines[2:9]])
        (tmp_path / "records.jsonl").write_text(edited, encoding="utf-8")
        with pytest.raises(ValueError, match=r"record 2 is not a sweep's.*expected records that a sweep wrote"):
            sweep(tiny_sweep.config(model), tmp_path)
        assert (tmp_path / "records.jsonl").read_text("utf-8") == edited


def test_a_sweep_is_refused_before_its_folder_is_made(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="folder is ''; expected the path of a folder"):
        sweep(tiny_sweep.config(model), "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="device is 'cuda'; expected 'cpu', since torch sees no GPU"):
        sweep(tiny_sweep.config(model, device="cuda"), tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_other_weights_are_another_sweep(model, tmp_path):
    before = sweep_module.identity(tiny_sweep.config(model), load_corpus())["model_sources"]
    other = tmp_path / "other"
    shutil.copytree(model, other)
    renamed = [
        source.replace(str(other), model)
        for source in sweep_module.identity(tiny_sweep.config(str(other)), load_corpus())["model_sources"]
    ]
    assert renamed == before, "the same files are the same model"
    with (other / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert sweep_module.identity(tiny_sweep.config(str(other)), load_corpus())["model_sources"] != renamed


def test_weights_that_change_under_a_path_are_noticed(model, tmp_path):
    """Trained on in place: names, sizes and config stay; and so they would if only one matrix were changed."""
    shutil.copytree(model, tmp_path / "mine")
    config = tiny_sweep.config(
        str(tmp_path / "mine"), n_prompts=1, kinds=["recall"], policies=["knorm"], orders=["defense_first"]
    )
    sweep(config, tmp_path / "out")
    trained = LlamaForCausalLM.from_pretrained(tmp_path / "mine")
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "mine").iterdir()}
    save_file(trained.state_dict(), tmp_path / "mine" / "model.safetensors", {"format": "pt"})
    assert {path.name: path.stat().st_size for path in (tmp_path / "mine").iterdir()} == sizes
    with pytest.raises(ValueError, match="begun with model_sources = "):
        sweep(config, tmp_path / "out")


def _rows(path, n, bad):
    rows = [dict(row) for row in load_corpus().rows[:n]]
    if bad:
        twice = load_corpus().defenses["refuse"].templates["defense_first"].replace("$system_prompt", "")
        rows[2]["messages"] = [{"role": "system", "content": f"Hello. {twice} Bye."}, rows[2]["messages"][1]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_prompt_that_fails_is_a_record_and_harms_no_other(model, tmp_path):
    """The third prompt holds the defense twice, so its instructions cannot be told apart."""
    found = {}
    for name in ("good", "bad"):
        rows = _rows(tmp_path / "rows.jsonl", 4, name == "bad")
        config = tiny_sweep.config(model, n_prompts=None, dataset=rows, orders=["defense_first"])
        done = sweep(config, tmp_path / name)
        found[name] = records.read_records(tmp_path / name)
        assert done["items"] == len(found[name]) and done["failed"] == sum(r["error"] is not None for r in found[name])
    failed = [r for r in found["bad"] if r["error"]]
    assert {r["key"] for r in failed} == {load_corpus().rows[2]["key"]} and len(failed) == len(found["bad"]) / 4
    assert all("is in the prompt 2 times" in r["error"] and r["output"] is None and r["scores"] is None for r in failed)
    for good, bad in zip(found["good"], found["bad"], strict=True):
        if not bad["error"]:
            assert {**good, "seconds": 0} == {**bad, "seconds": 0}


def test_a_whitelist_that_does_not_fit_is_infeasible_and_no_failure(model, tmp_path):
    config = tiny_sweep.config(
        model, modes=["biased", "whitelist", "whitelist_defense"], compression_ratios=[0.8], policies=["snapkv"]
    )
    done = sweep(config, tmp_path)
    recorded = records.read_records(tmp_path)
    missing = [r for r in recorded if r["infeasible"]]
    assert (
        0 < len(missing) == done["infeasible"]
        and {r["mode"] for r in missing} >= {"whitelist_defense"}
        and done["failed"] == 0
    )
    assert all("are protected; expected at least that" in r["infeasible"] for r in missing)
    assert all(r["error"] is None and r["output"] is None and r["scores"] is None for r in missing)
    assert all(r["infeasible"] is None and r["output"] is not None for r in recorded if r["mode"] in ("biased", "full"))
    kept = [r["kept"]["whitelist"] for r in recorded if r["mode"] == "whitelist" and not r["infeasible"]]
    assert all(share == 1 for share in kept)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, IndexError, kvp.UnsupportedModelError])
def test_a_failing_generation_costs_only_its_own_prompt(model, tmp_path, monkeypatch, capsys, error):
    """One prompt makes the generation raise, in a batch and alone; the others of its batch are generated again, one by
    one."""
    plain, victim = batch_module.answers, load_corpus().rows[1]

    def failing(loaded, contexts, conversations, cache, limit):
        if any(victim["messages"][0]["content"] in prompt.text for prompt in contexts):
            raise error("out of memory")
        return plain(loaded, contexts, conversations, cache, limit)

    monkeypatch.setattr(batch_module, "answers", failing)
    done = sweep(tiny_sweep.config(model, orders=["defense_first"]), tmp_path)
    recorded = records.read_records(tmp_path)
    assert done["failed"] == len(recorded) / 4 and {r["key"] for r in recorded if r["error"]} == {victim["key"]}
    assert {r["error"] for r in recorded if r["error"]} == {f"{error.__name__}: out of memory"}
    said = capsys.readouterr()
    assert f"failed ({error.__name__}: out of memory); its prompts are run one by one" in said.err and not said.out


def test_a_fault_of_a_program_ends_the_sweep_and_its_records_stay(model, tmp_path, monkeypatch):
    """It is no prompt's failure, and the sweep goes on from its records as if it had not been."""
    plain, calls, config = batch_module.answers, [], tiny_sweep.config(model, n_prompts=1)
    whole = tmp_path / "whole"
    sweep(config, whole)

    def broken(*args):
        calls.append(args)
        if len(calls) == 2:
            raise AttributeError("no such name")
        return plain(*args)

    monkeypatch.setattr(batch_module, "answers", broken)
    with pytest.raises(AttributeError, match="no such name"):
        sweep(config, tmp_path / "out")
    assert 0 < len(records.read_records(tmp_path / "out")) < len(records.read_records(whole))
    assert sweep(config, tmp_path / "out")["failed"] == 0
    assert tiny_sweep.untimed(tmp_path / "out") == tiny_sweep.untimed(whole)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"polices": ["snapkv"]}, "the config holds 'polices'; expected some of models"),
        ({"policies": ["snapvk"]}, "did you mean 'snapkv'"),
        ({"policies": "snapkv"}, "policies is 'snapkv'; expected a list"),
        ({"policies": []}, "expected a list that is not empty"),
        ({"policies": ["snapkv", "snap"]}, "expected each name once"),
        ({"modes": ["unfair"]}, "modes hold 'unfair'; expected some of biased"),
        ({"modes": [1.5]}, "modes hold 1.5"),
        ({"compression_ratios": [1.0]}, "compression_ratio is 1.0"),
        ({"orders": ["sideways"]}, "orders hold 'sideways'"),
        ({"kinds": ["attack", "guess"]}, "kinds hold 'guess'"),
        ({"max_new_tokens": {"attack": 0}}, r"max_new_tokens\['attack'\] is 0"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number, at least 1"),
        ({"n_prompts": True}, "n_prompts is True"),
        ({"defenses": ["none"], "modes": ["whitelist"]}, "expected a defense, since those modes need one"),
    ],
)
def test_bad_configs_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig.parse(given)


@pytest.mark.parametrize("kinds", [["attack", "recall", "follow"], ["probe"]])
def test_a_prompt_that_overflows_has_no_answers_and_harms_no_other(model, tmp_path, monkeypatch, kinds):
    """The largest of logits that are NaN would be the first token of the vocabulary, and complied with the attack."""
    rows = [dict(row) for row in load_corpus().rows[:3]]
    said = rows[1]["messages"]
    rows[1]["messages"] = [{**said[0], "content": f"{said[0]['content']} Ж"}, said[1]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    folders = [tmp_path / "finite", tmp_path / "overflows"]
    some = {"policies": ["snapkv"], "modes": ["biased"], "orders": ["defense_first"], "compression_ratios": [0.5]}
    config = tiny_sweep.config(model, kinds=kinds, n_prompts=None, dataset=str(tmp_path / "rows.jsonl"), **some)
    loaded, tokenizer = load(model)
    monkeypatch.setattr(sweep_module, "load_model", lambda config, name: (loaded, tokenizer))
    sweep(config, folders[0])
    with torch.no_grad():
        loaded.get_input_embeddings().weight[tokenizer("Ж")["input_ids"]] = float("nan")
    sweep(config, folders[1])
    for one, other in zip(*map(records.read_records, folders), strict=True):
        assert one["error"] is None
        if one["key"] != rows[1]["key"]:
            assert (one["output"], None) == (other["output"], other["error"])
        else:
            assert other["output"] is None and "are not finite; expected numbers, try dtype float32" in other["error"]


@pytest.mark.parametrize("name", ["models", "dataset"])
def test_a_name_that_no_record_could_hold_is_refused(name):
    """Such as that of a folder in Latin-1: the first batch could not be written."""
    given = {name: ["caf\udce9"] if name == "models" else "caf\udce9"}
    with pytest.raises(ValueError, match=rf"^{name} (hold|is) 'caf.udce9', which holds the lone surrogate"):
        SweepConfig(**given)


def test_an_error_that_quotes_half_a_character_is_recorded(model, tmp_path, monkeypatch):
    def fail(self, kind, output, seed):
        raise ValueError("not this: \ud83d")

    monkeypatch.setattr("kvpitfalls.experiments.scenario.Scenario.score", fail)
    config = tiny_sweep.config(model, n_prompts=1, compression_ratios=[0.5])
    assert sweep(config, tmp_path)["failed"] > 0
    (error,) = {record["error"] for record in records.read_records(tmp_path)}
    assert error == "ValueError: not this: \ud83d" and sweep(config, tmp_path)["resumed_at"] > 0
    (tmp_path / "records.jsonl").read_text("utf-8")
    written = Path(write_report(tmp_path)["page"])
    assert "not this: ⟨U+D83D⟩" in written.read_text("utf-8")
    assert "not this: \\ud83d" in written.with_name("failures.csv").read_text("utf-8")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"defenses": ["strong"]}, "defenses hold 'strong'; expected some of none, refuse"),
        ({"attacks": ["brute"]}, "attacks hold 'brute'; expected names such as verbatim-1"),
        ({"n_prompts": 1000}, "n_prompts is 1000; expected at most 68"),
    ],
)
def test_what_the_corpus_lacks_is_refused_and_nothing_written(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep(SweepConfig(**given), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_files(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(
        'policies = ["snap"]\nmodes = ["biased", 0.5]\ncompression_ratios = [0.5]\n[max_new_tokens]\nattack = 9\n',
        "utf-8",
    )
    config = SweepConfig.read(path)
    assert (config.policies, config.modes, config.compression_ratios) == (
        ("snapkv",),
        ("biased", "lambda=0.5"),
        (0.0, 0.5),
    )
    assert config.max_new_tokens == {"attack": 9, "recall": 64, "follow": 1280, "probe": 32, "turns": 64}
    (tmp_path / "again.json").write_text(json.dumps(config.to_dict()), "utf-8")
    assert SweepConfig.read(tmp_path / "again.json") == config
    path.write_text("policies = [", "utf-8")
    with pytest.raises(ValueError, match="cannot be read"):
        SweepConfig.read(path)


@pytest.mark.parametrize("policy", ["snapkv", "adakv", "pyramidkv"])
def test_fixes_and_control_hold_equal_memory(model, tmp_path, policy):
    """Every mode of the side by side keeps as many tokens of a prompt, whatever it protects and however layers and
    heads share them; and batches change none."""
    same = {
        "modes": list(FIXES),
        "policies": [policy],
        "compression_ratios": [0.3],
        "orders": ["defense_first"],
        "kinds": ["recall"],
    }
    sweep(tiny_sweep.config(model, n_prompts=3, **same), tmp_path / "together")
    sweep(tiny_sweep.config(model, n_prompts=3, batch_size=1, **same), tmp_path / "alone")
    recorded = records.read_records(tmp_path / "together")
    assert sorted(tiny_sweep.untimed(tmp_path / "together")) == sorted(tiny_sweep.untimed(tmp_path / "alone"))
    whole = {r["key"]: r["n_tokens"] for r in recorded if r["scores"] is not None}
    done = [r for r in recorded if r["scores"] is not None and r["compression_ratio"] == 0.3]
    assert {r["mode"] for r in done} >= {"biased", "random", "whitelist", "fair", "fair+whitelist"}
    assert all(r["n_kept"] == int(whole[r["key"]] * 0.7) for r in done)
    key = next(r["key"] for r in done if r["mode"] == "biased")  # a pyramid is not defined for the shorter prompts
    kept = {r["mode"]: r["kept"] for r in done if r["key"] == key}
    assert (
        kept["random"] != kept["biased"] and kept["whitelist"]["whitelist"] == kept["fair+whitelist"]["whitelist"] == 1
    )


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [
        ("attack", "rouge_score", "rouge-score"),
        ("recall", "rapidfuzz", "rapidfuzz"),
        ("turns", "rouge_score", "rouge-score"),
        ("follow", "langdetect", "langdetect"),
    ],
)
def test_a_sweep_that_nothing_could_score_does_not_begin(model, tmp_path, monkeypatch, kind, module, package):
    """One sentence, and no folder; a package that other kinds need is not missed."""
    known, mode = importlib.util.find_spec, {"modes": ["biased"], "n_prompts": 1, "compression_ratios": [0.5]}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *given: None if name == module else known(name, *given)
    )
    with pytest.raises(ImportError, match=rf"needs the package {package}; expected pip install 'kvpitfalls\[eval\]'$"):
        sweep(tiny_sweep.config(model, kinds=[kind], **mode), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    if kind == "attack":
        assert sweep(tiny_sweep.config(model, kinds=["follow"], **mode), tmp_path / "other")["failed"] == 0
