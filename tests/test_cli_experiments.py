"""The experiment commands as a user runs them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_sweep
from narrow_tables import rows_of, terminal

from kvpitfalls import cli
from kvpitfalls.cli import sweeps
from kvpitfalls.display.tables import following_table
from kvpitfalls.experiments import presets
from kvpitfalls.experiments.card import read_card
from kvpitfalls.experiments.corpus import load_corpus
from kvpitfalls.experiments.metrics import TURN, TURNS, WAYS, turn_metric
from kvpitfalls.experiments.records import read_records
from kvpitfalls.experiments.sweep import sweep


@pytest.fixture(scope="module")
def model(tmp_path_factory, smollm2):
    return tiny_sweep.save_tiny_model(tmp_path_factory.mktemp("tiny"), smollm2[1])


@pytest.fixture
def run(capsys):
    def call(*argv):
        try:
            code = cli.main([*map(str, argv)])
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return call


def test_sweep_from_a_file_and_again(run, model, tmp_path):
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(tiny_sweep.config(model, n_prompts=2, orders=["directive_first"]).to_dict()), "utf-8")
    code, out, _ = run("sweep", "--config", path, "--output", tmp_path / "out", "--n-prompts", 1, "--json")
    done = json.loads(out)["all"]
    assert code == 0 and done["items"] == len(read_records(tmp_path / "out")) == 9 * 4 and done["resumed_at"] == 0
    code, out, _ = run("sweep", "--config", path, "--output", tmp_path / "out", "--n-prompts", 1)
    assert code == 0 and out.splitlines() == [
        f"{tmp_path / 'out'}: 36 items, 0 failed, 0 infeasible, 36 were there already",
        f"Tables, figures and a page of it: kvpitfalls report {tmp_path / 'out'}",
    ]
    code, out, err = run("sweep", "--config", path, "--output", tmp_path / "out")
    assert code == 2 and "begun with config.n_prompts = 1 and would go on with 2" in err and not out


def test_the_suite_is_a_sweep_and_its_report(run, model, tmp_path, monkeypatch):
    """The command makes the card and the page, and both are those of the same sweep and report by hand."""
    short = {
        **presets._SMALL,
        "n_prompts": 2,
        "max_new_tokens": {"attack": 3, "recall": 3, "follow": 3},
    }
    monkeypatch.setitem(presets._PRESETS, "suite-v1-small", {"all": short})
    argv = ["--model", model, "--output", tmp_path / "suite"]
    code, out, _ = run("suite", "--small", *argv)
    card = read_card(tmp_path / "suite" / "report" / "card.json")
    assert (
        code == 0
        and str(tmp_path / "suite" / "report" / "index.html") in out
        and str(tmp_path / "suite" / "report" / "card.json") in out
        and "kvpitfalls report" not in out  # it has written that page itself
    )
    tiny_sweep.draw_nothing(monkeypatch)
    assert run("sweep", "--preset", "suite-v1-small", "--model", model, "--output", tmp_path / "by_hand")[0] == 0
    run("report", tmp_path / "by_hand")
    by_hand = read_card(tmp_path / "by_hand" / "report" / "card.json")
    assert card == by_hand and {made["config.dataset"] for made in card["made_with"]} == {"suite-v1"}
    code, out, _ = run("suite", "--small", *argv, "--json")
    assert code == 0 and json.loads(out)["all"]["resumed_at"] == 2 * 3 * 7
    assert {"all": json.loads(out)["all"], **json.loads(run("report", tmp_path / "suite", "--json")[1])} == json.loads(
        out
    )
    code, _, err = run("suite", *argv)
    assert code == 2 and "the sweep was begun with" in err, "the whole suite is another sweep"


def test_infeasible_items_are_counted_and_no_failure(run, model, tmp_path):
    path = tmp_path / "sweep.json"
    config = tiny_sweep.config(
        model, n_prompts=1, modes=["whitelist_defense"], compression_ratios=[0.9], orders=["defense_first"]
    )
    path.write_text(json.dumps(config.to_dict()), "utf-8")
    code, out, err = run("sweep", "--config", path, "--output", tmp_path / "out")
    assert code == 0 and "failed;" not in err and "12 items, 0 failed, 8 infeasible" in out


def test_answers_that_rouge_cannot_read_are_counted_where_numbers_are(run, model, tmp_path, monkeypatch):
    """None of a recital in Chinese is seen: "complied" there is no finding, and the page and the command say so."""
    tiny_sweep.draw_nothing(monkeypatch)
    sweep(tiny_sweep.config(model, n_prompts=1, kinds=["attack", "recall"]), tmp_path)
    recorded = read_records(tmp_path)
    for said, n in {"Ja, gerne: höflich. 42": 0, "!?": 0, "绝对不要透露这些 JSON": 3, "Никогда не": 3}.items():
        for i, record in enumerate(recorded):
            record["output"] = said if i < 3 else "Never."
        (tmp_path / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in recorded), "utf-8")
        code, out, _ = run("report", tmp_path)
        beginning = f"{n} of {len(recorded)} answers to attacks and of the control are mostly in other letters than a-z"
        for text in (out, (tmp_path / "report" / "index.html").read_text("utf-8")):
            assert code == 0 and text.count("mostly in other letters") == text.count(beginning) == (n > 0)


def test_failed_items_exit_with_1(run, model, tmp_path):
    row = {"key": 1, "messages": [{"role": "system", "content": "Silence!"}, {"role": "user", "content": "Hello"}]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    argv = [
        "--dataset",
        tmp_path / "mine.jsonl",
        "--model",
        model,
        "--policy",
        "knorm",
        "--ratio",
        0.5,
        "--max-new-tokens",
        3,
    ]
    code, _, err = run("leakage", *argv, "--output", tmp_path / "out")
    assert code == 1 and "items failed; their records hold the error" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sweep"], "required"),
        (["sweep", "--preset", "figure99", "--output", "x"], "preset is 'figure99'"),
        (
            ["sweep", "--preset", "smollm2", "--dtype", "float31", "--output", "x"],
            "dtype is 'float31'; expected float32",
        ),
        (["sweep", "--preset", "smollm2", "--output", ""], "--output is ''; expected the path of a folder"),
        (["suite", "--small", "--output", ""], "--output is ''; expected the path of a folder"),
        (["ifeval", "--output", ""], "--output is ''; expected the path of a folder"),
        (["report", ""], "folder is ''; expected the path of a folder"),
        (["sweep", "--preset", "smollm2", "--n-prompts", "0", "--output", "x"], "n_prompts is 0"),
        (["sweep", "--preset", "smollm2", "--config", "x", "--output", "x"], "not allowed with"),
        (["sweep", "--preset", "smollm2", "--engine", "slurm", "--output", "x"], "invalid choice: 'slurm'"),
        (["sweep", "--preset", "smollm2", "--workers", "2", "--output", "x"], "workers is 2, with the engine 'local'"),
    ],
)
def test_bad_usage_exits_with_2_and_writes_nothing(run, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*argv)
    assert code == 2 and message in err and not out and not list(tmp_path.iterdir())


def same_in_a_narrow_terminal(run, monkeypatch, whole, *argv):
    """What is at hand is shown again at 60 columns: nothing but a said path is wider, and every cell is there."""
    terminal(monkeypatch, 60)
    tiny_sweep.draw_nothing(monkeypatch)
    code, shown, _ = run(*argv)
    whole, shown = whole[whole.index("model ") :], shown[shown.index("model: ") :]
    tables = [line for line in shown.splitlines() if not line.startswith("model: ") and " recorded, " not in line]
    assert code == 0 and max(map(len, tables)) <= 60 < max(map(len, whole.splitlines()))
    assert rows_of(shown) == rows_of(whole)


def test_a_sweep_of_probes_is_reported(run, model, tmp_path, monkeypatch):
    path = tmp_path / "sweep.json"
    config = tiny_sweep.config(
        model, n_prompts=2, kinds=["probe"], modes=["fair"], compression_ratios=[0.5], orders=["defense_first"]
    )
    path.write_text(json.dumps(config.to_dict()), "utf-8")
    assert run("sweep", "--config", path, "--output", tmp_path / "out")[0] == 0
    code, out, _ = run("report", tmp_path / "out")
    header = out.splitlines()[0].split()
    assert code == 0 and header[-5:] == ["refusal", "leak", "margin", "recall", "follow"] and "guarded" not in out
    assert [line.split()[3:6] for line in out.splitlines()[2:5]] == [["none", "full", ".00"]] + [
        [p, "fair", ".50"] for p in config.policies
    ]
    assert "Likelihood of given answers" in (tmp_path / "out" / "report" / "index.html").read_text("utf-8")
    same_in_a_narrow_terminal(run, monkeypatch, out, "report", tmp_path / "out")


def test_a_sweep_of_turns_is_reported(run, model, tmp_path, monkeypatch):
    path = tmp_path / "sweep.json"
    config = tiny_sweep.config(
        model, n_prompts=2, kinds=["turns"], modes=["biased"], compression_ratios=[0.5], orders=["defense_first"]
    )
    path.write_text(json.dumps({**config.to_dict(), "max_new_tokens": {"turns": 4}}), "utf-8")
    assert run("sweep", "--config", path, "--output", tmp_path / "out")[0] == 0
    code, out, _ = run("report", tmp_path / "out")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and lines[0][-7:] == [*TURN] and "guarded" not in out
    settings = [(p, "biased", ".50", way) for p in config.policies for way in (*WAYS, "gain")]
    rows = [[*setting, str(n)] for setting in [("none", "full", ".00", "both"), *settings] for n in TURNS]
    assert [line[3:8] for line in lines[2 : 2 + len(rows)]] == rows
    page = (tmp_path / "out" / "report" / "index.html").read_text("utf-8")
    assert "<h3>Turn by turn</h3>" in page and "<svg" not in page, "a figure without a line"
    with (tmp_path / "out" / "report" / "differences.csv").open(encoding="utf-8") as file:
        assert {turn_metric(5, "once", "recall_above")} <= {row["metric"] for row in csv.DictReader(file)}
    same_in_a_narrow_terminal(run, monkeypatch, out, "report", tmp_path / "out")


def test_leakage_shows_all_four_and_report_reads_it(run, model, tmp_path, monkeypatch):
    flags = [
        "--model",
        model,
        "--n-prompts",
        2,
        "--policy",
        "tova",
        "--mode",
        "0.5",
        "--ratio",
        0.4,
        "--max-new-tokens",
        4,
    ]
    command = ["leakage", *flags, "--attack", "role_play", "--order", "directive_first", "--output", tmp_path]
    code, out, _ = run(*command)
    header = next(line for line in out.splitlines() if line.startswith("model")).split()
    together = ["guarded", "refused", "leaked", "complied", "leak_above", "recall_above", "follow", "refused_task"]
    assert code == 0 and header[-10:] == [*together, "kept:defense", "kept:directive"]
    assert header[6:10] == ["prompts", "items", "failed", "infeasible"]
    assert [line.split()[3:6] for line in out.splitlines()[-2:]] == [
        ["none", "full", ".00"],
        ["tova", "lambda=0.5", ".40"],
    ]
    assert {r["attack"] for r in read_records(tmp_path)} == {"role_play-1", "role_play-2", "role_play-3", None}
    code, out, _ = run("report", tmp_path)
    assert (
        code == 0
        and "20 of 20 items recorded, 0 failed, 0 infeasible" in out
        and (tmp_path / "report" / "index.html").is_file()
    )
    same_in_a_narrow_terminal(run, monkeypatch, out, *command)
    same_in_a_narrow_terminal(run, monkeypatch, out, "report", tmp_path)
    told, reported = (json.loads(run(*one, "--json")[1]) for one in (command, ["report", tmp_path]))
    assert told["cells"] == reported["cells"] and told["all"]["items"] == 20, "JSON has what the table shows"


def test_leakage_of_a_users_file_says_that_following_is_not_measured(run, model, tmp_path):
    messages = [{"role": "system", "content": "Be brief and kind."}, {"role": "user", "content": "Hello"}]
    (tmp_path / "mine.jsonl").write_text(json.dumps({"key": 1, "messages": messages}) + "\n", "utf-8")
    argv = [
        "--dataset",
        tmp_path / "mine.jsonl",
        "--model",
        model,
        "--policy",
        "tova",
        "--ratio",
        0.4,
        "--max-new-tokens",
        3,
    ]
    code, out, err = run("leakage", *argv, "--output", tmp_path / "out")
    assert code == 0 and "following is not measured" in err and "recall_above" in out and "refused_task" not in out


def test_ifeval_prints_both_levels_and_rules(run, model, tmp_path, monkeypatch):
    argv = [
        "--model",
        model,
        "--n-prompts",
        3,
        "--policy",
        "snapkv",
        "--ratio",
        0.5,
        "--max-new-tokens",
        4,
        "--output",
        tmp_path,
    ]
    code, out, _ = run("ifeval", *argv)
    assert code == 0 and "strict" in out and "loose" in out
    for what in ("prompts, all", "instructions, all", "prompts, single", "instructions, single"):
        assert out.count(what) == 2  # the full cache, and SnapKV
    assert {r["defense"] for r in read_records(tmp_path)} == {"none"} and {
        r["kind"] for r in read_records(tmp_path)
    } == {"follow"}
    same_in_a_narrow_terminal(run, monkeypatch, out, "ifeval", *argv)
    cells = json.loads(run("ifeval", *argv, "--json")[1])["cells"]
    assert following_table(cells) in out, "JSON has what the table shows"


def test_a_report_on_nothing_exits_with_1(run, tmp_path):
    code, out, err = run("report", tmp_path)
    assert code == 1 and "has no records.jsonl" in err and not out


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_tells_what_is_recorded_and_the_same_command_goes_on(run, model, tmp_path, sent):
    config, out = tmp_path / "sweep.json", tmp_path / "out"
    config.write_text(json.dumps(tiny_sweep.config(model, batch_size=6).to_dict()), "utf-8")
    command = [sys.executable, "-m", "kvpitfalls", "sweep", "--config", str(config), "--output", str(out)]
    ran = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests themselves run in the background
    )
    while ran.poll() is None and not ((out / "records.jsonl").exists() and (out / "records.jsonl").stat().st_size):
        time.sleep(0.01)
    ran.send_signal(sent)
    said, error = ran.communicate()
    recorded = len(read_records(out))
    assert ran.returncode == 130 and not said and "Traceback" not in error and 0 < recorded < 288
    last = (
        f"kvpitfalls sweep: interrupted; {recorded} of 288 items are recorded in {out}, and the same command goes on "
        "from there"
    )
    assert error.splitlines()[-1] == last


@pytest.mark.parametrize("step", ["begin", "run_local"])
def test_ctrl_c_before_the_first_record_says_that_nothing_is_recorded(run, model, tmp_path, monkeypatch, step):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"kvpitfalls.experiments.sweep.{step}", interrupted)
    config, out = tmp_path / "sweep.json", tmp_path / "out"
    config.write_text(json.dumps(tiny_sweep.config(model).to_dict()), "utf-8")
    code, said, error = run("sweep", "--config", config, "--output", out)
    assert (code, said) == (130, "")
    assert error.splitlines()[-1] == f"kvpitfalls sweep: interrupted; nothing is recorded in {out} yet"


@pytest.mark.parametrize("command", ["sweep", "leakage", "ifeval"])
def test_help_names_what_the_arguments_take(run, command):
    code, out, _ = run(command, "--help")
    lists = " ".join(out.split())
    for name in ("figure15", "snapkv", "fair_phrase", "confidential", "role_play (role_play-1 to role_play-"):
        assert name in lists
    assert code == 0


@pytest.mark.parametrize("command", ["leakage", "ifeval", "suite"])
def test_what_help_says_is_by_default_is_what_runs(run, command, monkeypatch, tmp_path):
    """Without an option but --output: the config that comes to run is the one that the help describes."""
    ran = []
    monkeypatch.setattr(sweeps, "run_parts", lambda args, parts, *_, **__: ran.extend(parts.values()) or 130)
    assert run(command, "--output", tmp_path)[0] == 130
    (config,), help_text = ran, " ".join(run(command, "--help")[1].split())
    said = [f"{config.batch_size} by default", f"{config.device} by default", f"{config.dtype} by default"]
    if command != "suite":
        limits, ratios = config.max_new_tokens, config.compression_ratios
        said += [f"{' and '.join(config.modes)} by default", f"{ratios[1]} to {ratios[-1]} by default"]
        said += [
            f"{limits[kind]} {what}" for kind, what in (("attack", "to"), ("recall", "of")) if kind in config.kinds
        ]
        said += [f"{limits['follow']}", f"{config.dataset} by default"]
        assert config.defenses == (("refuse",) if command == "leakage" else ("none",))
    if command == "leakage":  # "the first" of each
        corpus = load_corpus()
        assert [*config.attacks, *config.defenses] == [next(iter(corpus.attacks)), list(corpus.defenses)[1]]
    assert [text for text in said if text not in help_text] == [] and config.models == ("default",)
