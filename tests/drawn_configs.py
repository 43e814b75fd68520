"""Configurations that differ from a type's tiny one in fields by which its code takes other paths."""

from random import Random

from tiny_configs import fields, tiny_config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

N_PROMPT = 14
_SWITCHES = """
attention_bias attention_k_eq_v attention_out_bias attention_softmax_in_fp32 attn_temperature_tuning
do_layer_norm_before enable_bias gating layer_norm_elementwise_affine mup_enabled multi_query norm_topk_prob pre_norm
qk_layernorm qkv_bias reorder_and_upcast_attn rope_interleave scale_attention_softmax_in_fp32
scale_attn_by_inverse_layer_idx scale_attn_weights scale_embedding tie_word_embeddings use_attention_gate use_bias
use_double_wide_mlp use_parallel_residual use_post_norm use_qk_norm use_qkv_bias use_sandwich_norm use_sliding_window
"""
# What is said of the fields that a type has. A window is smaller than what is kept, as long as the prompt, or larger.
_VALUES = {
    **dict.fromkeys(_SWITCHES.split(), (False, True)),
    "attention_chunk_size": (2, N_PROMPT, 8192),
    "attention_multiplier": (0.05, 3.0),
    "attention_value_scale": (0.5, None),
    "attn_logit_softcapping": (None, 1.0, 50.0),
    "clip_qkv": (0.5, 8.0),
    "conv_L_cache": (2, 5),
    "decoder_sparse_step": (1, 2),
    "final_logit_softcapping": (None, 3.0),
    "first_k_dense_replace": (0, 1, 5),
    "floor_scale": (2, 4),
    "global_attn_every_n_layers": (1, 2, 3),
    "interleave_moe_layer_step": (1, 2),
    "kv_lora_rank": (4, 24),
    "max_position_embeddings": (8, N_PROMPT, 4096),
    "max_window_layers": (0, 1, 2),
    "mlp_only_layers": ([], [0]),
    "moe_layer_interval": (1, 2),
    "no_rope_layer_interval": (1, 2),
    "num_dense_layers": (0, 2),
    "num_kv_shared_layers": (0, 1, 3),
    "pad_token_id": (None, 5),
    "prefix_dense_sliding_window_pattern": (1, 2),
    "q_lora_rank": (None, 24),
    "qk_nope_head_dim": (4, 24),
    "qk_rope_head_dim": (4, 16),
    "query_pre_attn_scalar": (1, 64),
    "rotary_dim": (4, 16),
    "sliding_window": (2, 3, N_PROMPT, 4096, None),
    "sliding_window_pattern": (1, 2, 3),
    "v_head_dim": (4, 24),
}


def drawn_changes(model_type: str, draw: Random) -> dict:
    """Fields to change and what to; transformers may refuse them together."""
    known = fields(CONFIG_MAPPING[model_type])
    changes: dict = {}
    for part in draw.sample([_heads, _layers, _rope], draw.randint(1, 2)):
        changes |= part(model_type, known, draw, changes)
    names = sorted(known & set(_VALUES) - set(changes))
    return changes | {name: draw.choice(_VALUES[name]) for name in draw.sample(names, min(len(names), 2))}


def _all_of(known: set[str], names: tuple[str, ...], value) -> dict:
    return {name: value for name in names if name in known}


def _heads(model_type: str, known: set[str], draw: Random, changes: dict) -> dict:
    """One head, or numbers that are no power of two; each group of any size; heads of any width."""
    if "kv_channels" in known:  # jetmoe counts heads by its experts
        return {"kv_channels": draw.choice((4, 24))}
    n_head = draw.choice((1, 2, 3, 6, 7, 8))
    of_heads = ("num_attention_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads")
    sizes = _all_of(known, of_heads, n_head) | _all_of(known, ("num_attention_heads_per_layer",), None)
    groups = [n for n in range(1, n_head + 1) if n_head % n == 0 and ("kv_lora_rank" not in known or n == n_head)]
    sizes |= _all_of(known, ("num_key_value_heads",), draw.choice(groups))
    if "head_dim" in known and "kv_lora_rank" not in known and draw.random() < 0.5:
        return sizes | {"head_dim": draw.choice((4, 12, 24, 40))}
    return sizes | _all_of(known, ("hidden_size", "n_embd", "d_model"), n_head * draw.choice((8, 16)))


def _layers(model_type: str, known: set[str], draw: Random, changes: dict) -> dict:
    """Any number of layers, of any kinds in any order."""
    n, default = draw.choice((1, 2, 3, 5)), tiny_config(model_type).to_dict()
    of_layers = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers")
    some = _all_of(known, of_layers, n) | _all_of(known, ("moe_layers", "num_attention_heads_per_layer"), None)
    kinds = {
        "layer_types": sorted({*(default.get("layer_types") or ()), "full_attention"}),
        "mlp_layer_types": ("dense", "sparse") if default.get("mlp_layer_types") else (),
        "no_rope_layers": (0, 1),
        "layer_rope_theta": (0.0, 10000.0),
    }
    return some | {k: [draw.choice(of) for _ in range(n)] for k, of in kinds.items() if k in known and of}


def _rope(model_type: str, known: set[str], draw: Random, changes: dict) -> dict:
    """Another kind of rotary embedding, whose reach may end within the prompt."""
    if "rope_parameters" not in known:
        return {}
    config = tiny_config(model_type)
    width = changes.get("head_dim") or getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", 16)
    now, reach = config.rope_parameters or {}, draw.choice((8, N_PROMPT, 128))
    by_kind = now and all(isinstance(value, dict) for value in now.values())
    rope = {kind: _one_rope(draw, width) for kind in now} if by_kind else _one_rope(draw, width)
    return {"rope_parameters": rope, "max_position_embeddings": reach}


def _one_rope(draw: Random, width: int) -> dict:
    kind, reach = draw.choice(("linear", "dynamic", "yarn", "longrope", "llama3", "proportional")), draw.choice((4, 12))
    others = {
        "linear": {"factor": 8.0},
        "dynamic": {"factor": 4.0},
        "yarn": {
            "factor": 8.0,
            "original_max_position_embeddings": reach,
            "attention_factor": draw.choice((None, 1.5)),
        },
        "longrope": {
            "original_max_position_embeddings": reach,
            "factor": 4.0,
            "short_factor": [1.5] * (width // 2),
            "long_factor": [4.0] * (width // 2),
        },
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": reach,
        },
        "proportional": {},
    }[kind]
    return {"rope_type": kind, "rope_theta": draw.choice((100.0, 10000.0)), **others}
