"""Fields that the prior draws without a condition while it trains, measured beside true ones."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import PartitionSpec

from downscaling.fields import statistics
from downscaling.metrics import spectra
from downscaling.report import figures, themes
from downscaling.runtime import mesh as meshes
from downscaling.runtime import random_keys


def evaluator(
  sampler: Callable,
  mesh: jax.sharding.Mesh,
  fields: int,
  truth: np.ndarray,
  stats: statistics.Statistics,
  seed: int,
) -> Callable:
  """Evaluator: spectrum of fields drawn from nothing against held-out ones, beside its floor.

  Args:
    sampler: (keys [B], None, parameters) -> (fields [B, *space, C], in data units, misfit); see
      assembly/samples.py.
    fields: how many to draw; rounded up to fill the devices.
    truth: normalised held-out fields [V, *space, C]; the floor compares its second half with its
      first.
  Returns: evaluator with melr_weighted, melr_energy, the same of the floor, diverged (how many
    fields ran away and are left out; the rest is infinite if all did), and images "spectrum" and
    "fields".
  """
  count = -(-fields // mesh.size) * mesh.size
  alone = jax.shard_map(
    lambda keys, params: sampler(keys, None, params)[0],
    mesh=mesh,
    in_specs=(meshes.ROWS, PartitionSpec()),
    out_specs=meshes.ROWS,
    check_vma=False,  # no communication within: each device draws its own fields
  )

  @functools.partial(jax.jit, out_shardings=meshes.replicated(mesh))
  def draw(params):
    keys = jax.vmap(
      functools.partial(jax.random.fold_in, random_keys.key(seed, "watching"))
    )(np.arange(count))
    return alone(keys, params)

  truth = np.asarray(stats.restore(truth))[..., 0]
  shells = spectra.shell_energies(truth[: len(truth) // 2])
  reference = shells.mean(0)
  floor = spectra.energies(truth[len(truth) // 2 :])
  floors = spectra.melr(floor, reference)

  def evaluate(state) -> dict:
    drawn = np.asarray(draw(state.ema[0]))[..., 0]
    drawn = drawn[np.isfinite(drawn).all(axis=tuple(range(1, drawn.ndim)))]
    energy = spectra.energies(drawn) if len(drawn) else np.full_like(reference, np.inf)
    melr = spectra.melr(energy, reference)
    metrics = {f"melr_{k}": melr[k] for k in ("weighted", "energy")} | {
      "diverged": count - len(drawn)
    }
    metrics |= {f"melr_{k}_floor": floors[k] for k in ("weighted", "energy")}
    if not (meshes.is_main() and len(drawn)):
      return metrics
    few = min(8, len(drawn), len(truth))
    half, held = (
      spectra.band(shells, len(drawn)),
      spectra.energy_holding_shells(reference),
    )
    ends = [
      reference * (1 - np.minimum(half, 0.99)),
      floor,
      reference * (1 + half),
    ]
    spectrum = figures.spectrum(
      reference, {"unconditional": energy}, np.stack(ends), held
    )
    return metrics | {
      "spectrum": themes.pixels(spectrum),
      "fields": themes.pixels(gallery(drawn[:few], truth[:few])),
    }

  return evaluate


def gallery(drawn: np.ndarray, truth: np.ndarray) -> figures.Draw:
  """Drawn fields over as many true ones, both [S, *space]."""

  def draw(theme):
    figure = themes.page(3.2)
    axes = figure.subplots(2, len(drawn), sharex=True, sharey=True, squeeze=False)
    limit = float(np.abs(truth).max())
    for row, (name, fields) in enumerate((("drawn", drawn), ("true", truth))):
      for panel, field in zip(axes[row], fields, strict=True):
        if field.ndim == 1:
          panel.plot(field, color=theme.ink, linewidth=0.8)
          panel.set_ylim(-1.1 * limit, 1.1 * limit)
        else:
          panel.imshow(field, vmin=-limit, vmax=limit, cmap="RdBu_r")
        panel.set(xticks=[], yticks=[])
      axes[row, 0].set_ylabel(name)
    return figure

  return draw
