"""The table of bad inputs of the core's verbs; see bad_inputs.py."""

import numpy as np
import torch
from bad_inputs import HUGE, KEYS, POSITIONS, QUERIES, SCORES, UNALIGNED, VOTES, attention, torched

from kvpitfalls import RKV, BudgetError, keep, ops
from kvpitfalls.policies.random import Random

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
        lambda e: ops.score("attention", KEYS, queries=QUERIES, votes=VOTES * 0 + 4 * (np.arange(10) == 6)),
        ValueError,
        "votes[0,0] has weight 4; expected 0 (sum), 1 (mean), 2 (age) or 3 (max)",
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
    (lambda e: ops.score("keydiff", KEYS), ValueError, "votes is missing; expected a tensor (BVF)"),
    (lambda e: ops.score("lagkv", KEYS), ValueError, "values is missing; expected a tensor (BHTC)"),
    (
        lambda e: ops.score("lagkv", KEYS, values=KEYS, lag_size=1),
        ValueError,
        "lag_size is 1; expected a whole number from 2 to 2147483647",
    ),
    (
        lambda e: ops.score("random", KEYS, seed=2**32),
        ValueError,
        "seed is 4.29497e+09; expected a whole number from 0 to 4294967295",
    ),
    (
        lambda e: keep("knorm", KEYS, budget=3, protect=np.array(3)),
        ValueError,
        "protect holds array(3); expected 'sinks', 'boundary', span names or positions",
    ),
    (
        lambda e: keep("knorm", KEYS, budget=3, spans=np.array(3), fair=True),
        TypeError,
        "spans is array(3); expected (start, end) pairs, by name or in a list",
    ),
    (
        lambda e: keep("knorm", KEYS, budget=3, spans=[(0, 3)], fair=10**400),
        ValueError,
        f"fair is {10**400}; expected False, True, a number in [0, 1]",
    ),
    (
        lambda e: keep(RKV(window_size=2**31), KEYS, QUERIES, budget=3),
        BudgetError,
        f"expected a prompt of at least {2**31 + 1} tokens and a larger budget, or smaller settings",
    ),
    (
        lambda e: keep(Random(seed=0.5), KEYS, budget=2),
        ValueError,
        "seed is 0.5; expected a whole number",
    ),
    (
        lambda e: ops.score("keydiff", KEYS, votes=[[[0, 20, 0, 20, *[0] * 6]]]),
        ValueError,
        'votes[0,0,3] is 20; expected 0, since the scorer "keydiff" reads key ranges only',
    ),
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
