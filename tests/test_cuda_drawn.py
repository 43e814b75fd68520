"""Attention scores of calls that nobody thought of: a GPU gives what the CPU gives, whatever was drawn.

Needs a CUDA GPU. The CPU's scores are held against float64 and against each other's instruction sets elsewhere, so that
the two may disagree only where the GPU is wrong.
"""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kvpitfalls import ops
from kvpitfalls.policies import Inputs, Vote
from kvpitfalls.policies.base import pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whole tiles, one element more or less than them, odd ones that no fast kernel takes, and beyond its widest.
N_TOKEN = [1, 2, 17, 64, 65, 129, 300, 700, 1100, 1500, 2100]
N_DIM = [4, 8, 20, 33, 36, 40, 64, 68, 80, 96, 100, 128, 160, 256, 264, 512]


@st.composite
def interval(draw, low, n):
    """Of the queries, which are the last ones from ``low`` on."""
    start = draw(st.integers(low, n - 1))
    return start, min(n, start + draw(st.sampled_from([1, 3, 16, 64, 300, n])))


@st.composite
def votes(draw, n, n_query, weights):
    """Up to four votes on intervals that lie apart, each with one or two intervals of voters."""
    edges = sorted(draw(st.sets(st.integers(0, n), min_size=2, max_size=8)))
    judged = list(zip(edges[::2], edges[1::2], strict=False))
    made = []
    for start, end in judged:
        voters = sorted(draw(st.lists(interval(n - n_query, n), min_size=1, max_size=2)))
        apart = voters if len(voters) == 1 or voters[0][1] <= voters[1][0] else voters[:1]
        weight = draw(st.sampled_from(weights))
        made.append(Vote((start, end), *apart, weight=weight, **({"age_end": end} if weight == "age" else {})))
    return tuple(made)


@st.composite
def tensors(draw, n_row, n_head, group, n_token, n_query, n_dim, dtype):
    """Keys and queries laid out as in a model, with or without a gap after each row; now and then one broken key."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    gap = draw(st.sampled_from([0, 0, n_dim, 3]))
    scale = draw(st.sampled_from([0.1, 1.0, 3.0, 10.0]))

    def rows(n, heads, scale):
        whole = scale * torch.randn(n_row, n, heads, n_dim + gap, generator=generator)
        return whole.to(dtype)[..., :n_dim].transpose(1, 2)

    keys, queries = rows(n_token, n_head, 1.0), rows(n_query, n_head * group, scale)
    if draw(st.integers(0, 9)) == 0:
        broken = draw(st.integers(0, n_row - 1)), slice(None), draw(st.integers(0, n_token - 1))
        keys[broken] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    return keys, queries, scale


@st.composite
def calls(draw):
    dtype = draw(st.sampled_from(DTYPES))
    n_row, n_head, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    n_token, n_dim = draw(st.sampled_from(N_TOKEN)), draw(st.sampled_from(N_DIM))
    n_query = draw(st.one_of(st.just(n_token), st.integers(1, n_token)))
    keys, queries, scale = draw(tensors(n_row, n_head, group, n_token, n_query, n_dim, dtype))
    of_most = draw(st.integers(0, 3)) == 0  # the largest share instead of their sum: of all votes or of none
    weights = ["max"] if of_most else ["sum", "mean", "age"]
    packed = pack(tuple(draw(votes(n_token, n_query, weights)) for _ in range(n_row)))
    first = [draw(st.sampled_from([0, 0, n_token // 3])) for _ in range(n_row)]
    valid = [(start, draw(st.sampled_from([n_token, n_token, start + 1]))) for start in first]
    params = {"scaling": draw(st.sampled_from([n_dim**-0.5, 0.02, -0.1]))}
    if not of_most:
        params |= draw(st.sampled_from([{}, {}, {"kernel_size": 3}, {"kernel_size": 5}, {"kernel_size": 7}]))
        params |= draw(st.sampled_from([{}, {}, {"share_heads": 1}]))
    params |= draw(st.sampled_from([{}, {}, {}, {"softcap": 2.0}, {"softcap": 30.0}]))
    largest_logit = 4 * scale * n_dim**0.5 * abs(params["scaling"])  # of some thousand, by what is normal
    return keys, queries, packed, valid, params, largest_logit


def on_gpu(x):
    """The same numbers in the same strides on the GPU."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    return copy.copy_(x)


@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(calls())
def test_a_drawn_call_has_the_cpus_scores(call):
    keys, queries, packed, valid, params, largest_logit = call
    judged = Inputs(keys, queries, valid=valid, segments=[], spans=[]).valid_array
    try:
        cpu = ops.score("attention", keys, queries=queries, votes=packed, valid=judged, **params)
    except ValueError as refusal:
        with pytest.raises(ValueError) as again:
            ops.score("attention", on_gpu(keys), queries=on_gpu(queries), votes=packed, valid=judged, **params)
        assert str(again.value) == str(refusal)
        assume(False)
    gpu = ops.score("attention", on_gpu(keys), queries=on_gpu(queries), votes=packed, valid=judged, **params).cpu()
    finite = cpu.isfinite()
    torch.testing.assert_close(gpu[~finite], cpu[~finite], rtol=0, atol=0, equal_nan=True)
    # float32's rounding of a logit moves its share by as much times the logit.
    off = (gpu[finite].double() - cpu[finite].double()).norm()
    assert off <= 1e-6 * (3 + largest_logit) * cpu[finite].double().norm()
