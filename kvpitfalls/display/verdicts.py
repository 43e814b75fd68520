"""What an audit found, in words and as a table of text."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from ..eviction.fairness import fairness_name
from ..numbers import as_meant
from .columns import cut, one_line, share, table
from .tabular import worst_first

#: Policy, fairness, and the kept share by instruction and ratio.
KeptShares: TypeAlias = Sequence[tuple[str, bool | float | str, Mapping[str, Mapping[float, float]]]]

_NAME, _LABEL = 40, 60  # columns that the name of an instruction may take, and that of a policy


def kept_table(
    settings: KeptShares, min_kept: float = 0.5, most: int = 5, ratios: Sequence[float] | None = None
) -> str:
    """Kept share of every instruction, one column per share r removed; shares under ``min_kept`` are marked. Up to nine
    of them are at most 120 columns wide, and 100 if no policy has a long name.

    Of more than ``most`` + 1 instructions those with the least are shown, the worst first; the rest are one line, with
    the least of each ratio.
    """
    shown = audited_ratios(settings) if ratios is None else ratios
    lines = []
    for policy, fair, by_span in settings:
        lines.append([cut(one_line(f"{policy}, {fairness_name(fair)}"), _LABEL), *[""] * len(shown)])
        for span, kept in worst_first(by_span, most):
            shares = (share(kept[r]) + ("*" if kept[r] < min_kept else " ") for r in shown)
            lines.append([f"  {cut(one_line(span), _NAME - 2)}", *shares])
    return table(["r, the share removed", *(f"{share(r)} " for r in shown)], lines, right=range(1, 1 + len(shown)))


def audited_ratios(settings: KeptShares) -> list[float]:
    """All shares removed, ascending."""
    return sorted({ratio for _, _, by_span in settings for kept in by_span.values() for ratio in kept})


def verdicts(settings: KeptShares, min_kept: float | None = None) -> list[str]:
    """One sentence per policy: least and most kept share of an instruction at the audited ratio next to one half, and
    how many keep less than ``min_kept``, or less than half of what is kept of the whole prompt."""
    ratio = min(audited_ratios(settings), key=lambda r: (as_meant(abs(r - 0.5)), r))
    least = as_meant((1 - ratio) / 2) if min_kept is None else min_kept
    said: dict[str, list[str]] = {}
    for policy, fair, by_span in settings:
        kept = {span: of_span[ratio] for span, of_span in by_span.items()}
        worst, under = min(kept, key=kept.__getitem__), sum(x < least for x in kept.values())
        low, high = share(kept[worst]), share(max(kept.values()))
        about = f"{fairness_name(fair)} keeps {low}"
        about += f" (of {cut(one_line(worst), _NAME)!r}) to {high}" if low != high else ""
        about += (
            f", and less than {share(least)} of {under} in {len(kept)} instructions" if under and len(kept) > 1 else ""
        )
        said.setdefault(policy, []).append(about)
    return [f"{policy} at r={share(ratio)}: {'; '.join(parts)}." for policy, parts in said.items()]
