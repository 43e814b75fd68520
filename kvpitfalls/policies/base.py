"""What a policy is, what it is given, and how it is found by name."""

import difflib
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..eviction import ops
from ..eviction.allocation import Allocation
from ..eviction.arrays import A, Array, Int32
from ..eviction.layer_inputs import LayerInputs
from ..numbers import MOST, check_whole
from .attention_sinks import denominators_with_sinks
from .foreign import asked, check_fields, check_numbers, check_place, check_scores
from .votes import Vote, of_keys, pack, packed_rows

_FOLDER = __name__.removesuffix("base")  # what is made in it is ours


def _of_one_dtype(keys: Array, values: Array) -> tuple[Array, Array]:
    """Tensors that autocast left with two dtypes, as float32, which holds them exactly; all others as they are."""
    if isinstance(keys, np.ndarray) or isinstance(values, np.ndarray) or keys.dtype == values.dtype:
        return keys, values
    is_held = all(x.is_floating_point() and x.dtype.itemsize <= 4 for x in (keys, values))
    return (keys.float(), values.float()) if is_held else (keys, values)


class Call(NamedTuple):
    """One call of a scorer of the core, which is still to be made: for its scores, or for a press by them, in which
    nobody sees them.

    Attributes
    ----------
    inputs : Inputs
    scorer : str
    params : mapping of str to float
    votes : array of int32, shape (B, V, 10), or None
    lse : array of float32, shape (B, H*G, Q), or None
    queries : array, shape (B, H*G, Q, D), or None
    reads_values : bool
        Whether the scorer takes ``inputs.values``.

    Examples
    --------
    >>> import numpy as np
    >>> keys = np.array([[[[3.0, 4.0], [0.0, 1.0]]]], dtype=np.float32)
    >>> call = Inputs(keys, valid=[(0, 2)], segments=[[(0, 2)]], spans=[[]]).call("norm")
    >>> call.scores()
    array([[[-5., -1.]]], dtype=float32)
    >>> call.press(keys, np.array([[0, 2]], np.int32), np.array([[[1]]], np.int32), None, 1)[0]
    array([[[1]]], dtype=int32)
    """

    inputs: "Inputs"
    scorer: str
    params: Mapping[str, float]
    votes: Int32 | None = None
    lse: Array | None = None
    queries: Array | None = None
    reads_values: bool = False

    def scores(self) -> Array:
        """Float32 (B, H, T)."""
        keys, values = self.inputs.keys, self.inputs.values if self.reads_values else None
        if values is not None:
            keys, values = _of_one_dtype(keys, values)
        read: dict[str, Any] = {"queries": self.queries, "votes": self.votes, "lse": self.lse, **self.params}
        try:
            return ops.score(self.scorer, keys, values=values, valid=self.inputs.valid_array, **read)
        except ValueError:
            self._check_voters()
            raise

    def press(self, values: A, *how: Any, **shared: Any) -> tuple[A, A, A]:
        """What :func:`ops.press_checked` gives, which takes ``how`` before ``params`` and ``shared`` behind it."""
        read = self.inputs.keys, values, self.queries, self.votes, self.inputs.valid_array, self.lse
        given: Any = self.scorer, *read, *how, self.params
        try:
            return ops.press_checked(*given, **shared)
        except ValueError:
            self._check_voters()
            raise

    def _check_voters(self) -> None:
        """The core speaks of its table of votes, which whoever hands out too few queries never saw: in words of the
        inputs."""
        if self.queries is not None and self.votes is not None and len(self.queries.shape) == 4:
            self.inputs.check_voters(self.votes)


@dataclass(eq=False, kw_only=True)
class Inputs(LayerInputs):
    """What a policy scores: what one layer gives, see :class:`LayerInputs`, and where things are in each batch row.

    Attributes
    ----------
    valid : list of (int, int)
        Per row, the range of real tokens.
    segments : list of list of (int, int)
        Per row, the segments that are scored apart: one for a biased policy, one per instruction for a fair one.
    spans : list of list of (int, int)
        Per row, the instructions as given, in order of position.
    paper : bool
        Follow the authors' code to the letter (``fair="paper"``).

    Examples
    --------
    >>> import numpy as np
    >>> keys = np.array([[[[3.0, 4.0], [0.0, 1.0]]]], dtype=np.float32)
    >>> Inputs(keys, valid=[(0, 2)], segments=[[(0, 2)]], spans=[[]]).score("norm")
    array([[[-5., -1.]]], dtype=float32)
    """

    valid: Sequence[tuple[int, int]]
    segments: Sequence[Sequence[tuple[int, int]]]
    spans: Sequence[Sequence[tuple[int, int]]]
    paper: bool = False

    @classmethod
    def of(cls, layer: LayerInputs, **others: Any) -> "Inputs":
        """Of what a layer gives, and ``others``: the attributes of this class, and those of the layer that differ. Its
        fields are taken over, not checked again: they were when the layer was made, and every layer comes by."""
        known = vars(layer) | others
        if "valid_array" not in others:
            known.pop("valid_array", None)  # follows from ``valid``
        made = object.__new__(cls)
        made.__dict__ = known
        return made

    @property
    def n_token(self) -> int:
        """T, padding included."""
        return int(self.keys.shape[2])

    @cached_property
    def valid_array(self) -> npt.NDArray[np.int32] | None:
        """``valid`` as the core takes it, int32 (B, 2); None if all tokens are real."""
        return None if all(row == (0, self.n_token) for row in self.valid) else np.array(self.valid, np.int32)

    def score(self, scorer: str, **params: float) -> Array:
        """A scorer of the core that needs keys only: ``norm`` or ``position``."""
        return self.call(scorer, **params).scores()

    def call(self, scorer: str, **params: float) -> Call:
        """The call that :meth:`score` makes."""
        return Call(self, scorer, params)

    def apart(self, scorer: str) -> Call:
        """The call of a scorer of the core that judges each segment's keys by those of the segment: ``keydiff``."""
        return Call(self, scorer, {}, pack(tuple(tuple(map(of_keys, row)) for row in self.segments)))

    def attend(self, votes: Sequence[Sequence[Vote]], *, kernel_size: int = 1, share_heads: bool = False) -> Array:
        """Scores from attention, float32 (B, H, T).

        Parameters
        ----------
        votes : list of list of Vote
            Per batch row.
        kernel_size : int
            Odd; zero-padded mean over neighbouring keys of the same vote.
        share_heads : bool
            Mean over all query heads instead of each key head's own.
        """
        return self.attention(votes, kernel_size=kernel_size, share_heads=share_heads).scores()

    def attention(self, votes: Sequence[Sequence[Vote]], *, kernel_size: int = 1, share_heads: bool = False) -> Call:
        """The call that :meth:`attend` makes."""
        if self.queries is None:
            raise ValueError("queries is None; this policy scores by attention and needs the queries (B, H*G, Q, D)")
        if not isinstance(share_heads, bool):
            raise ValueError(f"share_heads is {share_heads!r}; expected True or False")
        packed = packed_rows(votes, len(self.valid))
        params = {"scaling": self.scaling, "softcap": self.softcap, "kernel_size": kernel_size}
        lse = self.lse if self.sinks is None else denominators_with_sinks(self, packed)
        return Call(self, "attention", {**params, "share_heads": int(share_heads)}, packed, lse, self.queries)

    def check_voters(self, votes: npt.NDArray[np.int32]) -> None:
        """Raise ValueError unless ``queries`` has every position that votes (B, V, 10), padding aside."""
        n_query = 0 if self.queries is None else self.queries.shape[2]
        for (low, high), of_row in zip(self.valid, votes.tolist(), strict=True):
            for begin, end, *voters, _, _, _, window_end in of_row:
                first = [max(a, low) for a, b in (voters[:2], voters[2:]) if max(a, low) < min(b, high)]
                if first and min(first) < self.n_token - n_query:
                    raise ValueError(
                        f"queries has the last {n_query} of {self.n_token} positions, but tokens [{begin}, "
                        f"{max(end, window_end)}) are judged by the query at position {min(first)}; expected all "
                        "queries from there on"
                    )


class Policy:
    """An eviction policy: a name and a way to score.

    Subclassing registers it; see the classes in this folder for examples.

    Attributes
    ----------
    name : str
        How :func:`kvpitfalls.wrap` and the command line call it.
    aliases : tuple of str
        Other names that are accepted.
    needs_queries : bool
        Whether :meth:`score` reads ``inputs.queries``.
    needs_values : bool
        Whether :meth:`score` reads ``inputs.values``.
    needs_rotary : bool
        Whether :meth:`score` reads ``inputs.rotary``; models where it cannot be told are then refused.
    needs_output : bool
        Whether :meth:`score` reads ``inputs.output``; likewise.
    needs_again : bool
        Whether the model is to read on after the prompt, as :meth:`again` says, before anything is evicted.
        :meth:`score` is then called after each such forward, with ``inputs.again`` and without the prompt's queries.
    holds : bool
        Whether its scores mean something while a budget is held (``when="decode"`` or ``"always"``), where what stands
        between two tokens may be gone; else it is refused there.
    in_chunks : bool
        Whether its scores mean something after each chunk of a prompt (``prefill_chunk_size``), of what is left of the
        chunks before; else it is refused there. By default as ``holds``.
    listed : bool
        Whether ``policy_names()`` has it; a control is not listed.
    allocation : Allocation or str
        How it shares a budget over layers and heads, if it says so itself; see :class:`kvpitfalls.Allocation`.
    recent_queries : int
        While a budget is held, or a prompt comes in chunks: how many of the newest queries
        :meth:`score` reads. They are kept for it.
    running : bool
        While a budget is held, or a prompt comes in chunks: a token's score is the attention it received from all
        queries so far, divided by their number, instead of what :meth:`score` says.
    n_sink : int
        How many of a row's first tokens ``protect="sinks"`` keeps.
    least : tuple of (str, int)
        Fields that are whole numbers, and the least that each may be: checked when one is made, unless a class has a
        ``__post_init__`` of its own that does not call this one's.

    Examples
    --------
    >>> import numpy as np
    >>> from dataclasses import dataclass, fields, is_dataclass
    >>> @dataclass(frozen=True)
    ... class Oldest(Policy):
    ...     \"\"\"Keep the oldest tokens.\"\"\"
    ...     name = "oldest"
    ...     def score(self, inputs):
    ...         return -inputs.score("position", n_sink=0)
    >>> get_policy("oldest")
    Oldest()
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    needs_queries: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = False
    needs_output: ClassVar[bool] = False
    needs_again: ClassVar[bool] = False
    holds: ClassVar[bool] = True
    listed: ClassVar[bool] = True
    allocation: ClassVar[Allocation | str] = "uniform"
    recent_queries: ClassVar[int] = 0
    running: ClassVar[bool] = False
    n_sink: int = 4
    least: ClassVar[tuple[tuple[str, int], ...]] = ()
    #: Under fair="paper": quotas per segment (True), or one choice over the whole row by scores that are fair
    #: themselves (False).
    paper_quotas: ClassVar[bool] = True
    is_ours: ClassVar[bool] = True  # this package's, in what it does
    # Whether `call`, where it is one, gives what `score` gives; so if one class defines both, or no score.
    scores_by_call: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "score" in vars(cls) or "call" in vars(cls):
            cls.scores_by_call = "call" in vars(cls)  # the call of a parent gives the parent's scores
        made_in = [getattr(method, "__module__", None) or "" for method in (cls.score, cls.call)]
        cls.is_ours = all(module.startswith(_FOLDER) for module in made_in)
        name = cls.__dict__.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise TypeError(
                f"policy {cls.__name__} has name {name!r}; expected lower-case letters, digits and underscores"
            )
        names = (name, *cls.__dict__.get("aliases", ()))  # a parent's are the parent's
        for key in names:
            other = _registry.get(_plain(key))
            if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"policy {cls.__name__} is called {key!r}, but {other.__module__}.{other.__qualname__} already is"
                )
        for key in names:
            _registry[_plain(key)] = cls

    def __post_init__(self) -> None:
        if not type(self).__module__.startswith(_FOLDER):
            check_fields(self)
        for field, least in self.least:
            check_whole(field, getattr(self, field), least)

    @property
    def in_chunks(self) -> bool:
        """See the class."""
        return self.holds

    @property
    def label(self) -> str:
        """How tables call it: its name, or its repr if a parameter is not the default."""
        changed = is_dataclass(self) and any(getattr(self, f.name) != f.default for f in fields(self))
        return repr(self) if changed else self.name

    def check(self, n_token: int, n_kept: int) -> None:
        """Raise ValueError if the policy is not defined for a row of ``n_token`` real tokens of which ``n_kept``
        (fewer) are kept; unless it says something else, where that is no more than it keeps :meth:`always`."""
        if n_kept > (n_always := self.always(n_token)):
            return
        expected = f"a budget of more than the {n_always} that it keeps unjudged"
        if n_always >= n_token:
            shortest = bisect_left(range(MOST), True, lo=n_token, key=lambda n: self.always(n) < n)
            expected = f"a prompt of at least {shortest} tokens and a larger budget"
        raise ValueError(
            f"policy {self!r} was given {n_token} tokens, of which {n_kept} are kept; expected {expected}, or smaller "
            "settings"
        )

    def check_given(self, layer: LayerInputs) -> None:
        """Raise, by name, for what it needs and the layer does not give."""
        if self.needs_queries and layer.queries is None:
            raise ValueError(
                f"queries is None; policy {self.name!r} scores by attention and needs the queries (B, H*G, Q, D)"
            )
        if self.needs_values and layer.values is None:
            raise ValueError(f"values is None; policy {self.name!r} scores by them and needs values (B, H, T, Dv)")
        if self.needs_rotary and layer.rotary is None:
            raise ValueError(
                f"rotary is None; policy {self.name!r} undoes it and needs the rotary embedding, such as "
                "kvpitfalls.Rotary()"
            )
        if self.needs_output and layer.output is None:
            raise ValueError(
                f"output is None; policy {self.name!r} weighs values by it and needs the output projection (H*G, Dv, E)"
            )
        if self.needs_again and layer.again is None:
            raise ValueError(
                f"again is None; policy {self.name!r} judges by what the model reads after the prompt and needs the "
                "queries and keys of that, one pair a forward"
            )

    def always(self, n_token: int) -> int:
        """How many of a row's ``n_token`` tokens it keeps before any that it judges."""
        return 0

    def again(self, tokens: Sequence[int]) -> list[list[int]]:
        """The ids that the model reads after a prompt of these ``tokens``: one list a forward, each right after the
        prompt. How many there are, and how long, depends on the number of tokens alone."""
        return []

    def score(self, inputs: Inputs) -> Array:
        """Scores float32 (B, H, T), higher = keep; in the array library of ``inputs.keys``, and on its device. What
        ``inputs`` has is lent, and not to be written to."""
        if (call := self.called(inputs)) is None:
            raise NotImplementedError(f"policy {type(self).__name__} defines no score(inputs)")
        return call.scores()

    def scored(self, inputs: Inputs) -> Array:
        """What :meth:`score` gives, where that is scores: what a policy of somebody else's does is looked at."""
        scores = self.score(inputs) if self.is_ours else asked(self.name, self.score, inputs)
        check_scores(self.name, scores, inputs.keys)
        if not self.is_ours:
            check_place(self.name, scores, inputs.keys)
            check_numbers(self.name, inputs, scores)
        return scores

    def called(self, inputs: Inputs) -> Call | None:
        """What :meth:`call` gives, likewise."""
        call = self.call(inputs) if self.is_ours else asked(self.name, self.call, inputs)
        if call is not None and not isinstance(call, Call):
            raise TypeError(
                f"policy {self.name!r} returned a {type(call).__name__} from call; expected a call, such as "
                "inputs.attention makes, or that scores are what score(inputs) returns"
            )
        return call

    def call(self, inputs: Inputs) -> Call | None:
        """The one call of a scorer that gives what :meth:`score` gives, for policies that are no more than that; None:
        there is more to do. Where nobody asks for the scores, a wrap scores, selects and gathers by it at once."""
        return None


#: What is taken for a policy.
AnyPolicy: TypeAlias = Policy | type[Policy] | str
_registry: dict[str, type[Policy]] = {}  # by _plain of its name and of each alias


def _plain(name: str) -> str:
    """A name as it is looked up: "Streaming-LLM", "StreamingLLM" and "streaming_llm" are one."""
    return re.sub("[-_ ]", "", name.lower())


def get_policy(policy: AnyPolicy) -> Policy:
    """A policy object from an object, a class, or a registered name.

    Parameters
    ----------
    policy : Policy, subclass of Policy, or str
        A name in upper or lower case, with or without hyphens and underscores.

    Raises
    ------
    ValueError
        For an unknown name; the nearest known ones are given.

    Examples
    --------
    >>> get_policy("snapkv")
    SnapKV(window_size=16, kernel_size=5)
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, type) and issubclass(policy, Policy):
        return policy()
    if not isinstance(policy, str):
        raise TypeError(f"policy is a {type(policy).__name__}; expected a Policy or one of {', '.join(policy_names())}")
    if (cls := _registry.get(_plain(policy))) is not None:
        return cls()
    near = difflib.get_close_matches(policy.lower(), policy_names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"expected one of {', '.join(policy_names())}"
    raise ValueError(f"policy is {policy!r}, which is not known; {hint}")


def policy_names() -> list[str]:
    """The registered names, without aliases and controls, in alphabetical order.

    Examples
    --------
    >>> policy_names()[:3]
    ['adakv', 'chunkkv', 'defensivekv']
    """
    return sorted({cls.name for cls in _registry.values() if cls.listed})
