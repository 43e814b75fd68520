"""The experiment commands as a user runs them."""

import json

import pytest
import tiny_sweep

from kvpitfalls import cli
from kvpitfalls.experiments.records import read_records


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
    assert code == 0 and out == f"{tmp_path / 'out'}: 36 items, 0 failed, 36 were there already\n"
    code, out, err = run("sweep", "--config", path, "--output", tmp_path / "out")
    assert code == 2 and "begun with config.n_prompts = 1 and would go on with 2" in err and not out


def test_failed_items_exit_with_1(run, model, tmp_path):
    path = tmp_path / "sweep.json"
    config = tiny_sweep.config(model, n_prompts=1, modes=["whitelist_defense"], compression_ratios=[0.9], orders=["defense_first"])
    path.write_text(json.dumps(config.to_dict()), "utf-8")
    code, out, err = run("sweep", "--config", path, "--output", tmp_path / "out")
    assert code == 1 and "8 items failed; their records hold the error" in err and "12 items, 8 failed" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sweep"], "required"),
        (["sweep", "--preset", "figure99", "--output", "x"], "preset is 'figure99'"),
        (["sweep", "--preset", "smollm2", "--n-prompts", "0", "--output", "x"], "n_prompts is 0"),
        (["sweep", "--preset", "smollm2", "--config", "x", "--output", "x"], "not allowed with"),
    ],
)
def test_bad_usage_exits_with_2(run, argv, message):
    code, out, err = run(*argv)
    assert code == 2 and message in err and not out
