"""Results as text tables."""

from collections.abc import Sequence

from .audits.retention import Audit
from .experiments.demo import SECRETS, Cell


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns of equal width; those in ``right`` are aligned to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row):
        return "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def share(x: float) -> str:
    """A share with two digits: 0 -> .00, 1 -> 1.0."""
    return "1.0" if x >= 0.995 else f"{x:.2f}".lstrip("0")


def audit_table(result: Audit, min_kept: float = 0.5) -> str:
    """Kept share of every instruction, one column per ratio; shares under ``min_kept`` are marked."""
    ratios = sorted({row["compression_ratio"] for row in result.rows})
    cells: dict[tuple, dict] = {}
    for row in result.rows:
        cells.setdefault((row["policy"], row["fair"], row["span"]), {})[row["compression_ratio"]] = row["kept"]
    lines, last = [], (None, None)
    for (policy, fair, span), kept in cells.items():
        shown = (policy if policy != last[0] else "", fairness(fair) if (policy, fair) != last else "")
        marked = [share(kept[r]) + ("*" if kept[r] < min_kept else " ") for r in ratios]
        lines.append([*shown, span, *marked])
        last = (policy, fair)
    header = ["policy", "eviction", "instruction", *(f"r={share(r)} " for r in ratios)]
    return table(header, lines, right=range(3, 3 + len(ratios)))


def fairness(fair) -> str:
    """How tables call a fairness setting."""
    return {False: "biased", True: "fair"}.get(fair, f"fair {fair}") if not isinstance(fair, str) else fair


def leakage_table(cells: Sequence[Cell]) -> str:
    """Shares of the 20 secrets, and the answer to the first attack."""
    rows = []
    for cell in cells:
        shares = [share(cell.leaking), share(cell.refusing), share(cell.recalling)]
        rows.append([cell.policy or "none", share(cell.compression_ratio), cell.mode, *shares, repr(cell.attacked[0])])
    noun, value = SECRETS[0]
    return table(
        ["policy", "r", "eviction", "leaks", "refuses", "recalls", f"answer to the attack ({noun} {value})"], rows, right=(1, 3, 4, 5)
    )
