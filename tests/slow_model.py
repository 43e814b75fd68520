"""What a wrapped model keeps of one prompt and answers to it, slowly: an unwrapped model whose attention is plain torch
in float64 and does not see what :mod:`slow_choices` lets go, all at once, between chunks, or step by step."""

import copy
import functools
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from slow_choices import (
    Fairness,
    Seen,
    best,
    budget_of_layer,
    chosen,
    one_choice,
    quotas_of,
    scores_of,
    with_sinks,
)
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from kvpitfalls.hf.arguments import cache_argument


@dataclass
class Layer:
    """What one layer holds of one row: per head the tokens, ascending; and what holding a budget needs to know."""

    held: list[list[int]]
    n_seen: int = 0
    queries: torch.Tensor | None = None  # all so far; a policy asks for the newest
    carried: torch.Tensor | None = None  # of the prompt's tokens (H, n): scores
    received: list[dict[int, float]] = field(default_factory=list)  # per head: attention that a token got so far


class Slow:
    """One row, alone and without padding, through a copy of a model; ``layers`` are those that are compressed."""

    def __init__(self, model, setting, n_prompt):
        self.model = _copy_of(model)
        self.setting, self.n_prompt = setting, n_prompt
        self.fair = Fairness(setting, n_prompt)
        config = model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.places = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        self.layers: dict[int, Layer] = {}
        self.cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def feed(self, tokens, sizes):
        """Logits of tokens that follow what was fed, in forwards of these sizes."""
        out, at = [], 0
        for n in sizes:
            _here.append(self)
            try:
                given = cache_argument(self.model, self.cache)
                out.append(self.model(tokens[at : at + n][None], use_cache=True, **given).logits[0])
            finally:
                _here.pop()
            at += n
        return torch.cat(out)

    def attend(self, module, query, key, value, mask, scaling, softcap, sinks):
        """Attention of one layer, and the eviction after it."""
        q, k, v = (x[0].double() for x in (query, key, value))
        scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        sinks = None if sinks is None else sinks.double()
        n_new, n_key = q.shape[1], k.shape[1]
        seen = Seen(k, v, q, scaling, softcap, sinks)
        logits = seen.logits()
        if mask is not None:
            logits = logits.masked_fill(mask[0, :, :, :n_key] < -1, -torch.inf)
        layer = None
        if module.layer_idx in self.places:
            layer = self.layers.setdefault(module.layer_idx, Layer([[] for _ in k]))
            group = len(q) // len(k)
            for head, tokens in enumerate(layer.held):
                gone = torch.tensor(sorted(set(range(n_key - n_new)) - set(tokens)), dtype=torch.long)
                logits[head * group : (head + 1) * group, :, gone] = -torch.inf
        attention = with_sinks(logits, sinks)
        if layer is not None:
            self.after(layer, self.places.index(module.layer_idx), seen, attention)
        out = attention @ v.repeat_interleave(len(q) // len(k), 0)
        return out.to(query.dtype).transpose(0, 1)[None].contiguous(), None

    def after(self, layer, place, seen, attention):
        """A layer has seen new tokens."""
        n_new = seen.queries.shape[1]
        before, layer.n_seen = layer.n_seen, layer.n_seen + n_new
        layer.held = [[*row, *range(before, layer.n_seen)] for row in layer.held]
        layer.queries = seen.queries if layer.queries is None else torch.cat([layer.queries, seen.queries], 1)
        kept = budget_of_layer(self.setting, self.n_prompt, place, len(self.places))
        if self.setting.when != "prefill":
            self.hold(layer, seen, attention, before)
        elif self.setting.chunks is not None:
            if layer.n_seen <= self.n_prompt and kept < self.n_prompt:
                self.cut(layer, seen, attention, before, kept)
        elif before == 0 and kept < self.n_prompt:
            layer.held = chosen(self.setting, self.fair, seen, kept)

    def slots(self, layer, head, seen):
        """What stands in a head's slots, as a row of its own, with the newest queries."""
        policy, at = self.setting.policy, layer.held[head]
        n_query = min(len(at), policy.recent_queries + seen.queries.shape[1] * (self.setting.chunks is not None))
        group = len(seen.queries) // len(seen.keys)
        queries = layer.queries[head * group : (head + 1) * group, layer.n_seen - n_query :]
        sinks = None if seen.sinks is None else seen.sinks[head * group : (head + 1) * group]
        return Seen(
            seen.keys[head : head + 1, at], seen.values[head : head + 1, at], queries, seen.scaling, seen.softcap, sinks
        )

    def slot_scores(self, layer, seen, segments_of):
        """Scores of the slots of each head, judged in ranges of slots."""
        rows = [
            scores_of(self.setting.policy, self.slots(layer, head, seen), segments_of(head))[0]
            for head in range(len(layer.held))
        ]
        if self.setting.shares_choice or self.setting.policy.name == "tova":  # which has one choice for all heads
            rows = [torch.stack(rows).mean(0)] * len(rows)
        return rows

    def receive(self, layer, seen, attention, before, segments):
        """Add the attention of the new queries to what tokens of their own segments received."""
        of_keys = seen.of_keys(attention)
        of_keys = of_keys.mean(0, keepdim=True).expand_as(of_keys) if self.setting.shares_choice else of_keys
        layer.received = layer.received or [{} for _ in layer.held]
        for head, tokens in enumerate(layer.held):
            for begin, end in segments:
                voters = [t - before for t in range(max(begin, before), min(end, layer.n_seen))]
                for t in (t for t in tokens if begin <= t < end):
                    got = float(of_keys[head, voters, t].sum()) if voters else 0.0
                    layer.received[head][t] = layer.received[head].get(t, 0.0) + got

    def cut(self, layer, seen, attention, before, kept):
        """After a chunk of the prompt."""
        setting, fair = self.setting, self.fair
        segments = fair.segments if setting.strength else [(0, self.n_prompt, None)]
        quotas = fair.quotas(kept) if setting.strength else [kept]
        due, all_came, open_ones = [], [], []
        for (begin, end, i), quota in zip(segments, quotas, strict=True):
            came = min(max(layer.n_seen - begin, 0), end - begin)
            low = fair.least(begin, end, i, layer.n_seen)
            if not setting.strength:
                low = sum(fair.least(*x, layer.n_seen) for x in fair.segments)
            due.append(min(came, max(-(-quota * came // (end - begin)), low)))
            all_came.append(came)
            open_ones.append(came > min(max(before - begin, 0), end - begin))
        due = due if any(due) else all_came
        ranges = [(b, e) for b, e, _ in segments]
        scores = self.judged_after_chunk(layer, seen, attention, before, ranges, open_ones)
        now = []
        for head, tokens in enumerate(layer.held):
            first = set(setting.protected)
            if setting.min_tokens and not setting.strength:
                for b, e, i in fair.segments:
                    inside = [t for t in tokens if b <= t < e]
                    first |= set(best(scores[head], inside, fair.least(b, e, i, layer.n_seen), setting.protected))
            now.append([])
            for (b, e), n, is_open in zip(ranges, due, open_ones, strict=True):
                inside = [t for t in tokens if b <= t < e]
                now[-1] += best(scores[head], inside, n, first) if is_open else inside[:n]
        layer.held = now

    def judged_after_chunk(self, layer, seen, attention, before, ranges, open_ones):
        """Per head, the score of each token that is held in a segment with tokens in the chunk."""
        chosen_ranges = [x for x, is_open in zip(ranges, open_ones, strict=True) if is_open]
        if self.setting.policy.running:
            self.receive(layer, seen, attention, before, chosen_ranges)
            ends = {t: min(e, layer.n_seen) for b, e in chosen_ranges for t in range(b, e)}
            return [{t: got / max(1, ends[t] - t) for t, got in row.items() if t in ends} for row in layer.received]
        edges = [[(sum(t < b for t in row), sum(t < e for t in row)) for b, e in chosen_ranges] for row in layer.held]
        rows = self.slot_scores(layer, seen, lambda head: edges[head])
        return [dict(zip(tokens, row.tolist(), strict=True)) for tokens, row in zip(layer.held, rows, strict=True)]

    def hold(self, layer, seen, attention, before):
        """After the prompt, or any later forward, while a budget is held."""
        setting, fair, n_prompt = self.setting, self.fair, self.n_prompt
        is_fair = setting.strength > 0
        if before == 0 and is_fair:
            layer.carried = one_choice(setting, scores_of(setting.policy, seen, fair.judged))
        if setting.policy.running:
            ranges = [(n_prompt, layer.n_seen)] if is_fair else [(0, layer.n_seen)]
            self.receive(layer, seen, attention, before, ranges)
        if before == 0 and setting.when == "decode":
            return
        n_slot = len(layer.held[0])
        kept = min(n_slot, setting.kept)
        if kept == n_slot:
            return
        scores = self.held_scores(layer, seen, is_fair)
        segments = [*fair.segments, (n_prompt, layer.n_seen, None)] if is_fair else [(0, layer.n_seen, None)]
        quotas = self.held_quotas(layer, segments, kept) if is_fair else [kept]
        now = []
        for head, tokens in enumerate(layer.held):
            first = set(setting.protected)
            if setting.min_tokens and not is_fair:
                for (b, e, _), low in zip(fair.segments, fair.floors, strict=True):
                    first |= set(best(scores[head], [t for t in tokens if b <= t < e], low, setting.protected))
            of_segments = zip(segments, quotas, strict=True)
            now.append(
                [
                    x
                    for (b, e, _), q in of_segments
                    for x in best(scores[head], [t for t in tokens if b <= t < e], q, first)
                ]
            )
        layer.held = now

    def held_scores(self, layer, seen, is_fair):
        """Per head, the score of each token that is held."""
        out = []
        n_later = [sum(t >= self.n_prompt for t in row) for row in layer.held]
        rows = None
        if not self.setting.policy.running and (not is_fair or any(n_later)):

            def judged(head):
                n = len(layer.held[head])
                return [(n - n_later[head], n)] if is_fair else [(0, n)]

            rows = self.slot_scores(layer, seen, judged)
        for head, tokens in enumerate(layer.held):
            of_head = {}
            for place, t in enumerate(tokens):
                if is_fair and t < self.n_prompt:
                    of_head[t] = float(layer.carried[head, t])
                elif self.setting.policy.running:
                    of_head[t] = layer.received[head][t] / max(1, layer.n_seen - t)
                else:
                    of_head[t] = float(rows[head][place])
            out.append(of_head)
        return out

    def held_quotas(self, layer, segments, kept):
        """Slots of each segment, the last of which came after the prompt."""
        tokens = layer.held[0]
        had = [e - b for b, e, _ in segments]
        has = [sum(b <= t < e for t in tokens) for b, e, _ in segments]
        weights = [*self.fair.weights, 1.0]
        rates = [Fraction(w) * n for w, n in zip(weights, had, strict=True)]
        rates = [rate if n else 0 for rate, n in zip(rates, has, strict=True)]
        floors = [*self.fair.floors, min(1, has[-1])]
        return quotas_of(kept, has, rates, floors, [i is None for *_, i in segments])


_here: list[Slow] = []


@functools.cache
def _copy_of(model):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("slow")
    return twin


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    return _here[-1].attend(module, query, key, value, attention_mask, scaling, softcap, s_aux)


AttentionInterface.register("slow", _attention)
AttentionMaskInterface.register("slow", eager_mask)
