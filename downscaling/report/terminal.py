"""The tables of metrics.json as plain text: value ± half of its interval, and below them what true
data do.
"""

import math
from collections.abc import Mapping

from downscaling.metrics import bootstrap, scoring
from downscaling.metrics.judge import inside
from downscaling.report import published

DEBIAS_COLUMNS = {
  "cov_rmse": "covRMSE", "sym_cov_rmse": "symcov", "melr_unweighted": "MELRu",
  "melr_weighted": "MELRw",
  "kld_sum": "KLD sum", "wass1": "Wass1", "mmd": "MMD",
}  # fmt: skip
HIGHER_COLUMNS = {
  "bispectrum": "bispectrum", "transfer": "transfer", "flatness": "flatness",
  "gradient_flatness": "grad. fl.",
  "square_covariance": "squares", "auc": "AUC",
}  # fmt: skip
KEPT_COLUMNS = {
  "corr_input": "corr", "amplitude": "amplitude", "displacement": "displaced", "excess": "excess",
  "persistence": "lag-1",
}  # fmt: skip
SAMPLE_COLUMNS = {
  "cov_rmse": "covRMSE", "sym_cov_rmse": "symcov", "melr_energy": "MELRe", "melr_weighted": "MELRw",
  "kld_sum": "KLD sum", "wass1": "Wass1", "auc": "AUC",
}  # fmt: skip
MEMBER_COLUMNS = {
  "melr_unweighted": "MELRu", "mmd": "MMD", "variability": "variab.", "constraint_rmse": "constr.",
  "corr_condition": "corr(C′x)", "misfit": "χ²", "failed": "failed",
}  # fmt: skip
PARTS = (
  ("debias", DEBIAS_COLUMNS, "Coarse fields"),
  ("debias", HIGHER_COLUMNS, "  higher orders"),
  ("debias", KEPT_COLUMNS, "  what a map keeps"),
  ("samples", SAMPLE_COLUMNS, "Fine samples"),
  ("samples", MEMBER_COLUMNS, "  members"),
)
NAME, CELL = 23, 11


def shown(value: float | None) -> str:
  """A number as tables print it; – where a row has none."""
  if value is None:
    return "–"
  if value == 0 or isinstance(value, int):
    return str(value if isinstance(value, int) else 0)
  if abs(value) >= 0.0095:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"
  return f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.0e}"


def with_interval(value: float | None, interval: list[float] | None) -> str:
  """.073±.004: the value to the digit in which half of its interval begins, or one more behind a 1
  or a 2.

  `shown` where it has no interval.
  """
  if value is None or interval is None or not interval[1] > interval[0]:
    return shown(value)
  half = (interval[1] - interval[0]) / 2
  place = math.floor(math.log10(half))
  digits = max(0, -place + (half < 3 * 10**place))
  if digits > 5:
    return shown(value)
  return f"{_short(value, digits)}±{_short(half, digits)}"


def between(floor: list[float] | None) -> str:
  """.042–.061: the ends of a floor."""
  if floor is None:
    return "–"
  digits = min(
    5,
    max(
      1,
      1 - math.floor(math.log10(max(floor[2], 1e-5))),
    ),
  )
  return f"{_short(floor[0], digits)}–{_short(floor[2], digits)}"


def _short(value: float, digits: int) -> str:
  """Without the zero before the point."""
  text = f"{value:.{digits}f}"
  return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def summary(metrics: Mapping) -> str:
  """All tables, at most 100 columns wide; a star marks values that true data have."""
  lines = []
  for part, columns, title in PARTS:
    if metrics.get(part):
      lines += [*_table(metrics, part, columns, title), ""]
  lines.append(
    "value ± half of its 95 % interval, by trajectory. * inside what true data do (the last rows: "
    "95 %"
  )
  lines.append("of true sets of that size, against the same reference).")
  if any(
    row["n"] < bootstrap.FEW
    for part in ("debias", "samples")
    for row in metrics.get(part, {}).values()
  ):
    lines.append(
      f"† fewer than {bootstrap.FEW} fields: what true data do is wide, and a star says little."
    )
  return "\n".join(lines)


def _table(
  metrics: Mapping, part: str, columns: Mapping[str, str], title: str
) -> list[str]:
  table = metrics[part]
  head = f"{title:<{NAME}}" + "".join(f"{name:>{CELL}}" for name in columns.values())
  lines = [head]
  for name, row in table.items():
    lines.append(
      _line(
        _titled(name, row, metrics.get("default")), [_cell(row, key) for key in columns]
      )
    )
    paper = published.beside(metrics["experiment"], name)
    if columns is DEBIAS_COLUMNS and paper:
      cells = [shown(paper[key]) + " " if key in paper else "" for key in columns]
      lines.append(_line(f"  the paper's {published.NAMES[name]}", cells))
  if any(key in scoring.COMPARED for key in columns):
    for (count, _), floor in scoring.floors(table).items():
      lines.append(
        _line(f"true data, n={count}", [_floor_cell(floor, key) for key in columns])
      )
  return lines


def _line(title: str, cells: list[str]) -> str:
  return (
    f"{title[:NAME]:<{NAME}}" + "".join(f" {cell:>{CELL - 1}}" for cell in cells)
  ).rstrip()


def _titled(name: str, row: Mapping, default: str | None) -> str:
  few = "†" if row["n"] < bootstrap.FEW else ""
  chosen = " (default)" if name == default else ""
  return f"{name}{chosen}{few}"


def _cell(row: Mapping, key: str) -> str:
  text = with_interval(row[key], row["interval"].get(key))
  return text + ("*" if inside(row[key], row["floor"].get(key)) else " ")


def _floor_cell(floor: Mapping, key: str) -> str:
  return between(floor.get(key)) + " " if key in scoring.COMPARED else ""
