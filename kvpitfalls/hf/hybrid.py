"""Layers that hold keys and values and states of linear attention, too: the former are compressed, the latter go along
as they are."""

import copy
from typing import Any

from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer

from .layer import STATES, KeptLayer, mapped

_Stock: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", DynamicLayer)  # not before 5.5


class KeptHybridLayer(KeptLayer, _Stock):
    """A :class:`KeptLayer` with states of linear attention, which are written in place.

    Parameters
    ----------
    index : int
    stock : LinearAttentionAndFullAttentionLayer
        An empty one, whose place it takes.
    """

    def __init__(self, index: int, stock: Any) -> None:
        super().__init__(index)
        self.__dict__.update(vars(stock))  # as many states

    def __copy__(self) -> Any:
        twin = super().__copy__()
        for name in STATES:  # of its own: what comes to one is not to be written to the other
            setattr(twin, name, mapped(getattr(self, name), lambda x: x.clone()))
        return twin

    def take_states(self, other: KeptLayer) -> None:
        plain = vars(KeptLayer(self.index))
        self.__dict__.update({name: copy.deepcopy(x) for name, x in vars(other).items() if name not in plain})

    def _map_rows(self, rows) -> None:
        super()._map_rows(rows)
        for name in STATES:
            setattr(self, name, mapped(getattr(self, name), rows))

    @property
    def is_croppable(self) -> bool:
        """Its states forget nothing."""
        return False

    def check_crop(self, n: int) -> int:
        """None can go."""
        if drop := super().check_crop(n):
            raise ValueError(
                f"crop would drop {drop} tokens of layer {self.index}, whose linear attention cannot forget them; "
                "expected a copy of the cache from before they came"
            )
        return 0

    def reset(self) -> None:
        """Empty the layer; the next prompt is compressed again."""
        _Stock.reset(self)
        super().reset()


def n_loops(config: Any) -> int:
    """How many times a model of this config runs some of its layers in a forward (Dory)."""
    return config.n_recurrent_loops if getattr(config, "model_type", None) == "dory" else 1


def is_full_attention(layer: object) -> bool:
    """Whether it is one of transformers' layers that grow with every token, which can be compressed."""
    return type(layer) in (DynamicLayer, _Stock)


def kept_layers(config: Any) -> list[Any]:
    """As many empty layers as a model of this config fills: transformers' own, or ours where they can be compressed. A
    model that loops fills others each time, which stand behind its own."""
    stock: list[Any] = DynamicCache(config=config).layers
    if (n := n_loops(config)) > 1:
        begin, end = config.n_input_layers, config.n_input_layers + config.n_recurrent_layers
        stock = stock + [copy.deepcopy(layer) for layer in stock[begin:end] * (n - 1)]
    return [
        KeptLayer(i) if type(layer) is DynamicLayer else KeptHybridLayer(i, layer) if type(layer) is _Stock else layer
        for i, layer in enumerate(stock)
    ]
