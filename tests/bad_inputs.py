"""The table of bad inputs: what is called, the exact type of the exception, and words that name the argument and what
is wrong with it."""

import functools
import types

import numpy as np
import torch
from chat_tokenizers import byte_level
from tiny_models import build, ids, tiny_prompt

import kvpitfalls as kvp
from kvpitfalls import BudgetError, DeviceError, ops
from kvpitfalls.audits.following import accuracies, check
from kvpitfalls.audits.leakage import begun_and_rest, floor, leakage, rouge_recall
from kvpitfalls.audits.refusal import refuses
from kvpitfalls.hf.load import load

KEYS = np.random.default_rng(0).standard_normal((1, 2, 20, 8), dtype=np.float32)
QUERIES = np.random.default_rng(1).standard_normal((1, 4, 20, 8), dtype=np.float32)
SCORES, POSITIONS = KEYS[..., 0].copy(), np.array([[[0, 2], [1, 3]]], np.int32)
VOTES = np.array([[[0, 20, 0, 20, 0, 0, 0, 0, 0, 0]]])
SPANS = {"a": (2, 10), "b": (10, 18)}
HUGE = torch.empty(1).expand(1, 2, 2**31, 8)  # 2^31 tokens in one number's memory
UNALIGNED = np.frombuffer(b"x" + KEYS.tobytes(), np.uint8)[1:].view(np.float32).reshape(KEYS.shape)
LOWER = {"key": 1, "prompt": "x", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]}
SAID = [{"role": "user", "content": "abc"}]


def attention(keys=KEYS, queries=QUERIES, **params):
    """Scores by one vote of all queries on all keys."""
    return ops.score("attention", keys, queries=queries, votes=VOTES, **params)


def expected(queries, budget=8, **given):
    """Expected Attention of everything."""
    return kvp.keep("expected_attention", KEYS, queries, values=KEYS, rotary=kvp.Rotary(), budget=budget, **given)


def torched(x):
    """The same numbers as a tensor."""
    return torch.from_numpy(x)


@functools.cache
def place():
    """A tiny model, wrapped, with a cache and an audit of a prompt with two instructions; and a model for the small
    tokenizer."""
    e = types.SimpleNamespace(
        model=build("llama"), chatty=build("llama", vocab_size=300), tok=byte_level(), prompt=tiny_prompt()
    )
    e.handle = kvp.wrap(e.model, "knorm", budget=4)
    e.cache = e.handle.compress(e.prompt)
    e.audit = kvp.audit(e.model, e.prompt, policies=["knorm"], compression_ratios=[0.5])
    e.text, e.chat = kvp.Prompt.from_text(e.tok, "abc"), kvp.Prompt.from_chat(e.tok, SAID)
    return e


OPS = [
    (lambda e: ops.score(None, KEYS), ValueError, "scorer is None; expected one of 'norm', 'position', 'attention'"),
    (
        lambda e: ops.score(["norm"], KEYS),
        ValueError,
        "scorer is ['norm']; expected one of 'norm', 'position', 'attention'",
    ),
    (lambda e: ops.score("norm", None), TypeError, "keys is a NoneType; expected a NumPy array or a torch tensor"),
    (lambda e: ops.score("norm", 3), TypeError, "keys is a int; expected a NumPy array or a torch tensor"),
    (
        lambda e: ops.score("norm", KEYS.astype(np.int32)),
        TypeError,
        "keys has dtype int32; expected float32, float16 or bfloat16",
    ),
    (
        lambda e: ops.score("norm", KEYS.astype(bool)),
        TypeError,
        "keys has dtype uint8; expected float32, float16 or bfloat16",
    ),
    (
        lambda e: ops.score("norm", KEYS.astype(np.complex64)),
        TypeError,
        "keys has dtype complex64; expected float32, float16 or bfloat16",
    ),
    (
        lambda e: ops.score("norm", np.zeros((1, 2, 20, 8), object)),
        TypeError,
        "keys has dtype object; expected float32, float16 or bfloat",
    ),
    (lambda e: ops.score("norm", KEYS[:, :0]), ValueError, "keys.shape[1] is 0; expected at least 1"),
    (lambda e: ops.score("norm", KEYS[:0]), ValueError, "keys.shape[0] is 0; expected at least 1"),
    (lambda e: ops.score("norm", KEYS[..., :0]), ValueError, "keys.shape[3] is 0; expected at least 1"),
    (
        lambda e: ops.score("norm", torched(KEYS).double()),
        TypeError,
        "keys has dtype float64; expected float32, float16 or bfloat16",
    ),
    (
        lambda e: ops.score("norm", torch.empty(1, 2, 20, 8, device="meta")),
        TypeError,
        "keys is a tensor whose library does not lend out i",
    ),
    (
        lambda e: ops.score("norm", torched(KEYS).to_sparse()),
        TypeError,
        "keys is a tensor whose library does not lend out its memory; the",
    ),
    (lambda e: ops.score("norm", HUGE), ValueError, "keys.shape[2] is 2147483648; expected at most 2147483647"),
    (
        lambda e: ops.score("attention", HUGE, queries=torched(QUERIES), votes=VOTES),
        ValueError,
        "keys.shape[2] is 2147483648; expected",
    ),
    (
        lambda e: ops.score("norm", np.lib.stride_tricks.as_strided(KEYS, (1, 2, 2**31, 8), (0, 0, 0, 4))),
        ValueError,
        "keys.shape[2] is ",
    ),
    (lambda e: ops.score("norm", UNALIGNED), ValueError, "keys is not aligned to its 4-byte elements"),
    (lambda e: ops.score("norm", KEYS, n_sink=1), TypeError, "scorer 'norm' has no parameter 'n_sink'; expected none"),
    (lambda e: ops.score("position", KEYS, n_sink="4"), TypeError, "n_sink is '4'; expected a number"),
    (lambda e: ops.score("position", KEYS, n_sink=None), TypeError, "n_sink is None; expected a number"),
    (
        lambda e: ops.score("position", KEYS, n_sink=-1),
        ValueError,
        "n_sink is -1; expected a whole number from 0 to 2147483647",
    ),
    (lambda e: ops.score("position", KEYS, n_sink=True), TypeError, "n_sink is True; expected a number"),
    (
        lambda e: ops.score("position", KEYS, n_sink=float("inf")),
        ValueError,
        "n_sink is inf; expected a whole number from 0 to 2147483647",
    ),
    (
        lambda e: ops.score("norm", KEYS, valid=[[0, 21]]),
        ValueError,
        "valid[0] is [0, 21); expected a range inside [0, 20)",
    ),
    (
        lambda e: ops.score("norm", KEYS, valid=[[0, 20], [0, 20]]),
        ValueError,
        "valid.shape[0] is 2, but B is 1 in keys",
    ),
    (lambda e: ops.score("norm", KEYS, valid=[[0, 20, 1]]), ValueError, "valid.shape[1] is 3; expected 2 (begin, end)"),
    (lambda e: ops.score("norm", KEYS, valid="all"), TypeError, "valid has dtype <U3; expected whole numbers"),
    (lambda e: ops.score("norm", KEYS, valid=[[0.5, 1]]), TypeError, "valid has dtype float64; expected whole numbers"),
    (
        lambda e: ops.score("norm", KEYS, valid=[[True, True]]),
        TypeError,
        "valid has dtype bool; expected whole numbers",
    ),
    (
        lambda e: ops.score("norm", KEYS, valid=[[0, 2**40]]),
        ValueError,
        "valid holds 1099511627776; expected numbers that fit int32",
    ),
    (lambda e: ops.score("norm", KEYS, valid=3), ValueError, "valid has 0 dimensions; expected 1 to 4"),
    (
        lambda e: ops.score("attention", KEYS, queries=[1], votes=VOTES),
        TypeError,
        "queries is of type list; expected a NumPy array or a t",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES.astype(np.float64), votes=VOTES),
        TypeError,
        "queries has dtype float64; expe",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=VOTES, lse=QUERIES[..., 0].astype(np.float64)),
        TypeError,
        "lse has dtype f",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=VOTES, lse=QUERIES[:, :1, :, 0]),
        ValueError,
        "lse.shape[1] is 1, but ",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=VOTES, lse="x"),
        TypeError,
        "lse is of type str; expected a NumPy arra",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes="x"),
        TypeError,
        "votes has dtype <U1; expected whole numbers",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=VOTES * 100),
        ValueError,
        "votes[0,0] has the key range [0, 2000); exp",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=VOTES, softcap=-1),
        ValueError,
        "softcap is -1; expected 0 (none), or ",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=VOTES, softcap=float("nan")),
        ValueError,
        "softcap is nan; expected 0 ",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=VOTES, share_heads=2),
        ValueError,
        "share_heads is 2; expected a whole",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=VOTES, kernel_size=2**40 + 1),
        ValueError,
        "kernel_size is 1.09951e+12",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=VOTES, scaling="1"),
        TypeError,
        "scaling is '1'; expected a number",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=VOTES, scaling=None),
        TypeError,
        "scaling is None; expected a number",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=torched(QUERIES).to("meta"), votes=VOTES),
        TypeError,
        "queries is a tensor whose libr",
    ),
    (
        lambda e: ops.score("attention", torched(KEYS), queries=torched(QUERIES).to("meta"), votes=VOTES),
        TypeError,
        "queries is a tensor w",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=np.concatenate([QUERIES, QUERIES], 2), votes=VOTES),
        ValueError,
        "queries.shape[2] is",
    ),
    (lambda e: ops.select(None, 3), TypeError, "scores is a NoneType; expected a NumPy array or a torch tensor"),
    (lambda e: ops.select(SCORES.astype(np.float64), 3), TypeError, "scores has dtype float64; expected float32"),
    (lambda e: ops.select(torched(SCORES).half(), 3), TypeError, "scores has dtype float16; expected float32"),
    (
        lambda e: ops.select(SCORES, None),
        TypeError,
        "quotas is None; expected whole numbers, the tokens to keep of each segment",
    ),
    (lambda e: ops.select(SCORES, "3"), TypeError, "quotas has dtype <U1; expected whole numbers"),
    (lambda e: ops.select(SCORES, 2.5), TypeError, "quotas has dtype float64; expected whole numbers"),
    (lambda e: ops.select(SCORES, True), TypeError, "quotas has dtype bool; expected whole numbers"),
    (lambda e: ops.select(SCORES, -1), ValueError, "quotas[0,0,0] is -1; expected 0 or more"),
    (lambda e: ops.select(SCORES, 2**31), ValueError, "quotas holds 2147483648; expected numbers that fit int32"),
    (
        lambda e: ops.select(SCORES, 2**31 - 1),
        ValueError,
        "quotas sum to 2147483647; expected at most 65556 for rows of 20 tokens",
    ),
    (lambda e: ops.select(SCORES, []), TypeError, "quotas has dtype float64; expected whole numbers"),
    (
        lambda e: ops.select(SCORES, [[1], [2], [3]]),
        ValueError,
        "quotas has shape (3, 1, 1); expected what fits (1, 2, 1)",
    ),
    (
        lambda e: ops.select(SCORES, [1, 2], segments=[0, 5]),
        ValueError,
        "segments.shape[1] is 2; expected 3, one more than the 2 segments",
    ),
    (
        lambda e: ops.select(SCORES, [1, 2], segments=[0, 7, 5]),
        ValueError,
        "segments[0,2] is 5; expected 7 to 20 (edges ascend inside the",
    ),
    (
        lambda e: ops.select(SCORES, [1, 2], segments=[0, 5.5, 20]),
        TypeError,
        "segments has dtype float64; expected whole numbers",
    ),
    (lambda e: ops.select(SCORES, [1, 2], segments="ab"), TypeError, "segments has dtype <U2; expected whole numbers"),
    (
        lambda e: ops.select(SCORES, [1, 2], segments=[]),
        TypeError,
        "segments has dtype float64; expected whole numbers",
    ),
    (lambda e: ops.select(SCORES, 3, protect=[1, 2]), ValueError, "protect has shape (2,); expected what fits (1, 20)"),
    (
        lambda e: ops.select(SCORES, 3, protect=np.ones(21, bool)),
        ValueError,
        "protect has shape (21,); expected what fits (1, 20)",
    ),
    (lambda e: ops.select(SCORES, 3, protect="x"), TypeError, "protect has dtype <U1; expected bool"),
    (lambda e: ops.select(SCORES, 3, protect=np.full(20, 0.5)), TypeError, "protect has dtype float64; expected bool"),
    (
        lambda e: ops.select(SCORES, 3, valid=[[5, 3]]),
        ValueError,
        "valid[0] is [5, 3); expected a range inside [0, 20)",
    ),
    (
        lambda e: ops.select(SCORES, 3, valid=[[-1, 3]]),
        ValueError,
        "valid[0] is [-1, 3); expected a range inside [0, 20)",
    ),
    (lambda e: ops.select(SCORES[:, :, :0], 3), ValueError, "scores.shape[2] is 0; expected at least 1"),
    (
        lambda e: ops.select(torch.empty(1).expand(1, 2, 2**31), 3),
        ValueError,
        "scores.shape[2] is 2147483648; expected at most 2147483647",
    ),
    (
        lambda e: ops.select(torched(SCORES).to("meta"), 3),
        TypeError,
        "scores is a tensor whose library does not lend out its memory; the ",
    ),
    (
        lambda e: ops.gather(None, KEYS, POSITIONS),
        TypeError,
        "keys is a NoneType; expected a NumPy array or a torch tensor",
    ),
    (
        lambda e: ops.gather(KEYS, None, POSITIONS),
        TypeError,
        "values is a NoneType; expected a NumPy array or a torch tensor",
    ),
    (
        lambda e: ops.gather(KEYS, KEYS, None),
        TypeError,
        "positions is a NoneType; expected a NumPy array or a torch tensor",
    ),
    (
        lambda e: ops.gather(KEYS, KEYS, POSITIONS.tolist()),
        TypeError,
        "positions is a list; expected a NumPy array or a torch tensor",
    ),
    (
        lambda e: ops.gather(KEYS, KEYS, POSITIONS.astype(np.float32)),
        TypeError,
        "positions has dtype float32; expected whole numbers",
    ),
    (lambda e: ops.gather(KEYS, KEYS, POSITIONS[0]), ValueError, "positions has shape (2, 2); expected 3 dimensions"),
    (lambda e: ops.gather(KEYS, KEYS, POSITIONS[:, :1]), ValueError, "positions.shape[1] is 1, but H is 2 in keys"),
    (
        lambda e: ops.gather(KEYS, KEYS, POSITIONS + 19),
        ValueError,
        "positions[0,0,1] is 21; expected positions that ascend in [0, 20), an",
    ),
    (
        lambda e: ops.gather(KEYS, KEYS, POSITIONS[..., ::-1].copy()),
        ValueError,
        "positions[0,0,1] is 0; expected positions that ascend in",
    ),
    (
        lambda e: ops.gather(KEYS, KEYS, -POSITIONS),
        ValueError,
        "positions[0,0,1] is -2; expected positions that ascend in [0, 20), any -1",
    ),
    (
        lambda e: ops.gather(KEYS, KEYS.astype(np.float16), POSITIONS),
        TypeError,
        "values has dtype float16; expected float32, as keys has",
    ),
    (
        lambda e: ops.gather(KEYS.astype(np.float64), KEYS.astype(np.float64), POSITIONS),
        TypeError,
        "keys has dtype float64; expected floa",
    ),
    (
        lambda e: ops.gather(torched(KEYS), torched(KEYS).to("meta"), torched(POSITIONS)),
        TypeError,
        "values is a tensor whose library does",
    ),
    (
        lambda e: ops.gather(torched(KEYS), torched(KEYS), torched(POSITIONS).to("meta")),
        TypeError,
        "positions is a tensor whose library d",
    ),
    (
        lambda e: ops.gather(KEYS, KEYS, np.zeros((1, 2, 0), np.int32)),
        ValueError,
        "positions.shape[2] is 0; expected at least 1",
    ),
    (lambda e: ops.gather(KEYS, KEYS[:, :, :5], POSITIONS), ValueError, "values.shape[2] is 5, but T is 20 in keys"),
    (
        lambda e: ops.gather(KEYS, KEYS, np.broadcast_to(np.int32(0), (1, 2, 2**31))),
        ValueError,
        "positions.shape[2] is 2147483648; expect",
    ),
    (
        lambda e: ops.gather(KEYS, KEYS, np.broadcast_to(np.int32(0), (1, 2, 2**40))),
        ValueError,
        "positions.shape[2] is 1099511627776; exp",
    ),
    (
        lambda e: ops.score("nrom", KEYS),
        ValueError,
        "scorer is 'nrom'; expected one of 'norm', 'position', 'attention'",
    ),
    (lambda e: ops.score("norm", KEYS, n_sink=4), TypeError, "scorer 'norm' has no parameter 'n_sink'; expected none"),
    (lambda e: ops.score("norm", KEYS[0]), ValueError, "keys has shape (2, 20, 8); expected 4 dimensions"),
    (lambda e: ops.score("norm", KEYS.tolist()), TypeError, "keys is a list; expected a NumPy array or a torch tensor"),
    (
        lambda e: ops.score("norm", KEYS.astype(np.float64)),
        TypeError,
        "keys has dtype float64; expected float32, float16 or bfloat16",
    ),
    (lambda e: ops.score("norm", KEYS[:, :, :0]), ValueError, "keys.shape[2] is 0; expected at least 1"),
    (lambda e: ops.score("norm", KEYS[:, :, ::-1]), ValueError, "keys.stride[2] is -8; expected no negative stride"),
    (
        lambda e: ops.score("position", KEYS, n_sink=1.5),
        ValueError,
        "n_sink is 1.5; expected a whole number from 0 to 2147483647",
    ),
    (
        lambda e: ops.score("attention", KEYS, votes=np.zeros((1, 1, 10), int)),
        ValueError,
        "queries is missing; expected a tensor (BNQD)",
    ),
    (lambda e: ops.score("attention", KEYS, queries=QUERIES), ValueError, "votes is missing; expected a tensor (BVF)"),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES[:, :3], votes=np.zeros((1, 1, 10), int)),
        ValueError,
        "queries.shape[1] is 3;",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES[..., :4], votes=np.zeros((1, 1, 10), int)),
        ValueError,
        "queries.shape[3] is ",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=np.zeros((1, 1, 9), int)),
        ValueError,
        "votes.shape[2] is 9; expected ",
    ),
    (
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=np.zeros((1, 1, 10))),
        TypeError,
        "votes has dtype float64; expected w",
    ),
    (lambda e: attention(scaling=np.nan), ValueError, "scaling is nan; expected a number that is finite"),
    (lambda e: attention(kernel_size=2), ValueError, "kernel_size is 2; expected an odd number"),
    (
        lambda e: attention(queries=QUERIES[:, :, -3:]),
        ValueError,
        "votes[0,0] needs the query at position 0, but queries holds only the l",
    ),
    (
        lambda e: attention(keys=torched(KEYS).half(), queries=torched(QUERIES)),
        TypeError,
        "queries has dtype float32; expected float16, a",
    ),
    (
        lambda e: ops.select(KEYS[0], [1, -1], segments=[0, 5, 20]),
        ValueError,
        "segments[0,2] is 20; expected 5 to 8 (edges ascend inside ",
    ),
    (
        lambda e: ops.select(KEYS[..., 0], [1, -1], segments=[0, 5, 20]),
        ValueError,
        "quotas[0,0,1] is -1; expected 0 or more",
    ),
    (
        lambda e: ops.select(KEYS[..., 0], [1, 1], segments=[0, 5, 21]),
        ValueError,
        "segments[0,2] is 21; expected 5 to 20 (edges ascend in",
    ),
    (
        lambda e: ops.select(KEYS[..., 0], [1, 1], segments=[0, 20]),
        ValueError,
        "segments.shape[1] is 2; expected 3, one more than the 2 s",
    ),
    (
        lambda e: ops.select(KEYS[..., 0], 3, valid=[[5, 2]]),
        ValueError,
        "valid[0] is [5, 2); expected a range inside [0, 20)",
    ),
    (
        lambda e: ops.gather(KEYS, KEYS, np.array([[[0, 20], [0, 1]]])),
        ValueError,
        "positions[0,0,1] is 20; expected positions that ascend",
    ),
    (
        lambda e: ops.gather(KEYS, KEYS, np.array([[[3, 1], [0, 1]]])),
        ValueError,
        "positions[0,0,1] is 1; expected positions that ascend i",
    ),
    (
        lambda e: ops.gather(KEYS, KEYS[:, :1], np.array([[[0, 1], [0, 1]]])),
        ValueError,
        "values.shape[1] is 1, but H is 2 in keys",
    ),
]

KEEP = [
    (
        lambda e: kvp.keep("knorm", None, budget=3),
        TypeError,
        "keys is a NoneType; expected a NumPy array or a torch tensor",
    ),
    (lambda e: kvp.keep("knorm", KEYS[0], budget=3), ValueError, "keys has shape (2, 20, 8); expected (B, H, T, D)"),
    (
        lambda e: kvp.keep("knorm", KEYS.tolist(), budget=3),
        TypeError,
        "keys is a list; expected a NumPy array or a torch tensor",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS[:, :, :0], budget=3),
        ValueError,
        "keys hold 1 rows of 0 tokens; expected at least one of each",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, rotary=1e4),
        TypeError,
        "rotary is a float; expected a kvpitfalls.Rotary",
    ),
    (lambda e: kvp.Rotary(0), ValueError, "theta is 0; expected a positive number"),
    (lambda e: kvp.ExpectedAttention(0), ValueError, "n_future_positions is 0; expected a whole number, at least 1"),
    (lambda e: kvp.ExpectedAttention(n_sink=True), ValueError, "n_sink is True; expected a whole number, at least 0"),
    (lambda e: kvp.ExpectedAttention(use_vnorm=1), ValueError, "use_vnorm is 1; expected True or False"),
    (lambda e: kvp.ExpectedAttention(epsilon=-1), ValueError, "epsilon is -1; expected a number, at least 0"),
    (lambda e: kvp.RKV(mix_lambda=1.5), ValueError, "mix_lambda is 1.5; expected a number in [0, 1]"),
    (lambda e: kvp.RKV(threshold=None), ValueError, "threshold is None; expected a number in [-1, 1]"),
    (lambda e: kvp.DefensiveKV(first_stage=2), ValueError, "first_stage is 2; expected a number in [0, 1]"),
    (lambda e: kvp.DefensiveKV(factor="sum"), ValueError, "factor is 'sum'; expected 'share', 'norm' or None"),
    (
        lambda e: kvp.keep(kvp.DefensiveKV(8, factor=None), KEYS, QUERIES, budget=8),
        BudgetError,
        "8 are kept; expected a budget of more than",
    ),
    (
        lambda e: expected(QUERIES, budget=4),
        BudgetError,
        "20 tokens, of which 4 are kept; expected a budget of more than its 4 sinks",
    ),
    (
        lambda e: expected(QUERIES[:, :, 1:]),
        ValueError,
        "queries has 19 tokens; policy 'expected_attention' expects all 20 of the prompt",
    ),
    (
        lambda e: expected(QUERIES, softcap=2.0),
        kvp.UnsupportedModelError,
        "softcap is 2.0; policy 'expected_attention' is not defined for",
    ),
    (
        lambda e: kvp.keep(None, KEYS, budget=3),
        TypeError,
        "policy is a NoneType; expected a Policy or one of adakv, chunkkv, ",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, budget=3),
        ValueError,
        "queries is None; policy 'h2o' scores by attention and needs the queries (B, ",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES[:, :, -3:], budget=3),
        ValueError,
        "votes[0,0] needs the query at position 0, but queries ho",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=True),
        ValueError,
        "budget is True; expected a whole number of tokens, at least 1",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget="3"),
        ValueError,
        "budget is '3'; expected a whole number of tokens, at least 1",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=-2),
        ValueError,
        "budget is -2; expected a whole number of tokens, at least 1",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, spans=3),
        TypeError,
        "spans is 3; expected (start, end) pairs, by name or in a list",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, spans="ab"),
        TypeError,
        "spans is 'ab'; expected (start, end) pairs, by name or in a lis",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, spans=[3]),
        ValueError,
        "span 'span 0' is 3; expected (start, end) in tokens",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, spans={"a": (5, 2)}),
        ValueError,
        "span 'a' is [5, 2); expected a range inside [0, 20)",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, spans={"a": (0.0, 5.0)}),
        ValueError,
        "span 'a' is (0.0, 5.0); expected (start, end) in ",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, spans={"a": (True, 5)}),
        ValueError,
        "span 'a' is (True, 5); expected (start, end) in to",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, spans={3: (0, 5)}),
        TypeError,
        "spans name 3; expected names that are texts",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, spans={"a": (0, 2**70)}),
        ValueError,
        "span 'a' is [0, 1180591620717411303424); expected",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, valid=3),
        TypeError,
        "valid is 3; expected a row (begin, end) for each row of keys",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, valid="ab"),
        TypeError,
        "valid is 'ab'; expected a row (begin, end) for each row of keys",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, valid=[3]),
        TypeError,
        "valid holds 3; expected (begin, end), whole numbers",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, valid=[(None, 3)]),
        TypeError,
        "valid holds (None, 3); expected (begin, end), whole numb",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, valid=[(0.5, 3)]),
        TypeError,
        "valid holds (0.5, 3); expected (begin, end), whole number",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, valid=[(5, 5)]),
        ValueError,
        "valid holds [5, 5); expected a range that is not empty ins",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, protect=3.5),
        ValueError,
        "protect holds 3.5; expected 'sinks', 'boundary', span names",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, protect=True),
        ValueError,
        "protect holds True; expected 'sinks', 'boundary', span names",
    ),
    (lambda e: kvp.keep("knorm", KEYS, budget=3, protect=object()), ValueError, "protect holds <object object at "),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, protect=np.ones(21, bool)),
        ValueError,
        "protect has shape (21,); expected (20,) or (1, ",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, protect=np.ones((3, 20), bool)),
        ValueError,
        "protect has shape (3, 20); expected (20,) ",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, protect=np.ones((1, 1, 20), bool)),
        ValueError,
        "protect has shape (1, 1, 20); expected ",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, protect={"a": 1}),
        ValueError,
        "protect names 'a'; expected 'sinks', 'boundary', a posit",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, fair=None),
        ValueError,
        "fair is None; expected False, True, a number in [0, 1], 'paper'",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, fair=[True]),
        ValueError,
        "fair is [True]; expected False, True, a number in [0, 1], 'pa",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, fair=float("nan")),
        ValueError,
        "strength is nan; expected a number from 0 to 1",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, fair=-0.1),
        ValueError,
        "strength is -0.1; expected a number from 0 to 1",
    ),
    (lambda e: kvp.keep("knorm", KEYS, budget=3, scaling="1"), TypeError, "scaling is '1'; expected a number"),
    (lambda e: kvp.keep("knorm", KEYS, budget=3, scaling=True), TypeError, "scaling is True; expected a number"),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, budget=3, softcap=-1.0),
        ValueError,
        "softcap is -1; expected 0 (none), or 1",
    ),
    (lambda e: kvp.keep("h2o", KEYS, QUERIES, budget=3, softcap="x"), TypeError, "softcap is 'x'; expected a number"),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, budget=3, softcap=float("nan")),
        ValueError,
        "softcap is nan; expected 0 (none), or 1",
    ),
    (lambda e: kvp.keep("h2o", KEYS, QUERIES[0], budget=3), ValueError, "queries has 3 dimensions; expected 4 (BNQD)"),
    (
        lambda e: kvp.keep("h2o", KEYS, "x", budget=3),
        TypeError,
        "queries is of type str; expected a NumPy array or a tensor with __dlpack",
    ),
    (
        lambda e: kvp.keep("knorm", HUGE, budget=3),
        ValueError,
        "keys.shape[2] is 2147483648; expected at most 2147483647",
    ),
    (
        lambda e: kvp.keep("knorm", torched(KEYS).to("meta"), budget=3),
        TypeError,
        "keys is a tensor whose library does not lend out its me",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=1.0),
        ValueError,
        "compression_ratio is 1.0; expected the share removed, ",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=-0.1),
        ValueError,
        "compression_ratio is -0.1; expected the share removed",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=float("nan")),
        ValueError,
        "compression_ratio is nan; expected the share ",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=True),
        ValueError,
        "compression_ratio is True; expected the share removed",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio="0.5"),
        ValueError,
        "compression_ratio is '0.5'; expected the share remov",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, budget=3),
        ValueError,
        "exactly one of compression_ratio (the share ",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES),
        ValueError,
        "exactly one of compression_ratio (the share removed) and budget (tokens kept)",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, budget=0),
        ValueError,
        "budget is 0; expected a whole number of tokens, at least 1",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, budget=2.5),
        ValueError,
        "budget is 2.5; expected a whole number of tokens, at least 1",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, budget=2, protect=[1, 2, 3]),
        BudgetError,
        "the budget of row 0 is 2 tokens, but 3 are prote",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, protect=[20]),
        ValueError,
        "protect holds position 20; expected one ",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, protect=[-1]),
        ValueError,
        "protect holds position -1; expected one ",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, protect="c", spans=SPANS),
        ValueError,
        "protect names 'c'; expected ",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, protect=[1.5]),
        ValueError,
        "protect holds 1.5; expected 'sinks', 'b",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, fair=True),
        ValueError,
        "fair eviction needs the instructions' place",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, fair=1.5, spans=SPANS),
        ValueError,
        "strength is 1.5; expected a num",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, fair="papre", spans=SPANS),
        ValueError,
        "fair is 'papre'; expected F",
    ),
    (
        lambda e: kvp.keep(
            "h2o", KEYS, QUERIES, compression_ratio=0.5, fair="paper", spans={"a": (2, 9), "b": (10, 18)}
        ),
        ValueError,
        "fair='paper' ex",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, fair="paper", spans={"a": (2, 9)}),
        ValueError,
        "fair='paper' expect",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, fair=kvp.Fair(weights={"z": 1}), spans=SPANS),
        ValueError,
        "weights name 'z",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, fair=True, spans={"a": (2, 12), "b": (10, 18)}),
        ValueError,
        "span 'b' starts",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, fair=True, spans={"a": (2, 22)}),
        ValueError,
        "span 'a' is [2, 22); ",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, fair=True, spans={"a": "text"}),
        ValueError,
        "span 'a' is 'text'; ex",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, spans=[{}, {}]),
        ValueError,
        "spans has 2 rows; expected 1, as keys ",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, valid=[(0, 21)]),
        ValueError,
        "valid holds [0, 21); expected a range",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, valid=[(0, 20), (0, 20)]),
        ValueError,
        "valid has 2 rows; expected 1",
    ),
    (
        lambda e: kvp.keep("h2o", KEYS, QUERIES, compression_ratio=0.5, scaling=float("inf")),
        ValueError,
        "scaling is inf; expected a finit",
    ),
    (
        lambda e: kvp.keep("snapvk", KEYS, QUERIES, budget=3),
        ValueError,
        "policy is 'snapvk', which is not known; did you mean 'snapkv' or",
    ),
    (
        lambda e: kvp.keep("zzz", KEYS, QUERIES, budget=3),
        ValueError,
        "policy is 'zzz', which is not known; expected one of adakv, chunkkv, ",
    ),
]

PARAMETERS = [
    (lambda e: kvp.SnapKV(window_size=True), ValueError, "window_size is True; expected a whole number, at least 1"),
    (lambda e: kvp.SnapKV(window_size=2.0), ValueError, "window_size is 2.0; expected a whole number, at least 1"),
    (lambda e: kvp.SnapKV(kernel_size="5"), ValueError, "kernel_size is '5'; expected a whole number, at least 1"),
    (lambda e: kvp.SnapKV(kernel_size=0), ValueError, "kernel_size is 0; expected a whole number, at least 1"),
    (lambda e: kvp.StreamingLLM(n_sink=1.5), ValueError, "n_sink is 1.5; expected a whole number, at least 0"),
    (lambda e: kvp.StreamingLLM(n_sink=True), ValueError, "n_sink is True; expected a whole number, at least 0"),
    (lambda e: kvp.StreamingLLM(n_sink=None), ValueError, "n_sink is None; expected a whole number, at least 0"),
    (lambda e: kvp.SnapKV(window=3), TypeError, "SnapKV.__init__() got an unexpected keyword argument 'window'"),
    (lambda e: kvp.KNorm(3), TypeError, "KNorm.__init__() takes 1 positional argument but 2 were given"),
    (lambda e: kvp.Fair(strength="1"), ValueError, "strength is '1'; expected a number from 0 to 1"),
    (lambda e: kvp.Fair(strength=True), ValueError, "strength is True; expected a number from 0 to 1"),
    (lambda e: kvp.Fair(strength=float("nan")), ValueError, "strength is nan; expected a number from 0 to 1"),
    (lambda e: kvp.Fair(weights=[1]), TypeError, "weights is [1]; expected a mapping of instruction names to numbers"),
    (
        lambda e: kvp.Fair(weights="ab"),
        TypeError,
        "weights is 'ab'; expected a mapping of instruction names to numbers",
    ),
    (lambda e: kvp.Fair(weights={"a": "x"}), ValueError, "weights['a'] is 'x'; expected a number from 0 to 1e+09"),
    (
        lambda e: kvp.Fair(weights={"a": float("nan")}),
        ValueError,
        "weights['a'] is nan; expected a number from 0 to 1e+09",
    ),
    (
        lambda e: kvp.Fair(weights={"a": float("inf")}),
        ValueError,
        "weights['a'] is inf; expected a number from 0 to 1e+09",
    ),
    (lambda e: kvp.Fair(weights={"a": True}), ValueError, "weights['a'] is True; expected a number from 0 to 1e+09"),
    (lambda e: kvp.Fair(weights={3: 1.0}), TypeError, "weights name 3; expected names of instructions"),
    (lambda e: kvp.Fair(min_tokens=True), ValueError, "min_tokens is True; expected a whole number, at least 0"),
    (lambda e: kvp.Fair(min_tokens=1.5), ValueError, "min_tokens is 1.5; expected a whole number, at least 0"),
    (lambda e: kvp.Fair(rule="authors"), ValueError, "rule is 'authors'; expected 'proportional' or 'paper'"),
    (lambda e: kvp.Fair(template=None), ValueError, "template is None; expected 'separate' or 'absorb'"),
    (lambda e: kvp.SnapKV(kernel_size=4), ValueError, "kernel_size is 4; expected an odd number"),
    (lambda e: kvp.StreamingLLM(n_sink=-1), ValueError, "n_sink is -1; expected a whole number, at least 0"),
    (
        lambda e: kvp.Fair(min_tokens=3, template="absorb"),
        ValueError,
        "min_tokens counts an instruction's own tokens; expected template=",
    ),
    (lambda e: kvp.Fair(min_tokens=-1), ValueError, "min_tokens is -1; expected a whole number, at least 0"),
    (lambda e: kvp.Fair(template="drop"), ValueError, "template is 'drop'; expected 'separate' or 'absorb'"),
    (
        lambda e: kvp.Fair(rule="paper", min_tokens=3),
        ValueError,
        "rule='paper' takes no weights or min_tokens; the authors' code has no",
    ),
    (lambda e: kvp.Fair(weights={"a": -1}), ValueError, "weights['a'] is -1; expected a number from 0 to 1e+09"),
    (lambda e: kvp.SnapKV(window_size=0), ValueError, "window_size is 0; expected a whole number, at least 1"),
]

PROMPTS = [
    (
        lambda e: kvp.Prompt.from_chat(e.tok, 3),
        TypeError,
        "messages is a int; expected a list of messages, each with a role and a content",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, "text"),
        TypeError,
        "messages is a str; expected a list of messages, each with a role and a co",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, {"role": "user", "content": "a"}),
        TypeError,
        "messages is a dict; expected a list of messages",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, [3]),
        ValueError,
        "message 0 is 3; expected a role and a content that is a str",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, [{"role": "user"}]),
        ValueError,
        "message 0 is {'role': 'user'}; expected a role and a content",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, [{"content": "a"}]),
        ValueError,
        "message 0 is {'content': 'a'}; expected a role and a content",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, [{"role": "user", "content": None}]),
        ValueError,
        "message 0 is {'role': 'user', 'content': No",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, SAID, ["abc"]),
        TypeError,
        "instructions is a list; expected a mapping of names to texts",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, SAID, {"a": (True, 3)}),
        ValueError,
        "instruction 'a' is (True, 3); expected a text, or (start",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, SAID, {"a": (1.0, 3.0)}),
        ValueError,
        "instruction 'a' is (1.0, 3.0); expected a text, or (sta",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, SAID, {"a": None}),
        ValueError,
        "instruction 'a' is None; expected a text, or (start, end) in ",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, SAID, {3: "abc"}),
        ValueError,
        "an instruction is called 3; expected a name, a str that is not",
    ),
    (
        lambda e: kvp.Prompt.from_chat(None, SAID),
        TypeError,
        "the tokenizer is a NoneType without character offsets; expected a fast token",
    ),
    (lambda e: kvp.Prompt.from_text(e.tok, None), TypeError, "text is a NoneType; expected a str"),
    (lambda e: kvp.Prompt.from_text(e.tok, b"abc"), TypeError, "text is a bytes; expected a str"),
    (lambda e: e.text.find(3), TypeError, "text is a int; expected a str"),
    (
        lambda e: e.text.find("zz"),
        ValueError,
        "the text of instruction 'zz' is not in the prompt; expected it once: 'zz'",
    ),
    (lambda e: e.text.followed_by(3), TypeError, "user is a int; expected a str, since the prompt is plain text"),
    (
        lambda e: e.chat.followed_by(3),
        TypeError,
        "messages is a int; expected a list of messages, each with a role and a content",
    ),
    (lambda e: e.chat.followed_by([]), ValueError, "messages is empty; expected at least one message"),
    (
        lambda e: e.text.followed_by(""),
        ValueError,
        "the context is not a prefix of the full ids: at token 3 the prompt has its end and th",
    ),
]

MODELS = [
    (lambda e: kvp.wrap(None, "knorm", budget=3), TypeError, "model is a NoneType; expected a transformers model"),
    (lambda e: kvp.wrap("gpt2", "knorm", budget=3), TypeError, "model is a str; expected a transformers model"),
    (
        lambda e: kvp.wrap(build("llama"), None, budget=3),
        TypeError,
        "policy is a NoneType; expected a Policy or one of adakv, chunkkv, ",
    ),
    (
        lambda e: kvp.wrap(build("llama"), "knorm", budget=3, when=None),
        ValueError,
        "when is None; expected 'prefill', 'decode' or 'always",
    ),
    (
        lambda e: kvp.wrap(build("llama"), "knorm", budget=3, when="decode", fair=0.5),
        ValueError,
        "fair is 0.5; when='decode' expects Fals",
    ),
    (
        lambda e: kvp.wrap(build("llama"), "knorm", budget=3, protect=object()).compress(ids()),
        ValueError,
        "protect holds <object object a",
    ),
    (
        lambda e: kvp.wrap(build("llama"), "knorm", budget=3, protect=object()).compress(e.prompt),
        ValueError,
        "protect holds <object objec",
    ),
    (
        lambda e: kvp.wrap(build("llama"), "knorm", budget=3, protect=True).compress(e.prompt),
        ValueError,
        "protect holds True; expected 's",
    ),
    (
        lambda e: e.handle.compress(None),
        TypeError,
        "prompt is a NoneType that is no tensor; expected a Prompt, a list of them, or token i",
    ),
    (
        lambda e: e.handle.compress(e.prompt, span={}),
        TypeError,
        "compress was given a prompt and span; expected a prompt, or all that a",
    ),
    (
        lambda e: e.handle.compress(attention_masks=3),
        TypeError,
        "compress was given no prompt; expected a prompt, or all that a token",
    ),
    (
        lambda e: e.handle.compress("text"),
        TypeError,
        "prompt is a str that is no tensor; expected a Prompt, a list of them, or token ids ",
    ),
    (
        lambda e: e.handle.compress([]),
        ValueError,
        "prompt has shape (1, 0) and dtype torch.float32; expected a Prompt, or token ids (T,) ",
    ),
    (
        lambda e: e.handle.compress([e.prompt, 3]),
        TypeError,
        "prompt is a list that is no tensor; expected a Prompt, a list of them, or to",
    ),
    (
        lambda e: e.handle.compress(ids().float()),
        ValueError,
        "prompt has shape (2, 30) and dtype torch.float32; expected a Prompt, or tok",
    ),
    (
        lambda e: e.handle.compress(ids()[None]),
        ValueError,
        "prompt has shape (1, 2, 30) and dtype torch.int64; expected a Prompt, or toke",
    ),
    (
        lambda e: e.handle.compress(torch.tensor([[True, False, True]])),
        ValueError,
        "prompt has shape (1, 3) and dtype torch.bool; expecte",
    ),
    (lambda e: e.handle.compress(ids() + 1000), ValueError, "prompt holds token 1127; expected ids in [0, 128)"),
    (lambda e: e.handle.compress(ids() - 1000), ValueError, "prompt holds token -996; expected ids in [0, 128)"),
    (
        lambda e: e.handle.compress(ids(), spans={"a": (0, 99)}),
        ValueError,
        "span 'a' is [0, 99); expected a range inside [0, 30)",
    ),
    (
        lambda e: e.handle.compress(ids(), spans=3),
        TypeError,
        "spans is 3; expected (start, end) pairs, by name or in a list",
    ),
    (
        lambda e: e.handle.compress(ids(), attention_mask="x"),
        TypeError,
        "attention_mask is a str that is no tensor; expected a tensor (B,",
    ),
    (
        lambda e: e.handle.compress(ids(), attention_mask=torch.ones(30)),
        ValueError,
        "attention_mask has shape (30,); expected (2, 30), on",
    ),
    (
        lambda e: e.handle.compress(e.prompt, attention_mask=torch.ones(1, 30)),
        ValueError,
        "attention_mask or spans were given with a Prom",
    ),
    (
        lambda e: e.handle.compress(e.prompt, spans={}),
        ValueError,
        "attention_mask or spans were given with a Prompt; expected them only w",
    ),
    (
        lambda e: e.handle.compress(ids().to("meta")),
        ValueError,
        "prompt is on the device 'meta', without values; expected a Prompt, a lis",
    ),
    (lambda e: e.handle.verify(n_token=0), ValueError, "n_token is 0; expected a whole number, at least 2"),
    (lambda e: e.handle.verify(n_token="x"), ValueError, "n_token is 'x'; expected a whole number, at least 2"),
    (lambda e: e.handle.verify(tolerance="x"), ValueError, "tolerance is 'x'; expected a number, at least 0"),
    (lambda e: e.cache.positions(99), ValueError, "layer is 99; expected a number in [0, 3)"),
    (lambda e: e.cache.positions("x"), ValueError, "layer is 'x'; expected a number in [0, 3)"),
    (lambda e: e.cache.positions(-7), ValueError, "layer is -7; expected a number in [0, 3)"),
    (lambda e: e.cache.kept("z"), ValueError, "span is 'z'; expected one of a, b"),
    (
        lambda e: e.cache.kept(3),
        ValueError,
        "span is 3; expected a name, or (start, end) in tokens, which is not empty",
    ),
    (
        lambda e: e.cache.kept((3, 3)),
        ValueError,
        "span is (3, 3); expected a name, or (start, end) in tokens, which is not empty",
    ),
    (
        lambda e: e.cache.kept((5, 2)),
        ValueError,
        "span is (5, 2); expected a name, or (start, end) in tokens, which is not empty",
    ),
    (lambda e: e.cache.kept("a", row=5), ValueError, "row is 5; expected one of the 1 of the batch"),
    (lambda e: e.cache.kept("a", row="x"), ValueError, "row is 'x'; expected one of the 1 of the batch"),
    (lambda e: e.cache.save(None), TypeError, "path is None; expected the path of a file"),
    (lambda e: e.cache.save(3), TypeError, "path is 3; expected the path of a file"),
    (lambda e: kvp.load_cache(None, e.model), TypeError, "path is None; expected the path of a file"),
    (lambda e: kvp.load_cache("x", None), TypeError, "model is a NoneType; expected a transformers model"),
    (lambda e: kvp.audit(None, e.prompt), TypeError, "model is a NoneType; expected a transformers model"),
    (
        lambda e: kvp.audit(e.model, "text"),
        TypeError,
        "prompt is a str; expected a kvpitfalls.Prompt, which knows where its instructions ",
    ),
    (
        lambda e: kvp.audit(e.model, ids()),
        TypeError,
        "prompt is a Tensor; expected a kvpitfalls.Prompt, which knows where its instruction",
    ),
    (lambda e: kvp.audit(e.model, e.prompt, policies="knorm"), TypeError, "policies is 'knorm'; expected a list"),
    (lambda e: kvp.audit(e.model, e.prompt, policies=3), TypeError, "policies is 3; expected a list"),
    (
        lambda e: kvp.audit(e.model, e.prompt, policies=[]),
        ValueError,
        "nothing to audit; expected at least one policy, one fairness and o",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, policies=[3]),
        TypeError,
        "policy is a int; expected a Policy or one of adakv, chunkkv, ",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=0.5),
        TypeError,
        "compression_ratios is 0.5; expected a list",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios="0.5"),
        TypeError,
        "compression_ratios is '0.5'; expected a list",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=["x"]),
        ValueError,
        "compression_ratio is 'x'; expected the share removed,",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=[1]),
        ValueError,
        "compression_ratio is 1; expected the share removed, a n",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=[True]),
        ValueError,
        "compression_ratio is True; expected the share remove",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=[None]),
        ValueError,
        "exactly one of compression_ratio (the share removed)",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=[float("nan")]),
        ValueError,
        "compression_ratio is nan; expected the share",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, fair=None),
        ValueError,
        "fair is None; expected False, True, a number in [0, 1], 'paper', 'flo",
    ),
    (lambda e: kvp.audit(e.model, e.prompt, fair=[2]), ValueError, "strength is 2.0; expected a number from 0 to 1"),
    (
        lambda e: kvp.audit(e.model, e.prompt, fair=[]),
        ValueError,
        "nothing to audit; expected at least one policy, one fairness and one c",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, protect="dfnse"),
        ValueError,
        "once: 'dfnse'; or the name of an instruction (a, b)",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, protect="zzz"),
        ValueError,
        "the text of instruction 'zzz' is not in the prompt; expected it ",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, protect=[99]),
        ValueError,
        "protect holds position 99; expected one inside [0, 30)",
    ),
    (lambda e: kvp.audit(e.model, e.prompt, protect=object()), ValueError, "protect holds <object object at "),
    (
        lambda e: kvp.audit(e.model, e.prompt, protect=3.5),
        ValueError,
        "protect holds 3.5; expected 'sinks', 'boundary', span names",
    ),
    (lambda e: e.audit.first_loss("x"), ValueError, "threshold is 'x'; expected a share in (0, 1]"),
    (lambda e: e.audit.first_loss(0), ValueError, "threshold is 0; expected a share in (0, 1]"),
    (
        lambda e: e.audit.kept_mask("knorm", 0.3),
        ValueError,
        "policy, fair and compression_ratio are ('knorm', False, 0.3); expected a com",
    ),
    (
        lambda e: e.audit.kept_mask("knorm", "x"),
        ValueError,
        "compression_ratio is 'x'; expected the share removed, a number in [0, 1)",
    ),
    (
        lambda e: e.audit.kept_mask("zzz", 0.5),
        ValueError,
        "policy is 'zzz', which is not known; expected one of adakv, chunkkv, ",
    ),
    (lambda e: e.audit.heatmap(start="x"), ValueError, "start is 'x'; expected a ratio in [0, 1)"),
    (lambda e: e.audit.heatmap(start=3), ValueError, "start is 3; expected a ratio in [0, 1)"),
    (
        lambda e: e.audit.plot_tokens("knorm", 0.5, layer=9),
        ValueError,
        "layer is 9; expected one of the compressed layers: 0, 1, 2",
    ),
    (lambda e: e.audit.to_json(None), TypeError, "path is a NoneType; expected the path of a file"),
]

TEXTS = [
    (
        lambda e: rouge_recall("", "x"),
        ValueError,
        "the reference is ''; expected text with a letter a-z or a digit, since ROUGE sees noth",
    ),
    (lambda e: rouge_recall(3, "x"), TypeError, "reference is a int; expected a str"),
    (lambda e: rouge_recall("a", None), TypeError, "response is a NoneType; expected a str"),
    (
        lambda e: leakage("x", {"a": "!"}),
        ValueError,
        "the reference is '!'; expected text with a letter a-z or a digit, since ROUGE sees ",
    ),
    (lambda e: leakage("x", ["a"]), TypeError, "references is a list; expected a mapping of names to texts"),
    (lambda e: leakage(3, {"a": "b"}), TypeError, "response is a int; expected a str"),
    (lambda e: refuses(3), TypeError, "response is a int; expected a str"),
    (lambda e: refuses("a", 3), TypeError, "sentence is a int; expected a str"),
    (
        lambda e: floor("a", []),
        ValueError,
        "others is []; expected texts that the answer cannot have seen, since a leak",
    ),
    (
        lambda e: floor("a", "b"),
        ValueError,
        "others is 'b'; expected texts that the answer cannot have seen, since a leak",
    ),
    (
        lambda e: begun_and_rest("one"),
        ValueError,
        "the directive is 'one'; expected at least two words, to begin with one and ask for the",
    ),
    (lambda e: begun_and_rest(3), TypeError, "directive is a int; expected a str"),
    (
        lambda e: check({"key": 1}, "x"),
        ValueError,
        "the row has no 'prompt'; expected the fields of IFEval: key, prompt, instruction_id_l",
    ),
    (lambda e: check(3, "x"), TypeError, "row is a int; expected a mapping with the fields of IFEval"),
    (
        lambda e: check({"key": 1, "prompt": "x", "instruction_id_list": ["a:b"], "kwargs": [{}]}, "x"),
        ValueError,
        "row 1 names instructio",
    ),
    (
        lambda e: check(
            {"key": 1, "prompt": "x", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": []}, "x"
        ),
        ValueError,
        "row 1 has 1 ins",
    ),
    (
        lambda e: check(
            {"key": 1, "prompt": "x", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{"zz": 1}]},
            "x",
        ),
        ValueError,
        "row 1 has kwarg",
    ),
    (lambda e: check(LOWER, 3), TypeError, "response is a int; expected a str"),
    (lambda e: check(LOWER, "x", seed="a"), TypeError, "seed is 'a'; expected a whole number"),
    (
        lambda e: check({"key": 1, "prompt": "x", "instruction_id_list": 3, "kwargs": [{}]}, "x"),
        TypeError,
        "row 1 has a int as instructio",
    ),
    (lambda e: accuracies([{}], []), ValueError, "results has 0 entries; expected 1, one for each row"),
    (lambda e: load(3), ValueError, "name is 3; expected a hub id, a folder or a GGUF file"),
    (lambda e: load(""), ValueError, "name is ''; expected a hub id, a folder or a GGUF file"),
    (lambda e: load("a\0b"), ValueError, "name is 'a\\x00b'; expected a hub id, a folder or a GGUF file"),
    (
        lambda e: load("/nowhere/at/all"),
        FileNotFoundError,
        "name is '/nowhere/at/all', which does not exist; expected a hub id",
    ),
    (lambda e: load("none.gguf"), FileNotFoundError, "none.gguf does not exist; expected a GGUF file"),
    (lambda e: load(dtype="float31"), ValueError, "dtype is 'float31'; expected float32, float16 or bfloat16"),
    (lambda e: load(dtype="int8"), ValueError, "dtype is 'int8'; expected float32, float16 or bfloat16"),
    (lambda e: load(dtype=None), ValueError, "dtype is None; expected float32, float16 or bfloat16"),
    (lambda e: load(dtype="Tensor"), ValueError, "dtype is 'Tensor'; expected float32, float16 or bfloat16"),
    (lambda e: load(device="gpu"), ValueError, "device is 'gpu'; expected a name such as 'cpu' or 'cuda'"),
    (lambda e: load(device=3.5), ValueError, "device is 3.5; expected a name such as 'cpu' or 'cuda'"),
    (lambda e: load(device="cuda"), DeviceError, "device is 'cuda'; expected 'cpu', since torch sees no GPU"),
]
