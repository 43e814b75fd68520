"""The same on a GPU, and on a model split over two: kept tokens and answers as on the CPU. Skipped where there is
none."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import build, feed, ids
from tiny_policies import EVERY, HELD, takes

import kvpitfalls as kvp
from kvpitfalls.eviction.fairness import Fair
from kvpitfalls.eviction.layer_inputs import LayerInputs
from kvpitfalls.eviction.layout import Layout
from kvpitfalls.eviction.selection import budgets_of, choose, rank
from kvpitfalls.policies.random import Random

SPANS = {"first": (2, 9), "second": (9, 18)}
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def compress_and_answer(model, policy, fair):
    """Kept positions of every layer, and the tokens generated from the compressed cache."""
    device = next(model.parameters()).device
    tokens = ids(2, 24)
    with kvp.wrap(model, policy, compression_ratio=0.5, fair=fair, protect="sinks") as handle:
        cache = handle.compress(tokens[:, :20], spans=SPANS)
        answer = model.generate(
            tokens.to(device),
            attention_mask=torch.ones_like(tokens).to(device),
            past_key_values=copy.deepcopy(cache),
            **GREEDY,
        )
        assert handle.report()["bytes_kept"] * 2 == handle.report()["bytes_before"]
    return [cache.positions(layer.index) for layer in cache.kept_layers], answer.cpu()


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("policy", EVERY, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_gpu_keeps_and_answers_what_the_cpu_does(family, policy, fair):
    if not takes(build(family), policy):
        pytest.skip("the model turns no queries by their positions")
    on_cpu = compress_and_answer(build(family), policy, fair)
    on_gpu = compress_and_answer(build(family).to("cuda"), policy, fair)
    assert all(np.array_equal(a, b) for a, b in zip(on_cpu[0], on_gpu[0], strict=True))
    assert torch.equal(on_cpu[1], on_gpu[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_random_control_draws_the_same_on_a_gpu(dtype):
    keys = torch.randn(3, 4, 5000, 16, generator=torch.Generator().manual_seed(5)).to(dtype)
    on_cpu, on_gpu = (kvp.keep(Random(), x, compression_ratio=0.5) for x in (keys, keys.cuda()))
    assert torch.equal(on_gpu.scores.cpu(), on_cpu.scores) and torch.equal(on_gpu.positions.cpu(), on_cpu.positions)


@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_bfloat16_runs(policy):
    model = build("llama").to("cuda", torch.bfloat16)
    with kvp.wrap(model, policy, compression_ratio=0.5) as handle:
        cache = handle.compress(ids(2, 20))
        assert all(layer.keys.dtype == torch.bfloat16 for layer in cache.kept_layers)
        assert np.mean([layer["kept"] for layer in cache.report()["layers"]]) == 10
        assert handle.verify(tolerance=0.05) <= 0.05  # bfloat16 has 8 bits


@pytest.mark.parametrize("policy", HELD, ids=str)
def test_bfloat16_holds_its_budget_while_decoding(policy):
    model = build("llama").to("cuda", torch.bfloat16)
    with kvp.wrap(model, policy, budget=8, when="always") as handle:
        cache = handle.new_cache()
        model.generate(ids(1, 20).cuda(), attention_mask=torch.ones(1, 20).cuda(), past_key_values=cache, **GREEDY)
        assert max(layer.keys.shape[2] for layer in cache.kept_layers) <= 8


def turns_after(model, policy, fair, when):
    """Logits of padded turns over a held budget, and the positions that are held at the end."""
    tokens, mask = ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :3] = mask[1, 20:24] = mask[0, 27] = 0
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    with kvp.wrap(model, policy, budget=9, fair=fair, when=when) as handle:
        cache = handle.compress(tokens[:, :20], mask[:, :20], [{"first": (4, 9), "second": (9, 18)}, SPANS])
        logits = feed(model, tokens, [6, 1, 2, 1], cache, mask, start=20)
    return logits.cpu(), [layer.pos.cpu() for layer in cache.kept_layers]


@pytest.mark.parametrize("when", ["always", "decode"])
@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("policy", HELD, ids=str)
def test_padding_between_turns_is_no_token_on_a_gpu_either(policy, fair, when):
    (on_cpu, held), (on_gpu, also) = (
        turns_after(build("llama").to(device), policy, fair, when) for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(held, also, strict=True))


def after_chunks(model, policy, fair):
    """Logits of turns after a padded prompt that came in chunks, and the positions that are held."""
    tokens, mask = ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :3] = 0
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    with kvp.wrap(model, policy, compression_ratio=0.5, fair=fair) as handle:
        spans = [{"first": (4, 9), "second": (9, 18)}, SPANS]
        cache = handle.compress(tokens[:, :26], mask[:, :26], spans, prefill_chunk_size=7)
        logits = feed(model, tokens, [1, 3], cache, mask, start=26)
    return logits.cpu(), [layer.pos.cpu() for layer in cache.kept_layers]


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("policy", [policy for policy in EVERY if policy.in_chunks], ids=str)
def test_chunks_on_a_gpu_keep_what_they_keep_on_the_cpu(policy, fair):
    (on_cpu, held), (on_gpu, also) = (
        after_chunks(build("llama").to(device), policy, fair) for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(held, also, strict=True))


@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_gradients_through_a_gpus_cache_are_the_cpus(policy):
    found, tokens = [], ids(2, 24)
    for device in ("cpu", "cuda"):
        model = build("llama").to(device)
        with kvp.wrap(model, policy, compression_ratio=0.5) as handle:
            logits = feed.__wrapped__(model, tokens.to(device), [20, 1, 3], handle.new_cache())[:, 20:]
        loss = logits.log_softmax(-1)[..., 5].sum()
        found.append(torch.autograd.grad(loss, model.get_input_embeddings().weight)[0].cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


def test_a_layer_after_the_first_waits_for_nothing():
    generator = torch.Generator("cuda").manual_seed(0)
    keys = torch.randn(2, 2, 300, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    layout = Layout.of(
        2, 300, spans={"first": (8, 90), "second": (90, 180)}, protect="sinks", valid=[(7, 300), (0, 300)]
    )
    fair = Fair.parse(True)

    def compress():
        ranked = rank(kvp.SnapKV(), layout.split(fair), LayerInputs(keys, keys))
        kept = choose(ranked, budgets_of(layout, lambda n: n // 2))
        return kvp.ops.gather(keys, keys, kept.positions)[0]

    first = compress()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = compress()
        graph = torch.cuda.CUDAGraph()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        third = compress()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_a_model_split_over_two_gpus(policy):
    accelerate = pytest.importorskip("accelerate", reason="device_map needs the package accelerate")
    whole = compress_and_answer(build("llama").to("cuda:0"), policy, True)
    model = build("llama")
    places = {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.layers.2": 1,
        "model.norm": 1,
        "lm_head": 1,
    }
    split = accelerate.dispatch_model(model, device_map={**places, "model.rotary_emb": 0})
    parts = compress_and_answer(split, policy, True)
    assert all(np.array_equal(a, b) for a, b in zip(whole[0], parts[0], strict=True))
    assert torch.equal(whole[1], parts[1])


def test_hostile_tensors_on_a_gpu():
    """Denormal numbers are not flushed, a freed tensor is refused before any launch, and so is a mix of devices."""
    keys = ids(1, 16).reshape(1, 1, 2, 8).float() * 1e-21  # squares are denormal
    scores = kvp.ops.score("norm", keys.cuda()).cpu()
    torch.testing.assert_close(scores, kvp.ops.score("norm", keys), rtol=1e-4, atol=0)
    assert bool((scores < 0).all())
    freed = torch.randn(1, 2, 20, 8, device="cuda")
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="keys has storage of 0 bytes; expected at least 1280: its memory was freed"):
        kvp.ops.score("norm", freed)
    with pytest.raises(kvp.DeviceError, match="values"):
        kvp.ops.gather(keys.cuda(), keys, torch.zeros(1, 1, 1, dtype=torch.int32, device="cuda"))
    with kvp.wrap(build("llama").to("cuda"), "knorm", budget=4) as handle:
        with pytest.raises(ValueError, match="prompt holds token 5000; expected ids in"):
            handle.compress(
                torch.full((1, 8), 5000, device="cuda")
            )  # else an assert on the device, after which nothing runs
        assert handle.compress(ids(1, 20)).report()["kept_share"] == 0.2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_stream_of_another_gpu_is_not_taken():
    """What the tensors' own GPU runs is waited for, whichever GPU and stream are current."""
    keys = torch.randn(1, 2, 5000, 64, device="cuda:0")
    wanted = kvp.ops.score("norm", keys)
    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream("cuda:1")):
        assert torch.equal(kvp.ops.score("norm", keys), wanted) and kvp.ops.score("norm", keys).device == keys.device
        positions, _ = kvp.ops.select(wanted, 100)
        assert torch.equal(
            kvp.ops.gather(keys, keys, positions)[0].cpu(),
            keys.cpu().gather(2, positions.cpu().long()[..., None].expand(-1, -1, -1, 64)),
        )
