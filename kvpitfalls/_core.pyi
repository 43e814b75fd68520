from collections.abc import Sequence
from typing import Any, Literal, TypedDict

# A NumPy array, or any tensor with __dlpack__ (torch); its dtype and shape are checked by the core, csrc/kvp.h says
# how.
Array = Any

class BuildInfo(TypedDict):
    compiler: str
    openmp: bool
    abi_version: int

def score(
    scorer: str,
    keys: Array,
    values: Array | None,
    queries: Array | None,
    votes: Array | None,
    valid: Array | None,
    lse: Array | None,
    scores: Array,
    params: Sequence[float] | None,
    workspace: Array | None,
    n_worker: int,
    /,
) -> None: ...
def select(
    scores: Array,
    segments: Array,
    quotas: Array,
    protect: Array | None,
    valid: Array | None,
    positions: Array,
    counts: Array,
    workspace: Array | None,
    n_worker: int,
    /,
) -> None: ...
def gather(
    keys: Array, values: Array, positions: Array, out_keys: Array, out_values: Array, n_worker: int, /
) -> None: ...
def press(
    scorer: str,
    keys: Array,
    values: Array,
    queries: Array | None,
    votes: Array | None,
    valid: Array | None,
    lse: Array | None,
    segments: Array,
    quotas: Array,
    protect: Array | None,
    params: Sequence[float] | None,
    n_kept: int,
    n_worker: int,
    /,
) -> tuple[Array, Array, Array]: ...
def press_shared(
    scorer: str,
    keys: Array,
    values: Array,
    queries: Array | None,
    votes: Array | None,
    valid: Array | None,
    lse: Array | None,
    segments: Array,
    quotas: Array,
    floors: Array,
    shares: Array,
    params: Sequence[float] | None,
    n_worker: int,
    /,
) -> tuple[Array, Array, Array]: ...
def evict(
    scores: Array,
    keys: Array,
    values: Array,
    valid: Array | None,
    segments: Array,
    quotas: Array,
    protect: Array | None,
    floors: Array | None,
    shares: Array | None,
    n_kept: int,
    n_worker: int,
    /,
) -> tuple[Array, Array, Array]: ...
def expect(
    keys: Array,
    queries: Array,
    values: Array | None,
    cosines: Array,
    sines: Array,
    ahead_cosines: Array,
    ahead_sines: Array,
    segments: Array,
    sinks: Array | None,
    logits: Array,
    scores: Array,
    scaling: float,
    epsilon: float,
    with_spread: bool,
    workspace: Array | None,
    n_worker: int,
    /,
) -> None: ...
def expect_workspace(
    keys: Array,
    queries: Array,
    values: Array | None,
    cosines: Array,
    sines: Array,
    ahead_cosines: Array,
    ahead_sines: Array,
    segments: Array,
    sinks: Array | None,
    logits: Array,
    scores: Array,
    scaling: float,
    epsilon: float,
    with_spread: bool,
    n_worker: int,
    /,
) -> int: ...
def score_workspace(
    scorer: str,
    keys: Array,
    values: Array | None,
    queries: Array | None,
    votes: Array | None,
    valid: Array | None,
    lse: Array | None,
    scores: Array,
    params: Sequence[float] | None,
    n_worker: int,
    /,
) -> int: ...
def select_workspace(
    scores: Array,
    segments: Array,
    quotas: Array,
    protect: Array | None,
    valid: Array | None,
    positions: Array,
    counts: Array,
    n_worker: int,
    /,
) -> int: ...
def share(
    scores: Array,
    segments: Array,
    quotas: Array,
    floors: Array,
    counts: Array,
    workspace: Array | None,
    n_worker: int,
    /,
) -> None: ...
def share_workspace(
    scores: Array, segments: Array, quotas: Array, floors: Array, counts: Array, n_worker: int, /
) -> int: ...
def scorers() -> tuple[tuple[str, int, tuple[tuple[str, float], ...]], ...]: ...
def supports(scorer: str, device: Literal["cpu", "cuda"] | str, dtype: str, /) -> bool: ...
def isa() -> str: ...
def isa_set(name: str, /) -> None: ...
def isas() -> tuple[str, ...]: ...
def build_info() -> BuildInfo: ...
