"""The forward's own softmax denominators: they are what float64 says, only plain causal attention has any, and policies
keep the same."""

import numpy as np
import pytest
import torch
from tiny_models import build, ids
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvpitfalls as kvp
from kvpitfalls.hf import forward
from kvpitfalls.hf.denominators import Denominators
from kvpitfalls.policies import Inputs, attention_sinks

SCALING = 0.3
sdpa = torch.nn.functional.scaled_dot_product_attention
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BACKENDS = [
    pytest.param("cpu", torch.float32, SDPBackend.FLASH_ATTENTION, id="cpu"),
    pytest.param("cuda", torch.bfloat16, SDPBackend.FLASH_ATTENTION, id="flash", marks=cuda),
    pytest.param("cuda", torch.float16, SDPBackend.FLASH_ATTENTION, id="flash-fp16", marks=cuda),
    pytest.param("cuda", torch.bfloat16, SDPBackend.CUDNN_ATTENTION, id="cudnn", marks=cuda),
]


def arrays(device="cpu", dtype=torch.float32, n_token=70, n_dim=64):
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 8, n_token, n_dim), (2, 2, n_token, n_dim), (2, 2, n_token, n_dim))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(("device", "dtype", "backend"), BACKENDS)
def test_they_are_those_of_float64_and_the_attention_stays_the_same(device, dtype, backend, mode):
    query, key, value = arrays(device, dtype)
    with mode(), sdpa_kernel(backend):
        plain = sdpa(query, key, value, is_causal=True, scale=SCALING, enable_gqa=True)
        with Denominators(query, SCALING) as seen:
            out = sdpa(query, key, value, is_causal=True, scale=SCALING, enable_gqa=True)
    logits = SCALING * query.double() @ key.double().repeat_interleave(4, 1).transpose(2, 3)
    wanted = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).logsumexp(-1)
    assert torch.equal(out, plain)
    assert seen.lse.dtype == torch.float32 and seen.lse.shape == wanted.shape
    torch.testing.assert_close(
        seen.lse.double(), wanted, rtol=0, atol=4e-6
    )  # float32 sums of 70 terms of magnitude below 1e2


def test_what_is_not_plain_causal_attention_gives_none():
    query, key, value = arrays()
    causal = torch.ones(70, 70).tril().bool()

    def found(scaling=SCALING, **how):
        with torch.no_grad(), Denominators(query, scaling) as seen:
            sdpa(query, how.pop("key", key), how.pop("value", value), scale=SCALING, enable_gqa=True, **how)
        return seen.lse is not None

    assert found(is_causal=True)
    assert not found(is_causal=False), "every query sees all keys"
    assert not found(attn_mask=causal), "a mask may hold anything"
    assert not found(scaling=0.5, is_causal=True), "not the logits that were asked for"
    assert not found(is_causal=True, key=key[:, :, :60], value=value[:, :, :60]), "queries without their keys"
    assert not found(is_causal=True, dropout_p=0.5)
    with torch.no_grad(), Denominators(query, SCALING) as seen:
        for _ in range(2):
            sdpa(query, key, value, is_causal=True, scale=SCALING, enable_gqa=True)
    assert seen.lse is None, "which of two is meant cannot be told"


def kept_by(model, tokens, policy, fair):
    with kvp.wrap(model, policy, compression_ratio=0.5, fair=fair) as handle:
        cache = handle.compress(tokens, spans={"first": (2, 9), "second": (9, 18)})
    return [cache.positions(layer.index) for layer in cache.kept_layers]


@pytest.fixture
def handed_over(monkeypatch):
    """Whether each attention call that was acted on brought its denominators."""
    seen, made = [], forward._seen_by

    def watched(*args):
        call = made(*args)
        seen.append(call.lse is not None)
        return call

    monkeypatch.setattr(forward, "_seen_by", watched)
    return seen


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "tova"])
def test_policies_keep_the_same_by_them(policy, fair, monkeypatch, handed_over):
    model, tokens = build("llama"), ids(2, 40)
    own = kept_by(model, tokens, policy, fair)
    assert handed_over == [False] * len(own), "a CPU computes its own"
    monkeypatch.setattr(forward, "_tells_denominators", lambda *_: True)
    handed_over.clear()
    given = kept_by(model, tokens, policy, fair)
    assert handed_over == [True] * len(own)
    assert all(np.array_equal(a, b) for a, b in zip(own, given, strict=True))


@cuda
@pytest.mark.parametrize(("policy", "uses"), [("h2o", True), ("snapkv", True), ("tova", True), ("knorm", False)])
def test_a_gpu_hands_them_over_where_the_policy_reads_queries(policy, uses, handed_over):
    model = build("llama").to("cuda", torch.bfloat16)
    kept_by(model, ids(1, 40), policy, False)
    assert handed_over and set(handed_over) == {uses}
    handed_over.clear()
    with kvp.wrap(model, policy, compression_ratio=0.5) as handle:
        handle.compress(ids(2, 40), attention_mask=torch.tensor([[0] * 5 + [1] * 35, [1] * 40]))
    assert handed_over and not any(handed_over), "padding comes as a mask, under which denominators are others"


@pytest.mark.parametrize("tile", [1, 6 * 40 * 7, 2**24], ids=["a query at a time", "seven", "all"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_learned_sinks_join_each_voters_softmax(softcap, tile, monkeypatch):
    """By the formula in float64; of queries that vote on nothing there is none."""
    monkeypatch.setitem(attention_sinks.TILE, "cpu", tile)
    draw, valid, votes = torch.Generator().manual_seed(3), [(0, 40), (5, 33)], [(20, 28), (30, 40)]
    keys, queries = (torch.randn(2, heads, n, 16, generator=draw) for heads, n in ((3, 40), (6, 25)))
    sinks = 3 * torch.randn(6, generator=draw)
    inputs = Inputs(keys, queries, softcap=softcap, sinks=sinks, segments=[], spans=[], valid=valid)
    packed = np.array([[[0, 40, *votes[0], *votes[1], 0, 0, 0, 0]]] * 2, np.int32)
    ours = attention_sinks.denominators_with_sinks(inputs, packed).double()
    logits = 0.25 * queries.double() @ keys.double().repeat_interleave(2, 1).mT
    logits = softcap * (logits / softcap).tanh() if softcap else logits
    for row, (begin, end) in enumerate(valid):
        for t in range(15, 40):
            own = ours[row, :, t - 15]
            if not any(low <= t < high for low, high in votes) or t >= end:
                assert (own == -torch.inf).all()
                continue
            wanted = torch.cat([logits[row, :, t - 15, begin : t + 1], sinks.double()[:, None]], 1).logsumexp(1)
            torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-6)
