"""Every causal-LM type of the installed transformers, tried tiny: exact or refused; of earlier releases some cannot be
built. ``python tests/model_sweep.py`` writes docs/models.md from it."""

import copy
import re
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import transformers
from tiny_configs import PARTS, tiny_config
from tiny_models import feed, ids, masked_like
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import kvpitfalls as kvp
from kvpitfalls.hf.cache import KeptCache
from kvpitfalls.hf.model import attached
from kvpitfalls.hf.rows import FORGETFUL, has_states
from kvpitfalls.hf.verify import Shuffle

TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MAX_WEIGHTS = 12_000_000
N_PROMPT, CHUNKS, N_KEPT, N_PAD = 12, [1, 3], 6, 2
CLOSE = 1e-5
# The release since which a type can be tried, and what is in the way before; and types that were gone before the
# release of the page.
_WHOLE = "its text model is given the configuration of the whole"
_SHARES_ALL = "its configuration rejects layers that all read another model's cache"
TRIED_SINCE = {
    "apertus": ("5.0", "its activation rejects the meta device, on which these tests count weights"),
    "dbrx": ("5.17", "its router is given another width than its input has"),
    "emu3": ("5.13", _WHOLE),
    "gemma4_assistant": ("5.24", _SHARES_ALL),
    "gemma4_unified_assistant": ("5.24", _SHARES_ALL),
    "lfm2": ("5.13", "its convolution takes no more than one token after a prompt"),
    "lfm2_moe": ("5.13", "its convolution takes no more than one token after a prompt"),
    "llama4": ("5.13", _WHOLE),
    "mllama": ("5.0", "its default configuration lacks rotary parameters"),
    "qdqbert": ("5.0", "it needs pytorch-quantization"),
    "qwen3_5": ("5.13", _WHOLE),
    "qwen3_5_moe": ("5.13", _WHOLE),
    "speech_to_text_2": ("5.0", "its positions cannot be initialized"),
    "transfo-xl": ("5.0", "its vocabulary cannot be cut to size"),
    "zamba2": ("5.17", "its linear attention takes no more than one token after a prompt"),
}


class Outcome(NamedTuple):
    """What became of a type: "exact", "refused" or "not built", and a note for the page."""

    status: str
    note: str


def causal_lm(config, **given):
    """A random model; Gemma 3n's without its towers, of which one needs timm, and which no text goes through."""
    name = next((name for name, part in PARTS.items() if part == type(config).__name__), None)
    if name is not None:
        return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])._from_config(config, **given)
    of_parts = AutoModel.from_config

    def text_alone(config, **given):
        return of_parts(config, **given) if "text" in config.model_type else torch.nn.Identity()

    with mock.patch.object(AutoModel, "from_config", text_alone if config.model_type == "gemma3n" else of_parts):
        return AutoModelForCausalLM.from_config(config, **given)


def build(model_type: str, attention: str | None = None, **changes):
    """A random model, with the attention implementation that it takes by default or the given one, and with some fields
    of its configuration changed."""
    config = tiny_config(model_type, **changes)
    with torch.device("meta"):
        if sum(weight.numel() for weight in causal_lm(config).parameters()) > MAX_WEIGHTS:
            raise ValueError(f"{model_type} has more than {MAX_WEIGHTS} weights")
    torch.manual_seed(1)
    model = causal_lm(config, **({} if attention is None else {"attn_implementation": attention})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # as in tiny_models: attention far from uniform
            if weight.ndim > 1 and "embed" not in name and "wte" not in name:
                weight.mul_(4.0)
    return model


# Decoders that differ in norms, positions, biases, grouped heads, latent keys, sinks and windows.
SEVERAL = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "gpt_bigcode",
    "opt",
    "cohere",
    "cohere2",
    "olmo2",
    "smollm3",
    "gpt_oss",
    "deepseek_v3",
    "granite",
    "starcoder2",
    "stablelm",
    "glm4",
    "nemotron",
    "exaone4",
]


def not_refused(*model_types: str, forgetful: bool = False) -> list[str]:
    """Those that this transformers release has and lets through: older ones keep some types off the attention
    interface. Either those that forget what came before several tokens, or those that do not."""
    return [name for name in model_types if (name in FORGETFUL) == forgetful and not _refused(name)]


def mixed() -> list[str]:
    """Those of layers that hold keys and values and states of linear attention, too."""
    return [name for name in not_refused("falcon_h1", "zamba2") if not why_not_built(name)]


def _refused(model_type: str) -> bool:
    try:
        if model_type in CONFIG_MAPPING:
            kvp.wrap(build(model_type), "knorm", budget=1).remove()
            return False
    except kvp.UnsupportedModelError:
        pass
    assert transformers.__version__ != page_version(), (
        f"{model_type} is refused or unknown, but docs/models.md was written for this release"
    )
    return True


def why_not_built(model_type: str) -> str | None:
    """What keeps these tests from trying a type on the installed release."""
    since, reason = TRIED_SINCE.get(model_type, ("0", ""))
    return reason if release(transformers.__version__) < release(since) else None


def release(version: str) -> list[int]:
    """Major and minor, to compare."""
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


def examine(model_type: str) -> Outcome:
    """Try one type; raises AssertionError if it is neither exact nor refused."""
    if (reason := why_not_built(model_type)) is not None:
        return Outcome("not built", reason)
    model = build(model_type)
    try:
        return Outcome("exact", exact(model))
    except AssertionError as error:
        raise AssertionError(f"{model_type}: {error}") from error
    except kvp.UnsupportedModelError as error:
        reason = re.sub(r"^\w+ \(model type '[\w-]+'\):? ?", "", str(error))
        return Outcome("refused", re.sub(r"^\w+ \(layer \d+\) ", "", reason))


def _check_memory(model, tokens) -> None:
    """What follows a prompt says the same in one piece and one token after the other, but of types that forget."""
    n_new = sum(CHUNKS)
    whole, single = (
        feed(model, tokens, [N_PROMPT, *sizes], DynamicCache(config=model.config)) for sizes in ([n_new], [1] * n_new)
    )
    # A scan over tokens and its steps round otherwise, by up to 2e-5 here; what is forgotten is a thousand times that.
    forgets = bool((whole - single).abs().max() > 1e-3)
    assert forgets == (model.config.model_type in FORGETFUL), f"several tokens forget what came before them: {forgets}"


def exact(model) -> str:
    chunks = [1] * sum(CHUNKS) if model.config.model_type in FORGETFUL else CHUNKS
    tokens = ids(2, N_PROMPT + sum(CHUNKS))
    with kvp.wrap(model, "h2o", compression_ratio=0) as handle:
        same = feed(model, tokens, [N_PROMPT, *chunks], handle.new_cache())
    plain = feed(model, tokens, [N_PROMPT, *chunks], DynamicCache(config=model.config))
    assert plain.isfinite().all() and torch.equal(same, plain), "ratio 0 is not bit-identical"
    _check_memory(model, tokens)

    mask = torch.ones_like(tokens)
    mask[0, :N_PAD] = 0
    padded = feed(model, tokens, [N_PROMPT, *chunks], DynamicCache(config=model.config), mask)
    with attached(model):
        shuffled = feed(model, tokens, [N_PROMPT, *chunks], KeptCache(model.config, Shuffle()), mask)
    _assert_close(shuffled[1], padded[1], "shuffled rows are visible")
    _assert_close(shuffled[0, N_PAD:], padded[0, N_PAD:], "shuffled rows are visible under padding")

    with kvp.wrap(model, "h2o", budget=N_KEPT) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        kept = copy.deepcopy(cache)
        evicted = feed(model, tokens, chunks, cache, start=N_PROMPT)
    for layer in kept.kept_layers:
        assert (layer.kept_counts == N_KEPT).all(), f"layer {layer.index} was not compressed"
        assert layer.keys.shape[2] == N_KEPT
    full = DynamicCache(config=model.config)
    feed(model, tokens, [N_PROMPT], full)
    with masked_like(model, kept, N_PROMPT):
        masked = feed(model, tokens, chunks, full, start=N_PROMPT)
    _assert_close(evicted, masked, "evicting is not masking")
    assert not torch.allclose(evicted, plain[:, N_PROMPT:], atol=1e-3), (
        "eviction changed nothing, so the comparison says nothing"
    )
    return _note(kept)


def _assert_close(a, b, message):
    assert (worst := float((a - b).abs().max())) <= CLOSE, f"{message}: {worst:.1g}"


def _note(cache) -> str:
    kinds = sorted({why.split(":")[0] for why in cache.report()["not_compressed"].values()})
    kinds += ["states beside keys and values"] * any(map(has_states, cache.kept_layers))
    notes = [
        f"{', '.join(kinds)} left as they are" if kinds else "",
        "one choice for all heads" if cache.kept_layers[0].shared else "",
    ]
    return "; ".join(filter(None, notes))


_IMAGES = """
## Models with images

Qwen2-VL, LLaVA and their kin go through the model's own `generate`, and so do Gemma 3 and Gemma 4, whose outer model makes the masks. What
attends both ways is refused, since scores by causal attention would not be the model's:

- an image in a prompt of Gemma 3, or of a Gemma 4 whose config has `use_bidirectional_attention="vision"`: by the forward that brings it. Texts
  alone are compressed as by the text model, and so are images where Gemma 4 reads them from left to right (`None`).
- PaliGemma, whose prompts attend both ways as a whole: what the cache holds of each token depends on all that follows it in the prompt, so that
  a compressed prompt with a question after it is another prompt to the model, whatever is kept and at whatever positions.
"""


_EARLIER = """
## Earlier releases

The releases in `tests/matrix.txt` go through the same test: there a type is as above, or refused, mostly since it has a cache class of its
own (before 5.5 hybrid models had). These cannot be built by the tests before the release named, or are gone since:

| type | release | what is in the way before it |
|---|---|---|
"""


def page(outcomes: dict[str, Outcome]) -> str:
    """docs/models.md."""
    exact, refused = (sum(o.status == s for o in outcomes.values()) for s in ("exact", "refused"))
    head = f"""# Models

Every causal-LM type of transformers {transformers.__version__}, built tiny from its configuration with random weights. Written by
`python tests/model_sweep.py`; `tests/test_models.py` tries each type again and fails on one that is not listed.

- *exact* ({exact}): a compression ratio of 0 gives the same bits as the unwrapped model; shuffling the cached rows changes logits by at
  most {CLOSE:g}, with padding too; evicting equals masking the same tokens, head by head, in the unwrapped model; and every layer that
  could be compressed was.
- *refused* ({refused}): `kvpitfalls.wrap`, or the first forward, raises `UnsupportedModelError` with this reason.

Each forward of a wrapped model checks that every layer was intercepted, and raises if not; `handle.verify()` probes a live model.

| type | | note |
|---|---|---|
"""
    table = "".join(f"| {name} | {o.status} | {o.note} |\n" for name, o in sorted(outcomes.items()))
    earlier = "".join(f"| {name} | {since} | {reason} |\n" for name, (since, reason) in sorted(TRIED_SINCE.items()))
    return head + table + _IMAGES + _EARLIER + earlier


def listed() -> dict[str, str]:
    """Type -> status, as docs/models.md has it."""
    return dict(re.findall(r"^\| ([\w.-]+) \| (exact|refused) \|", PAGE.read_text(), flags=re.M))


def page_version() -> str:
    """The transformers version that docs/models.md was written for."""
    return re.search(r"transformers ([\d.]+),", PAGE.read_text())[1]


if __name__ == "__main__":
    outcomes = {name: examine(name) for name in TYPES}
    PAGE.write_text(page(outcomes))
    sys.stdout.write(f"{PAGE.name}: {len(outcomes)} types\n")
