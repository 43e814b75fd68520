"""What is asked of a call of ``generate`` on a wrapped model before it begins: its public arguments say all that
matters."""

import copy
import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from transformers import GenerationConfig

from ..errors import NotInterceptedError, UnsupportedModelError
from ..numbers import check_whole, is_whole
from .arguments import NO_CACHE, given_cache
from .cache import KeptCache
from .coming import Coming
from .coverage import check_adapters
from .masks import check_padding, valid_ranges
from .parts import decoder_of, is_multimodal, takes
from .rows import FORGETFUL, TELLS_PADDING_ONCE, has_states

PAGED = (
    "continuous batching (generate_batch, or cache_implementation='paged') keeps a paged cache of its own, which "
    "cannot be compressed, and a thread of its own, for which no pause holds; expected generate, or a call outside the "
    "wrap"
)


def arguments_of(model, generate, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call of ``generate`` by name; ``generation_config`` is what they make of the model's own."""
    bound = inspect.signature(generate).bind(*args, **kwargs).arguments
    arguments = {**bound, **bound.get("kwargs", {})}
    config = copy.deepcopy(arguments.get("generation_config") or GenerationConfig())
    for name, value in vars(model.generation_config).items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    unset = {} if arguments.get("generation_config") is not None else vars(copy.deepcopy(model.generation_config))
    for name, value in {**unset, **{k: v for k, v in bound.get("kwargs", {}).items() if hasattr(config, k)}}.items():
        setattr(config, name, value)
    return {**arguments, "generation_config": config}


def n_rows_of(config: GenerationConfig) -> int:
    """How many rows ``generate`` runs for each prompt: its beams, or the answers that are wanted."""
    return max(config.num_beams or 1, config.num_return_sequences or 1)


def check_generate(model, arguments: dict, action) -> None:
    """Raise if this call would show the model something else than the cache's prompt and what follows it, or less.

    Parameters
    ----------
    model : transformers model
    arguments : dict
        Of :func:`arguments_of`.
    action : Action, or None
        The wrap's, for a call without a cache; None if there is none.
    """
    _, cache = given_cache(arguments)
    is_ours = isinstance(cache, KeptCache)
    action = (cache.action or action) if is_ours else action
    is_filled, acts = is_ours and cache.n_seen > 0, action is not None and action.acts
    if action is not None and arguments["generation_config"].cache_implementation == "paged":
        raise UnsupportedModelError(PAGED)
    if is_filled or acts:
        check_adapters(getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None))  # PEFT's, around it
        _check_mode(arguments, acts)
    if isinstance(cache, KeptCache) and is_filled:
        _check_goes_on(model, arguments, cache)


def chunks_of(model, arguments: dict, action) -> Coming | None:
    """The prompt of a call of ``generate`` with ``prefill_chunk_size``, if a cache of ours is to be filled by it.

    Raises
    ------
    ValueError, UnsupportedModelError
        If it cannot be compressed in chunks.
    """
    config, cache = arguments["generation_config"], given_cache(arguments)[1]
    size = getattr(config, "prefill_chunk_size", None)
    action = (cache.action or action) if isinstance(cache, KeptCache) else action
    is_filled = cache is not None and cache.get_seq_length() > 0
    if size is None or is_filled or action is None:
        return None
    check_whole("prefill_chunk_size", size, 1)  # transformers takes no other
    ids = next((x for name in ("inputs", "input_ids") if (x := arguments.get(name)) is not None), None)
    if arguments.get("inputs_embeds") is not None or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise UnsupportedModelError("generate runs with prefill_chunk_size; expected token ids (B, T) with it")
    mask = arguments.get("attention_mask")
    if mask is None and (pad := config.pad_token_id) is not None and bool((ids == pad).any()):
        raise ValueError(
            "generate runs with prefill_chunk_size on ids that hold the padding token; expected an attention_mask, "
            "which says where padding is"
        )
    n_row, sizes = n_rows_of(config), chunk_sizes(size, ids.shape[1])
    mask = None if mask is None else mask.repeat_interleave(n_row, 0)
    return chunked(model, ids.repeat_interleave(n_row, 0), mask, sizes, action)


def chunk_sizes(size: int | Sequence[int], n_token: int) -> list[int]:
    """How many tokens each chunk of a prompt (B, T) has, padding included: all ``size``, but the last one, or as told.

    Raises
    ------
    ValueError
        If they are no whole numbers of at least 1, or add up to another number than ``n_token``.
    """
    if isinstance(size, str) or not isinstance(size, Sequence):
        check_whole("prefill_chunk_size", size, 1)
        step = int(size)
        return [min(step, n_token - begin) for begin in range(0, n_token, step)]
    if wrong := [n for n in size if not is_whole(n) or n < 1]:
        raise ValueError(f"prefill_chunk_size holds {wrong[0]!r}; expected whole numbers, at least 1")
    if sum(size) != n_token:
        raise ValueError(
            f"prefill_chunk_size holds {len(size)} chunks of {sum(size)} tokens together; expected {n_token}, as the "
            "prompt has, padding included"
        )
    return [int(n) for n in size]


def chunked(model, ids: torch.Tensor, mask, sizes: Sequence[int], action) -> Coming | None:
    """A prompt (B, T) that is to come in chunks of these sizes; None if that is one."""
    if is_multimodal(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is multimodal, and prefill_chunk_size was given; expected none, since its prompts "
            "go through the model as a whole"
        )
    action.check_chunks()
    n_row, n_token = ids.shape
    if len(sizes) == 1:
        return None
    coming = Coming(decoder_of(model), n_token, valid_ranges(mask, n_row, n_token))
    _check_linear_attention(model, sizes, coming)
    return coming


def _check_linear_attention(model, sizes: Sequence[int], coming: Coming) -> None:
    """Raise where a model's layers of linear attention make something else of chunks than of the whole prompt, be it
    wrapped or not."""
    if not any(map(has_states, KeptCache(model.config).layers)):
        return
    name = type(model).__name__
    if model.config.model_type in FORGETFUL:
        raise UnsupportedModelError(
            f"the linear attention of {name} forgets what came before a forward of several tokens, and "
            "prefill_chunk_size was given; expected none"
        )
    n_padding = max(begin for begin, _ in coming.valid)
    if any(size == 1 and end <= n_padding for size, end in zip(sizes, accumulate(sizes), strict=True)):
        raise ValueError(
            f"prefill_chunk_size has chunks of 1, and prompts are padded; the linear attention of {name} takes a token "
            "that comes alone for a real one, so expected at least 2"
        )
    if TELLS_PADDING_ONCE and n_padding > sizes[0]:
        raise ValueError(
            f"prompts are padded with up to {n_padding} tokens, and prefill_chunk_size begins with {sizes[0]}; the "
            f"linear attention of {name} takes padding of later chunks for tokens in transformers before 5.17, so "
            f"expected a first chunk of at least {n_padding}"
        )


def _check_mode(arguments: dict, acts: bool) -> None:
    config = arguments["generation_config"]
    if config.use_cache is False:
        raise NotInterceptedError(NO_CACHE)
    if config.get_generation_mode(arguments.get("assistant_model")) == "assisted_generation":
        raise UnsupportedModelError(
            "assisted generation (assistant_model, prompt_lookup_num_tokens) puts drafts behind the prompt, and would "
            "take back "
            "what eviction saw; expected plain generation"
        )
    if acts and getattr(config, "is_assistant", False):
        raise UnsupportedModelError(
            "the wrapped model is the assistant_model of another one's generate, which takes back drafts, and with "
            "them what eviction saw; expected an assistant that is not wrapped"
        )
    if (
        getattr(config, "guidance_scale", None) not in (None, 1, 1.0)
        or arguments.get("negative_prompt_ids") is not None
    ):
        raise UnsupportedModelError(
            "generate runs with guidance (guidance_scale, negative_prompt_ids), whose second prompt has a cache of "
            "its own that would be "
            "compressed as well; expected none"
        )


def _check_goes_on(model, arguments: dict, cache: KeptCache) -> None:
    """Raise unless the ids, or their embeddings, begin with what the cache has seen, and go on."""
    tokens = next(
        (x for name in ("inputs_embeds", "inputs", "input_ids") if (x := arguments.get(name)) is not None), None
    )
    if not isinstance(tokens, torch.Tensor) or tokens.ndim not in (2, 3):
        return
    mask = arguments.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] == cache.n_seen + tokens.shape[1]:
        return  # new tokens alone: the mask says that they follow what the cache has seen
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and len(mask) != len(tokens):
        raise ValueError(f"attention_mask has {len(mask)} rows; expected {len(tokens)}, as the ids have")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] < tokens.shape[1]:
        n_given, n_both = tokens.shape[1], cache.n_seen + tokens.shape[1]
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns; expected {n_given}, as the ids have, or {n_both} if they "
            "follow what the cache has seen"
        )
    check_padding(mask, cache.valid, cache.n_prompt)
    config, known = arguments["generation_config"], cache.tokens
    _check_rows(len(tokens) * n_rows_of(config), len(cache.valid or ()))
    _check_kinds(model, arguments.get("token_type_ids"), cache)
    if tokens.ndim == 3 and known is not None:  # where an image stands, embeddings are not those of its tokens
        known = None if is_multimodal(model) else model.get_input_embeddings()(known).to(tokens)
    different = None if known is None else _first_difference(tokens, known, mask, cache)
    if different is not None:
        raise ValueError(_difference(*different, tokens.shape[1], cache))
    if tokens.shape[1] <= cache.n_seen:
        raise ValueError(
            f"generate was given {tokens.shape[1]} tokens, all of which the cache has seen; expected at least one more "
            "than its "
            f"{cache.n_seen}, or a copy made right after the prompt (cache.copy())"
        )


def _check_kinds(model, kinds: Any, cache: KeptCache) -> None:
    """Raise if tokens that the cache has seen without kinds of their own are given some now, and the decoder looks."""
    if not isinstance(kinds, torch.Tensor) or cache.origin.has_kinds or not bool(kinds[:, : cache.n_seen].any()):
        return
    if takes(decoder_of(model), "token_type_ids"):
        raise ValueError(
            "generate was given token_type_ids other than 0 of tokens that the cache has seen without; expected a "
            "cache that a forward with these filled, or none for its tokens"
        )


def _check_rows(n_run: int, n_held: int) -> None:
    if n_run != n_held:
        remedy = "as many" if n_run % n_held else f"cache.batch_repeat_interleave({n_run // n_held})"
        raise ValueError(f"generate runs {n_run} rows, but the cache holds {n_held}; expected {remedy}")


def _difference(row: int, place: int, n_given: int, cache: KeptCache) -> str:
    """The sentence on ids whose row ``row`` differs from what the cache has seen first at ``place``."""
    where, n_prompt = f"row {row}, token {place}", cache.n_prompt
    if place >= n_prompt:
        return (
            f"generate was given other tokens than the cache has seen since its prompt ({where} of {cache.n_seen}); "
            "expected the same "
            "conversation, or a copy made right after the prompt (cache.copy())"
        )
    if n_given < n_prompt:
        return (
            f"generate was given {n_given} tokens that the cache's prompt of {n_prompt} does not begin with "
            f"({where}); expected all of the "
            "prompt, then what follows it"
        )
    return (
        f"generate was given another prompt than the cache has seen ({where} of {n_prompt}); expected the prompt that "
        "was compressed, then "
        "what follows it"
    )


def _first_difference(tokens, known, mask, cache: KeptCache) -> tuple[int, int] | None:
    """Row and place of the first token, or embedding, that is not the cache's; padding counts for none."""
    n = min(tokens.shape[1], known.shape[1])
    tokens = tokens[:, :n].to(known.device).repeat_interleave(len(known) // len(tokens), 0)
    differs = tokens != known[:, :n]
    differs = differs.any(-1) if differs.ndim == 3 else differs
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        differs &= mask[:, :n].to(differs.device).bool().repeat_interleave(len(known) // len(mask), 0)
    if not differs.any():
        return None
    for row, (begin, end) in enumerate(cache.valid or ()):
        differs[row, :begin] = False
        differs[row, end : cache.n_prompt] = False
    places = differs.nonzero()
    return tuple(places[0].tolist()) if len(places) else None
