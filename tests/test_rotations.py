"""What a model's queries were before rotary embedding, and where they would turn, against the model's own code."""

import copy
import sys

import pytest
import torch
from model_sweep import build, not_refused
from tiny_models import build as build_tiny
from tiny_models import ids, longrope, tiny_prompt
from tiny_policies import takes

import kvpitfalls as kvp
from kvpitfalls.hf.arguments import cache_argument
from kvpitfalls.hf.parts import attention_modules, decoder_of
from kvpitfalls.hf.threads import local

FAMILIES = not_refused(
    *(
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma3_text",
        "phi",
        "phi3",
        "gpt_neox",
        "cohere",
        "cohere2",
        "olmo2",
        "smollm3",
    ),
    *(
        "gpt_oss",
        "granite",
        "starcoder2",
        "stablelm",
        "glm4",
        "nemotron",
        "qwen3_next",
        "exaone4",
        "ernie4_5",
        "phimoe",
        "seed_oss",
        "lara_mini",
        "lfm3",
        "olmo_hybrid",
        "granite_swa",
    ),
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
MASK = torch.ones(2, 14, dtype=torch.long)
MASK[0, :3] = 0


class Undoing(kvp.Policy):
    """Keep the newest, and undo what was done to the queries."""

    name = "test_undoes"
    listed = False
    needs_queries = needs_rotary = True

    def __init__(self):
        self.seen = []

    def score(self, inputs):
        at = inputs.rotary.positions(inputs.valid, inputs.n_token)
        self.seen.append((inputs.queries, inputs.rotary.undone(inputs.queries, at), inputs.rotary, at))
        return inputs.score("position", n_sink=0)


def seen_by(model, tokens, mask):
    """What the policy sees of each layer, and what the model's own function is given; None where it turns nothing."""
    policy, given = Undoing(), {}
    with kvp.wrap(model, policy, budget=4) as handle:
        handle.compress(tokens, mask)
    module = next(iter(attention_modules(model).values()))
    file = sys.modules[type(module).__module__]
    turn = file.apply_rotary_pos_emb

    def watched(q, k, cos, sin, *args, **kwargs):
        given[len(given)] = q.transpose(1, 2) if kwargs.get("unsqueeze_dim") == 2 else q
        return turn(q, k, cos, sin, *args, **kwargs)

    calls, hooks = {}, []
    for index, layer in attention_modules(model).items():
        hooks.append(layer.register_forward_pre_hook(lambda *_, i=index: calls.update({i: len(given)})))
    try:
        file.apply_rotary_pos_emb = watched
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            decoder_of(model)(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    finally:
        file.apply_rotary_pos_emb = turn
        for hook in hooks:
            hook.remove()
    ends = [*list(calls.values())[1:], len(given)]
    of_layer = {
        i: given.get(begin) if end > begin else None for (i, begin), end in zip(calls.items(), ends, strict=True)
    }
    cache = kvp.wrap(model, "knorm", budget=4)
    indices = [layer.index for layer in cache.new_cache().kept_layers]
    cache.remove()
    return list(zip(policy.seen, [of_layer[i] for i in indices], strict=True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_undone_queries_are_those_that_the_model_turned(family, padded):
    model, n_turned = build(family, "eager"), 0
    mask = MASK if padded else torch.ones_like(MASK)
    for (turned, undone, rotary, at), given in seen_by(model, ids(2, 14), mask):
        real = mask.bool()[:, None, :, None]
        if given is None:
            assert rotary.width == 0 and torch.equal(undone, turned)
            continue
        n_turned += 1
        width = given.shape[-1]
        tolerance = 1e-5 * float(given.abs().max())
        torch.testing.assert_close((undone[..., :width] * real), given * real, rtol=0, atol=tolerance)
        assert torch.equal(undone[..., width:], turned[..., width:])
        again = rotary.turned(undone, *rotary.angles(at, undone))
        torch.testing.assert_close(again * real, turned * real, rtol=0, atol=tolerance)
        assert not torch.allclose(undone, turned, atol=0.1)
        means = torch.stack(
            [
                rotary.turned(undone[:1, :1, :1], *rotary.angles(torch.tensor([[t]]), undone))[0, 0, 0]
                for t in range(20, 29)
            ]
        )
        torch.testing.assert_close(
            undone[0, 0, 0] @ rotary.mean(torch.arange(20, 29), undone), means.mean(0), rtol=0, atol=tolerance
        )
    assert n_turned or family in ("cohere2", "exaone4", "lara_mini")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_longer_queries_are_shortened_and_far_positions_leave_the_model_as_it_was(dtype):
    """YaRN makes queries longer as it turns them; dynamic scaling changes with the farthest position asked for."""
    model = build_tiny("llama", rope_parameters=YARN).to(dtype)
    for (_, undone, *_), given in seen_by(model, ids(2, 14), MASK):
        real = MASK.bool()[:, None, :, None]
        torch.testing.assert_close(
            undone * real,
            given.float() * real,
            rtol=0,
            atol=0.02 * float(given.abs().max()) ** (dtype != torch.float32),
        )
    model = build_tiny(
        "llama",
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        max_position_embeddings=16,
    )
    before, tokens = {k: v.clone() for k, v in model.model.rotary_emb.named_buffers()}, ids(1, 14)
    with torch.no_grad():
        plain = model(tokens).logits
        with kvp.wrap(model, kvp.ExpectedAttention(n_sink=1), budget=5) as handle:
            handle.compress(tokens)
        assert torch.equal(model(tokens).logits, plain)
    assert all(torch.equal(v, before[k]) for k, v in model.model.rotary_emb.named_buffers())


LONG = {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
BY_KIND = dict.fromkeys(["sliding_attention", "full_attention"], DYNAMIC)


BY_LENGTH = [
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}),
    ("llama", {"rope_parameters": {**LONG, "factor": 4.0, "original_max_position_embeddings": 12}}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 12}),
    ("gemma3_text", {"rope_parameters": BY_KIND, "max_position_embeddings": 8}),
]


@pytest.mark.parametrize(("family", "changes"), BY_LENGTH)
@pytest.mark.parametrize("n_before", [2, 40])
def test_angles_are_those_of_the_models_forward_whatever_was_asked_before(family, changes, n_before):
    """Some embeddings turn all tokens of a forward by its farthest position, here the longer row's, and remember the
    farthest of all forwards."""
    model, made, given = build_tiny(family, **changes), [], {}
    own = model.model.rotary_emb

    class Asking(kvp.Policy):
        """Keep the newest, and ask for far positions first."""

        name, listed, needs_queries, needs_rotary = "test_asks", False, True, True

        def score(self, inputs):
            rotary, prompts, one = inputs.rotary, (inputs.valid, inputs.n_token), inputs.queries[:1, :1, :1]
            rotary.ahead(*prompts, 50, one)
            made.append((rotary.of_tokens(*prompts, one), rotary.options.get("layer_type")))
            return inputs.score("position", n_sink=0)

    def note(module, args, kwargs, out):
        if module is own:  # and no copy of it
            given[kwargs.get("layer_type", args[2] if len(args) > 2 else None)] = out

    with torch.no_grad():
        model(ids(1, n_before), use_cache=False)
    own.register_forward_hook(note, with_kwargs=True)
    with kvp.wrap(model, Asking(), budget=4) as handle:
        handle.compress(ids(2, 14), MASK)
    assert len(made) == 3 - (family == "gemma3_text")
    for ours, kind in made:
        for table, wanted in zip(ours, given[kind], strict=True):
            for row, begin in enumerate((3, 0)):
                torch.testing.assert_close(table[row, begin:], wanted[row, begin:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "changes"), BY_LENGTH)
@pytest.mark.parametrize("n_before", [2, 40])
@torch.no_grad()
def test_a_model_whose_angles_depend_on_what_it_saw_is_verified_and_left_as_it_was(family, changes, n_before):
    model, tokens = build_tiny(family, **changes), ids(1, 20)
    model(ids(1, n_before), use_cache=False)
    other = copy.deepcopy(model)
    with kvp.wrap(model, "knorm", budget=4) as handle:
        for n_token in (4, 14, 24, 60):
            assert handle.verify(n_token) < 1e-5
    assert torch.equal(model(tokens).logits, other(tokens).logits)


def test_what_is_read_on_for_another_policy_is_turned_by_other_angles():
    model, ratio = build_tiny("llama"), 0.5
    policies = [kvp.ExpectedAttention(n_future_positions=16, n_sink=1), kvp.KVzip(n_sink=0)]
    options = {"compression_ratios": [ratio], "fair": False}
    audits = [kvp.audit(model, tiny_prompt(), policies=asked, **options) for asked in (policies, *zip(policies))]
    for policy, alone in zip(policies, audits[1:], strict=True):
        assert (audits[0].kept_mask(policy, ratio) == alone.kept_mask(policy, ratio)).all()


def test_positions_are_those_that_the_model_was_given():
    model, policy, tokens = build_tiny("llama"), Undoing(), ids(1, 12)
    with kvp.wrap(model, policy, budget=4) as handle, torch.no_grad():
        handle.compress(tokens)
        for positions in (None, torch.arange(30, 42)[None]):
            model(tokens, use_cache=True, past_key_values=handle.new_cache(), position_ids=positions)
    (_, first, *_), (_, second, *_), (turned, third, _, at) = policy.seen[::3]
    assert torch.equal(first, second) and at.tolist() == [list(range(30, 42))]
    torch.testing.assert_close(third, first, rtol=0, atol=1e-4)
    assert not torch.allclose(turned, policy.seen[0][0], atol=0.1)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "GPT2Model has no rotary_emb; the policy undoes"),
        ("opt", "OPTDecoder has no rotary_emb; the policy undoes"),
        (
            "deepseek_v3",
            "DeepseekV3Model turns the queries of layer 0 in another way than its apply_rotary_pos_emb does; the "
            "policy",
        ),
        ("gemma2", r"softcap is 50.0; policy 'expected_attention' is not defined for capped logits, expected none"),
    ],
)
def test_a_model_that_turns_no_queries_so_is_refused_by_name(family, reason):
    model = build(family, "eager")
    assert not takes(model, kvp.ExpectedAttention(n_sink=0))
    told = pytest.raises(kvp.UnsupportedModelError, match=f"^{reason}")
    with kvp.wrap(model, kvp.ExpectedAttention(n_sink=1), budget=4) as handle, told:
        handle.compress(ids(1, 12))
    with kvp.wrap(model, kvp.ExpectedAttention(n_sink=1), compression_ratio=0) as handle:  # and nothing is asked of it
        handle.compress(ids(1, 12))


@pytest.mark.parametrize("family", not_refused("granite_swa", "granitemoe_swa"))
def test_layers_that_are_handed_other_angles_are_refused_and_those_that_are_handed_none_turn_nothing(family):
    changes = {"layer_types": ["full_attention"] * 3, "shared_intermediate_size": 32, "num_local_experts": 2}
    model, policy = build_tiny(family, "eager", layer_rope_theta=[0.0, 0.0, 10000.0], **changes), Undoing()
    with kvp.wrap(model, policy, budget=4) as handle:
        handle.compress(ids(2, 14), MASK)
    assert [rotary.width for _, _, rotary, _ in policy.seen] == [0, 0, 16]
    model = build_tiny(family, "eager", layer_rope_theta=[10000.0, 100.0, 10000.0], **changes)
    with kvp.wrap(model, policy, budget=4) as handle:
        for _ in range(2):
            with pytest.raises(
                kvp.UnsupportedModelError, match=r"\(layer 1\) was handed other angles than its decoder's"
            ):
                handle.compress(ids(2, 14), MASK)


def test_a_layer_that_turns_its_queries_otherwise_is_noticed_before_any_layer_is_touched(monkeypatch):
    model = build_tiny("llama")
    file = sys.modules[type(model.model.layers[0].self_attn).__module__]
    turn = file.apply_rotary_pos_emb
    with kvp.wrap(model, kvp.ExpectedAttention(n_sink=1), budget=4) as handle:
        with monkeypatch.context() as patch:
            patch.setattr(
                file, "apply_rotary_pos_emb", lambda q, k, cos, sin: turn(q + 1, k, cos, sin)
            )  # it has no inverse
            cache = handle.new_cache()
            with pytest.raises(
                kvp.UnsupportedModelError,
                match=r"^LlamaModel turns the queries of layer 0 in another way than its apply",
            ):
                model(ids(1, 12), past_key_values=cache, use_cache=True)
            assert cache.get_seq_length() == 0 and not cache.is_half_filled and local.forward is None
        assert handle.compress(ids(1, 12)).report()["kept_share"] == 1 / 3


def test_layers_are_tried_once_and_only_for_a_policy_that_needs_it():
    asked = []
    model = build_tiny("llama")
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: asked.append(1))
    for policy, n_call in (("snapkv", 1), (kvp.ExpectedAttention(n_sink=1), 4), (kvp.ExpectedAttention(n_sink=2), 1)):
        asked.clear()
        with kvp.wrap(model, policy, budget=4) as handle:
            handle.compress(ids(1, 12))
        assert len(asked) == n_call, "tried once, by three calls, for each layer"
    hook.remove()


ONE = torch.zeros(1, 1, 1, 8)


@pytest.mark.parametrize("valid", [[(0, 14)], [(0, 14), (3, 14), (0, 9)]], ids=str)
def test_tables_of_a_prompt_are_the_angles_of_its_tokens_and_of_what_follows(valid):
    rotary = kvp.Rotary(100.0)
    of_tokens, ahead = rotary.of_tokens(valid, 14, ONE), rotary.ahead(valid, 14, 5, ONE)
    for row, (begin, end) in enumerate(valid):
        wanted = rotary.angles(torch.arange(end - begin + 5)[None], ONE)
        for table, mean, angles in zip(of_tokens, ahead, wanted, strict=True):
            assert torch.equal(table[row, begin:end], angles[0, : end - begin])
            assert not table[row, :begin].any() and not table[row, end:].any()
            torch.testing.assert_close(mean[row], angles[0, end - begin :].mean(0), rtol=0, atol=1e-6)


def test_tables_are_made_once_for_a_prompt_and_anew_for_another():
    rotary, valid = kvp.Rotary(), [(0, 14)]
    tables, ahead = rotary.of_tokens(valid, 14, ONE), rotary.ahead(valid, 14, 5, ONE)
    assert rotary.of_tokens(valid, 14, ONE) is tables and rotary.ahead(valid, 14, 5, ONE) is ahead
    for other in (([(2, 14)], 14, ONE), (valid, 15, ONE), (valid, 14, ONE.repeat(1, 1, 1, 2)), (valid, 14, ONE.half())):
        for ours, fresh in zip(rotary.of_tokens(*other), kvp.Rotary().of_tokens(*other), strict=True):
            assert ours is not tables[0] and torch.equal(ours, fresh)
    rotary.theta = 7.0
    for ours, fresh in zip(rotary.of_tokens(valid, 14, ONE), kvp.Rotary(7.0).of_tokens(valid, 14, ONE), strict=True):
        assert torch.equal(ours, fresh)
    assert not torch.equal(rotary.ahead(valid, 14, 6, ONE)[0], ahead[0])


def test_tables_of_angles_that_may_depend_on_anything_are_made_each_time():
    class Counting(kvp.Rotary):
        n = 0

        def angles(self, positions, x):
            self.n += 1
            return super().angles(positions, x)

    rotary = Counting()
    for n in (1, 2):
        rotary.of_tokens([(0, 14)], 14, ONE)
        assert rotary.n == n


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tables_are_of_one_stream_and_of_no_graph():
    """What another stream makes may not be there yet, and what a graph makes is there after a replay."""
    rotary, x = kvp.Rotary(), ONE.cuda()
    first = rotary.of_tokens([(0, 14)], 14, x)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert rotary.of_tokens([(0, 14)], 14, x) is not first
    kept = rotary.of_tokens([(0, 14)], 14, x)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert rotary.of_tokens([(0, 14)], 14, x) is not kept
    assert rotary.of_tokens([(0, 14)], 14, x) is kept


def test_the_layers_of_a_prompt_share_their_tables():
    seen, model = [], build_tiny("llama")

    class Sharing(kvp.Policy):
        """Keep the newest, and look at tables."""

        name, listed, needs_queries, needs_rotary = "test_shares", False, True, True

        def score(self, inputs):
            rotary, given = inputs.rotary, (inputs.valid, inputs.n_token)
            seen.append((rotary.of_tokens(*given, inputs.queries), rotary.angles(rotary.at, inputs.queries)))
            return inputs.score("position", n_sink=0)

    with kvp.wrap(model, Sharing(), budget=4) as handle:
        for _ in range(2):
            handle.compress(ids(1, 12))
    of_prompts = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(seen) >= 4 and of_prompts[0][0][0] is not of_prompts[1][0][0]
    for of_prompt in of_prompts:
        for tables, angles in of_prompt:
            assert tables is of_prompt[0][0]
            assert all(map(torch.equal, tables, angles))


def answered(model, asked):
    """An answer, and how many tokens each of its forwards reads."""
    lengths = []
    with model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1])):
        return model.generate(**asked, do_sample=False), lengths


@pytest.mark.parametrize("ratio", [0, 0.5])
@pytest.mark.parametrize("n_short", [19, 20, 25, 26, 40])
@pytest.mark.parametrize("is_given", [False, True])
def test_a_text_that_outgrows_a_models_short_inputs_is_read_anew_only_where_nothing_is_compressed(
    n_short, is_given, ratio
):
    """Generate then drops the cache and reads prompt and answer at once, which would be taken for one prompt. Some
    releases before transformers 5.23 read the newest token alone then, whether anything is compressed or not."""
    model, tokens = longrope(n_short), ids(1, 20)
    asked = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "min_new_tokens": 6}
    (plain, _), (_, lengths) = answered(model, asked), answered(longrope(20), asked)
    with kvp.wrap(model, "knorm", compression_ratio=ratio) as handle:
        more = cache_argument(model, handle.compress(tokens[:, :19])) if is_given else {}
        if 20 - is_given <= n_short < 25 and (ratio or max(lengths[1:]) == 1):
            said = "is to read [0-9]+ tokens without the cache of the first" if ratio else "one entry per token"
            with pytest.raises(kvp.UnsupportedModelError if ratio else ValueError, match=said):
                answered(model, asked | more)
            return
        answer, lengths = answered(model, asked | more)
    assert lengths[1:] == [1] * 5 or not ratio
    assert ratio or torch.equal(answer, plain)
