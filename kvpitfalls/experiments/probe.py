"""How likely given answers are after compression: a smooth signal from small models and single prompts, without
generating anything."""

from collections.abc import Sequence

import torch

from ..hf.cache import KeptCache
from ..hf.evict import Evict
from ..hf.fork import compress_each
from ..hf.generate import logits_after
from ..hf.model import attached
from ..prompts.prompt import Prompt


def probe(
    model, prompts: Sequence[Prompt], said: str, texts: Sequence[Sequence[str]], settings: Sequence[Evict]
) -> list[list[list[float]]]:
    """Log-probability per token of each answer to ``said``, under each setting.

    Parameters
    ----------
    model : transformers model
    prompts : list of Prompt
    said : str
        What the user says, such as an attack.
    texts : list of list of str, parallel to prompts
        Answers, equally many for each prompt: for an attack, the sentence that refuses and the text that would leak.
        Each is followed by the token that ends an answer.
    settings : list of Evict

    Returns
    -------
    list of list of list of float
        By setting, prompt and answer, in nats per token. The difference of refusal and leak says how far a defense
        holds; read both, since the leak's alone falls when the text is forgotten.

    Raises
    ------
    ValueError
        If an answer is empty or prompts have different numbers of answers.

    Notes
    -----
    One prefill for all settings, one forward pass for each. Source: teacher forcing; the paper (arXiv 2510.00231) has
    no such probe.
    """
    sizes = {len(of_prompt) for of_prompt in texts}
    if (
        len(texts) != len(prompts)
        or len(sizes) != 1
        or sizes == {0}
        or not all(text for of_prompt in texts for text in of_prompt)
    ):
        raise ValueError(
            f"texts hold {sorted(sizes)} answers for {len(texts)} of {len(prompts)} prompts; expected equally many, "
            "none empty"
        )
    n_text, tokenizer = sizes.pop(), prompts[0].tokenizer
    contexts = [prompt for prompt in prompts for _ in range(n_text)]
    asked = [ids for prompt in prompts for ids in [prompt.followed_by(said)[0].tolist()] * n_text]
    answers = [answer_ids(tokenizer, text) for of_prompt in texts for text in of_prompt]
    with attached(model):
        out = []
        for cache in compress_each(model, prompts, settings):
            cache.batch_repeat_interleave(n_text)
            means = answer_logprobs(model, contexts, asked, answers, cache)
            out.append([means[i : i + n_text] for i in range(0, len(means), n_text)])
        return out


def answer_ids(tokenizer, text: str, ends: bool = True) -> list[int]:
    """Token ids of an answer, and, unless it was cut off, of the token that ends it."""
    end = [] if tokenizer.eos_token_id is None or not ends else [tokenizer.eos_token_id]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) + end


@torch.no_grad()
def answer_logprobs(model, contexts, asked, answers, cache: KeptCache) -> list[float]:
    """Mean log-probability of each row's answer tokens; the cache is used up.

    Parameters
    ----------
    model : transformers model
        Wrapped, as the cache was.
    contexts : list of Prompt, one per row
        What the cache has seen.
    asked : list of list of int, one per row
        Token ids of context, question, and the beginning of the answer.
    answers : list of list of int, one per row
        Token ids of the rest.
    cache : KeptCache

    Returns
    -------
    list of float
        In nats per token.
    """
    conversations = [ids + answer for ids, answer in zip(asked, answers, strict=True)]
    logits = logits_after(model, contexts, conversations, cache, max(map(len, answers)) + 1)
    out = []
    for row, answer in zip(logits, answers, strict=True):
        before = row[-len(answer) - 1 : -1].double().log_softmax(-1)  # the logits that predict each answer token
        out.append(float(before.gather(-1, torch.tensor(answer, device=before.device)[:, None]).mean()))
    return out
