"""Between kvpress's presses and our policies: settings in both directions, and a press that selects fairly in kvpress's
own environment."""

import dataclasses
from collections.abc import Mapping

from ..eviction import ops
from ..eviction.allocation import UNIFORM, Ada, Allocation
from ..eviction.budget import check_budget
from ..eviction.fairness import Fair
from ..eviction.layout import read_once
from ..eviction.selection import allocation_of, keep
from ..policies import Policy, get_policy
from ..policies.expected_attention import ExpectedAttention
from ..policies.h2o import H2O
from ..policies.keydiff import KeyDiff
from ..policies.knorm import KNorm
from ..policies.kvzip import KVzip
from ..policies.snapkv import SnapKV
from ..policies.streaming_llm import StreamingLLM
from ..policies.tova import TOVA

# press -> policy, and the fields that both have
_SAME = {
    "SnapKVPress": (SnapKV, ("window_size", "kernel_size")),
    "StreamingLLMPress": (StreamingLLM, ("n_sink",)),
    "TOVAPress": (TOVA, ()),
    "KnormPress": (KNorm, ()),
    "KeyDiffPress": (KeyDiff, ()),
    "ObservedAttentionPress": (H2O, ()),
    "ExpectedAttentionPress": (
        ExpectedAttention,
        ("n_future_positions", "n_sink", "use_covariance", "use_vnorm", "epsilon"),
    ),
}
# KVzipPress asks for the repeat in words of its own and its layers share over their heads: the fields that both have,
# what its others must be, and what it has no field for.
_KVZIP = ("chunk_size", "n_sink")
_KVZIP_MUST = {"layerwise": True, "kvzip_plus_normalization": False}
_KVZIP_FIXED = {"repeat_ids": (), "part_ids": None, "answer_ids": (), "n_overlap": 8}
_KVZIP_HEADS = Ada(0)


def from_kvpress(press) -> dict:
    """The settings of a kvpress press, for :func:`kvpitfalls.wrap`.

    Parameters
    ----------
    press : kvpress press
        A SnapKVPress, StreamingLLMPress, TOVAPress, KnormPress, KeyDiffPress, ObservedAttentionPress,
        ExpectedAttentionPress, or a KVzipPress that is layerwise; kvpress itself is not needed.

    Returns
    -------
    dict
        ``policy`` and ``compression_ratio``, and of a KVzipPress ``allocation``. kvpress keeps ``int(n * (1 - ratio))``
        tokens in binary arithmetic, which may be one fewer. A KVzipPress asks for the repeat in its own words, by the
        model's tokenizer; the policy asks for it in none, unless :meth:`kvpitfalls.KVzip.for_tokenizer` makes it.

    Raises
    ------
    ValueError
        For any other press, a subclass or a wrapper, and for a field that no policy has.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class SnapKVPress:
    ...     compression_ratio: float = 0.5
    ...     window_size: int = 64
    ...     kernel_size: int = 5
    >>> from_kvpress(SnapKVPress())
    {'policy': SnapKV(window_size=64, kernel_size=5), 'compression_ratio': 0.5}
    """
    name = type(press).__name__
    if name == "KVzipPress" and dataclasses.is_dataclass(press):
        return _from_kvzip(press)
    if name not in _SAME or not dataclasses.is_dataclass(press):
        raise ValueError(
            f"the press is a {name}, which no policy here is; expected one of {', '.join([*_SAME, 'KVzipPress'])}"
        )
    policy, fields = _SAME[name]
    parameters = {f.name: getattr(press, f.name) for f in dataclasses.fields(press)}
    if unknown := sorted(set(parameters) - {"compression_ratio", *fields}):
        raise ValueError(
            f"{name} has {unknown[0]}={parameters[unknown[0]]!r}, which {policy.__name__} has not; expected "
            f"{', '.join(fields) or 'none'}"
        )
    check_budget(parameters["compression_ratio"], None)
    return {
        "policy": policy(**{field: parameters[field] for field in fields}),
        "compression_ratio": parameters["compression_ratio"],
    }


def _from_kvzip(press) -> dict:
    parameters = {f.name: getattr(press, f.name) for f in dataclasses.fields(press)}
    for name, value in parameters.items():
        if name not in ("compression_ratio", *_KVZIP) and (name not in _KVZIP_MUST or value != _KVZIP_MUST[name]):
            expected = f"{name}={_KVZIP_MUST[name]}" if name in _KVZIP_MUST else f"{', '.join(_KVZIP)} alone"
            raise ValueError(f"KVzipPress has {name}={value!r}, which KVzip has not; expected {expected}")
    check_budget(parameters["compression_ratio"], None)
    policy = KVzip(**{field: parameters[field] for field in _KVZIP if field in parameters})
    return {"policy": policy, "compression_ratio": parameters["compression_ratio"], "allocation": _KVZIP_HEADS}


def to_kvpress(policy: Policy | str, compression_ratio: float, allocation: Allocation | str | None = None):
    """The kvpress press of a policy; needs kvpress.

    Parameters
    ----------
    policy, compression_ratio, allocation
        As :func:`from_kvpress` gives them, and :func:`kvpitfalls.wrap` takes them. A KVzip must have
        ``allocation=Ada(0)`` and no request, since the press makes its own.

    Raises
    ------
    ValueError
        If kvpress has no such press, or none of these settings.
    ImportError
        If kvpress is missing.
    """
    policy = get_policy(policy)
    check_budget(compression_ratio, None)
    shared = allocation_of(policy, allocation)
    if type(policy) is KVzip:
        name, fields, must = "KVzipPress", _KVZIP, _KVZIP_MUST
        _check_kvzip(policy, shared)
    else:
        name, fields, must = *_same_press(policy, shared), {}
    return getattr(_kvpress(), name)(compression_ratio, **{field: getattr(policy, field) for field in fields}, **must)


def _kvpress():
    """The package, or one sentence."""
    try:
        import kvpress  # pyright: ignore[reportMissingImports] # an environment of its own has it
    except ModuleNotFoundError as error:
        if error.name != "kvpress":
            raise
        raise ImportError(
            "making a press needs the package kvpress; expected pip install kvpress, in an environment of its own: it "
            "needs an older transformers"
        ) from error
    return kvpress


def _same_press(policy: Policy, allocation: Allocation) -> tuple[str, tuple[str, ...]]:
    """The name of a policy's press, and the fields that both have."""
    for name, (ours, fields) in _SAME.items():
        if type(policy) is ours and allocation == UNIFORM:
            return name, fields
        if type(policy) is ours:
            raise ValueError(
                f"allocation is {allocation!r}, which {name} has not; expected none, the same for every layer and head"
            )
    raise ValueError(
        f"policy is {policy!r}, for which kvpress has no press; expected one of "
        f"{', '.join([*(p.name for p, _ in _SAME.values()), KVzip.name])}"
    )


def _check_kvzip(policy: KVzip, allocation: Allocation) -> None:
    """Raise if KVzipPress has not these settings."""
    for field, fixed in _KVZIP_FIXED.items():
        if getattr(policy, field) != fixed:
            raise ValueError(
                f"policy has {field}={getattr(policy, field)!r}, which KVzipPress has not; expected {fixed!r}: the "
                "press makes its own request"
            )
    if allocation != _KVZIP_HEADS:
        raise ValueError(
            f"allocation is {allocation!r}, which KVzipPress has not; expected {_KVZIP_HEADS!r}: heads of a layer "
            "share its budget there"
        )


def fair_press(press, spans: Mapping[str, tuple[int, int]], *, fair: bool | float | str | Fair = True, protect=None):
    """A kvpress press that keeps a fair share of each instruction; needs kvpress, and the transformers that kvpress
    needs.

    Parameters
    ----------
    press : kvpress press
        As :func:`from_kvpress` takes it.
    spans : mapping of str to (int, int)
        Names -> tokens ``[start, end)`` of the prompt, such as those of ``Prompt.spans``.
    fair, protect
        As :func:`kvpitfalls.wrap` takes them.

    Returns
    -------
    kvpress press
        For ``with press(model): ...`` and kvpress's pipeline. Scores and selection are ours, so that instructions are
        judged by their own tokens; one prompt at a time.
    """
    settings = from_kvpress(press)
    policy, chosen, protect = settings["policy"], Fair.parse(fair), read_once(protect)
    if policy.needs_rotary or policy.needs_again:
        raise ValueError(
            f"the press is a {type(press).__name__}, which needs more of the model than kvpress hands to a press; "
            "expected kvpitfalls.wrap for it"
        )
    _kvpress()
    from kvpress.presses.base_press import BasePress  # pyright: ignore[reportMissingImports] # an environment of its own has it
    from kvpress.utils import get_prerope_query_states  # pyright: ignore[reportMissingImports] # an environment of its own has it
    from transformers.models.llama.modeling_llama import rotate_half

    @dataclasses.dataclass
    class FairPress(BasePress):
        compression_ratio: float = settings["compression_ratio"]

        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            if self.compression_ratio == 0:
                return keys, values
            if keys.shape[0] != 1:
                raise ValueError(
                    f"the batch has {keys.shape[0]} prompts; expected 1, since spans are those of one prompt"
                )
            queries = None
            if policy.needs_queries:
                cos, sin = (x.unsqueeze(1) for x in kwargs["position_embeddings"])
                queries = get_prerope_query_states(module, hidden_states)
                queries = queries * cos + rotate_half(queries) * sin
            kept = keep(
                policy,
                keys,
                queries,
                compression_ratio=self.compression_ratio,
                spans=dict(spans),
                fair=chosen,
                protect=protect,
                scaling=module.scaling,
                values=values,
                layer=module.layer_idx,
                n_layer=module.config.num_hidden_layers,
            )
            return ops.gather(keys, values, kept.positions.expand(-1, keys.shape[1], -1).contiguous())

    return FairPress()
