"""What is kept of one prompt in one layer, slowly: scores, budgets, quotas and the choice in plain float64, by the
definitions (docs/method.md, the policies' docstrings).

None of the package's arithmetic is used; a policy's object is read for its name and parameters alone.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch

from kvpitfalls.policies import Policy

FIRST = 1e6  # a score that is above all others; the newer, the higher


@dataclass
class Setting:
    """What is asked for, of one prompt."""

    policy: Policy
    kept: int  # tokens, mean over layers and heads
    spans: list[tuple[int, int]]
    protected: set[int] = field(default_factory=set)
    strength: float = 0.0
    weights: list[float] | None = None
    min_tokens: int = 0
    absorbs: bool = False
    is_paper: bool = False
    allocation: tuple[str, float] = ("uniform", 0)  # with beta or alpha
    window: int = 0  # that a pyramid leaves to each layer
    when: str = "prefill"
    chunks: list[int] | None = None
    shares_choice: bool = False  # one choice for all heads of a layer


@dataclass
class Seen:
    """What one layer's attention had of one row: keys and values (H, n, D), the newest queries (Hq, m, D)."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def logits(self) -> torch.Tensor:
        """(Hq, m, n), minus infinity where a query comes before a key."""
        n_query, n_key = self.queries.shape[1], self.keys.shape[1]
        out = self.queries @ self.keys.repeat_interleave(len(self.queries) // len(self.keys), 0).mT * self.scaling
        if self.softcap:
            out = self.softcap * (out / self.softcap).tanh()
        place = torch.arange(n_key)
        return out.masked_fill(place > place[n_key - n_query :, None], -torch.inf)

    def attention(self) -> torch.Tensor:
        """(Hq, m, n)."""
        return with_sinks(self.logits(), self.sinks)

    def of_keys(self, of_queries: torch.Tensor) -> torch.Tensor:
        """Mean over the query heads of each key head."""
        return of_queries.unflatten(0, (len(self.keys), -1)).mean(1)


def with_sinks(logits, sinks):
    if sinks is None:
        return logits.softmax(-1)
    column = sinks[:, None, None].expand(*logits.shape[:2], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]


def windows(segments, size):
    """The window of each segment, [begin, end)."""
    share, spare, out = max(1, size // len(segments)), 0, []
    for i, (begin, end) in enumerate(segments):
        wanted = spare + (size - share * i if i == len(segments) - 1 else share)
        width = min(max(1, wanted), end - begin)
        spare = max(0, wanted - width)
        out.append((end - width, end))
    return out


def scores_of(policy, seen, segments, first_segments=None):
    """Scores (H, n) by a policy that judges each of the segments apart; ``first_segments``: paper's raw spans."""
    return globals()[f"_{policy.name}"](policy, seen, segments, first_segments)


def _knorm(policy, seen, segments, paper):
    return -seen.keys.norm(dim=-1)


def _streaming_llm(policy, seen, segments, paper):
    n_head, n, _ = seen.keys.shape
    place = torch.arange(n, dtype=torch.float64)
    out = torch.where(place < policy.n_sink, FIRST - place, place)
    if paper is not None:
        (_, cut), _ = segments
        ramps = [torch.linspace(0.1, 0.9, length) for length in (cut - policy.n_sink, n - cut)]
        out = torch.cat([torch.ones(policy.n_sink), *ramps]).double()
    return out.expand(n_head, -1)


def _keydiff(policy, seen, segments, paper):
    out = torch.zeros(seen.keys.shape[:2], dtype=torch.float64)
    for begin, end in segments:
        units = torch.nn.functional.normalize(seen.keys[:, begin:end], dim=-1)
        mean = units.mean(1, keepdim=True)
        if end - begin > 2:
            out[:, begin:end] = -torch.cosine_similarity(units, mean, dim=-1)
    return out


def _h2o(policy, seen, segments, paper):
    attention, n = seen.attention(), seen.keys.shape[1]
    out, place = torch.zeros(seen.keys.shape[:2], dtype=torch.float64), torch.arange(n)
    voters = [(segment, list(range(*segment)), segment[1]) for segment in segments]
    if paper is not None:
        (begin, cut), (_, end) = paper
        every = range(n)
        voters = [
            ((0, begin), every, n),
            ((begin, cut), [*range(begin, cut), *range(end, n)], cut),
            ((cut, n), every, n),
        ]
    for (begin, end), queries, last in voters:
        sums = seen.of_keys(attention[:, list(queries)].sum(1)) if len(queries) else torch.zeros_like(out)
        out[:, begin:end] = (sums / (last - place).clamp(min=1))[:, begin:end]
    return out


def _tova(policy, seen, segments, paper):
    attention, n_query = seen.attention(), seen.queries.shape[1]
    out = torch.zeros(seen.keys.shape[:2], dtype=torch.float64)
    for begin, end in segments:
        if begin < end:
            last = attention[:, n_query - (seen.keys.shape[1] - (end - 1))].mean(0)
            out[:, begin : end - 1] = last[begin : end - 1]
            out[:, end - 1] = FIRST
    return out


def _snapkv(policy, seen, segments, paper):
    attention = seen.attention()
    shift = seen.keys.shape[1] - seen.queries.shape[1]
    out = torch.zeros(seen.keys.shape[:2], dtype=torch.float64)
    for (begin, _), (cut, end) in zip(segments, windows(segments, policy.window_size), strict=True):
        mean = seen.of_keys(attention[:, cut - shift : end - shift, begin:cut].mean(1))
        out[:, begin:cut] = _pooled(mean, policy.kernel_size)
        out[:, cut:end] = 2.0 + torch.arange(end - cut)
    return out


def _pooled(x, width):
    reach = width // 2
    wide = torch.nn.functional.pad(x, (reach, reach))
    return torch.stack([wide[..., k : k + width].sum(-1) / width for k in range(x.shape[-1])], -1) if x.numel() else x


_adakv = _pyramidkv = _snapkv


def _rkv(policy, seen, segments, paper):
    shift, n_head = seen.keys.shape[1] - seen.queries.shape[1], len(seen.keys)
    out = torch.zeros(seen.keys.shape[:2], dtype=torch.float64)
    for (begin, _), (cut, end) in zip(segments, windows(segments, policy.window_size), strict=True):
        out[:, cut:end] = FIRST + torch.arange(end - cut)
        if cut == begin:
            continue
        queries = seen.queries[:, cut - shift : end - shift]
        logits = queries @ seen.keys[:, begin:cut].repeat_interleave(len(queries) // n_head, 0).mT * seen.scaling
        largest = logits.unflatten(0, (n_head, -1)).amax(1)
        largest = seen.softcap * (largest / seen.softcap).tanh() if seen.softcap else largest
        sinks = None if seen.sinks is None else seen.sinks.unflatten(0, (n_head, -1)).amax(1)
        shares, reach = with_sinks(largest, sinks).mean(1), policy.kernel_size // 2
        important = torch.stack([shares[:, max(0, k - reach) : k + reach + 1].amax(-1) for k in range(cut - begin)], -1)
        for head in range(n_head):
            redundant = _repeated(seen.keys[head, begin:end], policy.threshold)[: cut - begin]
            out[head, begin:cut] = policy.mix_lambda * important[head] - (1 - policy.mix_lambda) * redundant
    return out


def _repeated(keys, threshold):
    alike = torch.cosine_similarity(keys[:, None], keys[None], dim=-1).fill_diagonal_(0)
    for i, row in enumerate(alike.clone()):
        later = [k for k in range(len(keys)) if k != i and row[k] > threshold]
        alike[i, later[-1:]] = 0
    return alike.mean(0).softmax(-1)


def _lagkv(policy, seen, segments, paper):
    n_head, n, _ = seen.keys.shape
    size, first = policy.lag_size, policy.n_sink
    n_judged = max(0, (n - first) // size - 1)
    out = FIRST + torch.arange(n, dtype=torch.float64).expand(n_head, -1).clone()
    out[:, :first] = 2 * FIRST
    for begin in range(first, first + n_judged * size, size):
        weights = 0
        for x in (seen.keys, seen.values):
            chunk, after = x[:, begin : begin + size], x[:, begin + size : begin + 2 * size]
            low, high = after.amin(1, keepdim=True), after.amax(1, keepdim=True)
            weights = weights + ((chunk - low) / (high - low)).std(-1).softmax(-1)
        out[:, begin : begin + size] = -weights.argsort(dim=-1, descending=True, stable=True).argsort(-1).double()
    return out


def _chunkkv(policy, seen, segments, paper):
    of_tokens = scores_of(policy.policy, seen, segments, paper).sum(0)
    out = torch.zeros_like(of_tokens)
    for begin, end in segments:
        for at in range(begin, end, policy.chunks):
            piece = slice(at, min(at + policy.chunks, end))
            out[piece] = of_tokens[piece].mean()
    return out.expand(len(seen.keys), -1)


def best(scores, places, n, first=()):
    """The ``n`` best of some places of a head: those that come first, then by score, then the earlier."""
    order = sorted(places, key=lambda t: (t not in first, -scores[t], t))
    if 0 < n < len(order) and (order[n - 1] in first) == (order[n] in first):
        note_margin(scores[order[n - 1]], scores[order[n]])
    return sorted(order[:n])


margins: list[float] = []  # of each choice, by how much the worst that is kept is better than the best that is not


def note_margin(better, worse):
    if better != worse:
        margins.append((better - worse) / max(abs(better), abs(worse)))


def shares_of(total, lengths, rates, floors):
    """``clip(c * rate, floor, length)`` with the one c that makes them sum to ``total``."""
    if sum(n if rate else low for n, rate, low in zip(lengths, rates, floors, strict=True)) < total:
        floors = [n if rate else low for n, rate, low in zip(lengths, rates, floors, strict=True)]
        rates = lengths

    def at(c):
        of_each = zip(lengths, rates, floors, strict=True)
        return [min(max(c * Fraction(rate), Fraction(low)), Fraction(n)) for n, rate, low in of_each]

    corners = {Fraction(0)} | {
        Fraction(edge) / Fraction(rate)
        for n, rate, low in zip(lengths, rates, floors, strict=True)
        for edge in (low, n)
        if rate
    }
    below = max(c for c in corners if sum(at(c)) <= total)
    above = min((c for c in corners if c > below), default=below)
    rise = sum(at(above)) - sum(at(below))
    return at(below + (above - below) * (total - sum(at(below))) / rise if rise else below)


def quotas_of(total, lengths, rates, floors, unmarked):
    """Whole shares: by largest remainder, the later first; equal ones alike where unmarked text can pay for it."""
    shares = shares_of(total, lengths, rates, floors)
    quotas = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda j: (shares[j] - quotas[j], j), reverse=True)
    for j in order[: total - sum(quotas)]:
        quotas[j] += 1
    raised = [j for j in order if not unmarked[j] and quotas[j] > shares[j]]
    lowered = [j for j in order if not unmarked[j] and quotas[j] < shares[j]]
    parted = {shares[j] for j in raised} & {shares[j] for j in lowered}
    text = [j for j in order if unmarked[j]]
    takers = sorted((j for j in text if quotas[j] < lengths[j]), key=lambda j: quotas[j] - shares[j])
    givers = sorted((j for j in text if quotas[j] > floors[j]), key=lambda j: shares[j] - quotas[j])
    for changed, step, paying in ((raised, -1, takers), (lowered, 1, givers)):
        changed = [j for j in changed if shares[j] in parted]
        if len(changed) <= len(paying):
            for mine, theirs in zip(changed, paying, strict=False):
                quotas[mine], quotas[theirs] = quotas[mine] + step, quotas[theirs] - step
            break
    return quotas


def in_parts(total, parts):
    """Whole numbers of the sum ``total``, by largest remainder, of equal ones the later."""
    whole = [int(x) for x in parts]
    for j in sorted(range(len(parts)), key=lambda j: (parts[j] - whole[j], j), reverse=True)[: total - sum(whole)]:
        whole[j] += 1
    return whole


def raised_to(quotas, floors):
    """None below its floor; the others pay, in proportion to what they have above theirs."""
    raised = [max(q, low) for q, low in zip(quotas, floors, strict=True)]
    spare, over = [q - low for q, low in zip(raised, floors, strict=True)], sum(raised) - sum(quotas)
    paid = in_parts(over, [Fraction(over * x, max(1, sum(spare))) for x in spare])
    return [q - n for q, n in zip(raised, paid, strict=True)]


def cut_at(setting, n):
    """The segments of a prompt of ``n`` tokens as (begin, end, which instruction or None)."""
    spans = sorted((span, i) for i, span in enumerate(setting.spans))
    if setting.absorbs:
        ends = [span[0] for span, _ in spans[1:]] + [n]
        begins = [0, *ends[:-1]]
        return [(b, e, i) for b, e, (_, i) in zip(begins, ends, spans, strict=True)]
    out, last = [], 0
    for (begin, end), i in [*spans, ((n, n), None)]:
        out += [(last, begin, None)] * (last < begin) + [(begin, end, i)] * (i is not None)
        last = end
    return out


def budget_of_layer(setting, n, layer, n_layer):
    """Tokens that a layer keeps, mean over its heads."""
    kind, beta = setting.allocation
    if kind != "pyramid" or setting.kept == n:
        return min(setting.kept, n)
    last = Fraction(setting.kept) / Fraction(str(beta))
    first = min(2 * setting.kept - last, Fraction(n - setting.window))
    last = 2 * setting.kept - first
    parts = [first + (last - first) * Fraction(i, n_layer - 1) for i in range(n_layer)]
    return in_parts(n_layer * setting.kept, parts)[layer]


class Fairness:
    """Segments of a prompt, and what each is due."""

    def __init__(self, setting, n):
        self.setting, self.n = setting, n
        is_cut = setting.strength > 0 or setting.min_tokens > 0
        self.segments = cut_at(setting, n) if is_cut else [(0, n, None)]
        self.weights = [
            1.0 if i is None or setting.weights is None else setting.weights[i] for _, _, i in self.segments
        ]
        self.floors = [self.least(b, e, i, n) for b, e, i in self.segments]

    def least(self, begin, end, i, came):
        """Tokens that a segment keeps at least, of those before ``came``."""
        protected = sum(begin <= t < min(end, came) for t in self.setting.protected)
        own = 0 if i is None else max(0, min(self.setting.min_tokens, min(end, came) - begin))
        return max(protected, own)

    @property
    def judged(self):
        """What is scored apart."""
        return [(b, e) for b, e, _ in self.segments] if self.setting.strength else [(0, self.n)]

    def quotas(self, kept):
        """Of each segment, of ``kept`` tokens."""
        lengths = [e - b for b, e, _ in self.segments]
        if self.setting.is_paper:
            out = []
            for j, n in enumerate(lengths[:-1]):
                most = kept - sum(out) - sum(self.floors[j + 1 :])
                out.append(max(self.floors[j], min(kept * n // self.n, most)))
            return [*out, kept - sum(out)]
        rates = [Fraction(w) * n for w, n in zip(self.weights, lengths, strict=True)]
        return quotas_of(kept, lengths, rates, self.floors, [i is None for *_, i in self.segments])


def chosen(setting, fair, seen, kept):
    """Per head, the tokens kept of a whole prompt."""
    policy, n, n_head = setting.policy, seen.keys.shape[1], len(seen.keys)
    paper = sorted(setting.spans) if setting.is_paper and setting.strength else None
    scores = one_choice(setting, scores_of(policy, seen, fair.judged, paper)).tolist()
    protected, first = [setting.protected] * n_head, [setting.protected] * n_head
    if setting.min_tokens:
        first = [set().union(*floored(row, fair, setting.protected)) for row in scores]
    whole, is_global = [(0, n)], paper is not None and _of_whole_row(policy)
    if not setting.strength or (is_global and setting.strength == 1):
        return pick(scores, whole, shared_by_heads(setting, scores, whole, [[kept]] * n_head, first), first)
    if is_global:
        best_of_all = pick(scores, whole, shared_by_heads(setting, scores, whole, [[kept]] * n_head, first), first)
        quotas = [counted(row, fair.judged) for row in best_of_all]
    else:
        quotas = shared_by_heads(setting, scores, fair.judged, [fair.quotas(kept)] * n_head, first)
    if setting.strength < 1:
        plain = replace(setting, strength=0.0, min_tokens=0)
        counts = [counted(row, fair.judged) for row in chosen(plain, Fairness(plain, n), seen, kept)]
        quotas = blended(setting, counts, quotas, fair.floors)
    return pick(scores, fair.judged, quotas, protected)


def floored(scores, fair, protected):
    """The best of each segment of a head, as many as must be kept."""
    return [best(scores, range(b, e), n, protected) for (b, e, _), n in zip(fair.segments, fair.floors, strict=True)]


def _of_whole_row(policy):
    return _of_whole_row(policy.policy) if policy.name == "chunkkv" else policy.name == "streaming_llm"


def one_choice(setting, scores):
    return scores.mean(0, keepdim=True).expand_as(scores) if setting.shares_choice else scores


def counted(row, ranges):
    return [sum(b <= t < e for t in row) for b, e in ranges]


def blended(setting, counts, quotas, floors):
    """Quotas between what the biased policy keeps of each segment and the fair ones."""
    share, n_segment = Fraction(str(setting.strength)), len(floors)
    heads = [list(range(len(counts)))] if setting.allocation[0] == "ada" else [[h] for h in range(len(counts))]
    out = [None] * len(counts)
    for group in heads:
        c, q = ([x for h in group for x in of[h]] for of in (counts, quotas))
        mixed = in_parts(sum(q), [(1 - share) * a + share * b for a, b in zip(c, q, strict=True)])
        if setting.min_tokens:
            mixed = raised_to(mixed, floors * len(group))
        for i, h in enumerate(group):
            out[h] = mixed[i * n_segment : (i + 1) * n_segment]
    return out


def shared_by_heads(setting, scores, segments, quotas, first):
    """What each head keeps of each segment, where heads share."""
    kind, alpha = setting.allocation
    if kind != "ada":
        return quotas
    out = [list(row) for row in quotas]
    for s, (begin, end) in enumerate(segments):
        queue = []
        for head, row in enumerate(scores):
            order = sorted(range(begin, end), key=lambda t: (t not in first[head], -row[t], t))
            quota = quotas[head][s]
            part = Fraction(str(alpha))
            sure = max(min(quota, max(int(quota * part), int(part > 0))), min(len(first[head] & set(order)), quota))
            for place, t in enumerate(order):
                queue.append((place >= sure, t not in first[head], -row[t], head, t))
        queue.sort()
        n_kept = sum(row[s] for row in quotas)
        kept = queue[:n_kept]
        if 0 < n_kept < len(queue) and queue[n_kept - 1][:2] == queue[n_kept][:2]:
            note_margin(-queue[n_kept - 1][2], -queue[n_kept][2])
        for head in range(len(scores)):
            out[head][s] = sum(entry[3] == head for entry in kept)
    return out


def pick(scores, segments, quotas, first):
    """Per head, the best of each segment."""
    of_heads = zip(scores, quotas, first, strict=True)
    return [
        sorted(t for (b, e), q in zip(segments, of_head, strict=True) for t in best(row, range(b, e), q, forced))
        for row, of_head, forced in of_heads
    ]
