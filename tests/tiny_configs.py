"""A configuration of a few thousand weights for any causal-LM type of the installed transformers, derived from its
default one."""

import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Given to every configuration that has such an attribute.
_SIZES = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "embedding_dim", "word_embed_proj_dim"], 64),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"], 96
    ),
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "num_heads", "decoder_attention_heads", "encoder_attention_heads"], 4
    ),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "vocab_size"], 128),
    **dict.fromkeys(["unpadded_vocab_size", "vocab_size_per_layer_input"], 128),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "v_head_dim", "head_dim", "global_head_dim"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "sliding_window"], 8),
    **dict.fromkeys(["num_key_value_heads", "num_global_key_value_heads"], 2),
    "linear_num_heads": 2,
    "linear_head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SHARED_TAIL = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_SMALL_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
_QSA = {**_INDEXER, "indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 8}
_NO_PARTS = {"vision_config": None, "audio_config": None}
_TEXT = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_KINDS = ["sliding_attention", "full_attention"]
_BYTES = {**_TEXT, "vocab_size": 260, "num_key_value_heads": 4}
_DRAFTS = {**_TEXT, "layer_types": _KINDS, "head_dim": 16, "sliding_window": 8, "num_kv_shared_layers": 2}
_DRAFTS |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
# Types whose causal LM is built from a part of their configuration.
PARTS = {"musicgen": "MusicgenDecoderConfig", "musicgen_melody": "MusicgenMelodyDecoderConfig"}
_OMIT = object()  # leave the default
# What a type's own rules need instead.
_CHANGES = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"], "num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1], **_SMALL_MAMBA},
    "blt": {
        **{"vocab_size": 260, "encoder_hash_byte_group_vocab": 60, "encoder_hash_byte_group_size": [3]},
        **{"patcher_config": _BYTES, "global_config": {**_BYTES, "hidden_size": 128}},
        **{name: {**_BYTES, "hidden_size_global": 128} for name in ("encoder_config", "decoder_config")},
    },
    "cohere_compass_text": {
        **{"layer_types": _KINDS, "num_hidden_layers": 2, "sliding_window": 8},
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]} for kind in _KINDS
        },
    },
    "dbrx": {
        **{"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
    },
    "fuyu": {"text_config": {**_TEXT, "model_type": "persimmon"}, "patch_size": 4},
    "got_ocr2": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_TOWER, "mlp_dim": 48, "output_channels": 8, "image_size": 16, "patch_size": 4},
    },
    "gemma3": {"vision_config": {**_TOWER, "image_size": 16, "patch_size": 4}, "mm_tokens_per_image": 16},
    "gemma4_assistant": {"text_config": {**_DRAFTS, "model_type": "gemma4_text"}, "backbone_hidden_size": 64},
    "gemma4_unified": _NO_PARTS,
    "gemma4_unified_assistant": {
        **{"text_config": {**_DRAFTS, "model_type": "gemma4_unified_text"}, "backbone_hidden_size": 64},
    },
    "codegen": {"rotary_dim": 8},
    "deepseek_v4": {"layer_types": _OMIT},
    "dory": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **dict.fromkeys(["n_input_layers", "n_output_layers"], 1),
        **{"num_hidden_layers": 4, "n_recurrent_layers": 2},
    },
    "falcon_h1": {**_SMALL_MAMBA, "mamba_d_ssm": 128},
    "dots3_note": {
        "vision_config": {**_TOWER, "adapter_in_dim": 32, "adapter_out_dim": 64, "mlp_layer_types": ["dense"]},
        "audio_config": {**_TOWER, "adapter_input_size": 32, "adapter_out_dim": 64, "downsample_hidden_size": 8},
    },
    "dots3_note_text": {
        **{"num_key_value_heads": 4, "shared_experts_intermediate_size": 32},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16},
        **{"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    },
    "gemma3n_text": _SHARED_TAIL,
    "gemma4_text": {**_SHARED_TAIL, "per_layer_config": {}},
    "gemma4_unified_text": {**_SHARED_TAIL, "per_layer_config": {}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    # releases after 5.5 translate the names; the default state sizes take 17 GB where there is no kernel for them
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **_SMALL_MAMBA},
    "inkling2_loop_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2, "num_hidden_layers": 4, **_INKLING},
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"], "num_hidden_layers": 2, **_INKLING},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"], "num_hidden_layers": 2, **_INKLING},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8},
    "moss_transcribe_diarize": {
        "text_config": {**_TEXT, "model_type": "qwen3", "head_dim": 16},
        "audio_config": {**_TOWER, "num_mel_bins": 8},
    },
    "moshi": {"sliding_window": 8, "depth_decoder_config": {}},
    "prophetnet": {"num_hidden_layers": _OMIT},
    "qwen4_exp_text": _QSA,
    "reformer": {"axial_pos_embds": False, "attention_head_size": 16},
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "xlm": {"n_words": 128, "emb_dim": 64, "n_heads": 4, "n_layers": 2},
    "xlnet": {"max_position_embeddings": _OMIT},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1},
        "use_mamba_kernels": False,
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": _OMIT},
}


def tiny_config(model_type: str, **changes):
    """The configuration, with some fields changed; raises what transformers raises where none of this fits the type."""
    if model_type in PARTS:
        part = getattr(transformers, PARTS[model_type])
        return part(**_sizes(part) | changes)
    has_default = not model_type.endswith("_assistant")  # a drafting model's own rules reject its default sizes
    sizes = _sizes(CONFIG_MAPPING[model_type]) if has_default else {}
    return AutoConfig.for_model(model_type, **_changed(model_type, sizes) | changes)


def _sizes(config_class) -> dict:
    default, known = config_class(), fields(config_class)
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    if default.to_dict().get("kv_lora_rank"):  # multi-head latent attention
        sizes.update(head_dim=8, num_key_value_heads=4)
    kinds = default.to_dict().get("layer_types")
    if kinds and "layer_types" in known:
        sizes["layer_types"] = [*sorted(set(kinds) - {"full_attention"}), "full_attention"]
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    elif "sliding_window" in sizes:  # every layer would be a sliding one
        sizes["sliding_window"] = None
    for name, sub in (getattr(config_class, "sub_configs", None) or {}).items():
        sizes[name] = _changed(sub.model_type, _sizes(sub)) if sub is not AutoConfig else {}
    return sizes


def _changed(model_type: str, sizes: dict) -> dict:
    """With what the type's own rules need instead."""
    changed = {**sizes, **_CHANGES.get(model_type, {})}
    return {name: size for name, size in changed.items() if size is not _OMIT}


def fields(config_class) -> set[str]:
    """What can be said of a configuration under its own name."""
    renamed = getattr(config_class, "attribute_map", {}) or {}
    known = (set(config_class().to_dict()) | {"is_decoder"}) - set(renamed)
    return {name for name in known if not isinstance(getattr(config_class, name, None), property)}
