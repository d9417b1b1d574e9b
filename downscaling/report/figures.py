"""The figures of the report: each takes numbers already computed and returns draw(theme), see
`canvas.py`.

Nothing here reads a file or computes a score; shapes are those of `report.py`.
"""

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from downscaling.report.themes import Theme, label, page

Draw = Callable[[Theme], Figure]
BARS = 200  # of a rank histogram at most


def spectrum(
  reference: np.ndarray,
  rows: Mapping[str, np.ndarray],
  band: np.ndarray,
  held: np.ndarray,
) -> Draw:
  """E(k) on log axes over E(k)/E_ref(k) with the band of true sets.

  reference, held (mask of energy-holding shells): [k]. band: [3, k], low, median and high energy of
  true sets.
  rows: {name: [k]}.
  """
  k = np.arange(1, len(reference) + 1)
  cut = k[held].max()

  def draw(theme: Theme) -> Figure:
    figure = page(4.5)
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    top.loglog(
      k,
      reference,
      color=theme.ink,
      linewidth=3.2,
      alpha=0.35,
      label="reference",
      zorder=1,
    )
    ends = [_ratio(edge, reference) for edge in (band[0], band[2])]
    low.fill_between(
      k, *ends, color=theme.muted, alpha=0.28, linewidth=0, label="true sets, 95 %"
    )
    for name, energy in rows.items():
      top.loglog(
        k,
        np.maximum(energy, 1e-30 * reference.sum()),
        **theme.line(name),
        label=label(name),
      )
      low.loglog(k, _ratio(energy, reference), **theme.line(name))
    if cut < k[-1]:
      for axes in (top, low):
        axes.axvline(
          cut + 0.5,
          color=theme.muted,
          linewidth=0.7,
          linestyle=(0, (1, 2)),
        )
      top.annotate("← 99.9999 %\nof the energy", (cut + 0.5, reference.max() * 1.3), ha="left",
      va="top",
                   fontsize=8.5, color=theme.muted, xytext=(4, 0),
                   textcoords="offset points")  # fmt: skip
    gaps = [np.abs(np.log(_ratio(e, reference)[held])).max() for e in rows.values()]
    reach = float(
      np.clip(
        np.exp(max(gaps, default=0.0)) * 1.15,
        1.15,
        30.0,
      )
    )
    low.set_ylim(1 / reach, reach)
    ticks = [
      t
      for t in (0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 1, 1.1, 1.25, 2, 5, 10, 20)
      if 1 / reach <= t <= reach
    ]
    if reach > 2:
      ticks = [t for t in ticks if t not in (0.8, 0.9, 1.1, 1.25)]
    low.set_yticks(ticks, [f"{t:g}" for t in ticks])
    low.yaxis.set_minor_formatter(NullFormatter())
    low.yaxis.set_minor_locator(LogLocator(subs=[]))
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if t <= k[-1]]
    low.set_xticks(ticks, [str(t) for t in ticks])
    low.xaxis.set_minor_formatter(NullFormatter())
    low.set(xlabel="wavenumber k (waves a box)", ylabel="ratio to\nreference")
    top.set(ylabel="energy E(k)")
    top.legend(loc="best")
    low.legend(loc="best", ncols=2, fontsize=8.5)
    return figure

  return draw


def _ratio(energy, reference):
  tiny = 1e-30 * reference.sum()
  return np.maximum(energy, tiny) / np.maximum(reference, tiny)


def density(
  at: np.ndarray,
  reference: np.ndarray,
  rows: Mapping[str, np.ndarray],
  floor: np.ndarray,
  symbol: str,
) -> Draw:
  """One-point densities on a log axis: at [P], reference and floor [P], rows {name: [P]}."""

  def draw(theme: Theme) -> Figure:
    figure = page(3.1)
    axes = figure.subplots()
    axes.semilogy(
      at, reference, color=theme.ink, linewidth=3.2, alpha=0.35, label="reference"
    )
    axes.semilogy(
      at, floor, **theme.line("floor") | {"linewidth": 1.2}, label="floor set"
    )
    for name, value in rows.items():
      axes.semilogy(at, value, **theme.line(name), label=label(name))
    peak = (
      max(reference.max(), *(v.max() for v in rows.values()))
      if rows
      else reference.max()
    )
    least = min(v.min() for v in (reference, *rows.values()))
    axes.set(
      ylim=(max(peak * 1e-5, least / 3), peak * 2),
      xlabel=symbol,
      ylabel="density",
      xlim=(at[0], at[-1]),
    )
    axes.legend(loc="lower center")
    return figure

  return draw


def curves(
  x: np.ndarray,
  panels: list[dict],
  row: str,
  symbol: str,
  unit: str,
) -> Draw:
  """Members as lines, one panel a condition.

  x: [N] positions; panels: dicts of members [M, N], at [n] and condition [n] (or None), truth [N]
    (or None).
  """

  def draw(theme: Theme) -> Figure:
    figure = page(0.6 + 1.05 * len(panels))
    line = theme.line(row) | {"linestyle": "-"}
    for i, (axes, panel) in enumerate(
      zip(
        figure.subplots(
          len(panels),
          1,
          sharex=True,
          sharey=True,
          squeeze=False,
        )[:, 0],
        panels,
        strict=True,
      )
    ):
      for j, member in enumerate(panel["members"]):
        axes.plot(
          x,
          member,
          **line
          | {"linewidth": 1.5 if j == 0 else 0.7, "alpha": 1.0 if j == 0 else 0.4},
        )
      if panel.get("truth") is not None:
        axes.plot(
          x,
          panel["truth"],
          color=theme.ink,
          linewidth=1.1,
          linestyle=(0, (3, 1.5)),
          label="truth",
        )
      if panel.get("condition") is not None:
        axes.plot(panel["at"], panel["condition"], "o", color=theme.ink, markersize=3.2,
        markeredgecolor=theme.paper,
                  markeredgewidth=0.5, label="condition y′")  # fmt: skip
      axes.set(ylabel=symbol, xlim=(x[0], x[-1]))
      axes.yaxis.set_major_locator(MaxNLocator(3))
      if i == 0:
        axes.plot([], [], **line, label=f"member ({len(panel['members'])} drawn)")
        axes.legend(
          loc="lower left",
          bbox_to_anchor=(0, 1.0),
          ncols=3,
          borderaxespad=0.2,
          columnspacing=1.2,
        )
    axes.set_xlabel(f"x ({unit})" if unit else "x")
    return figure

  return draw


def images(
  panels: Mapping[str, np.ndarray],
  symbol: str,
  axis_labels: tuple[str, str],
  extent=None,
) -> Draw:
  """2-D arrays side by side under one shared, symmetric colour scale; at most 3 to a line.

  panels: {title: [rows, columns]}; extent: (left, right, bottom, top) of every image, or None for
    indices.
  """
  reach = max(float(np.quantile(np.abs(v), 0.995)) for v in panels.values())

  def draw(theme: Theme) -> Figure:
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    shape = np.shape(next(iter(panels.values())))
    square = shape[0] == shape[1]
    figure = page(0.75 + lines * (WIDE / columns * (1.0 if square else 1.35) + 0.15))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.ravel()[len(panels) :]:
      axes.set_visible(False)
    for i, (title, value) in enumerate(panels.items()):
      axes = grid.ravel()[i]
      shown = axes.imshow(value, cmap=theme.diverging, vmin=-reach, vmax=reach, origin="lower",
                          aspect="equal" if square else "auto", extent=extent)  # fmt: skip
      _frame(axes, theme)
      axes.set_title(title)
      axes.set_xlabel(axis_labels[0] if i // columns == lines - 1 else "")
      axes.set_ylabel(axis_labels[1] if i % columns == 0 else "")
      axes.xaxis.set_major_locator(MaxNLocator(3))
    bar = figure.colorbar(
      shown, ax=grid, orientation="horizontal", shrink=0.6, aspect=40, pad=0.02
    )
    bar.set_label(symbol)
    bar.outline.set_visible(False)
    return figure

  return draw


WIDE = 4.6  # inches left for a line of images


def _frame(axes, theme):
  for spine in axes.spines.values():
    spine.set_visible(True)
    spine.set_color(theme.grid)


def covariances(panels: Mapping[str, np.ndarray], unit: str) -> Draw:
  """Covariances [n, n] side by side: all but the last under one scale, the last (a difference)
  under its own.
  """
  names = list(panels)
  reach = max(float(np.abs(panels[n]).max()) for n in names[:-1])
  own = max(
    float(np.abs(panels[names[-1]]).max()),
    1e-30,
  )

  def draw(theme: Theme) -> Figure:
    figure = page(2.75)
    for axes, name in zip(
      figure.subplots(1, len(names), sharey=True), names, strict=True
    ):
      top = own if name == names[-1] else reach
      shown = axes.imshow(
        panels[name],
        cmap=theme.diverging,
        vmin=-top,
        vmax=top,
      )
      _frame(axes, theme)
      axes.set_title(name)
      axes.set_xlabel("point")
      axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
      axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
      bar = figure.colorbar(
        shown, ax=axes, orientation="horizontal", aspect=14, pad=0.02
      )
      tick = float(f"{0.8 * top:.1g}")
      bar.set_ticks(
        [-tick, 0, tick],
        labels=[f"{v:.1g}" for v in (-tick, 0, tick)],
      )
      bar.outline.set_visible(False)
    figure.axes[0].set_ylabel("point")
    figure.supxlabel(f"covariance ({unit})" if unit else "covariance", fontsize=9.5)
    return figure

  return draw


def convergence(
  steps: np.ndarray,
  epsilon: np.ndarray,
  errors: np.ndarray,
  threshold: float | None,
  unit: str,
) -> Draw:
  """Marginal error and the ε it was reached at, against iterations; all [checks]."""

  def draw(theme: Theme) -> Figure:
    figure = page(3.4)
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    final = epsilon == epsilon[-1]
    top.semilogy(steps, errors, color=theme.debiased, linewidth=1.0, alpha=0.5)
    top.semilogy(
      steps[~final],
      errors[~final],
      "o",
      color=theme.debiased,
      alpha=0.5,
      markersize=3,
      label="larger ε",
    )
    top.semilogy(
      steps[final],
      errors[final],
      "o",
      color=theme.debiased,
      markersize=3,
      label=f"last ε, {epsilon[-1]:.2g}",
    )
    if threshold:
      top.axhline(
        threshold,
        color=theme.raw,
        linewidth=0.9,
        linestyle=(0, (3, 2)),
        label=f"threshold, {threshold:.2g}",
      )
    low.step(steps, epsilon, where="mid", color=theme.ink, linewidth=1.2)
    low.set_yscale("log")
    low.yaxis.set_minor_formatter(NullFormatter())
    low.margins(y=0.2)
    top.margins(y=0.12)
    top.set(ylabel="L1 marginal error")
    low.set(xlabel="iteration", ylabel=f"ε\n({unit})")
    top.legend(loc="best")
    return figure

  return draw


def loss(steps: np.ndarray, values: np.ndarray) -> Draw:
  """Training loss as logged, and its running mean over a twentieth of the record."""

  def draw(theme: Theme) -> Figure:
    figure = page(2.6)
    axes = figure.subplots()
    axes.plot(
      steps, values, color=theme.debiased, alpha=0.3, linewidth=0.9, label="as logged"
    )
    width = max(len(values) // 20, 1)
    if width > 1:
      smooth = np.convolve(values, np.ones(width) / width, "valid")
      axes.plot(
        steps[width - 1 :],
        smooth,
        color=theme.debiased,
        linewidth=1.6,
        label=f"mean of {width} records",
      )
    positive = values.min() > 0
    if positive:
      axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="weighted denoising loss")
    if positive:
      axes.yaxis.set_minor_formatter(NullFormatter())
      low, high = np.log10(np.quantile(values, [0.0, 1.0]))
      ticks = [
        t
        for e in range(-6, 5)
        for m in (1, 2, 3, 5)
        if low - 0.1 <= np.log10(t := m * 10.0**e) <= high + 0.1
      ]
      axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.legend(loc="upper right")
    return figure

  return draw


def ranks(rows: Mapping[str, np.ndarray]) -> Draw:
  """Rank histograms: {name: [M + 1] shares}, each over the flat line of a perfect ensemble.

  Of a large ensemble, a bar is the mean of several ranks.
  """

  def draw(theme: Theme) -> Figure:
    figure = page(0.5 + 1.9 * len(rows))
    for axes, (name, share) in zip(
      figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True
    ):
      count = min(len(share), BARS)
      edges = np.linspace(0, len(share), count + 1).astype(int)
      width = np.diff(edges)
      axes.bar(
        edges[:-1] + (width - 1) / 2,
        np.add.reduceat(share, edges[:-1]) / width * len(share),
        width=0.86 * width,
        color=theme.line(name)["color"],
        alpha=0.8,
      )
      axes.axhline(1, color=theme.ink, linewidth=0.9)
      axes.set(
        xlabel="members below the truth",
        ylabel="frequency ×\n(members + 1)",
        title=label(name),
      )
      axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure

  return draw


def spread_error(rows: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Draw:
  """One point a condition: {name: (spread [K], error of the ensemble mean [K])}, both over the rms
  of the field.
  """

  def draw(theme: Theme) -> Figure:
    figure = page(3.3)
    axes = figure.subplots()
    every = np.concatenate([np.concatenate(pair) for pair in rows.values()])
    every = every[every > 0]
    ends = (every.min() / 1.3, every.max() * 1.3) if every.size else (1e-3, 1.0)
    axes.loglog(ends, ends, color=theme.ink, linewidth=0.9, label="spread = error")
    for name, (spread, error) in rows.items():
      axes.loglog(spread, error, "o", color=theme.line(name)["color"], alpha=0.45, markersize=3,
      markeredgewidth=0,
                  label=label(name))  # fmt: skip
    axes.set(
      xlabel="spread of the members (rms = 1)",
      ylabel="error of their mean (rms = 1)",
      xlim=ends,
      ylim=ends,
    )
    axes.legend(loc="upper left")
    return figure

  return draw


def front(
  rows: Mapping[str, tuple[float, float]],
  more: Mapping[str, str],
) -> Draw:
  """Maps by (excess displacement, distance of their statistics from the truth in floors). more:
  words behind a name.
  """

  def draw(theme: Theme) -> Figure:
    figure = page(3.3)
    axes = figure.subplots()
    axes.axhline(
      1,
      color=theme.muted,
      linewidth=0.9,
      linestyle=(0, (1, 2)),
    )
    axes.annotate(
      "floor",
      (1, 1),
      xycoords=("axes fraction", "data"),
      ha="right",
      va="bottom",
      color=theme.muted,
    )
    for name, (moved, distance) in rows.items():
      axes.plot(
        moved,
        distance,
        "o",
        color=theme.line(name)["color"],
        markersize=6,
      )
      axes.annotate(
        label(name) + more.get(name, ""),
        (moved, distance),
        xytext=(6, 5),
        textcoords="offset points",
      )
    axes.set_xscale("symlog", linthresh=1e-3, linscale=0.5)
    axes.set_yscale("log")
    axes.set_xlim(-2e-4, 2)
    axes.set_ylim(0.9, 1.6 * max(distance for _, distance in rows.values()))
    ticks = [t for t in (1, 2, 3, 5, 10, 20, 50) if t <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{t} ×" for t in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(
      xlabel="moved beyond need (share of the field's variance)",
      ylabel="error over its floor",
    )
    return figure

  return draw


def moved(
  levels: np.ndarray,
  shares: Mapping[str, np.ndarray],
  targets: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> Draw:
  """Quantiles of displacement {row: [levels]}; beside them, if any, of effective targets {row:
  (levels, values)}.
  """

  def draw(theme: Theme) -> Figure:
    figure = page(2.9)
    axes = figure.subplots(1, 2 if targets else 1, squeeze=False)[0]
    for name, values in shares.items():
      axes[0].plot(
        levels,
        values,
        **theme.line(name),
        label=label(name),
      )
    axes[0].set(
      xlabel="quantile of fields", ylabel="moved, over its size", ylim=(0, None)
    )
    axes[0].legend(loc="upper left")
    for name, (at, values) in targets.items():
      axes[1].semilogy(
        at, values, **theme.line(name), marker="o", markersize=3, label=label(name)
      )
    if targets:
      axes[1].set(xlabel="quantile of fields", ylabel="effective targets")
      axes[1].yaxis.set_major_formatter("{x:g}")
      axes[1].yaxis.set_minor_formatter("{x:g}")
      axes[1].legend(loc="upper left")
    return figure

  return draw


def transfer(
  reference: np.ndarray, rows: Mapping[str, np.ndarray], band: np.ndarray, symbol: str
) -> Draw:
  """What the quadratic term moves into each shell: reference [k], rows {name: [k]}, band [3, k] of
  true sets.
  """
  k = np.arange(1, len(reference) + 1)

  def draw(theme: Theme) -> Figure:
    figure = page(3.3)
    axes = figure.subplots()
    axes.axhline(0, color=theme.muted, linewidth=0.7)
    axes.fill_between(
      k,
      band[0],
      band[2],
      color=theme.muted,
      alpha=0.28,
      linewidth=0,
      label="true sets, 95 %",
    )
    axes.plot(
      k, reference, color=theme.ink, linewidth=3.2, alpha=0.35, label="reference"
    )
    for name, values in rows.items():
      axes.plot(k, values, **theme.line(name), label=label(name))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
      xlabel="wavenumber k (waves a box)", ylabel=f"transfer of {symbol}² into k"
    )
    axes.legend(loc="best")
    return figure

  return draw


_NEAREST = {"reference": "nearest true field"}


def beside(
  at: np.ndarray, panels: Mapping[str, Mapping[str, np.ndarray]], symbol: str, unit: str
) -> Draw:
  """Lines below each other: {title: {row: field [n]}}, e.g. y, T y and the true field nearest to
  it.
  """

  def draw(theme: Theme) -> Figure:
    figure = page(1.7 * len(panels) + 0.6)
    every = figure.subplots(
      len(panels),
      1,
      sharex=True,
      sharey=True,
      squeeze=False,
    )[:, 0]
    for axes, (title, rows) in zip(every, panels.items(), strict=True):
      for name, field in rows.items():
        axes.plot(
          at,
          field,
          **theme.line(name),
          label=_NEAREST.get(name, label(name)),
        )
      axes.set(title=title, ylabel=symbol)
    every[-1].set(xlabel=f"x ({unit})" if unit else "x")
    every[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.15), ncols=3)
    return figure

  return draw
