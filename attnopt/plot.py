"""Figures for notebooks and papers: patterns, numbers and maps of heads, errors, and trade-offs.

Each function draws into ``ax`` or a new figure and returns the axes.  matplotlib (``pip install "attnopt[plot]"``) is
imported at the first call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnopt.errors import AttnoptError
from attnopt.patterns import parse
from attnopt.patterns.algebra import Pattern
from attnopt.render.pattern_cells import shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from attnopt.compiler.head_results import HeadProfile
    from attnopt.report.atlas import Atlas
    from attnopt.report.head_effects import HeadEffects
    from attnopt.report.report import Report

CELLS = 256  # of a side of a drawn pattern; longer sequences show shares of visible pairs


def pattern(
    shown: Pattern | str, q_len: int = 64, kv_len: int | None = None, *, head: int | None = None, ax: Axes | None = None
) -> Axes:
    """Which keys each query sees: queries run downwards, keys to the right.

    ``head``: the head to draw if the pattern is per head; by default the mean over all named heads.
    """
    ax = _axes(ax, (4.2, 4.2))
    kv_len = q_len if kv_len is None else kv_len
    drawn = parse(shown) if isinstance(shown, str) else shown
    heads = range(max(1, drawn.named_heads)) if head is None else [head]
    grid = np.mean([shares(drawn.for_head(h), q_len, kv_len, CELLS) for h in heads], axis=0)
    ax.imshow(grid, cmap="Blues", vmin=0, vmax=1, extent=(0, kv_len, q_len, 0), interpolation="nearest", aspect="equal")
    ax.set(title=str(drawn), xlabel="key", ylabel="query")
    return ax


def importance(scores: Mapping[str, Sequence[float]] | Report, *, ax: Axes | None = None) -> Axes:
    """A heat map of head importance with one row per attention; each row is divided by its maximum.

    ``scores``: the result of ``attnopt.head_importance``, or a report that contains it.  Raises AttnoptError if there
    are none.
    """
    rows = dict(scores) if isinstance(scores, Mapping) else _held(scores)
    if not rows:
        raise AttnoptError(
            "there is no head importance to plot",
            hint="use report.with_importance(attnopt.head_importance(model, data))",
        )
    grid = np.full((len(rows), max(map(len, rows.values()))), np.nan)
    for i, row in enumerate(rows.values()):
        grid[i, : len(row)] = np.asarray(row) / (max(row, default=0) or 1)
    ax = _axes(ax, (1.5 + 0.35 * grid.shape[1], 0.8 + 0.3 * len(rows)))
    image = ax.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    ax.set(xlabel="head", xticks=range(grid.shape[1]), yticks=range(len(rows)), yticklabels=_names(rows))
    ax.figure.colorbar(image, ax=ax, label="relative to the row's largest")
    return ax


def profile(found: HeadProfile, site: str | None = None, *, ax: Axes | None = None) -> Axes:
    """The curves of the heads of one site as lines, or of all sites as a heat map with one row per head.

    ``found``: the result of ``attnopt.head_profile``.  Raises AttnoptError for a site that it does not hold.
    """
    if site is not None and site not in found:
        raise AttnoptError(f"the profile has no site {site!r}", hint=f"choose one of {', '.join(map(repr, found))}")
    if site is None and len(found) > 1:
        return _heat(found, ax)
    name = next(iter(found)) if site is None else site
    ax = _axes(ax, (5.5, 3.6))
    for head, row in zip(found.heads[name], found[name].values, strict=True):
        ax.plot(found[name].at, row, label=str(head))
    ax.set(title=name or "(root)", xlabel=found[name].axis, ylabel=found.method)
    ax.legend(title="head", fontsize="small")
    return ax


def depth(scores: Mapping[str, Sequence[float]], *, ax: Axes | None = None, label: str = "mean of the heads") -> Axes:
    """Scores by depth: the mean over the heads of each site in order of execution, and the band from the least to the largest.

    ``scores``: the result of ``attnopt.head_importance``, such as the cross-modal mass.  Raises AttnoptError if there are none.
    """
    if not scores:
        raise AttnoptError("there are no scores to plot")
    rows, ax = [np.asarray(row) for row in scores.values()], _axes(ax, (5.5, 3.6))
    ax.plot(range(len(rows)), [row.mean() for row in rows], "o-", label=label)
    ax.fill_between(range(len(rows)), [row.min() for row in rows], [row.max() for row in rows], alpha=0.25)
    ax.set(xlabel="attention", xticks=range(len(rows)))
    ax.set_xticklabels(_names(scores), rotation=45, ha="right")
    ax.legend()
    return ax


def _heat(found: HeadProfile, ax: Axes | None) -> Axes:
    rows = {
        f"{site or '(root)'} {h}": row
        for site in found
        for h, row in zip(found.heads[site], found[site].values, strict=True)
    }
    longest = max((found[site].at for site in found), key=len)
    grid = np.full((len(rows), len(longest)), np.nan)
    for i, row in enumerate(rows.values()):
        grid[i, : len(row)] = row
    ax = _axes(ax, (6.0, 0.8 + 0.2 * len(rows)))
    image = ax.imshow(grid, cmap="viridis", aspect="auto", interpolation="nearest")
    ax.set(xlabel=next(iter(found.values())).axis, yticks=range(len(rows)), yticklabels=list(rows))
    ax.figure.colorbar(image, ax=ax, label=found.method)
    return ax


def atlas(found: Atlas, *, by: str | None = None, ax: Axes | None = None) -> Axes:
    """The mean maps of all heads, one row per attention, in square roots of the weights; ``by``: a statistic that colours their
    frames.  ``found``: the result of ``attnopt.atlas``.  Raises AttnoptError for a statistic that it does not hold.
    """
    if by is not None and not found.statistics.get(by):
        raise AttnoptError(
            f"the atlas has no statistic {by!r}", hint=f"it has {', '.join(map(repr, found.statistics))}"
        )
    tall = max(own.maps.shape[1] for own in found.values()) + 1
    wide = max(own.maps.shape[2] for own in found.values()) + 1
    most = max(len(own.heads) for own in found.values())
    grid = np.full((len(found) * tall - 1, most * wide - 1), np.nan)
    for i, own in enumerate(found.values()):
        for j, one in enumerate(own.maps.numpy()):
            grid[i * tall : i * tall + one.shape[0], j * wide : j * wide + one.shape[1]] = np.sqrt(np.clip(one, 0, 1))
    ax = _axes(ax, (1.5 + 0.6 * most, 0.8 + 0.6 * len(found)))
    image = ax.imshow(grid, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    ax.set(xlabel="head", xticks=[(j + 0.5) * wide - 1 for j in range(most)], xticklabels=range(most))
    ax.set(yticks=[(i + 0.5) * tall - 1 for i in range(len(found))], yticklabels=_names(found))
    if by is None:
        ax.figure.colorbar(image, ax=ax, label="square root of the attention")
    else:
        _framed(ax, found, by, (tall, wide))
    return ax


def _framed(ax: Axes, found: Atlas, by: str, size: tuple[int, int]) -> None:
    from matplotlib import colormaps, colors, patches
    from matplotlib.cm import ScalarMappable

    (tall, wide), numbers = size, found.statistics[by]
    every = [x for row in numbers.values() for x in row]
    norm, colours = colors.Normalize(min(every), max(every)), colormaps["viridis"]
    for i, site in enumerate(found):
        for j, x in enumerate(numbers.get(site, ())):
            corner, colour = (j * wide - 0.5, i * tall - 0.5), colours(norm(x))
            ax.add_patch(patches.Rectangle(corner, wide - 1, tall - 1, fill=False, lw=2, color=colour))
    ax.figure.colorbar(ScalarMappable(norm, colours), ax=ax, label=by)


def head_kinds(found: Atlas, *, ax: Axes | None = None) -> Axes:
    """All heads on the first two principal components of their maps, coloured by cluster.  ``found``: the result of
    ``attnopt.atlas``."""
    ax = _axes(ax, (5.5, 4))
    places = [place for own in found.values() for place in own.places]
    clusters = [cluster for own in found.values() for cluster in own.clusters]
    for cluster in sorted({*clusters}):
        x, y = zip(*(p for p, c in zip(places, clusters, strict=True) if c == cluster), strict=True)
        ax.scatter(x, y, s=18, label=str(cluster))
    ax.set(xlabel="first component", ylabel="second component")
    ax.legend(title="cluster", fontsize="small")
    return ax


def effects(found: HeadEffects, *, ax: Axes | None = None) -> Axes:
    """A heat map of how far each head takes the metric from one run to the other, one row per attention; white is no effect.
    ``found``: the result of ``attnopt.patch`` or ``attnopt.path_patch``.  Raises CalibrationError if both runs give the same."""
    rows, columns = found.effects, sorted({h for own in found.heads.values() for h in own})
    grid = np.full((len(rows), len(columns)), np.nan)
    for i, (site, row) in enumerate(rows.items()):
        grid[i, [columns.index(h) for h in found.heads[site]]] = row
    ax = _axes(ax, (1.5 + 0.35 * len(columns), 0.8 + 0.3 * len(rows)))
    most = float(np.nanmax(np.abs(grid))) or 1.0
    image = ax.imshow(grid, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    ax.set(xlabel="head", xticks=range(len(columns)), xticklabels=columns)
    ax.set(yticks=range(len(rows)), yticklabels=_names(rows))
    ax.figure.colorbar(image, ax=ax, label=f"effect of {found.direction}")
    return ax


def errors(report: Report, *, ax: Axes | None = None) -> Axes:
    """The error of each attention on a logarithmic scale.  Raises AttnoptError if none was measured."""
    found = {site.name: site.error for site in report.sites if site.error is not None}
    if not found:
        raise AttnoptError("the report contains no errors")
    ax = _axes(ax, (5.5, 0.8 + 0.28 * len(found)))
    ax.barh(range(len(found)), [max(error, 1e-12) for error in found.values()], color="#4878a8")
    ax.set(xscale="log", xlabel="largest relative difference", yticks=range(len(found)), yticklabels=_names(found))
    ax.invert_yaxis()
    return ax


@dataclass(frozen=True)
class Point:
    """One rewritten model: its cost and how much it changes the output; lower is better for both."""

    cost: float
    error: float
    label: str = ""


def front(points: Iterable[Point]) -> list[Point]:
    """The Pareto front: the points that no other point beats in both respects, by increasing cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.error)):
        if not best or point.error < best[-1].error:
            best.append(point)
    return best


def pareto(points: Iterable[Point], *, ax: Axes | None = None, xlabel: str = "cost", ylabel: str = "error") -> Axes:
    """All points, and the line through the Pareto front.  Raises AttnoptError if there are no points."""
    given = list(points)
    if not given:
        raise AttnoptError("there are no points to plot")
    ax = _axes(ax, (5.5, 4))
    best = front(given)
    ax.scatter([p.cost for p in given], [p.error for p in given], color="#9bb8d3", zorder=2)
    ax.plot([p.cost for p in best], [p.error for p in best], "o-", color="#2b63c7", drawstyle="steps-post", zorder=3)
    for p in given:
        ax.annotate(p.label, (p.cost, p.error), xytext=(4, 4), textcoords="offset points", fontsize="small")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise AttnoptError("plotting needs matplotlib", hint='pip install "attnopt[plot]"') from error
    made: Any = pyplot.subplots(figsize=size, layout="constrained")[1]
    axes: Axes = made
    return axes


def _held(report: Report) -> dict[str, Sequence[float]]:
    return {site.name: site.importance for site in report.sites if site.importance is not None}


def _names(rows: Mapping[str, object]) -> list[str]:
    return [name or "(root)" for name in rows]
