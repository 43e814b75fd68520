"""What is done to a cache's layers: after a prompt's prefill and, where a budget is held, after every later forward."""

from .forward import AttentionCall
from .layer import KeptLayer


class Action:
    """A cache's action. This one leaves every layer as it is."""

    evicts = False  # takes rows from a prompt
    holds = False  # acts after later forwards, too
    reads_queries = False  # has use for softmax denominators that attention tells

    @property
    def acts(self) -> bool:
        """Whether it takes anything from a cache."""
        return self.evicts or self.holds

    def spans_of(self, n_row: int, n_token: int, valid) -> list:
        """The instructions of each row; raises if they do not fit the prompt. Called before any layer is touched."""
        return []

    def limit(self, n_token: int) -> int:
        """How much of a prompt of ``n_token`` real tokens a row may hold."""
        return n_token

    def waits(self, layer: KeptLayer) -> bool:
        """Whether it is not ``layer``'s turn yet, though it has seen a prompt."""
        return False

    def after_prefill(self, layer: KeptLayer, call: AttentionCall) -> None:
        """``layer`` has seen a prompt."""

    def after_step(self, layer: KeptLayer, call: AttentionCall) -> None:
        """``layer`` has seen what follows it; only of an action that ``holds``."""
