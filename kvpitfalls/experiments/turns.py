"""A conversation whose cache is compressed turn by turn, as a server that keeps it would: at each turn all that is held
competes again ("whole"), or each turn is cut to its share when it ends and never again ("once").

Source of the question: FlowKV (arXiv 2505.15347).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from ..eviction.fairness import Fair
from ..hf.cache import KeptCache, mean_kept_shares
from ..hf.chunks import Stage, cut_to
from ..hf.evict import Evict
from ..hf.fork import compress_each
from ..hf.forward import AttentionCall
from ..hf.generate import Answer, answers
from ..hf.layer import KeptLayer
from ..hf.wrap import Handle
from ..prompts.prompt import Prompt
from ..prompts.spans import Span
from .scenario import WAYS, Scenario, conversation


@dataclass(frozen=True)
class TurnByTurn(Evict):
    """Evict after each turn of a conversation, to the budget of all tokens so far.

    Without fairness all that is held competes each time. With it, and the turns as spans, a turn keeps as much as the
    budget grew by when it came, and loses nothing more. So both hold equally many tokens after each turn, and neither
    depends on the turns that are yet to come.

    Attributes
    ----------
    ends : tuple of int
        Where turns end, in tokens of the conversation.
    """

    ends: tuple[int, ...] = ()

    def after_chunk(self, layer: KeptLayer, call: AttentionCall) -> None:
        """Evict from ``layer`` after a turn."""
        if self.acts:
            layout = self.task(self.ends[-1], [(0, self.ends[-1])], call.n_layer).split.layout
            before, now = (self.stage(n) for n in (layer.seen - call.queries.shape[2], layer.seen))
            cut_to(layer, call, self.policy, self.fair, layout, before, now)

    def stage(self, n_seen: int) -> Stage:
        """What came and what is held of each turn after ``n_seen`` tokens; of all together without fairness."""
        edges = np.array([0, *self.ends])
        budgets = np.array([0, *map(self.limit, self.ends)])
        came, held = ((np.diff(x) * (edges[1:] <= n_seen)).astype(np.int32)[None] for x in (edges, budgets))
        if self.fair.strength:
            return Stage(came, held)
        return Stage(came.sum(-1, keepdims=True), held.sum(-1, keepdims=True))


@dataclass(frozen=True)
class Conversation:
    """A conversation that the full cache had.

    Attributes
    ----------
    prompts : list of Prompt
        All that was said up to the end of each turn: the system prompt belongs to the first one.
    answers : list of Answer
        Of each turn.
    """

    prompts: Sequence[Prompt]
    answers: Sequence[Answer]

    @property
    def together(self) -> Answer:
        """All answers as one, for a record."""
        texts, numbers = [answer.text for answer in self.answers], [answer.n_token for answer in self.answers]
        return Answer("\n\n".join(texts), sum(numbers), all(answer.ended for answer in self.answers))


def converse(model, tokenizer, scenario: Scenario, full: Evict, max_new_tokens: int) -> Conversation:
    """Have the scenario's tasks answered one after the other, greedily and by the full cache.

    Parameters
    ----------
    model : transformers model
        Attached.
    tokenizer
    scenario : Scenario
    full : Evict
        That evicts nothing.
    max_new_tokens : int
        Of each answer.

    Raises
    ------
    ValueError
        If the chat template renders a turn otherwise once another one follows.
    """
    prompt = scenario.prompt(tokenizer)
    messages = [dict(message) for message in prompt.messages or ()]
    prompts, said = [], []
    for task in scenario.tasks:
        (cache,) = compress_each(model, [prompt], [full])
        said += answers(model, [prompt], [prompt.followed_by(task)[0].tolist()], cache, max_new_tokens)
        messages += [{"role": "user", "content": task}, {"role": "assistant", "content": said[-1].text}]
        longer = Prompt.from_chat(tokenizer, messages)
        if longer.token_ids[: len(prompt)] != prompt.token_ids:
            raise ValueError(
                f"the chat template renders the first {len(prompts)} turns otherwise once another one follows; "
                "expected a conversation that grows at its end"
            )
        prompt = longer
        prompts.append(prompt)
    return Conversation(prompts, said)


def compress_turns(model, prompts: Sequence[Prompt], evict: Evict, way: str) -> KeptCache:
    """A conversation's cache after these turns, compressed at the end of each.

    Parameters
    ----------
    model : transformers model
        Attached, and not wrapped.
    prompts : list of Prompt
        All that was said up to the end of each turn; the last one is what the cache has seen.
    evict : Evict
        The policy, and the share that is removed of all tokens so far.
    way : {"whole", "once"}

    Returns
    -------
    KeptCache
        It can be used while the model is attached.
    """
    ends = tuple(map(len, prompts))
    edges = list(pairwise([0, *ends]))
    fair = Fair(strength=float(way == "once"))
    action = TurnByTurn(evict.policy, fair, evict.compression_ratio, None, ends=ends)
    spans = {f"turn {k}": turn for k, turn in enumerate(edges, 1)}
    with Handle(model, action) as handle:
        return handle.compress(
            prompts[-1].input_ids, spans=spans, prefill_chunk_size=[end - begin for begin, end in edges]
        )


def ask_turns(
    model,
    talk: Conversation,
    scenario: Scenario,
    attack: str,
    evicts: Sequence[Evict],
    max_new_tokens: int,
    seed: int,
) -> list[dict[str, list[dict]]]:
    """What a model recalls, and says to an attack, after each turn, under each setting.

    Parameters
    ----------
    model : transformers model
        Attached, and not wrapped.
    talk : Conversation
    scenario : Scenario
    attack : str
        What the user says.
    evicts : list of Evict
        Policies and ratios.
    max_new_tokens : int
        Of each answer.
    seed : int

    Returns
    -------
    list of dict of str to list of dict
        Per setting: way -> per turn: ``recall`` and ``floor`` of the control and ``outcome`` of the attack, as
        :meth:`Scenario.score` says; ``kept``, the share of each instruction, mean over layers and heads; ``answers`` to
        the control and to the attack.
    """
    said = [scenario.ask("recall", None), scenario.ask("attack", attack)]
    spans = scenario.prompt(talk.prompts[0].tokenizer).spans
    # where nothing is evicted, both ways are one
    made = [(i, way) for i, evict in enumerate(evicts) for way in (WAYS if evict.evicts else WAYS[:1])]
    turns: dict[tuple[int, str], list[dict]] = {where: [] for where in made}
    for n_turn, prompt in enumerate(talk.prompts, 1):
        asked = [conversation(prompt, *one) for one in said]
        for _, same in groupby(made, key=lambda where: evicts[where[0]].evicts):  # such caches join
            together = list(same)
            caches = [compress_turns(model, talk.prompts[:n_turn], evicts[i], way) for i, way in together]
            kept = [_kept(cache, spans) for cache in caches]
            replies = _replies(model, prompt, asked, caches, max_new_tokens)
            for where, shares, (recall, attacked) in zip(together, kept, replies, strict=True):
                score = scenario.score_turn(recall, attacked, seed)
                turns[where].append({**score, "kept": shares, "answers": [recall, attacked]})
    return [{way: turns.get((i, way), turns[i, WAYS[0]]) for way in WAYS} for i in range(len(evicts))]


def _replies(
    model, prompt: Prompt, asked: Sequence[Sequence[int]], caches: Sequence[KeptCache], max_new_tokens: int
) -> list[list[str]]:
    """What each cache of a prompt makes of each conversation; they are used up."""
    cache, n = KeptCache.join(caches), len(asked)
    cache.batch_repeat_interleave(n)
    rows = [*asked] * len(caches)
    texts = [answer.text for answer in answers(model, [prompt] * len(rows), rows, cache, max_new_tokens)]
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def _kept(cache: KeptCache, spans: Mapping[str, Span]) -> dict[str, float]:
    """Kept share of each instruction, mean over layers and heads."""
    positions = [cache.positions(layer.index)[0] for layer in cache.kept_layers]
    return mean_kept_shares(positions, {name: (span.start, span.end) for name, span in spans.items()})
