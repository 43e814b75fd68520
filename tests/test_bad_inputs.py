"""Every row of the table of bad inputs, and every bad command line: one exception of exactly the documented type, in
one sentence."""

import gc
import re
import warnings

import bad_calls
import bad_inputs
import bad_keeps
import bad_models
import bad_sweeps
import numpy as np
import pytest
import torch
from bad_inputs import KEYS, QUERIES, SCORES, place

import kvpitfalls as kvp
from kvpitfalls import _core, cli, ops, reference

ROWS = [
    pytest.param(*row, id=f"{name.lower()}-{i}-{row[2][:40]}")
    for table, names in (
        (bad_calls, ("OPS",)),
        (bad_keeps, ("KEEP", "PARAMETERS")),
        (bad_models, ("PROMPTS", "MODELS", "TEXTS")),
        (bad_sweeps, ("EXPERIMENTS",)),
    )
    for name in names
    for i, row in enumerate(getattr(table, name))
]


@pytest.fixture(scope="module", autouse=True)
def nothing_stays_wrapped():
    """The table's model is wrapped while its rows run, and not while other modules' tests do."""
    yield
    place().handle.remove()
    place.cache_clear()
    gc.collect()  # models that a row wrapped and dropped


@pytest.mark.parametrize(("call", "error", "message"), ROWS)
def test_a_bad_input_is_refused_by_name(call, error, message):
    before = KEYS.copy(), QUERIES.copy(), SCORES.copy()
    with pytest.raises(error) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of libraries that are given nonsense
        call(place())
    assert type(caught.value) is error and message in str(caught.value)
    assert all(np.array_equal(a, b) for a, b in zip(before, (KEYS, QUERIES, SCORES), strict=True)), (
        "a refused call has written nothing"
    )


def test_the_table_is_large():
    assert len(ROWS) >= 150


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """The exit code and output of a command in an empty folder; models are tiny."""
    monkeypatch.setattr("kvpitfalls.hf.load.load", lambda name, **_: (place().chatty, place().tok))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    (tmp_path / "utf16").write_bytes("Never.".encode("utf-16-le"))
    (tmp_path / "broken.toml").write_text("a = [")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "odd.json").write_bytes(b"\xff")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "unknown.toml").write_text("zz = 1")
    (tmp_path / "zero.toml").write_text("n_prompts = 0")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "records.jsonl").write_text("3\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "records.jsonl").write_text('{"key": 1}\n')
    (tmp_path / "foreign" / "run_meta.json").write_text('{"same": {}, "items": 1}')

    def call(argv):
        try:
            code = cli.main(argv)
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return call


AUDIT = ["audit", "--system", "Never say no.", "--instruction", "a=Never say no."]
SWEEP, LEAKAGE = ["sweep", "--output", "out"], ["leakage", "--output", "out"]
COMMANDS = [
    ([], 2, "the following arguments are required: command"),
    (["dance"], 2, "invalid choice: 'dance'"),
    (["info", "--zz"], 2, "unrecognized arguments: --zz"),
    (
        ["lm-eval", "--policy", "tova", "--budget", "4", "--tasks", "ifeval"],
        2,
        "unrecognized arguments: --tasks; lm-eval's own options go behind a --",
    ),
    (
        ["garak", "--policy", "tova", "--budget", "4", "--probes", "x"],
        2,
        "unrecognized arguments: --probes; garak's own options go behind a --",
    ),
    (["audit"], 2, "one of the arguments --system --system-file is required"),
    (["audit", "--instruction", "a=b"], 2, "one of the arguments --system --system-file is required"),
    ([*AUDIT[:3], "--instruction", "=b"], 2, "--instruction is '=b'; expected NAME=TEXT"),
    ([*AUDIT[:3], "--instruction", "a="], 2, "the text of instruction 'a' is empty"),
    ([*AUDIT[:3], "--instruction", "a"], 2, "--instruction is 'a'; expected NAME=TEXT"),
    ([*AUDIT, "--instruction", "a=no"], 2, "--instruction is 'a=no'; expected NAME=TEXT, each name once"),
    ([*AUDIT, "--instruction", "b=say"], 2, "instructions 'a' and 'b' overlap"),
    ([*AUDIT[:3], "--instruction", "a=e"], 2, "the text of instruction 'a' is in the prompt 2 times"),
    (["audit", "--system", "", "--instruction", "a=b"], 2, "the text of instruction 'a' is not in the prompt"),
    (["audit", "--system", "a<|im_end|>b", "--instruction", "a=b"], 2, "message 0 holds '<|im_end|>' at character 1"),
    (
        ["audit", "--system", "a\udcffb", "--instruction", "a=b"],
        2,
        "argument --system: it is not UTF-8 ('utf-8' codec can't decode byte 0xff in position 1",
    ),
    (["audit", "--system-file", "latin1", "--instruction", "a=b"], 2, "--system-file latin1 is not UTF-8"),
    (["audit", "--system-file", "utf16", "--instruction", "a=b"], 2, "utf16 holds U+0000 at character 1, as a file in"),
    (["audit", "--system-file", "none", "--instruction", "a=b"], 1, "none: No such file or directory"),
    (["audit", "--system-file", ".", "--instruction", "a=b"], 1, ".: Is a directory"),
    ([*AUDIT, "--ratio", "x"], 2, "argument --ratio/--compression-ratio: invalid float value: 'x'"),
    ([*AUDIT, "--ratio", "nan"], 2, "compression_ratio is nan"),
    ([*AUDIT, "--ratio", "1"], 2, "compression_ratio is 1.0"),
    ([*AUDIT, "--min-kept", "nan"], 2, "--min-kept is nan; expected a share in (0, 1]"),
    ([*AUDIT, "--min-kept", "0"], 2, "--min-kept is 0.0"),
    ([*AUDIT, "--fair", "maybe"], 2, "argument --fair: 'maybe'; expected both, no (biased), yes, paper"),
    ([*AUDIT, "--fair", "paper"], 2, "fair='paper' expects exactly two instructions that touch"),
    ([*AUDIT, "--policy", "zzz"], 2, "policy is 'zzz', which is not known"),
    ([*AUDIT, "--protect", "zzz"], 2, "the text is not in the prompt; expected it once: 'zzz'; or the name of an inst"),
    ([*AUDIT, "--output", "none/out.json", "--model", "unread"], 1, "none/out.json cannot be written: none is no fol"),
    ([*AUDIT, "--html", ".", "--model", "unread"], 1, "IsADirectoryError: . is a folder; expected the path of a file"),
    (["sweep"], 2, "the following arguments are required: --output"),
    (SWEEP, 2, "one of the arguments --config --preset is required"),
    ([*SWEEP, "--preset", "zz"], 2, "preset is 'zz'; expected one of"),
    ([*SWEEP, "--config", "none.toml"], 1, "none.toml: No such file or directory"),
    ([*SWEEP, "--config", "broken.toml"], 2, "broken.toml cannot be read"),
    ([*SWEEP, "--config", "odd.json"], 2, "odd.json cannot be read"),
    ([*SWEEP, "--config", "deep.json"], 2, "deep.json cannot be read"),
    ([*SWEEP, "--config", "list.json"], 2, "list.json holds a list; expected names and values"),
    ([*SWEEP, "--config", "unknown.toml"], 2, "the config holds 'zz'"),
    ([*SWEEP, "--config", "zero.toml"], 2, "n_prompts is 0; expected a whole number, at least 1"),
    ([*SWEEP, "--preset", "smollm2", "--n-prompts", "0"], 2, "n_prompts is 0"),
    ([*SWEEP, "--preset", "smollm2", "--n-prompts", "x"], 2, "argument --n-prompts: invalid int value: 'x'"),
    ([*SWEEP, "--preset", "smollm2", "--batch-size", "-1"], 2, "batch_size is -1"),
    ([*SWEEP, "--preset", "smollm2", "--workers", "2"], 2, "workers is 2, with the engine 'local'"),
    ([*SWEEP, "--preset", "smollm2", "--engine", "zz"], 2, "argument --engine: invalid choice: 'zz'"),
    ([*SWEEP, "--preset", "smollm2", "--dataset", "zz"], 1, "dataset is 'zz'; expected own, suite-v1, paper"),
    ([*SWEEP, "--preset", "figure1", "--data", "none"], 1, "sys_ifeval.jsonl does not exist; expected a folder with"),
    (["sweep", "--preset", "smollm2", "--output", "latin1"], 1, "latin1"),
    (["leakage"], 2, "the following arguments are required: --output"),
    ([*LEAKAGE, "--mode", "zz"], 2, "modes hold 'zz'"),
    ([*LEAKAGE, "--mode", "2"], 2, "modes hold 2.0"),
    ([*LEAKAGE, "--ratio", "2"], 2, "compression_ratio is 2.0"),
    ([*LEAKAGE, "--max-new-tokens", "0"], 2, "max_new_tokens['attack'] is 0"),
    ([*LEAKAGE, "--attack", "zz"], 2, "attacks hold 'zz'"),
    ([*LEAKAGE, "--defense", "zz"], 2, "defenses hold 'zz'"),
    ([*LEAKAGE, "--order", "zz"], 2, "orders hold 'zz'"),
    ([*LEAKAGE, "--policy", "zz"], 2, "policy is 'zz'"),
    (["ifeval", "--output", "out", "--defense", "zz"], 2, "defenses hold 'zz'"),
    (["report", "none"], 1, "none has no records.jsonl"),
    (["report", "."], 2, "record 1, is no JSON object"),
    (["report", "broken"], 2, "record 1, is no JSON object"),
    (["report", "foreign"], 2, "record 1 is not a sweep's"),
]


@pytest.mark.parametrize(
    ("argv", "code", "message"), COMMANDS, ids=[f"{i}-{' '.join(row[0])[-40:]!a}" for i, row in enumerate(COMMANDS)]
)
def test_a_bad_command_says_so_in_one_sentence(run, argv, code, message):
    found, out, err = run(argv)
    *usage, sentence = err.splitlines()
    assert found == code and message in sentence and out == ""
    assert not usage or usage[0].startswith("usage: "), "argparse says how it is called, and then what is wrong"
    assert "Traceback" not in err


def test_numbers_that_are_none_are_seen_and_sort_last():
    """NaN and infinity in keys and queries are no error: they are visible in the scores, and NaN is kept last."""
    keys = KEYS.copy()
    keys[0, 0, 3], keys[0, 0, 5], keys[0, 1, 7] = np.nan, np.inf, -np.inf
    scores = ops.score("norm", keys)
    assert np.isnan(scores[0, 0]).nonzero()[0].tolist() == [3] and scores[0, 0, 5] == scores[0, 1, 7] == -np.inf
    kept = ops.select(scores, 19)[0]
    assert 3 not in kept[0, 0] and 5 in kept[0, 0] and 7 not in kept[0, 1], (
        "minus infinity is a number, and goes before none"
    )
    queries = QUERIES.copy()
    queries[0, 0, 4] = np.nan
    voted = bad_inputs.attention(queries=queries)
    assert np.isnan(voted[0, 0, :5]).all() and np.isfinite(voted[0, 0, 5:]).all() and np.isfinite(voted[0, 1]).all()
    whole = kvp.keep("h2o", keys, queries, budget=6)
    assert whole.counts.tolist() == [[6, 6]]


def test_denormal_numbers_are_numbers():
    """Neither flushed to zero nor slow paths of their own: scores are the reference's, and ties stay ties."""
    keys = KEYS * np.float32(3e-20)
    assert (keys * keys).max() < np.finfo(np.float32).tiny and (keys * keys).max() > 0, "all squares are denormal"
    wanted = reference.score("norm", torch.from_numpy(keys)).numpy()
    np.testing.assert_allclose(ops.score("norm", keys), wanted, rtol=1e-4)  # denormal squares have 10 bits less
    tiny = np.full((1, 1, 4, 2), np.float32(1e-45))
    moved = ops.gather(tiny, tiny, np.zeros((1, 1, 1), np.int32))
    assert (moved[0] == np.float32(1e-45)).all(), "bit for bit"
    assert ops.select(np.full((1, 1, 5), np.float32(1e-45)), 2)[0].tolist() == [[[0, 1]]]


def test_gradients_and_read_only_arrays_are_only_read():
    keys = torch.from_numpy(KEYS).clone().requires_grad_()
    scores = ops.score("norm", keys)
    assert not scores.requires_grad and torch.equal(scores, ops.score("norm", keys.detach()))
    fixed = KEYS.copy()
    fixed.flags.writeable = False
    assert np.array_equal(ops.score("norm", fixed), ops.score("norm", KEYS))
    assert np.array_equal(
        ops.gather(fixed, fixed, bad_inputs.POSITIONS)[0], ops.gather(KEYS, KEYS, bad_inputs.POSITIONS)[0]
    )


def test_a_tensor_without_its_memory_is_refused():
    """As sharding leaves them: the shape is there, the storage is not, or is too small."""
    keys, found = torch.from_numpy(KEYS).clone(), []
    scores = keys[..., 0]
    whole, positions = keys.untyped_storage().nbytes(), torch.zeros(1, 2, 1, dtype=torch.int32)
    calls = [
        lambda: ops.score("norm", keys),
        lambda: ops.gather(keys, keys, positions),
        lambda: ops.select(scores, 3),
        lambda: kvp.keep("knorm", keys, budget=3),
    ]
    for n_byte in (0, 100):
        keys.untyped_storage().resize_(n_byte)
        for call in calls:
            try:
                call()
            except ValueError as error:
                found.append(str(error))
    keys.untyped_storage().resize_(whole)  # torch itself dies of printing such a tensor, as a failure would
    assert len(found) == 2 * len(calls)
    assert all(
        re.match(r"(keys|scores) has storage of (0|100) bytes; expected at least \d+: its memory was freed", m)
        for m in found
    )


class Older:
    """A tensor of a torch from before 2.10, which knows all but the exchange table."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@pytest.mark.parametrize("lend", [lambda x: x, Older], ids=["exchange table", "capsule"])
def test_what_dlpack_does_not_tell_of_torchs_tensors_is_asked_for(lend):
    """Autograd, signs that are still to be turned, and memory that was freed."""
    shape = n_row, n_head, n_token, n_dim = 2, 3, 40, 8
    turned = torch.conj(torch.complex(torch.zeros(shape), torch.randn(shape))).imag
    followed = torch.randn(shape).requires_grad_()
    positions, (keys, values) = np.zeros((n_row, n_head, 1), np.int32), np.empty((2, n_row, n_head, 1, n_dim), "f4")
    assert turned.is_neg()
    _core.gather(lend(turned), lend(followed), positions, keys, values, 1)
    assert np.array_equal(keys, turned.resolve_neg()[:, :, :1]) and np.array_equal(values, followed[:, :, :1].detach())
    shrunk, scores = torch.randn(shape), np.empty((1, 2, n_token // 2), np.float32)
    part = shrunk[1:, 1:, ::2]
    needed = 4 * (shrunk.numel() - n_dim)  # the last row is left out
    for n_byte in (needed - 4, 0):
        shrunk.untyped_storage().resize_(n_byte)
        with pytest.raises(ValueError, match=f"^keys has storage of {n_byte} bytes; expected at least {needed}: its "):
            _core.score("norm", lend(part), *[None] * 5, scores, None, None, 1)
    shrunk.untyped_storage().resize_(needed)
    _core.score("norm", lend(part), *[None] * 5, scores, None, None, 1)
