"""Results as text tables."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..experiments.demo import SECRETS, Cell
from ..experiments.intervals import share_interval
from ..experiments.metrics import ANSWERED, METRICS, PROBES, TOGETHER, TURN, by_turn
from .columns import prompts, share, table


def leakage_table(cells: Sequence[Cell]) -> str:
    """Shares of the 20 secrets with 95 % intervals, and the answer to the first attack."""
    rows = []
    for cell in cells:
        shares = [_of_secrets(x) for x in (cell.leaking, cell.refusing, cell.recalling)]
        rows.append([cell.policy or "none", share(cell.compression_ratio), cell.mode, *shares, repr(cell.attacked[0])])
    noun, value = SECRETS[0]
    return table(
        ["policy", "r", "eviction", "leaks", "refuses", "recalls", f"answer to the attack ({noun} {value})"],
        rows,
        right=(1, 3, 4, 5),
    )


def _of_secrets(x: float) -> str:
    n = len(SECRETS)
    low, high = share_interval(np.stack([np.arange(n) < round(x * n), np.ones(n)], 1))
    return f"{share(x)} [{share(low)}, {share(high)}]"


def outcome_table(cells: Sequence[Mapping]) -> str:
    """What became of each setting's attacks, controls and tasks, with 95 % intervals; never one without the others. ""
    without answers."""
    names = [name for name in TOGETHER if any(name in cell["metrics"] for cell in cells)]
    spans = [span for span in ("defense", "directive") if any(span in cell["kept"] for cell in cells)]
    rows = []
    for cell in cells:
        metrics = [cell["metrics"].get(name) for name in names]
        totals = [prompts(filter(None, metrics)), *_totals(cell["metrics"])]
        kept = [share(cell["kept"][span]) if span in cell["kept"] else "" for span in spans]
        rows.append([*_setting(cell), *totals, *map(_mean, metrics), *kept])
    header = [*_SETTING, *_COUNTS, *names, *(f"kept:{span}" for span in spans)]
    return table(header, rows, right=range(5, len(header))) if names else ""


def _setting(cell: Mapping) -> list[str]:
    named = [str(cell[name]) for name in ("model", "defense", "order")]
    return [*named, cell["policy"] or "none", cell["mode"], share(cell["compression_ratio"])]


_SETTING = ("model", "defense", "order", "policy", "mode", "r")
_COUNTS = ("prompts", "items", "failed", "infeasible")
#: How many columns of :func:`outcome_table` and :func:`probe_table` say which setting it is; of :func:`turn_table`;
#: of :func:`compare_table`; and of :func:`following_table`, with what is counted.
N_SETTING, N_TURN_SETTING, N_COMPARED, N_FOLLOWING = 6, 8, 5, 7


def _totals(metrics: Mapping[str, Mapping]) -> list[str]:
    """Items, failed ones and infeasible ones of all kinds of answers."""
    kinds = {METRICS[name][0]: metric for name, metric in metrics.items() if METRICS[name][0] in ANSWERED}
    return [str(sum(metric[name] for metric in kinds.values())) for name in ("n_item", "n_failed", "n_infeasible")]


def compare_table(changes: Sequence[Mapping]) -> str:
    """What one card has more than another, one line a setting; as :func:`kvpitfalls.experiments.card.compare` gives
    it."""
    names = [name for name in TOGETHER if any(row["metric"] == name for row in changes)]
    lines: dict[tuple, dict[str, Mapping]] = {}
    for row in changes:
        setting = (row["defense"], row["order"], row["policy"] or "none", row["mode"], row["compression_ratio"])
        lines.setdefault(setting, {})[row["metric"]] = row
    rows = [
        [*where, share(ratio), prompts(of_setting.values()), *(_difference(of_setting.get(name)) for name in names)]
        for (*where, ratio), of_setting in lines.items()
    ]
    return table(["defense", "order", "policy", "mode", "r", "prompts", *names], rows, right=range(4, 6 + len(names)))


def _difference(row: Mapping | None) -> str:
    if row is None or row["difference"] is None:
        return "-"
    return f"{row['difference']:+z.2f} [{row['low']:+.2f},{row['high']:+.2f}]"


def probe_table(cells: Sequence[Mapping]) -> str:
    """Log-probability per token of given answers at each setting, with the number of items and of failed ones; ""
    without probes."""
    rows = []
    for cell in cells:
        metrics = [cell["metrics"].get(name) for name in PROBES]
        if any(metrics):
            first = next(filter(None, metrics))
            counts = [
                prompts(filter(None, metrics)),
                *(str(first[name]) for name in ("n_item", "n_failed", "n_infeasible")),
            ]
            means = [_mean(metric, "{:z.2f}".format) for metric in metrics]
            rows.append([*_setting(cell), *counts, *means])
    header = [*_SETTING, *_COUNTS, *(name.removeprefix("probe_") for name in PROBES)]
    return table(header, rows, right=range(5, len(header))) if rows else ""


def turn_table(cells: Sequence[Mapping]) -> str:
    """What is left after each turn of conversations, for both ways to compress them, and how much more of it there is
    once than whole; "" without conversations."""
    rows = []
    for cell in cells:
        for way, n, metrics in by_turn(cell):
            first = next(iter(metrics.values()))
            counts = [prompts(metrics.values()), *(str(first[name]) for name in ("n_item", "n_failed", "n_infeasible"))]
            written = signed_difference if way == "gain" else signed_share
            means = [_mean(metrics.get(what), written) for what in TURN]
            rows.append([*_setting(cell), way, str(n), *counts, *means])
    header = [*_SETTING, "way", "turn", *_COUNTS, *TURN]
    return table(header, rows, right=[5, *range(7, len(header))]) if rows else ""


def _mean(metric: Mapping | None, written=None) -> str:
    """A mean and its interval; "-" where nothing has a score."""
    if metric is None:
        return ""
    if metric["mean"] is None:
        return "-"
    written = written or signed_share
    bounds = "" if metric["low"] is None else f"[{written(metric['low'])},{written(metric['high'])}]"
    return written(metric["mean"]) + bounds


def signed_difference(x: float) -> str:
    """A difference with its sign: 0.25 -> +.25."""
    return f"{'-' if x <= -0.005 else '+'}{share(abs(x))}"


def signed_share(x: float) -> str:
    """As :func:`share`, of a number in [-1, 1]."""
    return "-" + share(-x) if x < -0.005 else share(max(0.0, x))


def following_table(cells: Sequence[Mapping]) -> str:
    """Accuracies of instruction following, with 95 % intervals: prompt and instruction level, single and multi, and
    each family; strict and loose."""
    setting = ("model", "defense", "order", "policy", "mode", "compression_ratio")
    settings: dict[tuple, dict[tuple, Mapping]] = {}
    for cell in cells:
        settings.setdefault(tuple(cell[name] for name in setting), {})[
            cell["group"], cell["level"], cell["name"], cell["rule"]
        ] = cell
    rows = []
    for (model, defense, order, policy, mode, ratio), of_setting in settings.items():
        for group, level, name in dict.fromkeys(key[:3] for key in of_setting):
            if level in ("prompt", "instruction") or (level == "family" and group == "all"):
                strict, loose = (of_setting[group, level, name, rule] for rule in ("strict", "loose"))
                what = name if level == "family" else f"{level}s, {group}"
                means = [_mean({**by_rule, "mean": by_rule["accuracy"]}) for by_rule in (strict, loose)]
                means += [str(strict[name]) for name in ("n", "n_prompt", "n_failed", "n_infeasible")]
                rows.append([model, defense, order, policy or "none", mode, share(ratio), what, *means])
    header = [*_SETTING, "of", "strict", "loose", "n", "prompts", "failed", "infeasible"]
    return table(header, rows, right=(5, *range(7, 13)))
