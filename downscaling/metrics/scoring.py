"""The rows of metrics.json: every metric of a set of fields, its interval, its floor, and the
schema.

See `judge.py` for what intervals and floors are. `terminal.py` prints the tables.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from downscaling.fields import symmetry
from downscaling.fields.operators import Operator
from downscaling.metrics import bootstrap, distances, higher_order, spectra, symmetrised
from downscaling.metrics.ensembles import Ensemble
from downscaling.metrics.judge import Judge
from downscaling.metrics.reference import Reference

KEYS = (
  "cov_rmse", "melr_unweighted", "melr_weighted", "melr_energy", "kld_sum", "kld_mean", "wass1",
  "mmd",
  "sym_cov_rmse", "auc", "variability", "constraint_rmse", "corr_condition", "misfit", "failed",
  "n", "blocks",
)  # fmt: skip
HIGHER = (
  "bispectrum",
  "transfer",
  "flatness",
  "gradient_flatness",
  "square_covariance",
)  # see higher_order.py
SAMPLE_KEYS = ()
DEBIAS_KEYS = (
  "corr_input",
  "amplitude",
  "displacement",
  "excess",
  "persistence",
  *HIGHER,
)
COMPARED = (*KEYS[:10], *HIGHER)  # what has a floor
# Not every row has members or an input, nor every equation a quadratic term, and only lines have a
# bispectrum.
MAY_BE_NULL = (
  "variability", "constraint_rmse", "corr_condition", "misfit", "corr_input", "displacement",
  "excess", "persistence",
  "bispectrum", "transfer", "sym_cov_rmse", "auc",
)  # fmt: skip
RANGES = ("interval", "floor")  # {metric: quantiles} of a row


def measure(
  pred: np.ndarray,
  ref: np.ndarray | Reference,
  *,
  group: symmetry.Group | None = None,
  source: np.ndarray | None = None,
  ensemble: distances.Members | None = None,
  whole: np.ndarray | None = None,
  conditions: np.ndarray | None = None,
  operator: Operator | None = None,
  quadratic: Callable[[np.ndarray], np.ndarray] | None = None,
  misfit: np.ndarray | None = None,
  moves: symmetry.Moves | None = None,
  rows: bootstrap.Rows | None = None,
  step: float | None = None,
) -> dict[str, float | int | None]:
  """All metrics of one set: KEYS, and DEBIAS_KEYS if a group is given. What it cannot have is None.

  Args:
    pred: [S, *space], the rows whose distribution is judged.
    ref: [R, *space], or a Reference that several calls share.
    group: symmetry of the coarse grid; makes this a debias row (symmetry.trivial(n) if there is
      none).
    source: y for pred = T y, row by row.
    ensemble: [K, M, *space], all members, for variability and constraint; members that failed are
      NaN. whole: [K, M], which did not; None: none failed.
    conditions, operator: y′ [K, *coarse] and C′, for the constraint.
    quadratic: N of the equation, for the transfer of a debias row; see higher_order.
    moves: the symmetries of the fine grid, for symcov over the shells that hold the reference's
      energy.
    misfit: χ² of every member, [K, M]; 1 is what the prior expects. The row has the median of the
      conditions' means.
    rows: where the rows come from; independent if not said. step: time between rows that follow
      each other, for the persistence; None: rows are not in time.
  Raises: ValueError for NaN (naming the set), too few rows, or grids that differ.
  """
  ref = ref if isinstance(ref, Reference) else Reference(ref)
  pred = np.asarray(pred)
  distances.pair(pred, ref.fields)
  ratio = spectra.melr(spectra.energies(pred, "pred", ref.shells), ref.energies)
  kld_sum, kld_mean = distances.kld(pred, ref.fields)
  row = {
    "cov_rmse": distances.cov_rmse(pred, ref.fields),
    **{f"melr_{name}": value for name, value in ratio.items()},
    "kld_sum": kld_sum,
    "kld_mean": kld_mean,
    "wass1": distances.wass1(pred, ref.fields),
    "mmd": distances.mmd(pred, ref.fields, ref.kernel_term),
    "auc": None,
    "n": len(pred),
    "blocks": len(pred) if rows is None else rows.blocks,
  }
  row |= _of_ensemble(pred, ensemble, whole, conditions, operator, misfit)
  if group is None:
    row["sym_cov_rmse"] = None if moves is None else _symmetric(pred, ref, moves)
    return row
  row["sym_cov_rmse"] = distances.sym_cov_rmse(pred, ref.fields, group)
  row["persistence"] = (
    None if step is None or rows is None else _persistence(pred, rows, step)
  )
  row["amplitude"] = distances.amplitude(pred, ref.fields)
  return row | _of_map(pred, source, ref, group) | _higher(pred, ref, group, quadratic)


def _of_ensemble(
  pred, ensemble, whole, conditions, operator, misfit
) -> dict[str, float | int | None]:
  """What all members of a set say: how they vary, how well they meet their conditions, how many
  failed.
  """
  names = ("variability", "constraint_rmse", "corr_condition", "misfit")
  row: dict[str, float | int | None] = dict.fromkeys(names)
  row["failed"] = 0
  if ensemble is not None:
    good = np.ones(ensemble.shape[:2], bool) if whole is None else whole
    row["failed"] = int((~good).sum())
    complete = np.flatnonzero(good.all(axis=1))
    members = Ensemble.of(ensemble).only(complete)
    row["variability"] = distances.variability(members) if len(complete) else None
    if conditions is not None and operator is not None and len(complete):
      row["constraint_rmse"] = distances.constraint_rmse(
        members, conditions[complete], operator
      )
      seen = np.asarray(operator.apply(pred.astype(np.float32)[..., None]))[..., 0]
      row["corr_condition"] = (
        distances.corr_input(conditions, seen) if len(pred) > 1 else None
      )
  if misfit is not None:
    kept = np.where(np.isfinite(misfit), misfit, np.nan)
    known = ~np.isnan(kept).all(axis=1)
    row["misfit"] = (
      float(np.median(np.nanmean(kept[known], axis=1))) if known.any() else None
    )
  return row


def _symmetric(pred, ref: Reference, moves: symmetry.Moves) -> float:
  """symcov of fine fields, over the shells that hold the reference's energy."""
  held = spectra.energy_holding_shells(ref.energies)
  return symmetrised.sym_cov_rmse(
    symmetrised.covariance(pred, moves), ref.symmetric(moves), pred.shape[1:], held
  )


def _persistence(pred, rows: bootstrap.Rows, step: float) -> float | None:
  order = np.lexsort((rows.time, rows.block))
  same = np.diff(rows.block[order]) == 0
  near = np.isclose(np.diff(rows.time[order]), step)
  place = np.flatnonzero(same & near)
  return distances.persistence(pred, order[place], order[place + 1])


def _of_map(pred, source, ref: Reference, group) -> dict[str, float | None]:
  """What is left of a map's input."""
  if source is None:
    return dict.fromkeys(("corr_input", "displacement", "excess"))
  return {
    "corr_input": distances.corr_input(source, pred),
    "displacement": distances.displacement(source, pred),
    "excess": higher_order.displacement(source, pred, ref.fields, group)["excess"],
  }


def _higher(pred, ref: Reference, group, quadratic) -> dict[str, float | None]:
  theirs = {
    k: v for k, v in ref.higher(quadratic, group).items() if np.any(v)
  }  # a symmetry may forbid some
  found = higher_order.higher_order(pred, quadratic, group, ref.periodic)
  found = higher_order.errors({k: found[k] for k in theirs}, theirs)
  return {key: found.get(key) for key in HIGHER}


def debias_rows(
  coarse: Mapping[str, np.ndarray],
  sources: Mapping[str, np.ndarray],
  judge: Judge,
  rows: Mapping[str, bootstrap.Rows] | None = None,
  step: float | None = None,
) -> dict[str, dict]:
  """Metrics of coarse sets, with their intervals and floors.

  Args:
    coarse: {"lflr": [S, *coarse], map: [S, *coarse], ...}.
    sources: {row: y [S, *coarse]}; a row without one is taken as made from coarse["lflr"] if that
      has as many rows.
    judge: of coarse fields, with a group. rows: where each set's rows come from; independent if not
      said.
    step: see measure.
  """
  table = {}
  for name, x in coarse.items():
    source = sources.get(name, coarse.get("lflr"))
    if source is not None and len(source) != len(x):
      source = None
    origin = (rows or {}).get(name) or bootstrap.single(len(x))
    table[name] = _judged(
      name,
      x,
      judge,
      origin,
      group=judge.group,
      source=source,
      quadratic=judge.quadratic,
      step=step,
    )
  return table


def sample_rows(
  samples: Mapping[str, distances.Members],
  conditions: Mapping[str, np.ndarray],
  judge: Judge,
  operator: Operator | None = None,
  misfits: Mapping[str, np.ndarray] | None = None,
  rows: Mapping[str, bootstrap.Rows] | None = None,
  firsts: Mapping[str, "FirstMembers"] | None = None,
) -> dict[str, dict]:
  """Metrics of ensembles, with their intervals and floors.

  The distribution metrics see one member of every condition, the first that did not fail, so that K
  true fields are their floor; variability and constraint see every member.

  Args:
    samples: {set: [K, M, *fine], ...}; an unconditional set is [S, 1, *fine].
    conditions: {row: y′ [K, *coarse]}; rows without one have no constraint.
    judge: of fine fields. operator: C′, or None. misfits: {row: [K, M]} of those that have them.
    rows: where each set's conditions come from; independent if not said.
    firsts: `first_members` of the sets, where they are known.
  """
  table = {}
  for name, x in samples.items():
    first = (firsts or {}).get(name) or first_members(x, name)
    kept = first.conditions
    origin = (rows or {}).get(name) or bootstrap.single(len(x))
    given = conditions.get(name)
    table[name] = _judged(
      name,
      first.members,
      judge,
      bootstrap.Rows(origin.block[kept], origin.time[kept]),
      ensemble=Ensemble.of(x).only(kept),
      whole=first.whole[kept],
      conditions=None if given is None else given[kept],
      operator=operator,
      misfit=None if misfits is None or name not in misfits else misfits[name][kept],
      moves=judge.moves,
    )
    table[name]["failed"] += (len(x) - len(kept)) * np.shape(x)[1]
  return table


class FirstMembers(NamedTuple):
  """The first member of every condition that did not fail.

  conditions: that have one, [S]. members: [S, *space]. whole: [K, M], which members did not fail.
  """

  conditions: np.ndarray
  members: np.ndarray
  whole: np.ndarray


def first_members(x: distances.Members, name: str = "samples") -> FirstMembers:
  """The first whole members of an ensemble [K, M, *space], a block of conditions at a time.

  A member that failed is NaN at every point (sampling/ensemble.py). Raises ValueError for one that
  is NaN in part.
  """
  ensemble = distances.members(x, name)
  parts, flags = [], []
  for place, block in ensemble.blocks():
    finite = np.isfinite(block).reshape(*block.shape[:2], -1)
    whole, none = np.asarray(finite.all(axis=2)), np.asarray(~finite.any(axis=2))
    if not (whole | none).all():
      k, m = np.argwhere(~(whole | none))[0]
      raise ValueError(
        f"{name}: member {m} of condition {place.start + k} holds NaN or infinite values at some "
        "points: no metric of it means anything. Look at the stage that wrote it and run that "
        "again."
      )
    have = np.flatnonzero(whole.any(axis=1))
    parts.append(block[have, whole[have].argmax(axis=1)])
    flags.append(whole)
  good = np.concatenate(flags)
  kept = np.flatnonzero(good.any(axis=1))
  if not len(kept):
    raise ValueError(
      f"{name}: every member holds NaN, so there is nothing to judge. Draw the set again."
    )
  return FirstMembers(kept, np.concatenate(parts), good)


def _judged(name: str, x, judge: Judge, origin: bootstrap.Rows, **of_set) -> dict:
  """One row of a table: measure's values, their intervals and their floor."""
  try:
    row: dict[str, Any] = dict(
      measure(
        x,
        judge.reference,
        rows=origin,
        **of_set,
      )
    )
  except ValueError as error:
    raise ValueError(f"row {name!r}: {error}") from None
  row |= {
    "interval": judge.interval(x, origin, row),
    "floor": dict(judge.floor(origin)),
  }
  told = None if name.endswith("in-sample") else judge.auc(x, origin)
  if told is not None:
    row["auc"], row["interval"]["auc"], row["floor"]["auc"] = told
  return row


def floors(table: Mapping[str, dict]) -> dict[tuple[int, int], dict]:
  """{(rows, blocks): floor} of all structures in a table, in the order of its rows."""
  return {(row["n"], row["blocks"]): row["floor"] for row in table.values()}


# ---------------------------------------------------------------- the file


def check_schema(metrics: Mapping) -> None:
  """Raises ValueError, listing what is wrong, unless `metrics` has the form that docs/data.md gives
  metrics.json.
  """
  wrong = []
  for key, kind in {
    "experiment": str,
    "debias": Mapping,
    "samples": Mapping,
    "versions": Mapping,
  }.items():
    if not isinstance(metrics.get(key), kind):
      wrong.append(f"{key} is {type(metrics.get(key)).__name__}, need {kind.__name__}")
  if not isinstance(metrics.get("config_hash"), str):
    wrong.append("config_hash is missing")
  for part, keys in (
    ("debias", {*KEYS, *DEBIAS_KEYS}),
    ("samples", {*KEYS, *SAMPLE_KEYS}),
  ):
    table = metrics.get(part)
    if isinstance(table, Mapping):
      wrong += _wrong_rows(part, table, keys)
  if wrong:
    shown = "; ".join(wrong[:6]) + (
      f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
    )
    raise ValueError(f"metrics.json would not follow its schema: {shown}.")


def _wrong_rows(
  part: str,
  table: Mapping[str, dict],
  keys: set[str],
) -> list[str]:
  wrong = []
  for name, row in table.items():
    given = {*row} - {*RANGES}
    wrong += [f"{part}.{name}.{key} is missing" for key in sorted(keys - given)]
    wrong += [
      f"{part}.{name}.{key} is not in the schema" for key in sorted(given - keys)
    ]
    wrong += [
      f"{part}.{name}.{key} is {row[key]!r}"
      for key in sorted(keys & given)
      if not _fits(key, row[key])
    ]
    for kind, length in (("interval", 2), ("floor", 3)):
      if not isinstance(row.get(kind), Mapping):
        wrong.append(f"{part}.{name}.{kind} is missing")
        continue
      bad = [key for key, ends in row[kind].items() if not _ascending(ends, length)]
      wrong += [f"{part}.{name}.{kind}.{key} is {row[kind][key]!r}" for key in bad]
  return wrong


def _fits(key: str, value) -> bool:
  if value is None:
    return key in MAY_BE_NULL
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def _ascending(ends, length: int) -> bool:
  return (
    len(ends) == length
    and all(math.isfinite(e) for e in ends)
    and sorted(ends) == list(ends)
  )
