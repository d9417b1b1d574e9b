"""The rows of metrics.json: every metric of one set of samples, the floor beside it, the schema, the printed table.

A floor is `measure` of an independent draw of the reference's own law, with as many rows as the set it stands beside.
A number at its floor cannot be improved; one below it is noise or a leak.
"""

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

from downscaling.common import symmetry
from downscaling.common.operators import Operator
from downscaling.evaluation import distances, higher_order, spectra, symmetric

KEYS = (
  "cov_rmse", "melr_unweighted", "melr_weighted", "melr_energy", "kld_sum", "kld_mean", "wass1", "mmd", "variability",
  "constraint_rmse", "misfit", "n",
)  # fmt: skip
HIGHER = ("bispectrum", "transfer", "flatness", "gradient_flatness", "square_covariance")  # see higher_order.py
SAMPLE_KEYS = ("sym_cov_rmse",)
DEBIAS_KEYS = ("sym_cov_rmse", "corr_input", "displacement", "excess", *HIGHER)
COMPARED = (*KEYS[:8], "sym_cov_rmse", *HIGHER)  # what has a floor
# Not every row has members or an input, nor every equation a quadratic term, and only lines have a bispectrum.
MAY_BE_NULL = (
  "variability", "constraint_rmse", "misfit", "corr_input", "displacement", "excess", "bispectrum", "transfer",
  "sym_cov_rmse",
)  # fmt: skip
AT_FLOOR = 1.25

# Wan et al. 2023, Table 1: the only published numbers. Its sample sizes are not known, so neither are its floors.
PAPER = {
  "ks-8x": {
    "lflr": {"cov_rmse": 0.343, "melr_unweighted": 0.201, "melr_weighted": 0.144, "kld_sum": 1.464},
    "ot": {"cov_rmse": 0.081, "melr_unweighted": 0.020, "melr_weighted": 0.020, "kld_sum": 0.018},
  },
  "kolmogorov-8x": {
    "lflr": {"cov_rmse": 0.458, "melr_unweighted": 1.254, "melr_weighted": 0.196, "kld_sum": 29.30},
    "ot": {"cov_rmse": 0.083, "melr_unweighted": 0.013, "melr_weighted": 0.026, "kld_sum": 0.033},
  },
  "kolmogorov-16x": {
    "lflr": {"cov_rmse": 0.477, "melr_unweighted": 0.600, "melr_weighted": 0.200, "kld_sum": 12.26},
    "ot": {"cov_rmse": 0.079, "melr_unweighted": 0.016, "melr_weighted": 0.025, "kld_sum": 0.017},
  },
}


class Reference:
  """A reference set [R, *space] and what many comparisons with it share. Raises ValueError for NaN or < 2 rows."""

  def __init__(self, fields: np.ndarray):
    self.fields, self._higher, self._symmetric = np.asarray(fields), None, None
    distances.rows(self.fields, "the reference")

  @functools.cached_property
  def energies(self) -> np.ndarray:
    return spectra.energies(self.fields, "the reference")

  @functools.cached_property
  def kernel_term(self) -> float:
    return distances.kernel_ref_term(self.fields)

  def higher(self, quadratic, group: symmetry.Group) -> dict[str, np.ndarray]:
    """Its statistics of higher order, computed once."""
    if self._higher is None or self._higher[:2] != (quadratic, group):
      self._higher = (quadratic, group, higher_order.higher_order(self.fields, quadratic, group))
    return self._higher[2]

  def symmetric(self, moves: symmetry.Moves) -> np.ndarray:
    """Its covariance averaged over a group, computed once."""
    if self._symmetric is None or self._symmetric[0] != moves:
      self._symmetric = (moves, symmetric.covariance(self.fields, moves))
    return self._symmetric[1]


def measure(
  pred: np.ndarray,
  ref: np.ndarray | Reference,
  *,
  group: symmetry.Group | None = None,
  source: np.ndarray | None = None,
  ensemble: np.ndarray | None = None,
  conditions: np.ndarray | None = None,
  operator: Operator | None = None,
  quadratic: Callable[[np.ndarray], np.ndarray] | None = None,
  misfit: np.ndarray | None = None,
  moves: symmetry.Moves | None = None,
) -> dict[str, float | int | None]:
  """All metrics of one set: KEYS, and DEBIAS_KEYS if a group is given, else SAMPLE_KEYS. What it cannot have is None.

  Args:
    pred: [S, *space], the rows whose distribution is judged.
    ref: [R, *space], or a Reference that several calls share.
    group: symmetry of the coarse grid; makes this a debias row (symmetry.trivial(n) if there is none).
    source: y for pred = T y, row by row.
    ensemble: [K, M, *space], all members, for variability and constraint.
    conditions, operator: y′ [K, *coarse] and C′, for the constraint.
    quadratic: N of the equation, for the transfer of a debias row; see higher_order.
    moves: the symmetries of the fine grid, for symcov over the shells that hold the reference's energy.
    misfit: χ² of every member, [K, M]; 1 is what the prior expects. The row has the median of the conditions' means.
  Raises: ValueError for NaN (naming the set), too few rows, or grids that differ.
  """
  ref = ref if isinstance(ref, Reference) else Reference(ref)
  pred = np.asarray(pred)
  distances.pair(pred, ref.fields)
  ratio = spectra.melr(spectra.energies(pred, "pred"), ref.energies)
  kld_sum, kld_mean = distances.kld(pred, ref.fields)
  held = ensemble is not None and conditions is not None and operator is not None
  row = {
    "cov_rmse": distances.cov_rmse(pred, ref.fields),
    **{f"melr_{name}": value for name, value in ratio.items()},
    "kld_sum": kld_sum,
    "kld_mean": kld_mean,
    "wass1": distances.wass1(pred, ref.fields),
    "mmd": distances.mmd(pred, ref.fields, ref.kernel_term),
    "variability": None if ensemble is None else distances.variability(ensemble),
    "constraint_rmse": distances.constraint_rmse(ensemble, conditions, operator) if held else None,
    "misfit": None if misfit is None else float(np.median(np.mean(misfit, axis=1))),
    "n": len(pred),
  }
  if group is None:
    held = spectra.energy_holding_shells(ref.energies)
    row["sym_cov_rmse"] = moves and symmetric.sym_cov_rmse(
      symmetric.covariance(pred, moves), ref.symmetric(moves), pred.shape[1:], held
    )
  else:
    row["sym_cov_rmse"] = distances.sym_cov_rmse(pred, ref.fields, group)
    row["corr_input"] = None if source is None else distances.corr_input(source, pred)
    row["displacement"] = None if source is None else distances.displacement(source, pred)
    moved = None if source is None else higher_order.displacement(source, pred, ref.fields, group)
    row["excess"] = moved and moved["excess"]
    theirs = {k: v for k, v in ref.higher(quadratic, group).items() if np.any(v)}  # a symmetry may forbid some
    found = higher_order.higher_order(pred, quadratic, group)
    found = higher_order.errors({k: found[k] for k in theirs}, theirs)
    row |= {key: found.get(key) for key in HIGHER}
  return row


def debias_rows(coarse, sources, reference, floor, group=None, quadratic=None) -> dict[str, dict]:
  """Metrics of coarse sets, with their floors.

  Args:
    coarse: {"lflr": [S, *coarse], "ot": [S, *coarse], ...}.
    sources: {row: y [S, *coarse]}; a row without one is taken as made from coarse["lflr"] if that has as many rows.
    reference: [R, *coarse], held-out C′x. floor: [≥ S, *coarse], as many more, independent of it.
    group: symmetry of the coarse grid, or None. quadratic: see measure.
  """
  reference = Reference(reference)
  group = group or symmetry.trivial(math.prod(reference.fields.shape[1:]))
  table = {}
  for name, x in coarse.items():
    source = sources.get(name, coarse.get("lflr"))
    source = None if source is None or len(source) != len(x) else source
    table[name] = _named(name, measure, x, reference, group=group, source=source, quadratic=quadratic)
  return table | _floors(table, floor, reference, group=group, quadratic=quadratic)


def sample_rows(samples, conditions, reference, floor, operator=None, misfits=None, moves=None) -> dict[str, dict]:
  """Metrics of ensembles, with their floors.

  The distribution metrics see member 0 of every condition, K rows, so that K independent true fields are their floor;
  variability and constraint see every member.

  Args:
    samples: {"ot+diffusion": [K, M, *fine], ...}; an unconditional set is [S, 1, *fine].
    conditions: {row: y′ [K, *coarse]}; rows without one have no constraint.
    reference: [R, *fine], held out. floor: [≥ K, *fine], independent of it.
    operator: C′, or None. misfits: {row: [K, M]} of those that have them. moves: see measure.
  """
  reference, table = Reference(reference), {}
  for name, x in samples.items():
    x = distances.members(x, f"samples {name!r}")
    table[name] = _named(
      name,
      measure,
      x[:, 0],
      reference,
      ensemble=x,
      conditions=conditions.get(name),
      operator=operator,
      misfit=(misfits or {}).get(name),
      moves=moves,
    )
  return table | _floors(table, floor, reference, moves=moves)


def _named(name, call, *args, **kwargs):
  try:
    return call(*args, **kwargs)
  except ValueError as error:
    raise ValueError(f"row {name!r}: {error}") from None


def _floors(table: dict, floor: np.ndarray, reference: Reference, **kwargs) -> dict[str, dict]:
  """One floor for every number of rows: "floor" as many as the first row has, "floor n=…" for others."""
  out = {}
  for n in dict.fromkeys(row["n"] for row in table.values()):
    if n > len(floor):
      raise ValueError(
        f"the floor set has {len(floor)} rows and a set of {n} is judged: need {n} reference rows beside the reference."
      )
    out["floor" if not out else f"floor n={n}"] = _named("floor", measure, floor[:n], reference, **kwargs)
  return out


def floor_of(table: Mapping[str, dict], row: str) -> dict | None:
  """The floor that belongs beside a row: the one with its number of rows. None for a floor itself."""
  if row.startswith("floor"):
    return None
  return next((m for name, m in table.items() if name.startswith("floor") and m["n"] == table[row]["n"]), None)


def at_floor(value: float | None, floor: float | None) -> bool:
  """Is the value at most 1.25 × its floor?"""
  return value is not None and floor is not None and value <= AT_FLOOR * floor


# ---------------------------------------------------------------- the file


def check_schema(metrics: Mapping) -> None:
  """Raises ValueError, listing what is wrong, unless `metrics` has the form design.md gives metrics.json."""
  wrong = []
  for key, kind in {"experiment": str, "debias": Mapping, "samples": Mapping, "versions": Mapping}.items():
    if not isinstance(metrics.get(key), kind):
      wrong.append(f"{key} is {type(metrics.get(key)).__name__}, need {kind.__name__}")
  if not isinstance(metrics.get("config_hash"), str):
    wrong.append("config_hash is missing")
  for part, keys in (("debias", {*KEYS, *DEBIAS_KEYS}), ("samples", {*KEYS, *SAMPLE_KEYS})):
    table = metrics.get(part)
    if not isinstance(table, Mapping):
      continue
    if table and "floor" not in table:
      wrong.append(f"{part} has no floor")
    for name, row in table.items():
      wrong += [f"{part}.{name}.{key} is missing" for key in sorted(keys - {*row})]
      wrong += [f"{part}.{name}.{key} is not in the schema" for key in sorted({*row} - keys)]
      wrong += [f"{part}.{name}.{key} is {row[key]!r}" for key in sorted(keys & {*row}) if not _fits(key, row[key])]
  if wrong:
    shown = "; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else "")
    raise ValueError(f"metrics.json would not follow its schema: {shown}.")


def _fits(key: str, value) -> bool:
  if value is None:
    return key in MAY_BE_NULL
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------- the terminal

DEBIAS_COLUMNS = {
  "cov_rmse": "covRMSE", "sym_cov_rmse": "symcov", "melr_unweighted": "MELRu", "melr_weighted": "MELRw",
  "kld_sum": "KLD sum", "wass1": "Wass1", "mmd": "MMD", "corr_input": "corr", "displacement": "displ.",
}  # fmt: skip
HIGHER_COLUMNS = {
  "corr_input": "corr", "excess": "excess", "bispectrum": "bispec.", "transfer": "transf.", "flatness": "flatn.",
  "gradient_flatness": "gr.fl.", "square_covariance": "sq.cov.",
}  # fmt: skip
SAMPLE_COLUMNS = {
  "cov_rmse": "covRMSE", "sym_cov_rmse": "symcov", "melr_unweighted": "MELRu", "melr_energy": "MELRe",
  "melr_weighted": "MELRw", "kld_sum": "KLD sum", "wass1": "Wass1", "mmd": "MMD", "variability": "var.",
  "constraint_rmse": "constr.", "misfit": "χ²",
}  # fmt: skip


def shown(value: float | None) -> str:
  """A number as tables print it; – where a row has none."""
  if value is None:
    return "–"
  if value == 0:
    return "0"
  if abs(value) >= 0.0095:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"
  return f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.0e}"


def published(experiment: str, table: Mapping[str, dict], row: str) -> dict[str, float] | None:
  """The paper's numbers to be shown under a row: its OT under the row of its own kind of map, if there."""
  rows = {"lflr": "lflr", "entropic" if "entropic" in table else "ot": "ot"}
  return PAPER.get(experiment, {}).get(rows.get(row, ""))


def summary_table(metrics: Mapping) -> str:
  """Both tables as plain text, at most 100 columns; a star marks values at the floor."""
  lines = []
  parts = (
    ("debias", DEBIAS_COLUMNS, "Coarse fields"),
    ("debias", HIGHER_COLUMNS, "  of higher order"),
    ("samples", {k: v for k, v in SAMPLE_COLUMNS.items() if k not in ("mmd", "variability")}, "Fine samples"),
  )
  for part, columns, title in parts:
    if not (table := metrics.get(part)):
      continue
    lines.append(f"{title:<20}{'n':>7}" + "".join(f"{c:>8}" for c in columns.values()))
    for name, row in table.items():
      floor = floor_of(table, name) or {}
      cells = [shown(row[k]) + ("*" if k in COMPARED and at_floor(row[k], floor.get(k)) else " ") for k in columns]
      lines.append(f"{name[:19]:<20}{row['n']:>7}" + "".join(f"{c:>8}" for c in cells))
      if columns is DEBIAS_COLUMNS and (paper := published(metrics["experiment"], table, name)):
        cells = [shown(paper[k]) if k in paper else "" for k in columns]
        title = "  paper, LFLR" if name == "lflr" else "  paper, OT"
        lines.append(f"{title:<20}{'':>7}" + "".join(f"{c + ' ':>8}" for c in cells))
    lines.append("")
  lines.append(f"* at most {AT_FLOOR} x the floor: the same metric between two independent sets of true fields.")
  return "\n".join(lines)
