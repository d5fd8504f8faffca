"""The plots of the report, as SVG: readable on paper and without colour vision.

The colours are those of Okabe and Ito (2008), which are distinct in every common kind of colour vision; what they
distinguish also differs in shape or line.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prmkit.evaluation.estimates import Floats
from prmkit.evaluation.metrics import ORDER
from prmkit.evaluation.predictions import Scores
from prmkit.evaluation.statistics import weighted_mean
from prmkit.evaluation.summary import Group, group_name, judges_agreement
from prmkit.judge.types import BAD_BELOW, SAME_SCORE
from prmkit.rows import STEP_TYPES

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "D", "^", "v")
_STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # otherwise dollar signs in a judge's name would start a formula
}
_FEWEST_IN_BIN = 5
_HEXBINS_A_ROW = 4


def plots(metrics: Mapping[str, Any], scores: Scores) -> list[tuple[str, str, str]]:
    """Return all plots that the scores allow.

    Returns:
        The title, caption and SVG of each plot.
    """
    made = [
        ("Judge against the judges' mean", _HEXBIN_CAPTION, _predicted_against_reference(scores)),
        ("Rank correlations", _FOREST_CAPTION, _forest(metrics["groups"])),
        ("Calibration", _CALIBRATION_CAPTION, _calibration(scores)),
        ("Distribution of scores", _DISTRIBUTION_CAPTION, _distributions(scores, metrics["held_out"]["judges"])),
        ("Error by prompt length", _LENGTH_CAPTION, _error_by_length(scores)),
    ]
    with_spread = scores.where(np.isfinite(scores.std))
    if len(with_spread):
        made.append(("Risk-coverage curve", _COVERAGE_CAPTION, _risk_coverage(with_spread)))
    clips = scores.where(np.isin(scores.evaluation_type, STEP_TYPES) & np.isfinite(scores.clip_number))
    if len(clips):
        made.append(("Score by clip number", _CLIP_CAPTION, _score_by_clip(clips)))
    return made


def _drawn(width: float, height: float, draw: Any, name: str) -> str:
    """Make a matplotlib figure, let `draw` fill it, and return its SVG element.

    Args:
        width: of all axes, in inches; labels, titles and legends outside of them are added to it.
        height: of all axes, in inches.
        draw: adds axes to a figure.
        name: distinct from those of the other plots of a page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # The salt keeps the ids of different plots on the same page distinct. Names may be in any script: text
    # is kept as text, so the browser renders glyphs that the font lacks here.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height))
        figure.subplots_adjust(left=0, bottom=0, right=1, top=1)
        draw(figure)
        written = io.StringIO()
        # Neither a layout engine nor bbox_inches="tight": each of them draws the figure once more to measure it.
        whole = figure.get_tightbbox().padded(0.08)
        figure.savefig(written, format="svg", dpi=200, bbox_inches=whole, metadata={"Date": None})
    svg = written.getvalue()
    return svg[svg.index("<svg") :]


def _types(scores: Scores) -> list[str]:
    return list(dict.fromkeys(scores.evaluation_type))


# --- predicted against reference --------------------------------------------------------------------------------------

_HEXBIN_CAPTION = (
    "Each hexagon counts scores: darker means more. On the diagonal, this judge equals the judges' mean; above "
    "it, this judge is too lenient."
)


def _predicted_against_reference(scores: Scores) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    types = _types(scores)
    # Without the lightest colours, which are invisible on paper.
    visible = ListedColormap(colormaps["viridis_r"](np.linspace(0.2, 1.0, 256)))

    columns = min(len(types), _HEXBINS_A_ROW)
    rows = -(-len(types) // columns)

    def draw(figure: Any) -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True, gridspec_kw={"wspace": 0.1, "hspace": 0.35})
        for spare in grid.flat[len(types) :]:
            spare.set_visible(False)
        for place, (axis, evaluation_type) in enumerate(zip(grid.flat, types, strict=False), start=1):
            some = scores.where(scores.evaluation_type == evaluation_type)
            cells = axis.hexbin(
                some.reference, some.predicted, gridsize=16, extent=(0, 1, 0, 1), mincnt=1, cmap=visible, linewidths=0.1
            )
            axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
            axis.set(
                xlim=(-0.04, 1.04),
                ylim=(-0.04, 1.04),
                aspect="equal",
                xlabel="judges' mean",
                title=_short(evaluation_type, 30),
            )
            label = "scores" if place % columns == 0 or place == len(types) else ""
            figure.colorbar(cells, ax=axis, shrink=0.6, label=label, ticks=MaxNLocator(4, integer=True))
        for axis in grid[:, 0]:
            axis.set_ylabel("this judge")

    return _drawn(3.2 * columns - 0.4, 3.1 * rows - 0.8, draw, "hexbin")


# --- forest -----------------------------------------------------------------------------------------------------------

_FOREST_CAPTION = (
    "Spearman correlation with the judges' mean, with 95 % interval over tasks. Diamonds: two judges with each other. "
    "Bars: the most that any prediction could reach if the judges differed only by noise. Crosses: copying a score "
    "that the prompt shows. Below the diamond, there is more to learn; at the cross, the judge may only be copying."
)


def _forest(groups: Sequence[Group]) -> str:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for row, group in enumerate(groups):
            _forest_row(axis, -row, group)
        axis.axvline(0, color=GREY, linewidth=0.8)
        axis.set_yticks([-row for row in range(len(groups))], [_short(group_name(group)) for group in groups])
        axis.set(xlabel="Spearman correlation", ylim=(-len(groups) + 0.4, 0.6))
        axis.set_xlim(min(-0.05, axis.get_xlim()[0]), 1.03)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        _legend_outside(axis)

    return _drawn(5.6, 0.6 + 0.3 * len(groups), draw, "forest")


def _forest_row(axis: Any, y: float, group: Group) -> None:
    judge = group["judge"][ORDER]
    if judge["value"] is None:
        axis.text(0.01, y, _short(judge["reason"]), va="center", color=GREY, fontsize=8)
    else:
        if judge["low"] is not None:
            axis.plot([judge["low"], judge["high"]], [y, y], color=BLUE, linewidth=2.2, solid_capstyle="butt")
        axis.plot(judge["value"], y, "o", color=BLUE, markersize=6, label="this judge")
    other, bound = judges_agreement(group), group["ceiling"]["bounds"][ORDER]["mean_judge"]["value"]
    if other and other["value"] is not None:
        axis.plot(other["value"], y, "D", color=ORANGE, fillstyle="none", markersize=6, label="two judges")
    if bound is not None:
        axis.plot([bound, bound], [y - 0.3, y + 0.3], color="black", linewidth=1.6, label="noise bound")
    copying = group["baselines"].get("copy")
    if copying and copying["copy"][ORDER]["value"] is not None:
        axis.plot(copying["copy"][ORDER]["value"], y, "x", color=GREY, markersize=6, label="copying")


def _legend_outside(axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axis.legend(unique.values(), unique.keys(), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)


# --- calibration ------------------------------------------------------------------------------------------------------

_CALIBRATION_CAPTION = (
    "Left: scores in groups of equal size by the judge's score, and the judges' mean of each group. On the "
    "line, this judge equals the judges' mean. Right, if the judge gives probabilities: the share of bad steps among "
    "those that it calls bad with this probability."
)


def _calibration(scores: Scores) -> str:
    with_probability = bool(np.isfinite(scores.below).all()) and len(scores) > 0

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2 if with_probability else 1, squeeze=False, gridspec_kw={"wspace": 0.25})[0]
        for number, evaluation_type in enumerate(_types(scores)):
            some = scores.where(scores.evaluation_type == evaluation_type)
            _binned_line(axes[0], some, some.predicted, some.reference, number, _in_legend(evaluation_type))
        axes[0].set(xlabel="this judge", ylabel="judges' mean")
        if with_probability:
            for column, limit in enumerate(BAD_BELOW):
                bad = (scores.reference < limit - SAME_SCORE).astype(np.float64)
                _binned_line(axes[1], scores, scores.below[:, column], bad, column, f"bad: below {limit}")
            axes[1].set(xlabel="probability of a bad step", ylabel="share of bad steps")
        for axis in axes:
            axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
            axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
            axis.legend(loc="upper left")

    return _drawn(6.5 if with_probability else 2.9, 2.9, draw, "calibration")


def _binned_line(axis: Any, scores: Scores, said: Floats, true: Floats, number: int, label: str) -> None:
    bins = _equal_bins(said, 10)
    axis.plot(
        [weighted_mean(said[chosen], scores.weight[chosen]) for chosen in bins],
        [weighted_mean(true[chosen], scores.weight[chosen]) for chosen in bins],
        marker=_MARKERS[number % len(_MARKERS)],
        linestyle=_LINES[number % len(_LINES)],
        color=_COLOURS[number % len(_COLOURS)],
        label=label,
    )


def _equal_bins(values: Floats, most: int) -> list[Any]:
    """Return the positions of sorted values in groups of equal size; groups with the same value are merged."""
    count = max(1, min(most, len(values) // _FEWEST_IN_BIN))
    edges = np.unique(np.quantile(values, np.linspace(0, 1, count + 1)))
    if len(edges) == 1:
        return [np.arange(len(values))]
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return [np.flatnonzero(places == place) for place in range(len(edges) - 1) if (places == place).any()]


# --- distributions ----------------------------------------------------------------------------------------------------

_DISTRIBUTION_CAPTION = (
    "How often each score is given, in steps of 0.05; dotted: the mean. The scores of a cautious judge cluster in "
    "the middle; a judge that has learned a constant shows a single peak."
)


def _distributions(scores: Scores, judges: Sequence[str]) -> str:
    rows = [
        ("this judge", scores.predicted, scores.weight, BLUE),
        ("judges' mean", scores.reference, scores.weight, ORANGE),
    ]
    for column, judge in enumerate(judges):
        alone = scores.references[:, column]
        rows.append((judge, alone[np.isfinite(alone)], scores.judge_weights[np.isfinite(alone), column], GREY))

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(rows), squeeze=False, sharex=True, sharey=True, gridspec_kw={"hspace": 0.6})[:, 0]
        for axis, (name, values, weight, colour) in zip(axes, rows, strict=True):
            share = weight / max(weight.sum(), 1e-9)
            axis.hist(values, bins=np.arange(-0.025, 1.05, 0.05), weights=share, color=colour, edgecolor="white")
            mean, deviation = _mean_and_deviation(values, weight)
            axis.axvline(mean, color="black", linewidth=1, linestyle=":")
            axis.set_title(f"{_short(name)}: mean {mean:.2f}, standard deviation {deviation:.2f}")
            axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes[-1].set(xlabel="score", xlim=(-0.03, 1.03))

    return _drawn(5.8, 1.15 * len(rows) - 0.4, draw, "distribution")


def _mean_and_deviation(values: Floats, weight: Floats) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    mean = weighted_mean(values, weight)
    return mean, weighted_mean((values - mean) ** 2, weight) ** 0.5


def _short(name: str, most: int = 50) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _in_legend(name: str) -> str:
    # matplotlib leaves a name that begins with an underscore out of the legend, so a space is put before it.
    return f" {_short(name, 30)}" if name.startswith("_") else _short(name, 30)


# --- error by length, score by clip -----------------------------------------------------------------------------------

_LENGTH_CAPTION = (
    "Each dot is a score; the line is the mean error in groups of equal size. A rising line means that long prompts "
    "are judged worse, often because they were cut."
)


def _error_by_length(scores: Scores) -> str:
    errors = np.abs(scores.predicted - scores.reference)
    bins = _equal_bins(scores.prompt_characters, 8)
    means = [
        (np.median(scores.prompt_characters[chosen]), weighted_mean(errors[chosen], scores.weight[chosen]))
        for chosen in bins
    ]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.scatter(scores.prompt_characters, errors, s=6, color=BLUE, alpha=0.25, linewidths=0, rasterized=True)
        axis.plot(*zip(*means, strict=True), color="black", marker="o", label="mean")
        axis.set(xlabel="prompt, in characters", ylabel="|this judge - judges' mean|", ylim=(-0.02, None))
        axis.legend(loc="upper right")

    return _drawn(5.8, 2.5, draw, "length")


_COVERAGE_CAPTION = (
    "Mean error when only the scores with the smallest spread are kept. The further the line is below the grey one, "
    "the better the judge's own uncertainty predicts its errors; the dotted line is the best possible."
)


def _risk_coverage(scores: Scores) -> str:
    errors = np.abs(scores.predicted - scores.reference)
    orders = {
        "by its own spread": np.argsort(scores.std, kind="stable"),
        "by the true error": np.argsort(errors),
    }
    shown = np.unique(np.linspace(min(9, len(scores) - 1), len(scores) - 1, 200).astype(int))

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for (name, order), colour, line in zip(orders.items(), (BLUE, "black"), ("-", ":"), strict=True):
            kept = np.cumsum(scores.weight[order])
            risk = np.cumsum((errors * scores.weight)[order]) / kept
            axis.plot(kept[shown] / kept[-1], risk[shown], color=colour, linestyle=line, label=name)
        mean = weighted_mean(errors, scores.weight)
        axis.axhline(mean, color=GREY, linewidth=0.8, linestyle="--", label="all scores")
        axis.set(xlabel="share of the scores that are kept", ylabel="mean |this judge - judges' mean|", ylim=(0, None))
        axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.legend(loc="lower right")

    return _drawn(5.8, 2.5, draw, "coverage")


_CLIP_CAPTION = (
    "Mean score of the first clip, the second, and so on, with n below each. Where the lines diverge, this judge "
    "treats early or late steps differently from the judges that it learned from."
)


def _score_by_clip(clips: Scores) -> str:
    numbers = np.unique(clips.clip_number)
    chosen = [clips.where(clips.clip_number == number) for number in numbers]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for name, colour, marker, line, means, errors in (
            ("judges' mean", ORANGE, "D", "--", *_means([(each.reference, each.weight) for each in chosen])),
            ("this judge", BLUE, "o", "-", *_means([(each.predicted, each.weight) for each in chosen])),
        ):
            axis.errorbar(numbers, means, errors, color=colour, marker=marker, linestyle=line, capsize=2, label=name)
        labels = [f"{number:.0f}\nn={len(each)}" for number, each in zip(numbers, chosen, strict=True)]
        every = max(1, len(numbers) // 12)
        axis.set_xticks(numbers[::every], labels[::every])
        axis.set(xlabel="clip", ylabel="mean score, ± 1.96 standard errors", ylim=(-0.03, 1.03))
        axis.legend(loc="lower right")

    return _drawn(5.8, 2.5, draw, "clip")


def _means(values: Sequence[tuple[Floats, Floats]]) -> tuple[list[float], list[float]]:
    means, errors = [], []
    for each, weight in values:
        mean, deviation = _mean_and_deviation(each, weight)
        effective = weight.sum() ** 2 / (weight**2).sum()  # the effective number of scores (Kish 1965)
        means.append(mean)
        errors.append(1.96 * deviation / (effective - 1) ** 0.5 if effective > 1 + 1e-9 else 0.0)
    return means, errors
