"""A policy of somebody else's leaves what it is lent as it was, or is told by name; so is whatever it gives back that
is no answer."""

import re
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from tiny_models import build, ids

import kvpitfalls as kvp
from kvpitfalls.policies import Vote

KEYS, QUERIES, VALUES = (torch.randn(2, n, 30, 16, generator=torch.Generator().manual_seed(n)) for n in (2, 4, 6))
VALUES = VALUES[:, :2]
PARTS = {"keys": KEYS, "queries": QUERIES, "values": VALUES}
RANGES = [(4, 30), (0, 30)]
LIBRARIES = {"numpy": lambda x: x.clone().numpy(), "torch": torch.clone}


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture
def policy_of(registry):
    """A policy with this method, by name ``score`` or ``call``."""

    def made(method, name="score"):
        members = {"name": "somebody", name: method, "needs_queries": True, "needs_values": True}
        return dataclass(frozen=True)(type("Somebody", (kvp.Policy,), members))()

    return made


def newest(inputs):
    return inputs.score("position", n_sink=0)


def kept(policy, of=KEYS, given=None, **settings):
    queries, values = (QUERIES, VALUES) if isinstance(of, torch.Tensor) else (QUERIES.numpy(), VALUES.numpy())
    given = {"values": values, **(given or {})}
    return kvp.keep(policy, of, given.pop("queries", queries), budget=9, **given, **settings)


def write(x):
    x += 1


WRITES = {
    "in place": write,
    "by a view": lambda x: write(x[:, :, 2:5]),
    "by what is no copy": lambda x: write(np.asarray(x, np.float32) if isinstance(x, np.ndarray) else x.float()),
    "by index": lambda x: x.__setitem__((0, 0, 0), 0),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("method", ["score", "call"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_writing_to_what_is_lent_is_told(policy_of, library, method, way, part):
    def writes(self, inputs):
        WRITES[way](getattr(inputs, part))
        return newest(inputs) if method == "score" else inputs.call("position")

    given = {name: LIBRARIES[library](x) for name, x in PARTS.items()}
    told = rf"wrote to inputs\.{part} of layer 0, .*; expected .*clone" if library == "torch" else "read-only"
    with pytest.raises(ValueError, match=told):
        kept(policy_of(writes, method), given.pop("keys"), given)
    assert library == "torch" or all(np.array_equal(given[name], PARTS[name]) for name in given)


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_wrapped_models_cache_is_not_written_to(policy_of, llama, way, mode):
    """Nobody counts what is written in inference mode: there a policy gets copies, to do with as it likes."""

    def writes(self, inputs):
        scores = newest(inputs)
        for x in (inputs.keys, inputs.values, inputs.queries):
            WRITES[way](x)
        return scores

    cached = {}
    for name, method in (("writes", writes), ("reads", lambda self, inputs: newest(inputs))):
        with mode(), kvp.wrap(llama, policy_of(method), budget=9) as handle:
            if name == "writes" and mode is torch.no_grad:
                with pytest.raises(ValueError, match=r"wrote to inputs\.keys or inputs\.queries or inputs\.values"):
                    handle.compress(ids())
                return
            cached[name] = handle.compress(ids())
    for mine, theirs in zip(*(cache.kept_layers for cache in cached.values()), strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("library", LIBRARIES)
def test_lists_of_ranges_are_a_policys_own(policy_of, library, fair):
    def edits(self, inputs):
        scores = newest(inputs)
        inputs.valid[0] = (5, 6)
        inputs.segments[0][0] = (0, 2)
        inputs.spans[0].clear()
        return scores

    where = {"valid": RANGES, "spans": {"a": (5, 12), "b": (12, 25)}, "fair": fair}
    mine, theirs = (
        kept(policy_of(method), LIBRARIES[library](KEYS), **where)
        for method in (edits, lambda self, inputs: newest(inputs))
    )
    assert np.array_equal(mine.positions, theirs.positions)


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        (lambda x: x.to("meta"), r"scores on meta .*; expected them on cpu"),
        (torch.Tensor.to_sparse, r"torch\.sparse_coo.*; expected them on cpu \(torch\.strided\)"),
    ],
)
def test_scores_elsewhere_are_refused(policy_of, scores, told):
    with pytest.raises(ValueError, match=told):
        kept(policy_of(lambda self, inputs: scores(newest(inputs))))


def plain(cls):
    return cls


@pytest.mark.parametrize("parent", [kvp.SnapKV, kvp.TOVA, kvp.StreamingLLM, kvp.PyramidKV, kvp.LagKV])
@pytest.mark.parametrize("maker", [plain, dataclass(frozen=True)], ids=["plain", "dataclass"])
@pytest.mark.parametrize("annotated", [False, True])
def test_a_child_says_its_settings_where_they_are_read_or_is_refused(registry, parent, maker, annotated):
    """They are read of a dataclass's annotations, and of nothing else."""
    for name in (field.name for field in fields(parent)):
        members = {"name": "child", name: 7, **({"__annotations__": {name: int}} if annotated else {})}
        child = maker(type("Child", (parent,), members))
        if annotated and maker is not plain:
            assert getattr(child(), name) == 7
        else:
            with pytest.raises(TypeError, match=rf"Child says {name} = 7, .* not be read; expected @.* {name}: .* = 7"):
                child()
    assert maker(type("Child", (parent,), {"name": "child"}))() is not None


@pytest.mark.parametrize("given", [newest, lambda inputs: [inputs.call("norm")], lambda inputs: "norm"])
def test_what_is_no_call_is_refused(policy_of, llama, given):
    policy, told = policy_of(lambda self, inputs: given(inputs), "call"), "'somebody' returned a .* from call; expected"
    with pytest.raises(TypeError, match=told):
        kept(policy)
    with kvp.wrap(llama, policy, budget=9) as handle, pytest.raises(TypeError, match=told):
        handle.compress(ids())


VOTE = Vote((0, 30), (20, 30))
VOTES = [
    ([VOTE, VOTE], TypeError, "votes hold a tuple for a row; expected a list of Vote for each row"),
    ([[{"keys": (0, 30)}]] * 2, TypeError, "votes hold a dict for a row; expected"),
    (None, TypeError, "votes is None; expected a list of Vote for each row"),
    ([[VOTE]], ValueError, "votes are of 1 rows; expected 2, a list of Vote for each row"),
    ([[VOTE]] * 3, ValueError, "votes are of 3 rows; expected 2"),
    ([], ValueError, "votes are of 0 rows; expected 2"),
    ([[VOTE._replace(weight="avg")]] * 2, ValueError, "weight 'avg'; expected one of 'sum', 'mean', 'age', 'max'"),
    ([[VOTE._replace(queries=(20.5, 30))]] * 2, ValueError, "expected ranges .* of whole numbers"),
    ([[VOTE._replace(keys=[0, 30])]] * 2, ValueError, "expected ranges .* of whole numbers"),
    ([[VOTE._replace(keys=range(30))]] * 2, ValueError, "expected ranges .* of whole numbers"),
    ([[VOTE._replace(keys=7)]] * 2, ValueError, "expected ranges .* of whole numbers"),
    ([[VOTE._replace(keys=(0, 2**40))]] * 2, ValueError, "expected ranges .* of whole numbers"),
    ([[VOTE._replace(age_end=1.5)]] * 2, ValueError, "expected ranges .* of whole numbers"),
]


@pytest.mark.parametrize(("votes", "error", "told"), VOTES)
def test_votes_that_are_none_are_refused(policy_of, votes, error, told):
    with pytest.raises(error, match=told):
        kept(policy_of(lambda self, inputs: inputs.attend(votes)))


@pytest.mark.parametrize("share_heads", ["mean", "", "1", 1, 0.5, None, [True]])
def test_whether_heads_share_a_vote_is_true_or_false(policy_of, share_heads):
    told = re.escape(f"share_heads is {share_heads!r}; expected True or False")
    with pytest.raises(ValueError, match=f"^{told}$"):
        kept(policy_of(lambda self, inputs: inputs.attend([[VOTE]], share_heads=share_heads)))


def test_votes_may_come_one_by_one(policy_of):
    """By a generator, of generators."""
    listed, drawn = (
        kept(policy_of(lambda self, inputs, make=make: inputs.attend(make(make([VOTE]) for _ in inputs.valid))))
        for make in (list, iter)
    )
    assert torch.equal(listed.positions, drawn.positions)


@pytest.mark.parametrize("read", [None, 3, [1, 2], [[1.5]], torch.tensor([[1, 2]]), "text", ["text"]])
def test_what_the_model_cannot_read_again_is_refused(registry, llama, read):
    members = {"name": "again_somebody", "needs_again": True, "again": lambda self, tokens: read}
    policy = type("Again", (kvp.Policy,), {**members, "score": lambda self, inputs: newest(inputs)})()
    with (
        kvp.wrap(llama, policy, budget=9) as handle,
        pytest.raises(ValueError, match=r"has the model read .* after the prompt; expected a list of lists of ids"),
    ):
        handle.compress(ids())
