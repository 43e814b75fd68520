"""Figures. The only module that imports matplotlib (extra ``plot``).

Nothing is shown: figures are returned, and show themselves in a notebook. Colours are told apart with any colour
vision; lines differ in style and marker too, for print. ``theme`` is "light" or "dark".
"""

import functools
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from ..eviction.fairness import fairness_name
from ..policies import policy_names
from .columns import width as columns_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

_LABELS = {
    "refused": "refuses the attack",
    "refused_task": "refuses the user's own task",
    "leaked": "recites directive or defense",
    "leak_above": "leak (ROUGE-L recall of the directive, above its floor)",
    "recall_above": "recall (control, above its floor)",
    "follow": "follows (strict, per instruction)",
}
_PROBE_LABELS = {
    "probe_refusal": "the defense's refusal, after an attack",
    "probe_leak": "the directive, after an attack",
    "probe_recall": "recall: the directive's second half",
    "probe_follow": "the full cache's answer to the task",
}
_POLICIES = ("streaming_llm", "snapkv", "tova", "h2o", "knorm")
_SPANS = ("defense", "directive", "whitelist")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h", "d", "8")
_MODES = ("biased", "random", "whitelist", "whitelist_defense", "boundary", "floor=4", "fair", "fair+whitelist")
FEW_MODES = 4  # of more, the lines of several policies could not be told apart
_MOST_BANDS = 6  # bands of more curves would be one blot
# of the modes, in their order, and two for others
_LINES = (
    "-",
    (0, (1, 2)),
    ":",
    "-.",
    (0, (3, 1, 1, 1)),
    (0, (5, 1)),
    "--",
    (0, (6, 1, 1, 1, 1, 1)),
    (0, (8, 2)),
    (0, (2, 4)),
)
# ink, paper, pale ink, the colour of "all kept", and lines that stand out at least 3 : 1 from the paper
_THEMES = {
    "light": (
        "#222222",
        "#ffffff",
        "#999999",
        "#17365c",
        ("#4477aa", "#ee6677", "#228833", "#aa8800", "#aa3377", "#0088aa"),
    ),
    "dark": (
        "#e6e6e6",
        "#15181c",
        "#8a8a8a",
        "#d3e8ff",
        ("#6fa8dc", "#ff8a98", "#57b868", "#d9b84a", "#d36ba6", "#4fc3dd"),
    ),
}


def _themed(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw with the colours of ``theme``, a keyword that every figure takes, and names as they are: neither formulas
    nor TeX."""

    @functools.wraps(draw)
    def themed(*args: P.args, **kwargs: P.kwargs) -> R:
        theme: Any = kwargs.get("theme", "light")
        if theme not in _THEMES:
            raise ValueError(f"theme is {theme!r}; expected 'light' or 'dark'")
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("drawing needs the package matplotlib; expected pip install 'kvpitfalls[plot]'")
        from matplotlib import rc_context

        ink, paper = _THEMES[theme][:2]
        inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
        as_it_is = {"text.parse_math": False, "text.usetex": False}  # dollars in a name are dollars
        colors: Any = {**dict.fromkeys(inked, ink), **as_it_is, "figure.facecolor": paper, "axes.facecolor": paper}
        with rc_context(colors):
            return draw(*args, **kwargs)

    return themed


@functools.cache
def _figure_class():
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that shows itself in a notebook, without pyplot."""

        def _repr_png_(self) -> bytes:
            out = io.BytesIO()
            self.savefig(out, format="png", dpi=110)
            return out.getvalue()

    return Picture


def save(figure, to: Path, called: Path) -> None:
    """Write a figure as SVG or PNG, by the ending of what the file is called: of the same figure the same bytes."""
    from matplotlib import rc_context

    kind = called.suffix[1:]
    undated = {"Date": None} if kind == "svg" else {}
    with rc_context({"svg.hashsalt": called.stem}):  # else the ids in it are random
        figure.savefig(to, format=kind, dpi=130, metadata=undated)


def _figure(n_row: int, n_column: int, width: float = 4.2, height: float = 3.1):
    figure = _figure_class()(figsize=(width * n_column, height * n_row + 0.6), layout="constrained")
    return figure, figure.subplots(n_row, n_column, squeeze=False)


def _panels(n: int, n_column: int, width: float, height: float):
    """A figure of n panels, so many in a row at most, and their axes; places left over are empty."""
    n_column = min(n_column, n)
    figure, axes = _figure(-(-n // n_column), n_column, width, height)
    for axis in axes.flat[n:]:
        axis.set_axis_off()
    return figure, axes.flat[:n]


def _curves(cells: Sequence[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """(policy, mode) -> its cells by rising ratio, the full cache first."""
    full = [cell for cell in cells if cell["policy"] is None]
    named = dict.fromkeys((cell["policy"], cell["mode"]) for cell in cells if cell["policy"] is not None)
    curves = {key: [c for c in cells if (c["policy"], c["mode"]) == key] for key in named}
    return {key: [*full, *sorted(curve, key=lambda c: c["compression_ratio"])] for key, curve in curves.items()}


def _styles(curves: Mapping[tuple[str, str], list], theme: str) -> dict[tuple[str, str], dict]:
    """Colours and markers say which policy, lines which mode; of many modes of a single policy, colours and markers say
    which. The same name looks the same in every figure, but for those of a user's own, which come last."""
    policies = list(dict.fromkeys([*_POLICIES, *policy_names(), *(policy for policy, _ in curves)]))
    modes = list(dict.fromkeys([*_MODES, *(mode for _, mode in curves)]))
    colors = _THEMES[theme][-1]
    by_mode = len(curves) > FEW_MODES and len({policy for policy, _ in curves}) == 1
    styles = {}
    for policy, mode in curves:
        i, line = policies.index(policy), _LINES[modes.index(mode) % len(_LINES)]
        if by_mode:
            i = modes.index(mode)
            line = "-" if i < 6 else "--"
        styles[policy, mode] = {"color": colors[i % 6], "marker": _MARKERS[i % len(_MARKERS)], "linestyle": line}
    return {setting: {**style, "markersize": 3.5} for setting, style in styles.items()}


@_themed
def outcomes(cells: Sequence[Mapping], *, theme: str = "light") -> "Figure | None":
    """What becomes of attacks, controls and tasks against the ratio, together: none means anything without the others.

    Parameters
    ----------
    cells : list of dict
        Of one group, as :func:`kvpitfalls.experiments.summary.summarize` gives them.
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure
    """
    shown = [name for name in _LABELS if any(name in cell["metrics"] for cell in cells)]
    if not shown:
        return None
    figure, axes = _panels(len(shown), 2, 4.2, 3.1)
    for axis, name in zip(axes, shown, strict=True):
        _draw_curves(axis, cells, name, theme)
        axis.set(title=_LABELS[name], xlabel="share of the cache removed", ylim=_share_limits(axis))
        axis.title.set_fontsize(10)
    _legend(figure, axes[0])
    return figure


@_themed
def probes(cells: Sequence[Mapping], *, theme: str = "light") -> "Figure | None":
    """Log-probability of given answers against the ratio; None if nothing was probed. Read refusal and leak together
    with recall."""
    shown = [name for name in _PROBE_LABELS if any(name in cell["metrics"] for cell in cells)]
    if not shown:
        return None
    figure, axes = _panels(len(shown), 2, 4.2, 3.1)
    for axis, name in zip(axes, shown, strict=True):
        _draw_curves(axis, cells, name, theme)
        axis.set(title=_PROBE_LABELS[name], xlabel="share of the cache removed", ylabel="nats per token")
        axis.title.set_fontsize(10)
    _legend(figure, axes[0])
    return figure


def _draw_curves(axis, cells: Sequence[Mapping], name: str, theme: str) -> None:
    """A metric of every policy and mode along the ratio; of up to six curves, in its interval."""
    curves = _curves(cells)
    for ((policy, mode), curve), style in zip(curves.items(), _styles(curves, theme).values(), strict=True):
        points = [
            (c["compression_ratio"], *(c["metrics"][name][edge] for edge in ("mean", "low", "high")))
            for c in curve
            if c["metrics"].get(name, {}).get("mean") is not None
        ]
        _draw_curve(axis, points, f"{policy}, {mode}", style, len(curves) <= _MOST_BANDS)


def _draw_curve(axis, points: Sequence[tuple], label: str, style: Mapping, in_interval: bool) -> None:
    """Of points (ratio, mean, low, high); no edges, no band."""
    if points:
        ratios, means, *edges = (np.array(values, float) for values in zip(*points, strict=True))
        axis.plot(ratios, means, label=label, **style)
        if in_interval:
            axis.fill_between(ratios, *edges, color=style["color"], alpha=0.08, linewidth=0)


def _share_limits(axis) -> tuple[float, float]:
    """What an axis of shares shows: 0 to 1, and what lies under 0, as a share above its floor can."""
    return min(-0.08, axis.dataLim.y0 - 0.03), 1.03


@_themed
def kept(cells: Sequence[Mapping], *, theme: str = "light") -> "Figure | None":
    """Kept share of each instruction in a sweep against the ratio, one panel per policy and mode; the straight line is
    equal eviction.

    Parameters
    ----------
    cells : list of dict
        As for :func:`outcomes`.
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no setting says what it kept, as of conversations.
    """
    panels = {}
    for setting, curve in _curves(cells).items():
        points = {
            span: [(c["compression_ratio"], c["kept"][span]) for c in curve if span in c["kept"]] for span in _SPANS
        }
        panels[", ".join(setting)] = {span: of_span for span, of_span in points.items() if of_span}
    return _retention_panels(panels, theme) if any(panels.values()) else None


@_themed
def retention(rows: Sequence[Mapping], *, theme: str = "light") -> "Figure":
    """Kept share of each instruction of one prompt against the ratio, one panel per policy and fairness; the straight
    line is the ideal.

    Parameters
    ----------
    rows : list of dict
        As ``Audit.rows``.
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> setting = {"policy": "snapkv", "fair": False}
    >>> rows = [{**setting, "span": "defense", "compression_ratio": r, "kept": k} for r, k in ((0.3, 0.5), (0.7, 0.1))]
    >>> [line.get_label() for line in retention(rows).axes[0].get_lines()]
    ['equal eviction', 'defense']
    """
    panels: dict[str, dict[str, list]] = {}
    for row in sorted(rows, key=lambda row: row["compression_ratio"]):
        of_setting = panels.setdefault(f"{row['policy']}, {fairness_name(row['fair'])}", {})
        of_setting.setdefault(row["span"], [(0.0, 1.0)]).append((row["compression_ratio"], row["kept"]))
    order = dict.fromkeys(f"{row['policy']}, {fairness_name(row['fair'])}" for row in rows)
    return _retention_panels({name: panels[name] for name in order}, theme)


def _retention_panels(panels: Mapping[str, Mapping[str, list]], theme: str):
    """One panel per name; in it one line per instruction, and the ideal."""
    figure, axes = _panels(len(panels), 4, 2.8, 2.4)
    pale, colors = _THEMES[theme][2], _THEMES[theme][-1]
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        axis.plot([0, 1], [1, 0], color=pale, linewidth=1, label="equal eviction")
        for i, (span, points) in enumerate(lines.items()):
            axis.plot(
                *zip(*points, strict=True), color=colors[i % 6], marker=_MARKERS[i % 6], markersize=3.5, label=span
            )
        axis.set(title=name, xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="share removed", ylabel="share kept")
        axis.title.set_fontsize(min(10, 290 / columns_of(name)))  # a panel is 2.8 inches wide
    _legend(figure, axes[0])
    return figure


@_themed
def token_matrix(
    shares: Any,
    names: Sequence[object],
    spans: Mapping[str, tuple[int, int]],
    *,
    ylabel: str,
    title: str = "",
    theme: str = "light",
) -> "Figure":
    """What is kept of each token (across), by layer or by head (down). Instructions are bracketed and named above.

    Parameters
    ----------
    shares : ndarray, shape (N, T)
        In [0, 1].
    names : list
        N layers or heads.
    spans : dict of str to (int, int)
        The instructions, in tokens.
    ylabel, title : str
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> figure = token_matrix(np.eye(3), [0, 1, 2], {"rule": (0, 2)}, ylabel="layer")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['rule']
    """
    shares, names = np.asarray(shares), list(names)
    n_row, n_token = shares.shape
    figure, axes = _figure(1, 1, min(14, max(6, n_token * 0.09 + 2)), min(8, n_row * 0.12 + 1.3))
    axis, (_, paper, _, strong, colors) = axes[0][0], _THEMES[theme]
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.transforms import offset_copy

    cmap = LinearSegmentedColormap.from_list("kept", [paper, colors[0], strong])
    picture = axis.imshow(shares, aspect="auto", cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    shown = sorted({round(i) for i in np.linspace(0, n_row - 1, min(n_row, 7))})
    axis.set_yticks(shown, [str(names[i]) for i in shown])
    axis.set(xlabel="token", ylabel=ylabel)
    axis.xaxis.get_major_locator().set_params(integer=True)  # there is no token 2.5
    levels = _levels(spans, n_token, figure.get_size_inches()[0])
    for i, (name, (begin, end)) in enumerate(spans.items()):
        above = offset_copy(axis.get_xaxis_transform(), figure, y=5 + 19 * levels[name], units="points")
        options = {"transform": above, "clip_on": False, "color": colors[i % 6]}
        axis.plot([begin - 0.5, end - 0.5], [1, 1], linewidth=4, solid_capstyle="butt", **options)
        axis.text(
            begin - 0.5,
            1,
            name,
            fontsize=9,
            va="bottom",
            **{**options, "transform": offset_copy(above, figure, y=3, units="points")},
        )
    axis.set_xlim(-0.5, n_token - 0.5)
    axis.set_title(title, fontsize=10, pad=12 + 19 * (max(levels.values(), default=-1) + 1))
    bar = figure.colorbar(picture, ax=axis, pad=0.01, fraction=0.03)
    bar.set_label("share kept")
    return figure


def _levels(spans: Mapping[str, tuple[int, int]], n_token: int, width: float) -> dict[str, int]:
    """Which line above the matrix an instruction's name stands on, so that names do not overlap; a letter is about .09
    inches wide."""
    taken: list[float] = []
    levels = {}
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        left = begin / n_token * (width - 1.5)
        level = next((i for i, right in enumerate(taken) if right <= left), len(taken))
        taken[level : level + 1] = [max(left + 0.09 * columns_of(name) + 0.1, end / n_token * (width - 1.5))]
        levels[name] = level
    return levels


@_themed
def joint(cells: Sequence[Mapping], *, theme: str = "light") -> "Figure | None":
    """Leak against following, one line per policy and mode along the ratio; None if one of the two was not measured.

    Low and right is good. Low and left is a prompt that was forgotten.

    Parameters
    ----------
    cells : list of dict
        As for :func:`outcomes`.
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure or None
    """
    figure, axes = _figure(1, 1, 5.2, 4.2)
    axis, drawn, curves = axes[0][0], False, _curves(cells)
    for ((policy, mode), curve), style in zip(curves.items(), _styles(curves, theme).values(), strict=True):
        metrics = [
            (c["compression_ratio"], *(c["metrics"].get(m, {}).get("mean") for m in ("follow", "leak_above")))
            for c in curve
        ]
        points = [point for point in metrics if None not in point]
        if points:
            drawn = True
            axis.plot([p[1] for p in points], [p[2] for p in points], label=f"{policy}, {mode}", **style)
            axis.scatter(*points[-1][1:], s=64, marker=style["marker"], color=style["color"])
    axis.set(
        xlabel=_LABELS["follow"],
        ylabel=_LABELS["leak_above"],
        title="leak against following; large marks: the largest ratio",
    )
    axis.set(xlim=(-0.03, 1.03), ylim=_share_limits(axis))
    axis.title.set_fontsize(10)
    _legend(figure, axis)
    return figure if drawn else None


@_themed
def ranks(correlations: Sequence[Mapping], *, theme: str = "light") -> "Figure | None":
    """Rank correlation of instruction classes with the full cache, against the ratio; of up to six curves, in its
    interval. None if there is nothing to rank.

    Parameters
    ----------
    correlations : list of dict
        As :func:`kvpitfalls.experiments.comparisons.rank_correlations` gives them.
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure or None
    """
    figure, axes = _figure(1, 1, 5.2, 3.2)
    axis, drawn, curves = axes[0][0], False, _curves(correlations)
    for ((policy, mode), curve), style in zip(curves.items(), _styles(curves, theme).values(), strict=True):
        points = [tuple(map(c.get, ("compression_ratio", "rho", "low", "high"))) for c in curve if c["rho"] is not None]
        if len(points) > 1:
            drawn = True
            _draw_curve(axis, points, f"{policy}, {mode}", style, len(curves) <= _MOST_BANDS)
    axis.set_ylim(min(0.0, axis.dataLim.y0 if drawn else 0.0) - 0.05, 1.05)
    axis.set(
        xlabel="share of the cache removed",
        ylabel="Spearman's rho",
        title="ranking of instruction families against the full cache",
    )
    axis.title.set_fontsize(10)
    _legend(figure, axis)
    return figure if drawn else None


def _legend(figure, axis) -> None:
    """Name every line below the axes. Matplotlib leaves out labels that begin with "_", so they are set afterwards."""
    lines = axis.get_lines()
    if lines:
        labels = [line.get_label() for line in lines]
        # inches: a letter is about .08 wide, the line before it and the gap .6
        widest = max(map(columns_of, labels)) * 0.08 + 0.6
        width, height = figure.get_size_inches()
        n_column = max(1, min(len(labels), int(width / widest)))
        # further lines of the legend take nothing from the axes
        figure.set_size_inches(width, height + 0.2 * (-(-len(labels) // n_column) - 1))
        places = [str(i) for i in range(len(labels))]
        legend = figure.legend(lines, places, loc="outside lower center", ncols=n_column, fontsize=9, frameon=False)
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set_text(label)
