"""What is done to a cache's layers: after a prompt's prefill and, where a budget is held, after every later forward."""

from collections.abc import Iterable, Sequence

from ..policies import Policy
from .forward import AttentionCall
from .layer import KeptLayer


def each_once(policies: Iterable[Policy]) -> list[Policy]:
    """Equal policies once; a policy need not be hashable."""
    once: list[Policy] = []
    for policy in policies:
        if policy not in once:
            once.append(policy)
    return once


class Action:
    """A cache's action. This one leaves every layer as it is."""

    evicts = False  # takes rows from a prompt
    holds = False  # acts after later forwards, too
    shares_heads = False  # a layer's heads hold different numbers of tokens
    least_heads = 1  # that a layer must choose for
    reads_queries = False  # has use for softmax denominators that attention tells
    reads_rotary = False  # wants to know how layers turn the queries of a prompt
    reads_output = False  # wants to know what layers make of what they attended to

    @property
    def acts(self) -> bool:
        """Whether it takes anything from a cache."""
        return self.evicts or self.holds

    def spans_of(self, n_token: int, valid: Sequence[tuple[int, int]], n_layer: int) -> list:
        """The instructions of each row; raises if they do not fit the prompt. Called before any of the ``n_layer``
        layers is touched."""
        return []

    def limit(self, n_token: int) -> int:
        """How much of a prompt of ``n_token`` real tokens a row may hold, mean over layers and heads."""
        return n_token

    def limits(self, n_token: int, n_layer: int) -> Sequence[int]:
        """What :meth:`limit` says, of each layer; mean over heads."""
        return [self.limit(n_token)] * n_layer

    def waits(self, layer: KeptLayer) -> bool:
        """Whether it is not ``layer``'s turn yet, though it has seen a prompt."""
        return False

    def after_prefill(self, layer: KeptLayer, call: AttentionCall) -> None:
        """``layer`` has seen a prompt."""

    def asks(self, valid: Sequence[tuple[int, int]]) -> list[Policy]:
        """The policies that have the model read on after these prompts, before they are judged; see ``again.py``."""
        return []

    def after_turn(self, layer: KeptLayer, call: AttentionCall, policy: Policy) -> None:
        """``layer``, which still has its prompt alone, has seen what this ``policy`` had the model read, which is
        ``call.again``; the rest of ``call`` is the prompt's, without its queries."""

    def after_turns(self, layer: KeptLayer, valid: Sequence[tuple[int, int]]) -> None:
        """``layer`` has seen all of it."""

    def after_chunk(self, layer: KeptLayer, call: AttentionCall) -> None:
        """``layer`` has seen a part of a prompt, or its last one; see ``call.coming``."""

    def after_step(self, layer: KeptLayer, call: AttentionCall) -> None:
        """``layer`` has seen what follows it; only of an action that ``holds``."""
