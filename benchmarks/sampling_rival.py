"""Eq. 7 at its best: its strength α is fitted on calibration conditions, then it meets our default
on test conditions.

Each variant of the rival is a solver with a number of steps. Euler–Maruyama with 256 steps is the
paper's. Our best solver, DPM-Solver++(2M) SDE, is swept over η, too, and over where it starts: from
noise, as the paper does, or from our draw of the Gaussian posterior at σ = 3. `normalise` is not
swept: it multiplies α by a constant of the operator.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import sampling_cases as cases

# Short steps bear a large α: what runs away at 5 with 32 steps is best near 50 with 256. α = 1 is a
# case of its own.
LONG = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
SHORT = (4.0, 8.0, 16.0, 32.0, 64.0)
# no larger α is tried in a setting once one has so many times its least member RMSE: members run
# away
HOPELESS = 1.5
REFINED = 2  # times that the interval on either side of the best α is halved
LARGEST = 1000.0  # no α above it
ETAS = (1.0, 2.5, 10.0)
STARTS = {"noise": cases.NOISE, "gaussian": {}}
# a choice by CRPS is drawn as well if it has so much less CRPS than the choice by member RMSE
APART = 0.02


class Variant(NamedTuple):
  """name: of the solver and its steps. settings: {what was set: overrides of config.sampling}.
  alphas: ascending.
  """

  name: str
  settings: dict[str, dict]
  alphas: tuple[float, ...]


def _sde(steps: int) -> Variant:
  settings = {}
  for start, low in STARTS.items():
    for eta in ETAS:
      settings[f"η{eta:g} from {start}"] = (
        cases.case("paper", steps, eta) | cases.OVERWRITE | low
      )
  return Variant(f"sde {steps}", settings, LONG)


VARIANTS = (Variant("em 256", {"from noise": cases.EQ7}, SHORT), _sde(32), _sde(16))


class Fit(NamedTuple):
  """One variant's sweep. tried: {setting: {α: scores}}. by_error, by_crps: (setting, α) with the
  least of each.
  """

  tried: dict[str, dict[float, dict]]
  by_error: tuple[str, float]
  by_crps: tuple[str, float]


def fit(variant: Variant, measure: Callable[[dict], dict]) -> Fit:
  """Sweeps α in every setting of a variant, then α finely in the setting with the least member
  RMSE.

  measure: overrides of config.sampling -> scores with "member" and "crps", or without them where
    members ran away.
  Raises: ValueError if members ran away in all.
  """
  tried = {}
  for setting, overrides in variant.settings.items():
    tried[setting] = _upwards(variant.alphas, _at(overrides, measure))
  setting, _ = best(tried, "member")
  _between(tried[setting], _at(variant.settings[setting], measure))
  return Fit(tried, best(tried, "member"), best(tried, "crps"))


def best(tried: dict[str, dict[float, dict]], column: str) -> tuple[str, float]:
  """(setting, α) with the least of a column."""
  found = [
    (scores[column], setting, alpha)
    for setting, by_alpha in tried.items()
    for alpha, scores in by_alpha.items()
    if column in scores
  ]
  if not found:
    raise ValueError(
      f"members of Eq. 7 ran away at every α tried in {list(tried)}: there is no best α."
    )
  return min(found)[1:]


def _at(overrides: dict, measure: Callable[[dict], dict]) -> Callable[[float], dict]:
  return lambda alpha: measure(overrides | {"guidance.alpha": alpha})


def _upwards(
  alphas: tuple[float, ...], score: Callable[[float], dict]
) -> dict[float, dict]:
  """{α: scores} of alphas in turn until members run away, and of twice the largest for as long as
  that is the best.
  """
  ahead, by_alpha = list(alphas), {}
  while ahead:
    alpha = ahead.pop(0)
    by_alpha[alpha] = score(alpha)
    error, least = (
      by_alpha[a].get("member", math.inf) for a in (alpha, _least(by_alpha))
    )
    if error > HOPELESS * least:
      break
    if not ahead and error == least and 2 * alpha <= LARGEST:
      ahead.append(2 * alpha)
  return by_alpha


def _between(by_alpha: dict[float, dict], score: Callable[[float], dict]) -> None:
  """Adds the geometric mean of the best α and each neighbour, REFINED times over."""
  for _ in range(REFINED):
    ordered = sorted(by_alpha)
    place = ordered.index(_least(by_alpha))
    beside = [ordered[i] for i in (place - 1, place + 1) if 0 <= i < len(ordered)]
    for neighbour in beside:
      middle = float(f"{math.sqrt(neighbour * ordered[place]):.3g}")
      by_alpha[middle] = score(middle)


def _least(by_alpha: dict[float, dict]) -> float:
  return min(by_alpha, key=lambda alpha: by_alpha[alpha].get("member", math.inf))


def contest(fits: dict[str, Fit]) -> dict[str, dict]:
  """The cases that are drawn on test conditions: our default, and Eq. 7 in all its forms."""
  found = {cases.DEFAULT: cases.CASES[cases.DEFAULT]}
  for variant in VARIANTS:
    one = fits[variant.name]
    found[f"eq7 best {variant.name}"] = _chosen(variant, one.by_error)
    if _gain(one) > APART:
      found[f"eq7 crps-best {variant.name}"] = _chosen(variant, one.by_crps)
  return found | {
    name: cases.CASES[name] for name in ("eq7 library em 256", "eq7 α1 em 256")
  }


def _chosen(variant: Variant, choice: tuple[str, float]) -> dict:
  setting, alpha = choice
  return variant.settings[setting] | {"guidance.alpha": alpha}


def _gain(one: Fit) -> float:
  """Share of CRPS that the choice by CRPS has less than the choice by member RMSE."""
  by_error, by_crps = (
    one.tried[setting][alpha]["crps"] for setting, alpha in (one.by_error, one.by_crps)
  )
  return 1 - by_crps / by_error


def swept(name: str, one: Fit) -> list[str]:
  """Lines on one sweep: member RMSE and CRPS by setting and α, and what was chosen."""
  lines = []
  for setting, by_alpha in one.tried.items():
    ordered = sorted(by_alpha)
    lines.append(
      "  ".join([f"{name} {setting}, α", *(f"{alpha:>6.3g}" for alpha in ordered)])
    )
    for column in ("member", "crps"):
      cells = (by_alpha[alpha].get(column) for alpha in ordered)
      shown = (" away" if cell is None else f"{cell:.4f}" for cell in cells)
      lines.append(
        "  ".join(
          [
            f"{'':<{len(name + setting) - 5}}{column:>9}",
            *(f"{cell:>6}" for cell in shown),
          ]
        )
      )
  setting, alpha = one.by_error
  lines.append(f"{name}: best member RMSE at α = {alpha:g}, {setting}")
  if one.by_crps != one.by_error:
    setting, alpha = one.by_crps
    lines.append(
      f"{name}: CRPS would choose α = {alpha:g}, {setting}, with {100 * _gain(one):.1f} % less of "
      "it"
    )
  return [*lines, ""]


COSTS = ("calls", "ms", "wall")
QUALITY = ("member", "mean", "crps", "energy", "melre", "cov")
BEST = "the best of each"
# (what, column, which rival, at most)
AIMS = (
  ("member RMSE, of the best", "member", BEST, 1 / 4),
  ("CRPS, of the best", "crps", BEST, 1 / 4),
  ("wall time, of its 256 steps", "wall", "eq7 best em 256", 1 / 10),
  ("wall time, of its best 32 steps", "wall", "eq7 best sde 32", 1 / 3),
)


def _off(row: dict) -> dict[str, float]:
  """{column: distance from what is right} of the columns in which less is not better."""
  if "member" not in row:
    return {}
  return {
    "s/e": abs(math.log(row["s/e"])),
    "χ²": abs(math.log(row["χ²"])),
    "in50": abs(row["in50"] - row["ideal50"]),
    "in90": abs(row["in90"] - row["ideal90"]),
  }


def ratios(rows: dict[str, dict]) -> dict[str, dict]:
  """{rival: {column: our default's over the rival's, "worse": names of the columns where ours is
  worse}}.

  The last row, BEST, is against the best rival of each column. "worse" judges spread over error, χ²
  and coverage, too, by their distance from what is right. A rival whose members ran away has no
  scores: its costs alone are compared.
  """
  ours = rows[cases.DEFAULT]
  rivals = [name for name in rows if name != cases.DEFAULT]
  less = {name: _numbers(rows[name]) for name in rivals}
  off = {name: _off(rows[name]) for name in rivals}
  found = {name: _against(ours, less[name], off[name]) for name in rivals}
  found[BEST] = _against(ours, _least_of_each(less), _least_of_each(off))
  return found


def _numbers(row: dict) -> dict[str, float]:
  return {key: row[key] for key in (*COSTS, *QUALITY) if key in row}


def _least_of_each(rows: dict[str, dict[str, float]]) -> dict[str, float]:
  columns = dict.fromkeys(key for row in rows.values() for key in row)
  return {key: min(row[key] for row in rows.values() if key in row) for key in columns}


def _against(ours: dict, less: dict[str, float], off: dict[str, float]) -> dict:
  found = {key: ours[key] / value for key, value in less.items()}
  distances = _off(ours)
  worse = [key for key, ratio in found.items() if ratio > 1]
  worse += [key for key, distance in off.items() if distances[key] > distance]
  return found | {"worse": ", ".join(worse)}


def aims(rows: dict[str, dict], found: dict[str, dict]) -> list[str]:
  """Lines on what is aimed at and whether it is reached, and on rivals that have no scores."""
  lines = []
  for what, column, rival, most in AIMS:
    ratio = found[rival].get(column, math.nan)
    verdict = "met" if ratio <= most else "missed"
    lines.append(f"ours over theirs, {what}: {ratio:.3f} (aim {most:.3f}: {verdict})")
  away = {name: row["runaways"] for name, row in rows.items() if "runaways" in row}
  return lines + [
    f"{name}: {count} members ran away, so it has no scores"
    for name, count in away.items()
  ]
