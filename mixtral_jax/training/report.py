"""What a finished run shows: one picture of its curves, and its loss beside file compressors."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mixtral_jax.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#222222", "#9aa0a6"
BLUE, RED, GREEN = "#2166ac", "#b2182b", "#1b7837"
STYLE = {
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
}
FILE = "report.png"
MOST_LABELS = 16
"""More experts than this are drawn without a number each."""


# ---- bits per byte -------------------------------------------------------------------------------


def compression_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on this text, their headers included.

    Raises:
      ValueError: if the text is empty.
    """
    if not text:
        raise ValueError("text is empty: bits per byte need at least one byte")
    sizes = {
        "gzip -9": len(gzip.compress(text, compresslevel=9)),
        "xz -9": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def summary_lines(
    model_bits_per_byte: float, compressors: Mapping[str, float], num_bytes: int
) -> list[str]:
    """The table printed at the end of a run: the model beside compressors on the same bytes.

    Args:
      model_bits_per_byte: the last validation, in bits per byte.
      compressors: what compression_bits_per_byte gave for the bytes that were validated on.
      num_bytes: how many bytes these are.
    """
    rows = {"this model": model_bits_per_byte, **compressors}
    width = max(map(len, rows))
    lines = [f"bits per byte on the same {num_bytes:,} held-out bytes (lower is better)"]
    return lines + [f"  {name:<{width}}  {value:6.3f}" for name, value in rows.items()]


# ---- metrics.jsonl -------------------------------------------------------------------------------


def read_metrics(path: str | os.PathLike[str]) -> tuple[list[dict], list[dict]]:
    """The training lines and the validation lines of a metrics.jsonl, each in order of step.

    Where a step occurs twice (a run resumed from before it) the later line wins. A line that is
    not a JSON object with a step, such as the last one of a killed run, is left out.
    """
    training: dict[int, dict] = {}
    validation: dict[int, dict] = {}
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not isinstance(values, dict) or "step" not in values:
                continue
            if "loss" in values:
                training[values["step"]] = values
            if "validation_loss" in values:
                validation[values["step"]] = values
    return [training[s] for s in sorted(training)], [validation[s] for s in sorted(validation)]


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over a twentieth of the points, without those that are not finite.

    The window is centred; near the start, where curves are steep, it shrinks to stay so.
    """
    index, last = np.arange(len(values)), len(values) - 1
    half = np.minimum(len(values) // 40, index)
    known = np.isfinite(values)

    def window_sum(x: np.ndarray) -> np.ndarray:
        before = np.concatenate([[0.0], np.cumsum(x)])
        return before[np.minimum(index + half, last) + 1] - before[index - half]

    count, total = window_sum(known), window_sum(np.where(known, values, 0.0))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _column(lines: list[dict], key: str) -> np.ndarray:
    """One value a line; NaN where it is missing or null."""
    values = (line.get(key) for line in lines)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _table(lines: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps of the lines that have the key, and their (nested) lists stacked."""
    found = [line for line in lines if line.get(key)]
    steps = np.array([line["step"] for line in found])
    return steps, np.array([line[key] for line in found], dtype=np.float64)


# ---- the picture ---------------------------------------------------------------------------------


def draw_report(
    run_dir: str | os.PathLike[str],
    balanced_value: float,
    compressors: Mapping[str, float],
) -> pathlib.Path:
    """Draw report.png (1600 x 1100 pixels) from a run folder's metrics.jsonl.

    Args:
      run_dir: the run folder; the picture is written there.
      balanced_value: the load-balancing loss of a balanced router, which is k.
      compressors: bits per byte of file compressors on the validation bytes, drawn as lines.
    Returns:
      the path of the picture, which appears whole or not at all.
    Raises:
      ValueError: if metrics.jsonl holds no training line.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run_dir = pathlib.Path(run_dir)
    training, validation = read_metrics(run_dir / "metrics.jsonl")
    if not training:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} holds no training line to draw")
    path = run_dir / FILE
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 11), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, training, validation, balanced_value, dict(compressors))
        headline = _headline(run_dir.resolve().name, training, validation)
        figure.suptitle(headline, fontsize=19, fontweight="bold")
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="png")
    return path


def _headline(name: str, training: list[dict], validation: list[dict]) -> str:
    parts = [f"{training[-1]['step']:,} steps"]
    speed = _column(training, "tokens_per_second")
    if np.isfinite(speed).any():
        parts.append(f"{np.nanmedian(speed):,.0f} tokens/s")
    if validation and validation[-1].get("validation_bits_per_byte") is not None:
        parts.append(f"validation {validation[-1]['validation_bits_per_byte']:.3f} bits per byte")
    return f"{name}: {', '.join(parts)}"


def _draw(
    figure: Figure,
    training: list[dict],
    validation: list[dict],
    balanced_value: float,
    compressors: dict[str, float],
) -> None:
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    _draw_loss(top.add_subplot(), training, validation, compressors)
    grid = bottom.add_gridspec(1, 3)
    balance = grid[0].subgridspec(2, 1)
    _draw_balance(bottom.add_subplot(balance[0]), training, balanced_value)
    _draw_busiest(bottom.add_subplot(balance[1]), training)
    _draw_shares(bottom.add_subplot(grid[1]), training)
    _draw_last_shares(bottom.add_subplot(grid[2]), training)


def _draw_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    """The values thin and their moving average thick."""
    marker = "o" if len(steps) == 1 else ""
    axes.plot(steps, values, color=BLUE, linewidth=1, alpha=0.35)
    axes.plot(steps, smooth(values), color=BLUE, linewidth=2.5, marker=marker, label=label)


def _cut_start(
    axes: Axes, steps: np.ndarray, low: np.ndarray, high: np.ndarray, marks: list[float]
) -> None:
    """Fit the axis to the marks and all but the first fiftieth of a curve that falls from far."""
    late = steps > 0.02 * steps[-1]
    inside = np.concatenate([low[late], high[late], marks])
    inside = inside[np.isfinite(inside)]
    margin = 0.06 * np.ptp(inside) if inside.size else 0
    if margin > 0 and axes.get_ylim()[1] > inside.max() + 5 * margin:
        axes.set_ylim(inside.min() - margin, inside.max() + margin)


def _number_steps(axes: Axes, steps: np.ndarray, bins: int | str = "auto") -> None:
    """Whole numbers along the axis; one step alone stands between the two beside it."""
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(nbins=bins, integer=True)
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def _draw_loss(
    axes: Axes, training: list[dict], validation: list[dict], compressors: dict[str, float]
) -> None:
    steps, loss = _column(training, "step"), _column(training, "loss")
    _draw_curve(axes, steps, loss, "training, smoothed")
    if validation:
        _draw_validation(axes, validation, compressors)
    marks = [y for line in axes.lines[2:] for y in line.get_ydata()]
    _cut_start(axes, steps, loss, loss, marks)
    axes.set(title="Loss", xlabel="step", ylabel="nats per token")
    _number_steps(axes, steps)
    axes.legend(loc="upper right")


def _draw_validation(axes: Axes, validation: list[dict], compressors: dict[str, float]) -> None:
    """The validation curve; bits per byte, which are nats per token times a constant, at right."""
    steps, loss = _column(validation, "step"), _column(validation, "validation_loss")
    bits = _column(validation, "validation_bits_per_byte")
    marker = "o" if len(steps) <= 40 else ""
    axes.plot(steps, loss, marker=marker, color=RED, linewidth=2, label="validation")
    known = np.isfinite(loss) & np.isfinite(bits) & (loss > 0) & (bits > 0)
    if not known.any():
        return
    ratio = bits[known][-1] / loss[known][-1]
    right = axes.secondary_yaxis("right", functions=(lambda y: y * ratio, lambda y: y / ratio))
    right.set_ylabel("bits per byte")
    for number, (name, value) in enumerate(compressors.items()):
        axes.axhline(value / ratio, color=GREEN, linestyle="--", linewidth=1.5)
        axes.annotate(
            f"{name}: {value:.3f} bits per byte",
            xy=(0.42 + 0.22 * number, value / ratio),  # side by side: the lines can be close
            xycoords=("axes fraction", "data"),
            color=GREEN,
            ha="center",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
        )


def _draw_balance(axes: Axes, training: list[dict], balanced_value: float) -> None:
    steps, value = _column(training, "step"), _column(training, "load_balance")
    _draw_curve(axes, steps, value, "")
    axes.axhline(balanced_value, color=GREEN, linestyle="--", linewidth=1.5)
    _cut_start(axes, steps, value, value, [balanced_value])
    axes.set(title=f"Load-balancing loss (even: {balanced_value:g})")
    _number_steps(axes, steps, bins=5)
    axes.tick_params(labelbottom=False)


def _draw_busiest(axes: Axes, training: list[dict]) -> None:
    axes.set(title="Busiest expert (even: 1)", ylabel="load / mean")
    axes.set_xlabel("step (band: all layers, line: their mean)")
    axes.axhline(1, color=GREEN, linestyle="--", linewidth=1.5)
    steps, load = _table(training, "expert_load_max_over_mean")
    _number_steps(axes, steps, bins=5)
    if not len(steps):
        return
    low, high = load.min(axis=1), load.max(axis=1)
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.2, linewidth=0)
    marker = "o" if len(steps) == 1 else ""
    axes.plot(steps, load.mean(axis=1), color=BLUE, linewidth=2, marker=marker)
    _cut_start(axes, steps, low, high, [1.0])


def _draw_shares(axes: Axes, training: list[dict]) -> None:
    """Share of the tokens of each expert, mean of the layers, as bands stacked over time."""
    import matplotlib

    axes.set(title="Share of tokens per expert", xlabel="step", ylabel="mean of the layers")
    steps, share = _table(training, "expert_share")
    if not len(steps):
        return
    share_SE = share.mean(axis=1)
    if len(steps) == 1:
        steps, share_SE = np.array([steps[0] - 1, steps[0]]), np.repeat(share_SE, 2, axis=0)
    experts = share_SE.shape[1]
    few = experts <= MOST_LABELS
    colors, width = matplotlib.colormaps["tab10"].colors, 0.7 if few else 0
    axes.stackplot(
        steps, share_SE.T, colors=colors, edgecolor="white", linewidth=width, antialiased=few
    )
    axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(nbins=5, integer=True)
    axes.grid(visible=False)
    if few:
        middles = np.cumsum(share_SE[-1]) - share_SE[-1] / 2
        numbers = axes.secondary_yaxis("right")
        wide = np.flatnonzero(share_SE[-1] > 0.03)  # thinner bands' numbers would overlap
        numbers.set_yticks(middles[wide], labels=map(str, wide))
        numbers.tick_params(length=0)
        numbers.set_ylabel("expert")


def _draw_last_shares(axes: Axes, training: list[dict]) -> None:
    """Load of every expert of every layer in the last line, over the mean of its layer."""
    axes.set(title="Last step's load (even: 1)", xlabel="expert", ylabel="layer")
    axes.grid(visible=False)
    _, share = _table(training[-1:], "expert_share")
    if not len(share):
        return
    load_NE = share[0] * share.shape[2]
    layers, experts = load_NE.shape
    reach = max(0.5, min(1.0, math.ceil(10 * np.abs(load_NE - 1).max()) / 10))
    image = axes.imshow(load_NE, cmap="PuOr_r", vmin=1 - reach, vmax=1 + reach, aspect="auto")
    axes.figure.colorbar(image, ax=axes, extend="max" if load_NE.max() > 1 + reach else "neither")
    axes.spines[:].set_visible(False)
    if experts <= MOST_LABELS:
        axes.set_xticks(range(experts))
    if layers <= MOST_LABELS:
        axes.set_yticks(range(layers))
    if experts <= 8 and layers <= 12:
        for (layer, expert), value in np.ndenumerate(load_NE):
            color = "white" if abs(value - 1) > 0.7 * reach else INK
            axes.text(
                expert, layer, f"{value:.2f}", ha="center", va="center", color=color, fontsize=10
            )
