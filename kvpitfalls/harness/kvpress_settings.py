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
from ..policies.adakv import AdaKV
from ..policies.chunkkv import ChunkKV
from ..policies.expected_attention import ExpectedAttention
from ..policies.h2o import H2O
from ..policies.keydiff import KeyDiff
from ..policies.knorm import KNorm
from ..policies.kvzip import KVzip
from ..policies.lagkv import LagKV
from ..policies.pyramidkv import PyramidKV
from ..policies.snapkv import SnapKV
from ..policies.streaming_llm import StreamingLLM
from ..policies.tova import TOVA

# press -> policy, and the fields that both have
_SAME: dict[str, tuple[type[Policy], tuple[str, ...]]] = {
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
    "LagKVPress": (LagKV, ("n_sink", "lag_size")),
    "PyramidKVPress": (PyramidKV, ("window_size", "kernel_size", "beta")),
    "KVzipPress": (KVzip, ("chunk_size", "n_sink")),
}
# What the others of a press's fields must be.
_MUST: dict[str, dict[str, object]] = {
    "LagKVPress": {"cross_scoring": False},
    "KVzipPress": {"layerwise": True, "kvzip_plus_normalization": False},
}
# KVzipPress asks for the repeat in words of its own and its layers share over their heads: what it has no field for.
_KVZIP_FIXED = {"repeat_ids": (), "part_ids": None, "answer_ids": (), "n_overlap": 8}
_KVZIP_HEADS = Ada(0)
# Presses around another press, and their own field.
_AROUND = {"AdaKVPress": "alpha_safeguard", "ChunkKVPress": "chunk_length"}


def from_kvpress(press) -> dict:
    """The settings of a kvpress press, for :func:`kvpitfalls.wrap`.

    Parameters
    ----------
    press : kvpress press
        A SnapKVPress, StreamingLLMPress, TOVAPress, KnormPress, KeyDiffPress, ObservedAttentionPress, LagKVPress,
        PyramidKVPress, ExpectedAttentionPress, a KVzipPress that is layerwise, or an AdaKVPress or ChunkKVPress around
        one of these; kvpress itself is not needed.

    Returns
    -------
    dict
        ``policy`` and ``compression_ratio``, and of a KVzipPress and an AdaKVPress ``allocation``. kvpress keeps
        ``int(n * (1 - ratio))`` tokens in binary arithmetic, which may be one fewer, and of chunks whole ones only. A
        KVzipPress asks for the repeat in its own words, by the model's tokenizer; the policy asks for it in none,
        unless :meth:`kvpitfalls.KVzip.for_tokenizer` makes it. Prompts for which the policy is not defined are refused,
        such as short ones of LagKV and PyramidKV, where the press keeps what another one would.

    Raises
    ------
    ValueError
        For any other press or a subclass, and for a field that no policy has.

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
    if dataclasses.is_dataclass(press) and name in _AROUND:
        return _from_around(name, press)
    if not dataclasses.is_dataclass(press) or name not in _SAME:
        raise ValueError(
            f"the press is a {name}, which no policy here is; expected one of {', '.join([*_SAME, *_AROUND])}"
        )
    policy, fields = _SAME[name]
    must = _MUST.get(name, {})
    parameters = {f.name: getattr(press, f.name) for f in dataclasses.fields(press)}
    for field, value in parameters.items():
        if field not in ("compression_ratio", *fields) and (field not in must or value != must[field]):
            expected = f"{field}={must[field]}" if field in must else f"{', '.join(fields)} alone" if fields else "none"
            raise ValueError(f"{name} has {field}={value!r}, which {policy.__name__} has not; expected {expected}")
    check_budget(parameters["compression_ratio"], None)
    settings = {
        "policy": policy(**{field: parameters[field] for field in fields if field in parameters}),
        "compression_ratio": parameters["compression_ratio"],
    }
    return settings | ({"allocation": _KVZIP_HEADS} if policy is KVzip else {})


def _from_around(name: str, press) -> dict:
    """Of a press around another one."""
    if (has := [f.name for f in dataclasses.fields(press)]) != ["press", _AROUND[name]]:
        raise ValueError(f"{name} has {', '.join(has)}; expected press, {_AROUND[name]} alone")
    settings, own = from_kvpress(press.press), getattr(press, _AROUND[name])
    if "allocation" in settings or settings["policy"].allocation != "uniform":
        raise ValueError(
            f"{name} is around a {type(press.press).__name__}, which shares its budget by itself; expected a press "
            "that scores tokens"
        )
    if name == "AdaKVPress":
        return {**settings, "allocation": Ada(own)}
    return {**settings, "policy": ChunkKV(settings["policy"], own)}


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
        _check_kvzip(policy, shared)
    elif isinstance(shared, Ada) and type(policy) is not ChunkKV:
        scorer = SnapKV(policy.window_size, policy.kernel_size) if type(policy) is AdaKV else policy
        return _kvpress().AdaKVPress(to_kvpress(scorer, compression_ratio, UNIFORM), shared.alpha)
    elif type(policy) is ChunkKV and shared == UNIFORM:
        if policy.chunks == "instructions":
            raise ValueError("policy has chunks='instructions', which ChunkKVPress has not; expected a number")
        return _kvpress().ChunkKVPress(to_kvpress(policy.policy, compression_ratio), policy.chunks)
    name, fields = _same_press(policy, shared)
    must = _MUST.get(name, {})
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
        if type(policy) is ours and (ours is KVzip or allocation == allocation_of(policy, None)):
            return name, fields
        if type(policy) is ours:
            raise ValueError(f"allocation is {allocation!r}, which {name} has not; expected the policy's own")
    if type(policy) is ChunkKV:
        raise ValueError(f"allocation is {allocation!r}, which ChunkKVPress has not; expected the policy's own")
    raise ValueError(
        f"policy is {policy!r}, for which kvpress has no press; expected one of "
        f"{', '.join([*(p.name for p, _ in _SAME.values()), AdaKV.name, ChunkKV.name])}"
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
    if policy.needs_rotary or policy.needs_again or "allocation" in settings:
        raise ValueError(
            f"the press is a {type(press).__name__}, which needs more of the model than kvpress hands to a press, "
            "or has heads keep different numbers; expected kvpitfalls.wrap for it"
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
