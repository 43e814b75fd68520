"""The softmax denominators of the forward itself, so that a policy need not compute them a second time.

``scaled_dot_product_attention`` does not return them, but the operations that it is made of do; a dispatch mode sees
those.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WHOLE = "aten::scaled_dot_product_attention"  # inference mode dispatches it before it is taken apart
_RETURN_THEM = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
)


class Denominators(TorchDispatchMode):
    """Inside this context, plain causal attention of ``query`` on all its ``n_token`` keys leaves its denominators
    here.

    Parameters
    ----------
    query : tensor (B, Hq, T, D)
    scaling : float, optional
        ``D ** -0.5`` by default.

    Attributes
    ----------
    lse : tensor of float32, shape (B, Hq, T), or None
        Natural logs; None if no such attention was computed, or by an operation that returns none, or more than once.
    """

    def __init__(self, query: torch.Tensor, scaling: float | None):
        super().__init__()
        self._shape = tuple(query.shape[:3])
        self._scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        self._returned: list[torch.Tensor] = []

    @property
    def lse(self) -> torch.Tensor | None:
        return self._returned[0] if len(self._returned) == 1 else None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name()
        if name == _WHOLE:
            with self:
                return func.decompose(*args, **kwargs)
        if name not in _RETURN_THEM:
            return func(*args, **kwargs)
        arguments = _bind(func, args, kwargs)
        plain = self._is_plain(arguments)
        if plain and "compute_log_sumexp" in arguments:
            arguments["compute_log_sumexp"] = True
        out = func(**arguments)
        if plain:
            self._returned.append(out[1].reshape(self._shape))
        return out

    def _is_plain(self, arguments: dict) -> bool:
        """Whether it is the attention that policies mean: causal, of all queries on as many keys, with no bias and
        nothing dropped."""
        query, scale = arguments["query"], arguments["scale"]
        return (
            tuple(query.shape[:3]) == self._shape
            and arguments["key"].shape[2] == self._shape[2]
            and arguments["is_causal"]
            and arguments["dropout_p"] == 0
            and arguments.get("attn_bias") is None
            and arguments.get("attn_mask") is None
            and (query.shape[-1] ** -0.5 if scale is None else scale) == self._scaling
        )


def _bind(func, args, kwargs) -> dict:
    """All arguments of an operation by name; a dispatch leaves out those that have their defaults."""
    arguments = func._schema.arguments
    return (
        {a.name: a.default_value for a in arguments if a.has_default_value()}
        | {a.name: value for a, value in zip(arguments, args, strict=False)}
        | kwargs
    )
