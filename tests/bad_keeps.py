"""The table of bad inputs of ``keep`` and of policies; see bad_inputs.py."""

import re

import numpy as np
from bad_inputs import HUGE, KEYS, QUERIES, SPANS, expected, torched

import kvpitfalls as kvp
from kvpitfalls import BudgetError

BEYOND = 2**70 + 1  # more than any machine counts

KEEP = [
    (lambda e: kvp.keep("knorm", KEYS, budget=3, n_layer=BEYOND), ValueError, f"n_layer is {BEYOND}; expected at most"),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=BEYOND),
        ValueError,
        f"budget is {BEYOND}; expected a whole number of tokens, at least 1 and at most {2**63 - 1}",
    ),
    (
        lambda e: kvp.SnapKV(window_size=BEYOND),
        ValueError,
        f"window_size is {BEYOND}; expected a whole number, at least 1 and at most {2**63 - 1}",
    ),
    (
        lambda e: kvp.keep("snapkv", KEYS, QUERIES, budget=3, scaling=10**400),
        TypeError,
        f"scaling is {10**400}; expected a",
    ),
    (
        lambda e: kvp.keep("snapkv", KEYS, QUERIES, budget=3, softcap=10**400),
        TypeError,
        f"softcap is {10**400}; expected a",
    ),
    (
        lambda e: kvp.keep("knorm", None, budget=3),
        TypeError,
        "keys is a NoneType; expected a NumPy array or a torch tensor",
    ),
    (lambda e: kvp.keep("knorm", KEYS[0], budget=3), ValueError, "keys has shape (2, 20, 8); expected (B, H, T, D)"),
    (lambda e: kvp.keep("knorm", KEYS[:, :0], budget=3), ValueError, "keys has shape (1, 0, 20, 8); expected at least"),
    (
        lambda e: kvp.keep("knorm", KEYS[..., :0], budget=3),
        ValueError,
        "keys has shape (1, 2, 20, 0); expected at least",
    ),
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
    (
        lambda e: kvp.keep(
            "expected_attention", KEYS[..., :7], QUERIES[..., :7], values=KEYS, rotary=kvp.Rotary(), budget=8
        ),
        ValueError,
        "keys have 7 channels; rotary embedding turns pairs of them, and expects an even number",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, spans=SPANS, fair=np.array([0.0, 1.0])),
        ValueError,
        "fair is array([0., 1.]); expected False, True, a number in [0, 1]",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, spans={"a": range(4, 6)}),
        ValueError,
        "span 'a' is range(4, 6); expected (start, end) in tokens",
    ),
    (
        lambda e: kvp.keep("knorm", KEYS, budget=3, spans={"a": re.search("b", "abc")}),
        ValueError,
        "span 'a' is <re.Match object; span=(1, 2), match='b'>; expected (start, end) in tokens",
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
        "20 tokens, of which 4 are kept; expected a budget of more than the 4 that it keeps unjudged",
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
        "queries has the last 3 of 20 positions, but tokens [0, 20) are judged by the query at position 0; expected",
    ),
    (
        lambda e: kvp.keep("snapkv", KEYS, QUERIES[:, :, -3:], budget=3, spans=[(0, 12), (12, 20)], fair=True),
        ValueError,
        "queries has the last 3 of 20 positions, but tokens [0, 12) are judged by the query at position 4; expected",
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
        "policy is 'snapvk', which is not known; did you mean 'snapkv'?",
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
