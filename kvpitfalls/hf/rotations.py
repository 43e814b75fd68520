"""How a model's layers turn their queries: read from the model's own code and its decoder, and tried on each layer.

The modeling file's ``apply_rotary_pos_emb`` and the decoder's ``rotary_emb`` are called, nothing is replaced. Whether a
layer really turns its queries so, its attention is asked alone, on random hidden states: with the angles of some
positions, and with none. Whether its decoder hands it these angles, the prompt's own forward shows.
"""

import inspect
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..policies.rotary import Order, Rotary, in_order, orders
from .alone import answered, arguments_for, called, copied, embedding_of, options_of, same
from .parts import registries_of
from .stand_ins import ROTARY

# Of layers that were tried: width and is_noted.
_known: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, bool]]" = weakref.WeakKeyDictionary()


class LayerRotary(Rotary):
    """How one layer turns the first ``width`` channels of each head of a prompt's queries.

    Parameters
    ----------
    function : callable
        Of (x, cos, sin): the modeling file's.
    embedding : torch.nn.Module
        A copy of the decoder's.
    options : dict
        What it is called with beside positions.
    at : LongTensor (1 or B, T)
        The prompt's positions.
    made, met : dict
        What all layers of the prompt share: see :meth:`Rotary.once`, and, by :meth:`kind`, cosines that a layer was
        handed.

    Attributes
    ----------
    width : int
        0 for a layer that turns nothing.
    is_noted : bool
        Whether it calls the function, in the modeling file's own name, with what its decoder hands it.
    """

    def __init__(self, function: Callable, embedding, options: dict, at: torch.Tensor, made: dict, met: dict):
        self.function, self.embedding, self.options, self.at, self.width = function, embedding, options, at, 0
        self.is_noted, self._made, self._met = False, made, met

    def positions(self, valid, n_token, device=None):
        """See :class:`Rotary`; as the model was given them."""
        return self.at.expand(len(valid), -1).to(device)

    def angles(self, positions, x):
        """See :class:`Rotary`; rounded as the model rounds them for an x of this type."""
        one_row = x.reshape(1, -1, x.shape[-1])[:, :1]
        return tuple(part.float().to(x.device) for part in self.asked(one_row, positions))

    def asked(self, like, positions):
        """What the embedding gives for positions (B, N) in a forward over the prompt. Some turn all tokens of a forward
        by its farthest position, be it another row's, and remember that for later ones."""
        farthest = self.at.max().to(positions.device).expand(len(positions), 1)
        embedding = copied(self.embedding)
        parts = embedding(like, torch.cat([positions, farthest], 1), **self.options)
        return tuple(part[:, :-1] for part in parts) if isinstance(parts, tuple) else parts

    def meet(self, given) -> bool:
        """Whether the angles (cos, sin) by which the layer turned the prompt's queries are the embedding's; None, if
        its decoder handed it none: it turns nothing."""
        if not self.is_noted or not self.width:
            return True
        if given is None:
            self.width = 0
            return True
        if self._met.get(self.kind()) is given[0]:
            return True
        ours = self.asked(given[0].new_zeros(1, 1, 1, device=self.at.device), self.at)
        self._met[self.kind()] = given[0]
        pairs = zip(ours, given, strict=True)
        return all(same(part.to(its.device).expand_as(its), its, its.dtype) for part, its in pairs)

    def kind(self):
        """See :class:`Rotary`."""
        return str(sorted(self.options.items()))

    def turned(self, x, cos, sin):
        """See :class:`Rotary`."""
        if not self.width:
            return x
        part = x[..., : self.width]
        return torch.cat([self.function(part, cos, sin), x[..., self.width :]], -1)

    def order(self, n_dim, n_angle):
        """See :class:`Rotary`; tried."""
        return _order(self.function, self.width, n_dim, n_angle)


@lru_cache(maxsize=64)
def _order(function: Callable, width: int, n_dim: int, n_angle: int) -> Order | None:
    """In which order halves of all channels are turned as a modeling file's function turns the first of them. What it
    gives is linear in x and in cosines and sines together, so that random ones tell."""
    draw = partial(torch.randn, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x, cos, sin = draw(1, 2, 3, n_dim), draw(1, 3, n_angle), draw(1, 3, n_angle)
    rotary = LayerRotary(function, None, {}, torch.arange(3, device="cpu")[None], {}, {})
    rotary.width = width
    turned = rotary.turned(x, cos, sin)
    # a function that is handed all channels may turn as many as there are angles
    for order in (order for n in dict.fromkeys((width, n_angle)) if n <= n_dim for order in orders(n_dim, n)):
        plain = Rotary().turned(in_order(x, order), *rotary.of_halves(cos, sin, order))
        if same(plain, in_order(turned, order), torch.float32):
            return order
    return None


def rotaries_of(
    decoder, layers: Mapping[torch.nn.Module, int], positions: torch.Tensor
) -> dict[torch.nn.Module, LayerRotary]:
    """How each of these attention modules turns the queries of a prompt at these positions (1 or B, T).

    Raises
    ------
    UnsupportedModelError
        If that cannot be told, or is not what a module does.
    """
    embedding = embedding_of(decoder)
    if embedding is None or positions.ndim != 2:
        raise _unknown(
            decoder, "has no rotary_emb" if embedding is None else f"counts positions in {len(positions)} dimensions"
        )
    rotaries: dict[torch.nn.Module, LayerRotary] = {}
    made: dict = {}
    met: dict = {}
    for module, index in layers.items():
        function = _function_of(module)
        if function is None:
            raise _unknown(
                decoder, f"has no {ROTARY} of queries, cosines and sines in the file of {type(module).__name__}"
            )
        rotary = LayerRotary(function, embedding, options_of(decoder, embedding, index), positions, made, met)
        if module not in _known:
            _known[module] = answered(decoder, index, "queries", _tried, decoder, module, index, rotary)
        rotary.width, rotary.is_noted = _known[module]
        rotaries[module] = rotary
    return rotaries


def _function_of(module) -> Callable | None:
    """The modeling file's function, as one of (x, cos, sin); some turn queries and keys by one call."""
    function: Any = next((file[ROTARY] for file in registries_of(module) if ROTARY in file), None)
    if function is None:
        return None
    function = getattr(function, "own", function)  # not what notes by which angles a layer turns
    names = list(inspect.signature(function).parameters)
    if names[:4] == ["q", "k", "cos", "sin"]:
        return _of_queries(function)
    return function if names[:3] == ["x", "cos", "sin"] else None


@lru_cache(maxsize=64)
def _of_queries(function: Callable) -> Callable:
    return lambda x, cos, sin: function(x, x, cos, sin)[0]


def _unknown(decoder, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(decoder).__name__} {reason}; the policy undoes rotary embedding and expects a model whose layers "
        "turn their queries by one"
    )


def _tried(decoder, module, index: int, rotary: LayerRotary) -> tuple[int, bool]:
    """How many channels of each head this layer turns, and whether it is noted by what angles; raises if positions move
    it in any other way."""
    arguments = arguments_for(decoder, module)
    places, device = arguments["position_ids"], arguments["hidden_states"].device
    angles = rotary.asked(arguments["hidden_states"], places)
    if not isinstance(angles, tuple) or not all(
        isinstance(part, torch.Tensor) and not part.is_complex() for part in angles
    ):
        raise _unknown(decoder, "turns its queries by something else than cosines and sines")
    angles = tuple(part.to(device) for part in angles)
    still = torch.ones_like(angles[0]), torch.zeros_like(angles[1])
    calls = ((still, places), (still, places + 7), (angles, places))
    watches = [called(module, {**arguments, "position_embeddings": by, "position_ids": at}) for by, at in calls]
    before, moved, after = (watch.query for watch in watches)
    noted, dtype = watches[-1].angles, before.dtype
    if same(before, moved, dtype) and same(before, after, dtype):
        return 0, False
    cos, sin = (part.float() for part in angles)
    for width in dict.fromkeys((before.shape[-1], cos.shape[-1])) if same(before, moved, dtype) else ():
        rotary.width = width
        if _turns(rotary, before, after, cos, sin) and same(rotary.undone(after, places), before, dtype):
            return width, noted is not None and noted[0] is angles[0]
    raise _unknown(decoder, f"turns the queries of layer {index} in another way than its {ROTARY} does")


def _turns(rotary: LayerRotary, before, after, cos, sin) -> bool:
    try:
        return same(rotary.turned(before.float(), cos, sin), after, before.dtype)
    except RuntimeError:  # the function does not take as many channels
        return False
