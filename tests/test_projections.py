"""What a layer makes of each head's part of what it attended to, against the model's own module in a forward."""

import pytest
import torch
from model_sweep import SEVERAL, build, not_refused
from tiny_models import build as build_tiny
from tiny_models import ids
from tiny_policies import takes

import kvpitfalls as kvp
from kvpitfalls.hf.parts import attention_modules, decoder_of

FAMILIES = not_refused(*SEVERAL)


class Weighing(kvp.Policy):
    """Keep the newest, and look at the output projection."""

    name = "test_weighs"
    listed = False
    needs_output = True

    def __init__(self):
        self.seen = []

    def score(self, inputs):
        self.seen.append(inputs.output)
        return inputs.score("position", n_sink=0)


def projections_in(model, tokens):
    """Of each attention module, by index, (input, output, bias) of its linear part that ran last in a plain forward."""
    found, hooks = {}, []
    for index, module in attention_modules(model).items():
        for name, part in module.named_children():
            if name in ("o_proj", "out_proj", "dense", "c_proj"):
                hooks.append(
                    part.register_forward_hook(
                        lambda p, x, y, i=index: found.update({i: (x[0], y, getattr(p, "bias", None))})
                    )
                )
    with torch.no_grad():
        decoder_of(model)(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_parts_add_up_to_what_the_model_makes_of_them(family):
    model, policy, tokens = build(family, "eager"), Weighing(), ids(1, 12)
    with kvp.wrap(model, policy, budget=4) as handle:
        indices = [layer.index for layer in handle.compress(tokens).kept_layers]
    made = projections_in(model, tokens)
    assert len(indices) == len(policy.seen) > 0
    for index, output in zip(indices, policy.seen, strict=True):
        attended, wanted, bias = made[index]
        parts = attended.unflatten(-1, output.shape[:2])
        total = torch.einsum("bthd,hde->bte", parts, output) + (0 if bias is None else bias)
        torch.testing.assert_close(total, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_gate_after_attention_is_refused_by_name_before_any_layer_is_touched():
    if not not_refused("qwen3_next"):
        pytest.skip("this release's model is refused for another reason")
    model = build("qwen3_next", "eager")
    assert not takes(model, kvp.DefensiveKV(2))
    told = pytest.raises(
        kvp.UnsupportedModelError,
        match=r"^Qwen3NextModel does more in layer \d+ with what was attended to than to project it",
    )
    with kvp.wrap(model, kvp.DefensiveKV(2), budget=4) as handle:
        cache = handle.new_cache()
        with told, torch.no_grad():
            model(ids(1, 12), past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 0
    with kvp.wrap(model, kvp.DefensiveKV(2, factor=None), budget=4) as handle:
        handle.compress(ids(1, 12))


def test_a_projection_that_is_no_plain_module_is_asked():
    """As one with an adapter, or a quantized one, is."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model, plain, doubled = build_tiny("llama", attention_bias=True), Weighing(), Weighing()
    for policy in (plain, doubled):
        with kvp.wrap(model, policy, budget=4) as handle:
            handle.compress(ids(1, 12))
        for layer in model.model.layers:
            layer.self_attn.o_proj = Doubled(layer.self_attn.o_proj)
    for one, other in zip(plain.seen, doubled.seen, strict=True):
        torch.testing.assert_close(other, 2 * one, rtol=1e-5, atol=1e-5)
