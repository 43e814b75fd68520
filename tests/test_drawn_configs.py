"""What must hold for a type holds for legal values of its configuration, too, of which each test draws some."""

import copy
import random
import re
import sys

import numpy as np
import pytest
import torch
import transformers
from drawn_configs import N_PROMPT, drawn_changes
from huggingface_hub.errors import StrictDataclassError
from model_sweep import MAX_WEIGHTS, causal_lm, listed, release, why_not_built
from tiny_configs import tiny_config
from tiny_models import far_from_uniform, feed, ids, masked_like, tiny_prompt
from tiny_policies import EVERY
from transformers import AutoModel, AutoModelForSequenceClassification, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import kvpitfalls as kvp
from kvpitfalls.eviction.budget import kept_tokens
from kvpitfalls.hf import forward
from kvpitfalls.hf.cache import KeptCache
from kvpitfalls.hf.evict import Action
from kvpitfalls.hf.model import attached
from kvpitfalls.hf.rows import FORGETFUL
from kvpitfalls.hf.threads import local

TYPES = [name for name, status in listed().items() if status == "exact" and name in CONFIG_MAPPING]
N_DRAW, N_TRY, N_TOKEN, CLOSE = 1, 8, N_PROMPT + 4, 2e-5
PROMPT = tiny_prompt()
# What transformers and torch raise for values that do not go together: the next are drawn.
OF_TRANSFORMERS = (
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    StopIteration,
    UnboundLocalError,
    StrictDataclassError,
)
# What a drawn policy does not do with drawn values: no fault of the model's, so that it is no UnsupportedModelError.
REFUSALS = re.compile(
    r"policy 'kvzip' has \w+ read \d+ tokens after a prompt of \d+; expected at most its \d+ positions together"
    r"|one choice serves all heads of layer \d+ of \w+; an allocation that shares over heads"
    r"|n_layer is 1; allocation 'pyramid' shares over layers"
)
# Types that have a cache class of their own before a release.
OWN_CACHE = dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "jamba", "qwen3_next", "zamba", "zamba2"), "5.5")
OWN_CACHE["olmo_hybrid"] = "5.17"
# Their generate tells no positions, so that their decoders count padding, and the reference here does not.
COUNTS_PADDING = {"moss_transcribe_diarize", "whisper"}


class Told(Action):
    """A cache's action: remember what policies are told of each layer; leave it as it is."""

    evicts = True

    def __init__(self, reads_rotary):
        self.reads_rotary, self.calls = reads_rotary, []

    def after_prefill(self, layer, call):
        if self.reads_rotary:  # far positions first, as a policy may ask
            given, one = (call.valid, call.keys.shape[2]), call.queries[:1, :1, :1]
            call.rotary.ahead(*given, 16, one)
            self.tables = call.rotary.of_tokens(*given, one)
        self.calls.append(call)


def drawn_model(model_type, seed):
    """A model that transformers itself can build and run, what was changed, and what else to draw from, or None; and
    what transformers said of tries that came to nothing."""
    draw, said = random.Random(f"{model_type} {seed}"), []
    for _ in range(N_TRY):
        try:
            changes = drawn_changes(model_type, draw)
            config = tiny_config(model_type, **copy.deepcopy(changes))
            with torch.device("meta"):
                n_weight = sum(x.numel() for x in causal_lm(config).parameters())
            if n_weight > MAX_WEIGHTS:
                said.append(f"{n_weight} weights")
                continue
            torch.manual_seed(1)
            implementation = {"attn_implementation": "eager"} if draw.random() < 0.5 else {}
            model = far_from_uniform(causal_lm(config, **implementation).eval())
            tokens = ids(2, N_TOKEN)
            if feed(copy.deepcopy(model), tokens, [N_PROMPT, 4], DynamicCache(config=config)).isfinite().all():
                return (model, {**changes, **implementation}, draw), said
            said.append("logits that are no numbers")
        except OF_TRANSFORMERS as error:
            said.append(f"{type(error).__name__}: {error}")
    return None, said


def why_not_drawn(model_type):
    """Why this release of transformers runs a type with no values at all; None if it does with some."""
    since = OWN_CACHE.get(model_type, "0")
    is_early = release(transformers.__version__) < release(since)
    return f"before {since} it has a cache class of its own" if is_early else why_not_built(model_type)


def run(model, tokens, mask, chunks):
    """Logits of a copy: some rotary embeddings remember the farthest position."""
    return feed(copy.deepcopy(model), tokens, [N_PROMPT, *chunks], DynamicCache(config=model.config), mask)


def state(model):
    """What a wrap might leave behind: of the modules, of the files of their classes, of the config."""
    names = ("ALL_ATTENTION_FUNCTIONS", "eager_attention_forward", "apply_rotary_pos_emb")
    files = {type(module).__module__: vars(sys.modules[type(module).__module__]) for module in model.modules()}
    functions = [(file, [id(known.get(name)) for name in names]) for file, known in files.items()]
    return [sorted(vars(module)) for module in model.modules()], functions, model.config.to_json_string()


def told(model, tokens, mask, reads_rotary, monkeypatch):
    """Per compressed layer what its attention gave, what policies are told of it, by what angles it turned its queries,
    and tables of them."""
    action, found, own = Told(reads_rotary), [], forward.attention

    def watched(base, implementation, module, *args, **kwargs):
        n, angles = len(action.calls), local.forward.angles
        out = own(base, implementation, module, *args, **kwargs)
        if len(action.calls) > n:
            found.append((out[0], action.calls[-1], angles, action.tables if reads_rotary else None))
        return out

    model = copy.deepcopy(model)
    with attached(model), monkeypatch.context() as patch:
        patch.setattr(forward, "attention", watched)
        feed(model, tokens, [N_PROMPT], KeptCache(model.config, action), mask)
    return found


def check_attention(model, tokens, mask, monkeypatch):
    """What attention gives follows from what policies are told of it."""
    for out, call, *_ in told(model, tokens, mask, False, monkeypatch):
        queries, keys, values = (x.double() for x in (call.queries, call.keys, call.values))
        logits = queries @ keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1).mT * call.scaling
        if call.softcap:
            logits = call.softcap * (logits / call.softcap).tanh()
        seen = torch.ones(N_PROMPT, N_PROMPT, dtype=torch.bool).tril() & mask.bool()[:, None, None]
        logits = logits.masked_fill(~seen, -torch.inf)
        if call.sinks is not None:
            logits = torch.cat([logits, call.sinks[:, None, None].expand(*logits.shape[:3], 1)], -1)
        shares = logits.softmax(-1)[..., :N_PROMPT]
        wanted = (shares @ values.repeat_interleave(shares.shape[1] // values.shape[1], 1)).transpose(1, 2)
        difference = float((out - wanted)[mask.bool()].abs().max() / wanted[mask.bool()].abs().max())
        assert difference < 1e-3, f"attention of layer {call.layer} is not what policies are told: {difference:.1g}"


def check_angles(model, tokens, mask, monkeypatch):
    """The angles by which policies undo a layer's turn are those by which it turned, or it turned nothing."""
    for _, call, angles, tables in told(model, tokens, mask, True, monkeypatch):
        assert call.rotary.width == 0 or angles is not None, f"layer {call.layer} was handed no angles"
        for table, given in zip(tables, angles, strict=True) if call.rotary.width else ():
            real = mask.bool()[:, :, None]
            difference = float((table - given.float()).mul(real).abs().max())
            assert difference < 1e-5, f"angles of layer {call.layer} differ by {difference:.1g}"


def check_eviction(model, tokens, mask, chunks, policy, ratio):
    """Evicting is masking, the counts are as many as were asked for, and an audit tells of the same tokens."""
    twin, full = copy.deepcopy(model), DynamicCache(config=model.config)
    with kvp.wrap(copy.deepcopy(model), policy, compression_ratio=ratio) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT], mask[:, :N_PROMPT])
        report, kept = cache.report(), copy.deepcopy(cache)
        evicted = feed(handle.model, tokens, chunks, cache, mask, start=N_PROMPT)
    for row, layer in zip(report["layers"], kept.kept_layers, strict=True):
        held = (kept.positions(layer.index) >= 0).sum(-1)
        assert np.array_equal(row["kept"], held), f"layer {layer.index} tells of {row['kept']}, and holds {held}"
        if policy.allocation == "uniform":
            wanted = [[kept_tokens(int(of_row.sum()), ratio)] * held.shape[1] for of_row in mask[:, :N_PROMPT]]
            assert row["kept"] == wanted, f"layer {layer.index} holds {row['kept']}, and not {wanted}"
    feed(twin, tokens, [N_PROMPT], full, mask)
    with masked_like(twin, kept, N_PROMPT):
        masked = feed(twin, tokens, chunks, full, mask, start=N_PROMPT)
    difference = float((evicted - masked).abs().max() / masked.abs().max().clamp(min=1))
    assert difference < CLOSE, f"{policy.name}: evicting is not masking: {difference:.1g}"
    audit = kvp.audit(copy.deepcopy(model), PROMPT, policies=[policy], compression_ratios=[ratio], fair=False)
    with kvp.wrap(copy.deepcopy(model), policy, compression_ratio=ratio) as handle:
        cache = handle.compress(PROMPT)
    for of_layer, layer in zip(audit.kept_mask(policy, ratio), cache.kept_layers, strict=True):
        held = (cache.positions(layer.index)[0][..., None] == np.arange(of_layer.shape[-1])).any(1)
        if len(held) != len(of_layer):  # the cache holds what its heads are made of, and one choice serves all
            assert (held == held[0]).all(), f"layer {layer.index} has {len(held)} choices for {len(of_layer)} heads"
            held = held[:1]
        assert (of_layer == held).all(), f"an audit of {policy.name} tells otherwise"


def check(model, draw, monkeypatch):
    """All that must hold."""
    before, tokens = state(model), ids(2, N_TOKEN)
    kvp.wrap(model, "knorm", budget=5).remove()  # or it is refused
    chunks = [1] * 4 if model.config.model_type in FORGETFUL else draw.choice(([1, 3], [2, 2], [4]))
    mask = torch.ones_like(tokens)
    mask[0, : 0 if model.config.model_type in COUNTS_PADDING else draw.choice((0, 3))] = 0
    plain, policy = run(model, tokens, mask, chunks), draw.choice(EVERY)
    with kvp.wrap(copy.deepcopy(model), "h2o", compression_ratio=0) as handle:
        same = feed(handle.model, tokens, [N_PROMPT, *chunks], handle.new_cache(), mask)
    assert torch.equal(same[mask.bool()], plain[mask.bool()]), "ratio 0 gives other bits"
    check_attention(model, tokens[:, :N_PROMPT], mask[:, :N_PROMPT], monkeypatch)
    with kvp.wrap(model, "knorm", budget=5):
        pass
    for law in (
        lambda: check_angles(model, tokens[:, :N_PROMPT], mask[:, :N_PROMPT], monkeypatch),
        lambda: check_eviction(model, tokens, mask, chunks, policy, draw.choice((0.4, 0.6))),
    ):
        try:
            law()
        except kvp.UnsupportedModelError:  # by name; the other law is tried all the same
            continue
        except ValueError as error:
            if not REFUSALS.match(str(error)):
                raise
    assert state(model) == before, "something is left of a wrap"
    assert torch.equal(run(model, tokens, mask, chunks), plain), "a wrap changed the model"


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("seed", range(N_DRAW))
def test_a_drawn_configuration_is_exact_or_refused_by_name(model_type, seed, monkeypatch):
    drawn, said = drawn_model(model_type, seed)
    if drawn is None:
        reason = why_not_drawn(model_type)
        assert reason is not None, f"transformers runs none of {N_TRY} draws of {model_type}: {said}"
        pytest.skip(reason)
    model, changes, draw = drawn
    print(f"{model_type} with {changes}")  # pytest shows it of one that fails
    try:
        check(model, draw, monkeypatch)
    except kvp.UnsupportedModelError as error:
        assert type(model).__name__ in str(error)
    except kvp.NotInterceptedError:  # its eager attention passed the interface by, which the first forward tells
        assert model_type == "gemma4" and release(transformers.__version__) < release("5.13")


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_with_another_head_or_none_is_verified(kind):
    model = far_from_uniform(kind.from_config(tiny_config("llama")).eval())
    with kvp.wrap(model, "h2o", budget=5) as handle:
        assert handle.verify() < 1e-5
