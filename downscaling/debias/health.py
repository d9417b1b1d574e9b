"""Is a map fit to be used? Checks of the rows before a fit, and of each map after it.

Every check leaves a finding: {"level": "ok" | "warning" | "error", "check", "map" (or None),
"value", "limit", "message"}. The debias job stores all of them in diagnostics.json under "health",
prints each warning as one line, and refuses to finish on an error. A fault of a map that samples
are not drawn behind is a warning at most.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from downscaling.debias import bias_symmetry
from downscaling.debias.equivariant.equivariant_map import blocks

Finding = dict
STRAY = 30.0  # robust standard deviations of a value from which it is named
# Rows, each with all its images under the group, for every point of the grid.
ROWS_PER_POINT = 10.0
POOLED, PINNED = (
  (0.8, 1.25),
  0.2,
)  # amplitude ratio of all points together; of one point, 1 ± so much beyond sampling
# of the amplitude, or of the variance by averaging: a map that loses more carries little
# information
LOST = 0.5
# Standard errors beyond which their number says nothing.
COUNTED = 1000.0
# Mean over median squared distance of rows; 1.1 of Gaussian fields in 24 dimensions.
INFLATED = 10.0
SHRUNK = 0.1  # of the variance may be lost by averaging over targets
LOOK_UP = 1.05  # effective targets below it: each row is replaced by its nearest target
SPREAD_OUT = 0.1  # of all targets in one row's average
SHOWN = 8  # places named in a message


def finding(
  check: str,
  value: float,
  limit: float,
  bad: str = "",
  level: str = "warning",
  name: str | None = None,
):
  """One finding; `bad` is what is wrong and what to do, "" if all is well."""
  return {
    "level": level if bad else "ok",
    "check": check,
    "map": name,
    "value": float(value),
    "limit": float(limit),
    "message": bad,
  }


def refuse(findings: Sequence[Finding]) -> None:
  """Raises ValueError with the messages of all errors."""
  errors = [each["message"] for each in findings if each["level"] == "error"]
  if errors:
    raise ValueError(" ".join(errors))


# ---------------------------------------------------------------- before the fit


def of_rows(
  clouds: Mapping[str, np.ndarray], fitted: Sequence[str], outlier: float
) -> list[Finding]:
  """Outlying values and constant points of clouds [S, *space, C]; values of `fitted` clouds beyond
  outlier are errors.

  A value is measured from its point's median, in units of the standard deviation that the central
  90 % of the point's values have if they are normal: outliers do not move that.
  """
  found = []
  for name, rows in clouds.items():
    flat = rows.reshape(len(rows), -1)
    found.append(_outliers(name, flat, outlier if name in fitted else math.inf))
    if name in fitted:
      found.append(_constant(name, flat))
  return found


def _outliers(name: str, rows: np.ndarray, outlier: float) -> Finding:
  middle, width = bias_symmetry.middle_and_width(rows)
  typical = float(np.sqrt((width**2).mean()))
  width = np.where(width > 0, width, typical)
  if not typical > 0:
    return finding(f"outliers in {name}", 0.0, STRAY)
  worst = np.concatenate(
    [(np.abs(block - middle) / width).max(axis=1) for _, block in blocks(rows)]
  )
  most = float(worst.max())
  limit = min(STRAY, outlier)
  stray = np.flatnonzero(worst > limit)
  if not len(stray):
    return finding(f"outliers in {name}", most, limit)
  level = "error" if most > outlier else "warning"
  stray = stray[np.argsort(-worst[stray], kind="stable")]
  say = (
    f"{len(stray)} of {len(rows)} {name} rows hold values beyond {limit:g} robust standard "
    f"deviations (rows {_places(stray)}; the largest is "
    f"{_value(rows, stray[0], middle, width):.4g}, at {most:.3g}): is it a fill value or a unit? "
    "Drop or mend those rows"
  )
  if level == "error":
    say += f", or allow them by --config.debias.outlier={2 * most:.1g}."
  else:
    say += ": such rows bend a fit, and what is mapped from them is a guess."
  return finding(f"outliers in {name}", most, limit, say, level)


def _value(rows, row, middle, width) -> float:
  return float(rows[row][np.argmax(np.abs(rows[row] - middle) / width)])


def _constant(name: str, rows: np.ndarray) -> Finding:
  same = np.ones(rows.shape[1], bool)
  for _, block in blocks(rows):
    same &= (block == rows[0]).all(axis=0)
  still = np.flatnonzero(same)
  if not len(still):
    return finding(f"constant points in {name}", 0, 0)
  say = (
    f"{len(still)} of {rows.shape[1]} points have one value in all {name} rows (points "
    f"{_places(still)}): no map can give them a spread, and they enter every average over "
    "symmetries. Leave those points out, or mend them."
  )
  return finding(f"constant points in {name}", len(still), 0, say)


def of_size(rows: int, points: int, elements: int) -> Finding:
  """Enough rows for a covariance? points: of the grid; elements: of the group."""
  value = rows * elements / points
  if value >= ROWS_PER_POINT:
    return finding("rows for each point", value, ROWS_PER_POINT)
  say = (
    f"{rows} rows with {elements} images each for {points} points: fewer than {ROWS_PER_POINT:g} a "
    "point, so covariances are noisy and in-sample rows flatter. Raise config.debias.points, "
    "simulate more, or coarsen more."
  )
  return finding("rows for each point", value, ROWS_PER_POINT, say)


def inflating(clouds: Mapping[str, np.ndarray]) -> str:
  """What to say if a few rows make the mean cost, which scales ε, much larger than most costs are.

  clouds: {name: rows [S, *space, C]}. Returns "" if none do.
  """
  said = []
  for name, rows in clouds.items():
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    size = ((flat - np.median(flat, axis=0)) ** 2).sum(axis=1)
    middle = float(np.median(size))
    if size.mean() > INFLATED * middle:
      far = np.flatnonzero(size > INFLATED * middle)
      said.append(f"{len(far)} {name} rows ({_places(far[np.argsort(-size[far])])})")
  if not said:
    return ""
  return (
    f"{' and '.join(said)} lie so far from the others that they inflate the mean cost, of which "
    "config.debias.epsilon is a share. Remove or mend these rows."
  )


def of_group(verdicts: Sequence[bias_symmetry.Verdict], used: str) -> list[Finding]:
  """What the test said of the groups that it looked at, the largest first; used: the one that maps
  are fitted with.

  All groups that the bias breaks are told in one finding.
  """
  broken = [each for each in verdicts if not each.passes]
  found = [
    finding(f"symmetry of the bias: {each.name}", each.worst, each.limit)
    for each in verdicts
    if each.passes
  ]
  if not broken:
    return found
  first, *others = broken
  where = "over all points" if first.point is None else f"at point {first.point}"
  # A point without spread, or nearly so, has no standard error that means anything.
  errors = f"{first.worst:.1f}" if first.worst < COUNTED else f"more than {COUNTED:g}"
  say = (
    f"the bias breaks the symmetry of the group {first.name!r} ({first.elements} elements): the "
    f"difference in {first.statistic} {where} is {first.size:+.2g} from what the group allows, "
    f"{errors} standard errors where sampling allows {first.limit:.1f}"
  )
  if others:
    told = [f"{each.name!r}: {min(each.worst, COUNTED):.1f}" for each in others]
    say += f" ({', '.join(told)})"
  if used in [each.name for each in broken]:
    say += f"; config.debias.group keeps {used!r}, and maps cannot mend that: set "
    say += "--config.debias.group=auto."
  else:
    say += f"; maps are fitted with the group {used!r}. --config.debias.group={first.name} would "
    say += "keep the symmetry."
  return [
    finding(f"symmetry of the bias: {first.name}", first.worst, first.limit, say),
    *found,
  ]


# ---------------------------------------------------------------- after it


def of_map(
  name: str,
  facts: Mapping,
  held_out: np.ndarray,
  in_sample: np.ndarray,
  target: np.ndarray,
  chosen: bool,
  inflated: str = "",
) -> list[Finding]:
  """Amplitude of a map's fields, and what averaging over targets has cost a barycentric one.

  Args:
    facts: of the fit (maps.fit). held_out, in_sample: mapped rows, [S, *space, C]. target: true
      rows. chosen: are samples drawn behind this map? Only then is a fault an error. inflated: see
      `inflating`.
  """
  worst = "error" if chosen else "warning"
  found = [*_amplitude(name, held_out, target, worst)]
  if "epsilon" in facts:
    found.append(_shrinkage(name, in_sample, target, worst, inflated))
  if "effective_targets" in facts:
    found.append(
      _effective(name, facts["effective_targets"]["0.5"], len(target), chosen)
    )
  if facts.get("dropped"):
    found.append(_dropped(name, facts))
  return found


def _amplitude(
  name: str, mapped: np.ndarray, target: np.ndarray, worst: str
) -> list[Finding]:
  ours, true = (
    np.asarray(
      rows.reshape(len(rows), -1),
      np.float64,
    ).std(axis=0)
    for rows in (mapped, target)
  )
  if not true.any():
    return []
  pooled = math.sqrt(float((ours**2).sum() / (true**2).sum()))
  low, high = POOLED
  say, level = "", "warning"
  if not low <= pooled <= high:
    say = (
      f"map {name} gives fields {pooled:.2f} times the amplitude of the true ones (standard "
      f"deviation of anomalies): {low:g} to {high:g} is healthy. Lower config.debias.epsilon if it "
      "is an entropic map; else look for outliers, or for held-out rows that are not of the law "
      "of the fit."
    )
    level = worst if pooled < LOST else "warning"
  found = [
    finding("amplitude ratio", pooled, low if pooled < 1 else high, say, level, name)
  ]
  alive = true > 0
  ratio = ours[alive] / true[alive]
  # Of a standard deviation; twice as wide, as rows of one trajectory are alike and tails are not
  # normal.
  error = 2 * math.sqrt(0.5 / len(mapped) + 0.5 / len(target))
  allowed = PINNED + 4 * error
  place = int(np.argmax(np.abs(ratio - 1)))
  say = ""
  if abs(ratio[place] - 1) > allowed:
    say = (
      f"map {name} gives point {int(np.flatnonzero(alive)[place])} {ratio[place]:.2f} times the "
      f"true amplitude (1 ± {allowed:.2f} is healthy): does the bias differ from place to place? "
      "Set --config.debias.group=auto, or look at that point's raw data."
    )
  limit = 1 + math.copysign(allowed, ratio[place] - 1)
  return [
    *found,
    finding("amplitude ratio at a point", ratio[place], limit, say, "warning", name),
  ]


def _shrinkage(
  name: str, mapped: np.ndarray, target: np.ndarray, worst: str, inflated: str
) -> Finding:
  ours, true = (
    float(rows.reshape(len(rows), -1).var(axis=0, dtype=np.float64).sum())
    for rows in (mapped, target)
  )
  lost = 1 - ours / true if true > 0 else 0.0
  say, level = "", "warning"
  if lost > LOST:
    level = worst
    say = f"map {name} has lost {lost:.0%} of the variance by averaging over targets: "
    say += inflated or (
      "config.debias.epsilon is too large for its output to carry information. Set "
      "--config.debias.epsilon=0.001 or so, in another --workdir."
    )
  elif lost > SHRUNK:
    say = (
      f"map {name} has lost {lost:.0%} of the variance by averaging over targets: lower "
      "config.debias.epsilon, or use the map 'equivariant'."
    )
  return finding("shrinkage of the barycentric map", lost, SHRUNK, say, level, name)


def _effective(name: str, median: float, targets: int, chosen: bool) -> Finding:
  check = "effective targets"
  if median > (most := SPREAD_OUT * targets):
    say = (
      f"map {name} averages over {median:.0f} of {targets} targets (median row): more than "
      f"{SPREAD_OUT:.0%}, so outputs are much alike. Lower config.debias.epsilon."
    )
    return finding(check, median, most, say, name=name)
  say = ""
  if chosen and median < LOOK_UP:
    say = (
      f"map {name} is a look-up of the nearest target ({median:.2f} effective targets in the "
      "median): little of the input's own weather is kept. Use the map 'equivariant', or raise "
      "config.debias.epsilon."
    )
  return finding(check, median, LOOK_UP, say, name=name)


def _dropped(name: str, facts: Mapping) -> Finding:
  kept = facts.get("letters", "")
  say = ""
  if not kept:
    say = (
      f"map {name} is the identity: no step of its recipe brings rows outside the fit nearer to "
      "the truth. Is there a bias at all, and are there enough rows? --config.debias.select=False "
      "takes all steps."
    )
  return finding(
    "steps that were not taken", len(facts["dropped"]), len(kept), say, name=name
  )


def tell(findings: Sequence[Finding], say: Callable[[str], None]) -> None:
  """Every warning as one line."""
  for each in findings:
    if each["level"] == "warning":
      say(f"debias: warning: {each['message']}")


def _places(numbers: np.ndarray) -> str:
  return ", ".join(map(str, numbers[:SHOWN])) + (
    ", ..." if len(numbers) > SHOWN else ""
  )
