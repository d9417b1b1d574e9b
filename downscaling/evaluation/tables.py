"""The rows of metrics.json: every metric of one set of samples, the floor beside it, the schema, the printed table.

A floor is `measure` of an independent draw of the reference's own law, with as many rows as the set it stands beside.
A number at its floor cannot be improved; one below it is noise or a leak.
"""

import functools
import math
from collections.abc import Mapping

import numpy as np

from downscaling.common import symmetry
from downscaling.common.operators import Operator
from downscaling.evaluation import distances, spectra

KEYS = (
  "cov_rmse", "melr_unweighted", "melr_weighted", "melr_energy", "kld_sum", "kld_mean", "wass1", "mmd", "variability",
  "constraint_rmse", "n",
)  # fmt: skip
DEBIAS_KEYS = ("sym_cov_rmse", "corr_input", "displacement")
COMPARED = (*KEYS[:8], "sym_cov_rmse")  # what has a floor
MAY_BE_NULL = ("variability", "constraint_rmse", "corr_input", "displacement")  # not every row has members or an input
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
    self.fields = np.asarray(fields)
    distances.rows(self.fields, "the reference")

  @functools.cached_property
  def energies(self) -> np.ndarray:
    return spectra.energies(self.fields, "the reference")

  @functools.cached_property
  def kernel_term(self) -> float:
    return distances.kernel_ref_term(self.fields)


def measure(
  pred: np.ndarray,
  ref: np.ndarray | Reference,
  *,
  group: symmetry.Group | None = None,
  source: np.ndarray | None = None,
  ensemble: np.ndarray | None = None,
  conditions: np.ndarray | None = None,
  operator: Operator | None = None,
) -> dict[str, float | int | None]:
  """All metrics of one set: KEYS, and DEBIAS_KEYS if a group is given. What a set cannot have is None.

  Args:
    pred: [S, *space], the rows whose distribution is judged.
    ref: [R, *space], or a Reference that several calls share.
    group: symmetry of the coarse grid; makes this a debias row (symmetry.trivial(n) if there is none).
    source: y for pred = T y, row by row.
    ensemble: [K, M, *space], all members, for variability and constraint.
    conditions, operator: y′ [K, *coarse] and C′, for the constraint.
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
    "n": len(pred),
  }
  if group is not None:
    row["sym_cov_rmse"] = distances.sym_cov_rmse(pred, ref.fields, group)
    row["corr_input"] = None if source is None else distances.corr_input(source, pred)
    row["displacement"] = None if source is None else distances.displacement(source, pred)
  return row


def debias_rows(coarse, sources, reference, floor, group=None) -> dict[str, dict]:
  """Metrics of coarse sets, with their floors.

  Args:
    coarse: {"lflr": [S, *coarse], "ot": [S, *coarse], ...}.
    sources: {row: y [S, *coarse]}; a row without one is taken as made from coarse["lflr"] if that has as many rows.
    reference: [R, *coarse], held-out C′x. floor: [≥ S, *coarse], as many more, independent of it.
    group: symmetry of the coarse grid, or None.
  """
  reference = Reference(reference)
  group = group or symmetry.trivial(math.prod(reference.fields.shape[1:]))
  table = {}
  for name, x in coarse.items():
    source = sources.get(name, coarse.get("lflr"))
    source = None if source is None or len(source) != len(x) else source
    table[name] = _named(name, measure, x, reference, group=group, source=source)
  return table | _floors(table, floor, reference, group=group)


def sample_rows(samples, conditions, reference, floor, operator=None) -> dict[str, dict]:
  """Metrics of ensembles, with their floors.

  The distribution metrics see member 0 of every condition, K rows, so that K independent true fields are their floor;
  variability and constraint see every member.

  Args:
    samples: {"ot+diffusion": [K, M, *fine], ...}; an unconditional set is [S, 1, *fine].
    conditions: {row: y′ [K, *coarse]}; rows without one have no constraint.
    reference: [R, *fine], held out. floor: [≥ K, *fine], independent of it.
    operator: C′, or None.
  """
  reference, table = Reference(reference), {}
  for name, x in samples.items():
    x = distances.members(x, f"samples {name!r}")
    table[name] = _named(
      name, measure, x[:, 0], reference, ensemble=x, conditions=conditions.get(name), operator=operator
    )
  return table | _floors(table, floor, reference)


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
  for part, keys in (("debias", {*KEYS, *DEBIAS_KEYS}), ("samples", {*KEYS})):
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
SAMPLE_COLUMNS = {
  "cov_rmse": "covRMSE", "melr_unweighted": "MELRu", "melr_energy": "MELRe", "melr_weighted": "MELRw",
  "kld_sum": "KLD sum", "wass1": "Wass1", "mmd": "MMD", "variability": "var.", "constraint_rmse": "constr.",
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


def summary_table(metrics: Mapping) -> str:
  """Both tables as plain text, at most 100 columns; a star marks values at the floor."""
  lines = []
  parts = (("debias", DEBIAS_COLUMNS, "Coarse fields"), ("samples", SAMPLE_COLUMNS, "Fine samples"))
  for part, columns, title in parts:
    if not (table := metrics.get(part)):
      continue
    lines.append(f"{title:<20}{'n':>7}" + "".join(f"{c:>8}" for c in columns.values()))
    for name, row in table.items():
      floor = floor_of(table, name) or {}
      cells = [shown(row[k]) + ("*" if k in COMPARED and at_floor(row[k], floor.get(k)) else " ") for k in columns]
      lines.append(f"{name[:19]:<20}{row['n']:>7}" + "".join(f"{c:>8}" for c in cells))
      for key, label in (("lflr", "  paper, LFLR"), ("ot", "  paper, OT")):
        if part == "debias" and name == key and (published := PAPER.get(metrics["experiment"])):
          cells = [shown(published[key][k]) if k in published[key] else "" for k in columns]
          lines.append(f"{label:<20}{'':>7}" + "".join(f"{c + ' ':>8}" for c in cells))
    lines.append("")
  lines.append(f"* at most {AT_FLOOR} x the floor: the same metric between two independent sets of true fields.")
  return "\n".join(lines)
