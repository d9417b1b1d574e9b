"""What a report is made from: arrays and records that finished stages left on disk, and the numbers
they give.
"""

import dataclasses
import functools
import math
import os
import platform
from collections.abc import Callable
from typing import Any

import numpy as np

from downscaling.fields import symmetry
from downscaling.fields.domain import Domain
from downscaling.fields.operators import Operator
from downscaling.metrics import bootstrap, calibration, distances, judge, scoring
from downscaling.metrics.ensembles import Ensemble
from downscaling.metrics.increments import Series
from downscaling.metrics.reference import Reference

CLIMATOLOGY = 256  # held-out fields that stand for an ensemble without a condition

TITLES = {
  "ks-8x": "Kuramoto–Sivashinsky, 8×",
  "ks-16x-series": "Kuramoto–Sivashinsky in time, 16×",
  "kolmogorov-8x": "Kolmogorov flow, 8×",
  "kolmogorov-16x": "Kolmogorov flow, 16×",
}


@dataclasses.dataclass(frozen=True)
class Evidence:
  """One experiment's results. Every part but the name may be absent; its section then says which
  job makes it.

  Fields carry no channel axis: one report a channel. K conditions, M members, S and R rows.

  Attributes:
    experiment: key of the table of published numbers, e.g. "ks-8x".
    coarse: {"lflr": y, map: T y, ...}, [S, *coarse] each. default: the map that samples are drawn
      behind, or None.
    sources: {row: y [S, *coarse]} for rows not made from coarse["lflr"].
    coarse_reference, coarse_floor: [R, *coarse] and [P, *coarse], independent held-out C′x.
    domain, coarse_domain: of fine and coarse fields; None for periodic boxes of equal sides.
    group, coarse_moves: symmetry of the coarse grid; moves: of the fine one.
    quadratic: N of the equation, see higher_order, or None.
    effective_targets: {row: {quantile: over how many targets a row of the fit is averaged}} of
      entropic maps.
    samples: {set: [K, M, *fine], ...}, e.g. "equivariant+diffusion"; an unconditional set is [S, 1,
      *fine]. Arrays, or ensembles that are read a block at a time (metrics/ensembles.py).
    conditions: {row: y′ [K, *coarse]}. misfits: {row: χ² [K, M] of every member's misfit to its
      condition}.
    truth: {row: [K, *fine]}, the fields whose own C′x were the conditions ("true+diffusion").
    fine_reference, fine_floor: [R, *fine] and [P, *fine], independent held-out x.
    origins: {row of coarse or samples, "reference", "floor": where its rows come from}; rows of a
      set that is not named are taken as independent.
    step: time between rows that follow each other, where rows are in time.
    draws: how many bootstrap replicates. seed: of them.
    guesses: {row of truth: [K, *fine]}, an interpolation of its conditions, which a forecast should
      beat.
    operator: C′.
    series: of samples in time, or None; above, their frames are rows, and K counts frames.
    health: findings of the debias job, {"level", "check", "map", "value", "limit", "message"} each.
    history: the solver's checks, {"iteration": [...], "epsilon": [...], "error": [...]}
      (debias/diagnostics.json).
    mean_cost: of the solve, to print ε relative to it; threshold: marginal error at which it calls
      itself converged.
    loss: (steps, values).
    symbol, unit, length, length_unit: what axes say; length is the box size.
    provenance: config_hash (str), versions, config, times (seconds by stage), cost (see costs.py),
      sizes, seeds, machine (dicts), rows ({row: "held-out" or "in-sample"}), command, commit (str).
      All optional.
  """

  experiment: str
  coarse: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  sources: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  coarse_reference: np.ndarray | None = None
  coarse_floor: np.ndarray | None = None
  domain: Domain | None = None
  coarse_domain: Domain | None = None
  default: str | None = None
  origins: dict[str, bootstrap.Rows] = dataclasses.field(default_factory=dict)
  step: float | None = None
  draws: int = bootstrap.DRAWS
  seed: int = 0
  group: symmetry.Group | None = None
  coarse_moves: symmetry.Moves | None = None
  moves: symmetry.Moves | None = None
  quadratic: Callable[[np.ndarray], np.ndarray] | None = None
  effective_targets: dict[str, dict[str, float]] = dataclasses.field(
    default_factory=dict
  )
  samples: dict[str, distances.Members] = dataclasses.field(default_factory=dict)
  conditions: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  misfits: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  truth: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  guesses: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  fine_reference: np.ndarray | None = None
  fine_floor: np.ndarray | None = None
  operator: Operator | None = None
  series: Series | None = None
  health: list[dict] = dataclasses.field(default_factory=list)
  history: dict[str, list] | None = None
  mean_cost: float | None = None
  threshold: float | None = None
  loss: tuple[Any, Any] | None = None
  symbol: str = "u"
  unit: str = ""
  length: float = 1.0
  length_unit: str = ""
  provenance: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for rows, name in ((self.coarse, "coarse"), (self.samples, "fine")):
      if rows and (
        getattr(self, f"{name}_reference") is None
        or getattr(self, f"{name}_floor") is None
      ):
        raise ValueError(
          f"{name} rows {sorted(rows)} came without {name}_reference and {name}_floor: a number "
          "needs a set to be compared with and an independent one for its floor."
        )
    strangers = sorted({*self.truth, *self.conditions, *self.guesses} - {*self.samples})
    if strangers:
      raise ValueError(
        f"truth or conditions for {strangers}, which are not among the samples "
        f"{sorted(self.samples)}."
      )

  @property
  def title(self) -> str:
    return TITLES.get(self.experiment, self.experiment)

  @property
  def u(self) -> str:
    """The axis label of field values."""
    return f"{self.symbol} ({self.unit})" if self.unit else self.symbol

  @functools.cached_property
  def calibrations(self) -> dict[str, calibration.Calibration]:
    """Scores against the truth of rows that have one and two members or more."""
    return {
      name: calibration.calibrate(*self.whole(name))
      for name in self.truth
      if self.samples[name].shape[1] > 1
    }

  @functools.cached_property
  def firsts(self) -> dict[str, scoring.FirstMembers]:
    """The first whole member of every condition, of every set."""
    return {name: scoring.first_members(x, name) for name, x in self.samples.items()}

  def whole(self, name: str) -> tuple[Ensemble, np.ndarray]:
    """(members, truth) of a set's conditions none of whose members failed."""
    kept = np.flatnonzero(self.firsts[name].whole.all(axis=1))
    return Ensemble.of(self.samples[name]).only(kept), self.truth[name][kept]

  @functools.cached_property
  def references(self) -> dict[str, dict[str, calibration.Reference]]:
    """{row: {"climatology", "interpolation"}}: what every calibrated row must beat."""
    found = {}
    for name in self.calibrations:
      truth = self.whole(name)[1]
      found[name] = {
        "climatology": calibration.climatology(self._true_fields[:CLIMATOLOGY], truth)
      }
      if name in self.guesses:
        found[name]["interpolation"] = calibration.single(
          self.guesses[name], self.truth[name]
        )
    return found

  @property
  def _true_fields(self) -> np.ndarray:
    assert self.fine_reference is not None  # samples do not come without
    return self.fine_reference

  @functools.cached_property
  def coarse_judge(self) -> judge.Judge:
    """Of coarse rows; without a group, symcov is covRMSE."""
    assert self.coarse_reference is not None  # coarse rows do not come without
    group = self.group or symmetry.trivial(math.prod(self.coarse_reference.shape[1:]))
    moves = None if self.group is None else self.coarse_moves
    of_grid = {"moves": moves, "group": group, "quadratic": self.quadratic}
    return self._judge("coarse", self.coarse_domain, **of_grid)

  @functools.cached_property
  def fine_judge(self) -> judge.Judge:
    """Of samples."""
    return self._judge("fine", self.domain, moves=self.moves)

  def _judge(self, level: str, domain: Domain | None, **of_grid) -> judge.Judge:
    fields = {kind: getattr(self, f"{level}_{kind}") for kind in ("reference", "floor")}
    origins = {
      kind: self.origins.get(kind) or bootstrap.single(len(x))
      for kind, x in fields.items()
    }
    return judge.Judge(
      Reference(fields["reference"], domain),
      origins["reference"],
      fields["floor"],
      origins["floor"],
      draws=self.draws,
      seed=self.seed,
      **of_grid,
    )

  @functools.cached_property
  def metrics(self) -> dict:
    """metrics.json, checked against its schema."""
    given = self.provenance
    debias, samples = {}, {}
    if self.coarse:
      debias = scoring.debias_rows(
        self.coarse, self.sources, self.coarse_judge, self.origins, self.step
      )
    if self.samples:
      samples = scoring.sample_rows(
        self.samples,
        self.conditions,
        self.fine_judge,
        self.operator,
        self.misfits,
        self.origins,
        self.firsts,
      )
    metrics = {
      "experiment": self.experiment,
      "default": self.default,
      "debias": debias,
      "samples": samples,
      "calibration": {
        name: c.as_json()
        | {"references": {k: r._asdict() for k, r in self.references[name].items()}}
        for name, c in self.calibrations.items()
      },
      "rows": dict(given.get("rows", {})),
      "sizes": self.sizes() | dict(given.get("sizes", {})),
      "seeds": dict(given.get("seeds", {})),
      "versions": dict(given.get("versions", {})),
      "config_hash": str(given.get("config_hash", "unknown")),
      "command": given.get("command"),
      "commit": given.get("commit"),
      "seconds": dict(given.get("times", {})),
      "cost": dict(given.get("cost", {})),
      "machine": dict(given.get("machine") or machine()),
      **({} if self.series is None else {"series": self.series.rows()}),
      "notes": (
        "interval: 2.5 and 97.5 % of the row's own value, its trajectories drawn anew. floor: "
        "2.5, 50 and 97.5 % of the same metric of true sets with as many rows of as many "
        "trajectories, against the same reference. Distribution metrics of samples see one member "
        "of every condition; variability and constraint see all members."
        + (
          ""
          if self.series is None
          else " Frames of series are rows, in the floors as well."
        )
      ),
    }
    scoring.check_schema(metrics)
    return metrics

  def sizes(self) -> dict[str, list[int]]:
    """Shapes of every set that was compared."""
    sets = {
      "coarse_reference": self.coarse_reference,
      "fine_reference": self.fine_reference,
    }
    sets |= {f"coarse.{name}": x for name, x in self.coarse.items()}
    sets |= {f"samples.{name}": x for name, x in self.samples.items()}
    return {name: list(x.shape) for name, x in sets.items() if x is not None}

  def convergence(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(iterations, ε, errors) of every check with a finite error, ε over the mean cost if that is
    known.

    None if there is no record. Raises ValueError if it has another form.
    """
    if not self.history:
      return None
    try:
      steps, epsilon, errors = (
        np.array(self.history[key], float) for key in ("iteration", "epsilon", "error")
      )
      kept = np.isfinite(errors) & (errors > 0) & (epsilon > 0)
    except (KeyError, TypeError, ValueError):
      raise ValueError(
        f"a Sinkhorn record {str(self.history)[:80]!r} came; need "
        f"{{'iteration': [...], 'epsilon': [...], "
        "'error': [...]} of one length. Was diagnostics.json made by another version?"
      ) from None
    return (
      (steps[kept], epsilon[kept] / (self.mean_cost or 1.0), errors[kept])
      if kept.any()
      else None
    )


def machine() -> dict[str, str | int]:
  """Processor model, cores and system of this host."""
  model = platform.processor() or platform.machine()
  try:
    with open("/proc/cpuinfo") as file:
      model = next(
        (
          line.split(":", 1)[1].strip()
          for line in file
          if line.startswith("model name")
        ),
        model,
      )
  except OSError:
    pass  # only Linux has it
  return {
    "processor": model,
    "cores": os.cpu_count() or 1,
    "system": f"{platform.system()} {platform.release()}",
  }
