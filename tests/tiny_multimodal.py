"""Random multimodal models of a few thousand weights, and prompts with an image in them."""

import inspect

import torch
import transformers
from packaging.version import Version
from tiny_models import far_from_uniform, ids
from transformers import AutoConfig, CLIPVisionConfig, SiglipVisionConfig

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_MARKS = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
_GRID = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2}
_TOWER = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, **_GRID}
_GRIDS = {
    "qwen2_vl": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, **_GRID},
    "qwen2_5_vl": {"depth": 1, "fullatt_block_indexes": [0], **_TOWER},
    "qwen3_vl": {"depth": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], **_TOWER},
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_WINDOWS = {**_TEXT, "head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", *["full_attention"] * 2]}
_GEMMA = {
    "gemma3": {"text_config": _WINDOWS, "vision_config": _VISION, "mm_tokens_per_image": 16, "image_token_index": 150},
    "gemma4": {
        "text_config": {**_WINDOWS, "vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 8}
        | {"num_kv_shared_layers": 1, "global_head_dim": 16, "use_bidirectional_attention": None},
        "vision_config": {**_VISION, "pooling_kernel_size": 2, "num_key_value_heads": 2, "head_dim": 16}
        | {"position_embedding_size": 16},
        **{"image_token_id": 150, "video_token_id": 151, "audio_token_id": 154},
    },
}
OF_GRIDS = tuple(_GRIDS)
# Where images are read from left to right, as text is; and also those where only text can be compressed.
FAMILIES = (*OF_GRIDS, "llava", *(["gemma4"] if Version(transformers.__version__) >= Version("5.13") else []))
OF_TEXT = (*FAMILIES, "gemma3")


def _config(family: str):
    if family in OF_GRIDS:  # until transformers 5 the rotary settings had another name, and a base beside them
        text = {
            **_TEXT,
            "head_dim": 16,
            "rope_parameters": _ROPE,
            "rope_scaling": _ROPE,
            "rope_theta": _ROPE["rope_theta"],
        }
        return AutoConfig.for_model(family, text_config=text, vision_config=_GRIDS[family], **_MARKS)
    if family == "llava":
        parts = {"text_config": AutoConfig.for_model("llama", **_TEXT), "vision_config": CLIPVisionConfig(**_VISION)}
        return AutoConfig.for_model(family, **parts, image_token_index=150, image_seq_length=16)
    if family in _GEMMA:
        return AutoConfig.for_model(family, **_GEMMA[family])
    text = AutoConfig.for_model("gemma", **_TEXT, head_dim=16)
    vision = SiglipVisionConfig(**_VISION, projection_dim=64)
    return AutoConfig.for_model(
        "paligemma", text_config=text, vision_config=vision, image_token_index=150, projection_dim=64
    )


def build(family: str, attention: str = "sdpa"):
    """A random model in eval mode."""
    torch.manual_seed(1)
    model = transformers.AutoModelForImageTextToText.from_config(_config(family), attn_implementation=attention)
    return far_from_uniform(model.eval())


def image_prompt(model, family: str, seed: int = 4, side: int = 8, n_row: int = 1) -> dict:
    """What a processor would return for texts around one image of ``side`` patches each way; llava's has 4."""
    is_grid = family in OF_GRIDS
    n_image = (side // 2) ** 2 if is_grid else 16
    before, after, image = ids(n_row, 5, seed), ids(n_row, 9, seed + 1), torch.full((n_row, n_image), 150)
    marks = [torch.full((n_row, 1), token) for token in (152, 153)]
    tokens = torch.cat([before, marks[0], image, marks[1], after], 1)
    noise = torch.Generator().manual_seed(seed)
    options = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if family.startswith("gemma"):
        options["token_type_ids" if family == "gemma3" else "mm_token_type_ids"] = (tokens == 150).int()
    if family == "gemma4":
        options["pixel_values"] = torch.randn(n_row, 64, 3 * 4 * 4, generator=noise)
        return options | {"image_position_ids": torch.cartesian_prod(*[torch.arange(8)] * 2).expand(n_row, -1, -1)}
    if not is_grid:
        return options | {"pixel_values": torch.randn(n_row, 3, 16, 16, generator=noise)}
    options["pixel_values"] = torch.randn(n_row * side * side, 3 * 2 * 4 * 4, generator=noise)
    options["image_grid_thw"] = torch.tensor([[1, side, side]] * n_row)
    if "mm_token_type_ids" in inspect.signature(model.model.get_rope_index).parameters:
        options["mm_token_type_ids"] = (tokens == 150).int()
    return options


def followed_by(given: dict, question: torch.Tensor) -> dict:
    """The same prompt, image and all, with more text."""
    tokens = torch.cat([given["input_ids"], question], 1)
    longer = {**given, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for name in {"mm_token_type_ids", "token_type_ids"} & given.keys():
        longer[name] = (tokens == 150).int()
    return longer
