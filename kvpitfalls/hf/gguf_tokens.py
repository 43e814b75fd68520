"""What a GGUF file says of its special tokens; what transformers makes of it depends on the release.

transformers 4.57 reads no ids of them: the end of SmolLM2's turns is then that of their beginning, and each text gets a
token before it.
"""

from pathlib import Path

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message: generation stops at each


def metadata(path: Path) -> dict:
    """The file's small entries ``tokenizer.ggml.*``, without that prefix."""
    from gguf import GGUFReader

    prefix = "tokenizer.ggml."
    fields = {
        name.removeprefix(prefix): field for name, field in GGUFReader(path).fields.items() if name.startswith(prefix)
    }
    return {
        name: fields[name].parts[-1].item() for name in fields if name.endswith("_token_id") or name.startswith("add_")
    }


def as_stated(tokenizer, stated: dict) -> PreTrainedTokenizerFast:
    """The same tokenizer with the special tokens of :func:`metadata`, under no model's name.

    transformers 5.5 takes a Llama GGUF for CodeLlama, and reloads that with another way to split.
    """
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if name in _NAMES}
    special |= {
        name: tokenizer.convert_ids_to_tokens(i)
        for name, key in _NAMES.items()
        if (i := stated.get(f"{key}_token_id")) is not None
    }
    backend = tokenizer.backend_tokenizer
    if "add_bos_token" in stated or "add_eos_token" in stated:
        around = [special[f"{end}_token"] if stated.get(f"add_{end}_token") else None for end in ("bos", "eos")]
        single = [token for token in (around[0], "$A", around[1]) if token is not None]
        known = [(token, backend.token_to_id(token)) for token in single if token != "$A"]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        model_input_names=tokenizer.model_input_names,
        **special,
    )


def ends(stated: dict) -> list[int]:
    """The tokens at which generation stops."""
    return sorted({stated[f"{name}_token_id"] for name in _ENDS if stated.get(f"{name}_token_id") is not None})
