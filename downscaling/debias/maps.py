"""The debiasing maps by name: how each is fitted, what is said of the fit, and how any of them is
loaded.

| name | map | keeps the input's weather |
|---|---|---|
| entropic | the paper's: entropic optimal transport, out of sample | hardly, at small ε |
| symmetric | the same between orbits under the equation's group: equivariant | somewhat |
| rescaled | entropic, then spectral gains fitted on rows outside its fit: against barycentric
shrinkage | hardly |
| minibatch | entropic, its potential fitted on a stream of batches: for more rows than a full solve
takes | hardly |
| gaussian | optimal transport between group-averaged Gaussians | nearly all |
| equivariant | steps by config.debias.recipe (recipes.py) | nearly all |
| quantile | empirical quantiles of every point by itself, as BCSD has it | nearly all |
| pooled_quantile | the same; points that the group takes to each other share rows | nearly all |
"""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from downscaling.debias import bias_symmetry, map_files, quantile_map
from downscaling.debias.entropic import entropic_map, minibatch, sinkhorn
from downscaling.debias.equivariant import equivariant_map, recipes, step_selection
from downscaling.fields import symmetry
from downscaling.fields.quadratic import Quadratic
from downscaling.runtime import checkpoints as checkpoints_lib
from downscaling.runtime import files, progress
from downscaling.runtime import mesh as meshes

SPARE = 8  # one row of so many is kept out of a fit that needs rows of its own
QUANTILE = ("quantile", "pooled_quantile")  # names of quantile maps
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
  """One map after the other."""

  kind: ClassVar[str] = "chain"
  maps: tuple

  def __call__(self, y: np.ndarray) -> np.ndarray:
    for each in self.maps:
      y = each(y)
    return y

  def outside(self, y: np.ndarray) -> np.ndarray:
    return self.maps[0].outside(y)

  def save(self, folder: str | os.PathLike) -> None:
    """The maps as FOLDER/0, FOLDER/1, ..., then map.json."""
    for i, each in enumerate(self.maps):
      each.save(files.as_path(folder) / str(i))
    map_files.save(folder, self.kind, {"length": len(self.maps)}, {})

  @classmethod
  def load(cls, folder: str | os.PathLike) -> "Chain":
    record, _ = map_files.load(folder, cls.kind)
    return cls(
      tuple(load(files.as_path(folder) / str(i)) for i in range(int(record["length"])))
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
  """A map of fields whose channels are divided by `scale` [C], so that their units do not count."""

  kind: ClassVar[str] = "scaled"
  map: Any
  scale: np.ndarray

  def __call__(self, y: np.ndarray) -> np.ndarray:
    return self.map(y / self.scale) * self.scale

  def outside(self, y: np.ndarray) -> np.ndarray:
    return self.map.outside(y / self.scale)

  def save(self, folder: str | os.PathLike) -> None:
    """The map as FOLDER/map, then map.json."""
    self.map.save(files.as_path(folder) / "map")
    map_files.save(folder, self.kind, {}, {"scale": self.scale})

  @classmethod
  def load(cls, folder: str | os.PathLike) -> "Scaled":
    _, arrays = map_files.load(folder, cls.kind)
    if set(arrays) != {"scale"}:
      raise map_files.damaged(folder, ", ".join(sorted(arrays)))
    return cls(load(files.as_path(folder) / "map"), arrays["scale"])


def load(folder: str | os.PathLike) -> Callable[[np.ndarray], np.ndarray]:
  """The map in a folder, of whatever kind: [S, *space, C] -> the same shape.

  Raises: FileNotFoundError if there is none; ValueError if it is damaged or of a kind that this
    version does not know.
  """
  kind = map_files.kind_of(folder)
  if kind not in KINDS:
    raise ValueError(
      f"{folder}/map.json holds a map of kind {kind!r}, this version reads {sorted(KINDS)}."
    )
  return KINDS[kind].load(folder)


# The kind in map.json -> the class that reads it.
KINDS: dict[str, Any] = {
  each.kind: each
  for each in (
    entropic_map.EntropicMap,
    equivariant_map.EquivariantMap,
    quantile_map.QuantileMap,
    Chain,
    Scaled,
  )
}


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
  """What all fits of a job share.

  group: of the equation on the coarse grid; for `fit`, the one that maps commute with. subgroup:
  which part of it they may use, "auto" for the largest that the bias respects (groups.py). towards:
  what noisy covariances are drawn towards, see recipes.fit. select: are steps of the recipe taken
  only if rows outside the fit gain (selection.py)? outlier: robust standard deviations of a value
  beyond which rows are refused.

  quadratic: the equation's quadratic term, or None. sinkhorn: keywords of sinkhorn.fit.
  minibatch: {"batch": rows, "passes": over the source}. recipe: see recipes.fit. quantiles: of the
  quantile maps. config_hash: of
  the blocks this stage depends on. mesh, stop, interruptible: of the job, see
  runtime/supervision.py. agree: see Checkpoints. weights: of the channels, for squared errors in
  units of their own standard deviation; () for one alike for all.
  """

  group: symmetry.Group
  subgroup: str = bias_symmetry.AUTO
  towards: str | None = None
  select: bool = True
  outlier: float = 100.0
  quadratic: Quadratic | None = None
  sinkhorn: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  minibatch: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  recipe: str | tuple = "G"
  quantiles: int = 1000
  seed: int = 0
  config_hash: str = ""
  mesh: jax.sharding.Mesh | None = None
  stop: Callable[[], bool] = lambda: False
  interruptible: Callable[[str], contextlib.AbstractContextManager] = (
    contextlib.nullcontext
  )
  agree: Callable[[Any], list] = lambda value: [value]
  weights: tuple[float, ...] = ()


def fit(
  name: str,
  folder: pathlib.Path,
  source: np.ndarray,
  target: np.ndarray,
  setting: Setting,
):
  """Fits (or goes on fitting) a map by name.

  Args:
    folder: of this map; a fit that can go on leaves its checkpoints there.
    source, target: [S, *space, C] float32, whole on every process.
  Returns: (map, facts about the fit as plain values); of the facts, process 0 has all.
  Raises: ValueError for an unknown name; what the fits raise; supervision.Interrupted.
  """
  if name not in FITS:
    raise ValueError(
      f"config.debias.maps has {name!r}, which is unknown; use some of {sorted(FITS)}."
    )
  channels = source.shape[-1]
  if channels == 1:
    return FITS[name](folder, source, target, setting)
  scale = _scale(target, setting.weights or (1.0,) * channels)
  made, facts = FITS[name](folder, source / scale, target / scale, setting)
  return Scaled(made, scale), facts | {"scale": scale.tolist()}


def _scale(target: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
  """What channels are divided by, [C] float32: a squared difference of 1 then counts its weight in
  standard deviations of the target.
  """
  spread = target.std(
    axis=tuple(range(target.ndim - 1)),
    dtype=np.float64,
  )
  if len(weights) != len(spread) or not (spread > 0).all():
    raise ValueError(
      f"{len(weights)} weights for {len(spread)} channels with standard deviations "
      f"{spread.tolist()}: need one weight a channel, and no channel that is constant."
    )
  return np.asarray(spread / np.sqrt(weights), np.float32)


def _entropic(
  folder, source, target, setting: Setting, group: symmetry.Group | None = None
):
  x, y = (np.asarray(a, np.float32).reshape(len(a), -1) for a in (source, target))
  most = setting.sinkhorn.get("max_iterations", 2000)
  with (
    checkpoints_lib.opened(
      folder / "checkpoints", setting.config_hash, setting.agree
    ) as saver,
    progress.Progress(folder.name, most, "iterations at most") as bar,
  ):
    advance = lambda count, eps, error: bar.advance(count, error=error, epsilon=eps)
    shared = {
      "mesh": setting.mesh,
      "stop": setting.stop,
      "agree": setting.agree,
      "progress": advance,
    }
    result = sinkhorn.fit(
      x, y, checkpoints=saver, group=group, **shared, **setting.sinkhorn
    )
  if not result.converged and meshes.is_main():
    progress.say(
      f"debias: {folder.name} not converged after {sinkhorn.last_check(result.history)}; wanted "
      f"{result.threshold:g} at ε = {result.epsilon:.3g}: raise --config.debias.max_iterations or "
      "epsilon."
    )
  reach = entropic_map.reach_of(x, y, group)
  made = entropic_map.EntropicMap(
    y, result.g, result.epsilon, source.shape[1:], group, reach
  )
  return made, plan(
    result, made, source
  ) if meshes.is_main() else {}  # a pass over all pairs, for the file alone


def plan(
  result: sinkhorn.Fit, made: entropic_map.EntropicMap, source: np.ndarray
) -> dict[str, Any]:
  """What the plan looks like; Σ P log P = −entropy and ⟨P, C⟩ = ⟨f⟩ + ⟨g⟩ + ε·entropy, with
  marginals as converged.
  """
  effective = np.asarray(made.effective_targets(source), np.float64)
  entropy = math.log(len(source)) + float(np.log(effective).mean())
  duals = sum(float(np.asarray(p).mean(dtype=np.float64)) for p in (result.f, result.g))
  return {
    "converged": result.converged,
    "threshold": result.threshold,
    "path": result.path,
    "history": result.history,
    "epsilon": result.epsilon,
    "epsilon_relative": result.epsilon / result.mean_cost,
    "mean_cost": result.mean_cost,
    "transport_cost": duals + result.epsilon * entropy,
    "plan_entropy": entropy,
    "effective_targets": {
      f"{q:g}": float(np.quantile(effective, q)) for q in QUANTILES
    },
  }


def _symmetric(folder, source, target, setting: Setting):
  group = setting.group.over_channels(source.shape[-1], last=True)
  return _entropic(folder, source, target, setting, group)


def _rescaled(folder, source, target, setting: Setting):
  """Rows of the fit are shrunk more than others, and would mislead: the gains see others."""
  devices = setting.mesh.size if setting.mesh else 1
  kept = (len(source) - max(2, len(source) // SPARE)) // devices * devices
  made, facts = _entropic(folder, source[:kept], target, setting)
  gains = recipes.fit(
    made(source[kept:]),
    target,
    group=setting.group,
    recipe="G",
  )
  return Chain((made, gains)), facts | {"spare_rows": len(source) - kept}


def _minibatch(folder, source, target, setting: Setting):
  """One device's work: process 0 does it and the others read what it wrote."""
  batch, passes = setting.minibatch["batch"], setting.minibatch["passes"]
  x, y = (np.asarray(a, np.float32).reshape(len(a), -1) for a in (source, target))
  spare = max(2, len(x) // SPARE)
  if meshes.is_main():
    steps = max(1, round(passes * ((len(x) - spare) // batch)))
    with (
      checkpoints_lib.opened(folder / "checkpoints", setting.config_hash) as saver,
      progress.Progress(folder.name, steps, "steps") as bar,
    ):
      result = minibatch.fit(
        minibatch.shuffled(x[:-spare], batch, setting.seed),
        y,
        held_out=x[-spare:],
        epsilon=setting.sinkhorn["epsilon"],
        steps=steps,
        checkpoints=saver,
        stop=setting.stop,
        progress=lambda count, eps, error: bar.advance(count, error=error, epsilon=eps),
      )
    reach = entropic_map.reach_of(x[:-spare], y)
    made = entropic_map.EntropicMap(
      y, np.asarray(result.g), result.epsilon, source.shape[1:], reach=reach
    )
    facts = {
      key: getattr(result, key) for key in ("epsilon", "mean_cost", "history", "rows")
    }
    made.save(folder)
    files.write_json(folder / "facts.json", facts)
  setting.agree("minibatch")
  return load(folder), files.read_json(folder / "facts.json")


def _recipe(folder, source, target, setting: Setting, recipe: str | tuple):
  count, mine = jax.process_count(), jax.process_index()
  notes: list[dict] = []
  with progress.Progress(
    folder.name, len(recipes.letters(recipe, setting.quadratic)), "steps"
  ) as bar:
    made = recipes.fit(
      source[mine::count],
      target[mine::count],
      recipe=recipe,
      together=meshes.each_process,
      progress=bar.advance,
      notes=notes,
      stop=setting.stop,
      **_shared(setting),
    )
  return made, {
    "recipe": recipe,
    "steps": [step.kind for step in made.steps],
    "shrinkage": notes,
  }


def _shared(setting: Setting) -> dict[str, Any]:
  """What a fit by recipe and the trial of its steps have in common."""
  return {
    "group": setting.group,
    "quadratic": setting.quadratic,
    "towards": setting.towards,
    "seed": setting.seed,
  }


def _gaussian(folder, source, target, setting: Setting):
  return _recipe(folder, source, target, setting, "G")


def _equivariant(folder, source, target, setting: Setting):
  """The steps of the recipe that rows outside the fit ask for."""
  order = recipes.letters(setting.recipe, setting.quadratic)
  recipes.check_channels(source.shape[1:], order)
  if not setting.select:
    return _recipe(folder, source, target, setting, setting.recipe)
  with progress.Progress(f"{folder.name}: trials", len(order), "steps") as bar:
    clouds = (recipes.cloud(source, "source"), recipes.cloud(target, "target"))
    choice = step_selection.select(
      *clouds, order, stop=setting.stop, progress=bar.advance, **_shared(setting)
    )
  kept = setting.agree(choice.letters)[
    0
  ]  # all processes have all rows; the last bit of a sum may differ
  if kept:
    made, facts = _recipe(folder, source, target, setting, kept)
  else:
    made, facts = (
      equivariant_map.EquivariantMap((), source.shape[1:]),
      {"steps": [], "shrinkage": []},
    )
  trials = {"letters": kept, "dropped": choice.dropped, "trials": list(choice.trials)}
  return made, facts | {"recipe": setting.recipe} | trials


def _quantile(folder, source, target, setting: Setting):
  return quantile_map.fit(source, target, setting.quantiles), {
    "quantiles": setting.quantiles
  }


def _pooled_quantile(folder, source, target, setting: Setting):
  made = quantile_map.fit(source, target, setting.quantiles, setting.group)
  return made, {"quantiles": setting.quantiles, "images": len(setting.group)}


FITS = {
  "entropic": _entropic,
  "symmetric": _symmetric,
  "rescaled": _rescaled,
  "minibatch": _minibatch,
  "gaussian": _gaussian,
  "equivariant": _equivariant,
  "quantile": _quantile,
  "pooled_quantile": _pooled_quantile,
}
