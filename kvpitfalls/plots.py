"""Figures of a sweep. The only module that imports matplotlib (extra ``plot``); nothing is shown, figures are returned."""

import importlib.util
from collections.abc import Mapping, Sequence

from .experiments.summary import GROUP

_LABELS = {
    "leak": "leak (ROUGE-L recall of the directive)",
    "refused": "refuses the attack",
    "recall": "recall (control)",
    "follow": "follows (strict, per instruction)",
}
_PROBE_LABELS = {
    "probe_refusal": "the defense's refusal, after an attack",
    "probe_leak": "the directive, after an attack",
    "probe_recall": "recall: the directive's second half",
    "probe_follow": "the full cache's answer to the task",
}
_COLORS = {"streaming_llm": "#4477aa", "snapkv": "#ee6677", "tova": "#228833", "h2o": "#aa8800", "knorm": "#aa3377"}
_LINES = {"biased": "-", "fair": "--", "paper": "--", "whitelist": ":", "whitelist_defense": "-."}


def _figure(n_row: int, n_column: int, width: float = 4.2, height: float = 3.1):
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("drawing needs the package matplotlib; expected pip install 'kvpitfalls[plot]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n_column, height * n_row + 0.6), layout="constrained")
    return figure, figure.subplots(n_row, n_column, squeeze=False)


def groups(cells: Sequence[Mapping]) -> dict[tuple, list[Mapping]]:
    """Cells by model, dataset, defense and order: one set of figures each."""
    out: dict[tuple, list[Mapping]] = {}
    for cell in cells:
        out.setdefault(tuple(cell[name] for name in GROUP), []).append(cell)
    return out


def _curves(cells: Sequence[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """(policy, mode) -> its cells by rising ratio, the full cache first."""
    full = [cell for cell in cells if cell["policy"] is None]
    named = dict.fromkeys((cell["policy"], cell["mode"]) for cell in cells if cell["policy"] is not None)
    rise = {key: [c for c in cells if (c["policy"], c["mode"]) == key] for key in named}
    return {key: [*full, *sorted(found, key=lambda c: c["compression_ratio"])] for key, found in rise.items()}


def _style(policy: str, mode: str) -> dict:
    return {"color": _COLORS.get(policy, "#555555"), "linestyle": _LINES.get(mode, (0, (3, 1, 1, 1))), "marker": "o", "markersize": 3.5}


def outcomes(cells: Sequence[Mapping]):
    """Leak, refusal, recall and following against the ratio, side by side: none means anything without the others. None without answers.

    Parameters
    ----------
    cells : list of dict
        Of one group, as :func:`kvpitfalls.experiments.summary.summarize` gives them.

    Returns
    -------
    matplotlib.figure.Figure
    """
    shown = [name for name in _LABELS if any(name in cell["metrics"] for cell in cells)]
    if not shown:
        return None
    figure, axes = _figure(1, len(shown))
    for axis, name in zip(axes[0], shown, strict=True):
        _draw_curves(axis, cells, name)
        axis.set(title=_LABELS[name], xlabel="share of the cache removed", ylim=(-0.03, 1.03))
        axis.title.set_fontsize(10)
    _legend(figure, axes[0][0])
    return figure


def probes(cells: Sequence[Mapping]):
    """Log-probability of given answers against the ratio; None if nothing was probed. Read refusal and leak together with recall."""
    shown = [name for name in _PROBE_LABELS if any(name in cell["metrics"] for cell in cells)]
    if not shown:
        return None
    figure, axes = _figure(1, len(shown))
    for axis, name in zip(axes[0], shown, strict=True):
        _draw_curves(axis, cells, name)
        axis.set(title=_PROBE_LABELS[name], xlabel="share of the cache removed", ylabel="nats per token")
        axis.title.set_fontsize(10)
    _legend(figure, axes[0][0])
    return figure


def _draw_curves(axis, cells: Sequence[Mapping], name: str) -> None:
    """A metric of every policy and mode along the ratio, in its interval."""
    for (policy, mode), curve in _curves(cells).items():
        points = [(c["compression_ratio"], c["metrics"][name]) for c in curve if c["metrics"].get(name, {}).get("mean") is not None]
        if points:
            ratios, style = [r for r, _ in points], _style(policy, mode)
            axis.plot(ratios, [m["mean"] for _, m in points], label=f"{policy}, {mode}", **style)
            low, high = ([m[edge] for _, m in points] for edge in ("low", "high"))
            axis.fill_between(ratios, low, high, color=style["color"], alpha=0.08, linewidth=0)


def kept(cells: Sequence[Mapping]):
    """Kept share of each instruction against the ratio, one panel per policy and mode; the diagonal is equal eviction."""
    curves = _curves(cells)
    figure, axes = _figure((len(curves) + 3) // 4, min(4, len(curves)), 3.2, 2.6)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, ((policy, mode), curve) in zip(axes.flat, curves.items(), strict=False):
        ratios = [cell["compression_ratio"] for cell in curve]
        axis.plot(ratios, [1 - r for r in ratios], color="#bbbbbb", linewidth=1, label="equal")
        for span, color in (("defense", "#4477aa"), ("directive", "#ee6677"), ("whitelist", "#228833")):
            points = [(c["compression_ratio"], c["kept"][span]) for c in curve if span in c["kept"]]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=span)
        title = f"{policy}, {mode}"
        axis.set(title=title, ylim=(-0.03, 1.03), xlabel="share removed", ylabel="share kept")
        axis.title.set_fontsize(min(10, 330 / len(title)))  # a panel is 3.2 inches wide
    _legend(figure, axes.flat[0])
    return figure


def joint(cells: Sequence[Mapping]):
    """Leak against following, one line per policy and mode along the ratio; None if one of the two was not measured.

    Low and right is good. Low and left is a prompt that was forgotten.
    """
    figure, axes = _figure(1, 1, 5.2, 4.2)
    axis, drawn = axes[0][0], False
    for (policy, mode), curve in _curves(cells).items():
        metrics = [
            (c["compression_ratio"], c["metrics"].get("follow", {}).get("mean"), c["metrics"].get("leak", {}).get("mean")) for c in curve
        ]
        points = [point for point in metrics if None not in point]
        if points:
            drawn = True
            axis.plot([p[1] for p in points], [p[2] for p in points], label=f"{policy}, {mode}", **_style(policy, mode))
            axis.annotate(f"{points[-1][0]:g}", points[-1][1:], fontsize=7, color=_style(policy, mode)["color"])
    axis.set(xlabel=_LABELS["follow"], ylabel=_LABELS["leak"], title="leak against following; numbers: the largest ratio")
    axis.title.set_fontsize(10)
    _legend(figure, axis)
    return figure if drawn else None


def ranks(correlations: Sequence[Mapping]):
    """Rank correlation of instruction classes with the full cache, against the ratio; None if there is nothing to rank."""
    figure, axes = _figure(1, 1, 5.2, 3.2)
    axis, drawn = axes[0][0], False
    for (policy, mode), curve in _curves(correlations).items():
        points = [(c["compression_ratio"], c["rho"]) for c in curve if c["rho"] is not None]
        if len(points) > 1:
            drawn = True
            axis.plot(*zip(*points, strict=True), label=f"{policy}, {mode}", **_style(policy, mode))
    axis.set(xlabel="share of the cache removed", ylabel="Spearman's rho", title="ranking of instruction families against the full cache")
    axis.title.set_fontsize(10)
    _legend(figure, axis)
    return figure if drawn else None


def _legend(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        n_column = max(1, min(len(labels), int(figure.get_size_inches()[0] / 2.2)))  # a label is up to 2.2 inches wide
        figure.legend(handles, labels, loc="outside lower center", ncols=n_column, fontsize=8, frameon=False)
