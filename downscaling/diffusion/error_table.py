"""What a trained denoiser leaves unknown: its held-out error by mode and noise level, tabulated
once. The modes are those of a basis (fields/basis.py).

    e_k(σ) = E|(Qᵀ(D(x₀ + σn, σ) − x₀))_k|²

For a Gaussian field and an exact D this is S_kσ²/(S_k + σ²). A network knows more: modes that are
slaved to larger ones have a small part of that, and the gain of `measured` guidance
(sampling/gaussian_gain.py) lives on the difference.
"""

import hashlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from downscaling.diffusion import schedules
from downscaling.fields.basis import Basis, Trigonometric
from downscaling.runtime import files, progress, random_keys, supervision
from downscaling.runtime import mesh as meshes

FILE = "denoising_error.npz"  # beside the prior
LEVELS = 44
ROWS = 64  # fields a device takes at a time
VALUES, FEWEST = 2**21, 32
FLOOR = 1e-14  # of a level's largest mode: below float32's rounding, and above 0


class ErrorTable(NamedTuple):
  """sigmas: [K] ascending. errors: [K, *space, C] > 0, e_k(σ) of every mode, of unit-variance
  data.
  """

  sigmas: np.ndarray
  errors: np.ndarray


def rows(shape: tuple[int, ...]) -> int:
  """Fields of that shape that a table needs: VALUES in all, but FEWEST; each has as many modes as
  values, and a gain sums over many of them, so that larger fields may be fewer."""
  return max(FEWEST, VALUES // int(np.prod(shape)))


def check_covers(table: ErrorTable, sigmas, key: str) -> None:
  """Raises ValueError unless the table has noise levels on both sides of sigmas; key: where they
  are from.
  """
  low, high = float(np.min(sigmas)), float(np.max(sigmas))
  first, last = float(table.sigmas[0]), float(table.sigmas[-1])
  if first * (1 - schedules.ROUNDING) <= low and high <= last * (
    1 + schedules.ROUNDING
  ):
    return
  raise ValueError(
    f"{key} asks for noise levels from {low:g} to {high:g}, the prior's error is tabulated from "
    f"{first:g} to {last:g}: beyond them nothing is known of it. Sample within them, or move "
    f"{FILE} away and run `downscaling train` again, which keeps the prior and tabulates its error."
  )


def levels(sigma_min: float, sigma_max: float) -> np.ndarray:
  """LEVELS noise levels, even in ln σ: what a solver meets between sigma_min and sigma_max."""
  return np.geomspace(sigma_min, sigma_max, LEVELS).astype(np.float32)


def tabulate(
  denoiser: nn.Module,
  params: Any,
  x: np.ndarray,
  sigmas: np.ndarray,
  mesh: jax.sharding.Mesh,
  seed: int,
  stop: Callable[[], bool] = lambda: False,
  basis: Basis | None = None,
) -> ErrorTable:
  """The table over held-out fields x [V, *space, C], normalised, the same on every process; V
  beyond a multiple of the devices is left out. A mode's value is the mean over V fields, good to
  about V^−½.

  Row i at level k has its noise from fold_in(fold_in(key(seed, "error table"), k), i): of no
  device. No isotropy is assumed; modes k and −k of a real field are equal, and made so exactly.

  Args:
    params: replicated. stop: polled at each level.
    basis: None for waves along every axis.
  Raises:
    ValueError: fewer fields than devices.
    FloatingPointError: an error is not finite. supervision.Interrupted: stop said so; nothing is
    kept, the whole takes but a small part of a training run.
  """
  chunk = min(len(x) // mesh.size, ROWS) * mesh.size
  if not chunk:
    raise ValueError(
      f"{len(x)} held-out fields for {mesh.size} devices: need one a device "
      "(config.data.hfhr.calibration)."
    )
  count = len(x) // chunk * chunk
  modes = basis or Trigonometric(x.shape[1:-1])

  def local(params, x, ids, key, sigma):
    draw = lambda i: jax.random.normal(
      jax.random.fold_in(key, i),
      x.shape[1:],
      x.dtype,
    )
    noisy = x + sigma * jax.vmap(draw)(ids)
    error = (
      denoiser.apply(
        {"params": params},
        noisy,
        jnp.full(len(x), sigma),
      )
      - x
    )
    return jax.lax.psum(modes.power(error).sum(0), meshes.AXES)

  rows, one = meshes.ROWS, PartitionSpec()
  many = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(one, rows, rows, one, one),
    out_specs=one,
    check_vma=False,
  )  # check_vma: what is replicated after the sum is known to us, not to the checker
  summed = jax.jit(many)
  mine, blocks = meshes.host_rows(mesh, chunk), []
  for first in range(0, count, chunk):
    ids = np.arange(first, first + chunk, dtype=np.uint32)[mine]
    blocks.append(
      meshes.to_global(
        mesh,
        (np.asarray(x[ids], np.float32), ids),
        chunk,
      )
    )
  errors = np.zeros((len(sigmas), *x.shape[1:]))
  with progress.Progress("error table", len(sigmas), "noise levels") as bar:
    for k, sigma in enumerate(sigmas):
      if stop():
        raise supervision.Interrupted(
          f"the error table stopped at {k} of {len(sigmas)} noise levels"
        )
      key = jax.random.fold_in(random_keys.key(seed, "error table"), k)
      for block in blocks:
        errors[k] += (
          np.asarray(
            jax.device_get(summed(params, *block, key, np.float32(sigma))), np.float64
          )
          / count
        )
      bar.advance(1)
  if not np.isfinite(errors).all():
    raise FloatingPointError(
      "the denoising error is not finite: the prior is damaged, or diverged in training."
    )
  errors = modes.symmetrised(errors)
  largest = errors.max(
    axis=tuple(range(1, x.ndim - 1)),
    keepdims=True,
  )
  return ErrorTable(
    np.asarray(sigmas, np.float32),
    np.maximum(errors, FLOOR * largest).astype(np.float32),
  )


def save(folder: str | os.PathLike, table: ErrorTable, config_hash: str) -> None:
  """folder/FILE with a SHA-256 over numbers and config hash; all or nothing."""
  path = files.as_path(folder) / FILE
  about = {"config_hash": config_hash, "sha256": _digest(table, config_hash)}
  with files.full_disk_in_words(path, "the prior is whole"):
    files.write_npz(path, table._asdict() | about)


def load(folder: str | os.PathLike, config_hash: str) -> ErrorTable:
  """Raises FileNotFoundError or ValueError, with what to do, if the table is missing, damaged or of
  another prior.
  """
  path = files.as_path(folder) / FILE
  again = (
    "run `downscaling train` with the same --config and --workdir: it keeps the prior and "
    "tabulates its error"
  )
  if not path.exists():
    raise FileNotFoundError(
      f"{path} is missing, which guidance by the measured error reads: {again}."
    )
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
      table = ErrorTable(*(stored[k] for k in ErrorTable._fields))
      made_by, digest = str(stored["config_hash"]), str(stored["sha256"])
  except Exception as error:  # zip, numpy and zlib each raise their own
    raise ValueError(
      f"{path} is damaged ({error}): move it away and {again}."
    ) from error
  if digest != _digest(table, made_by):
    raise ValueError(
      f"{path} has changed since it was written: move it away and {again}."
    )
  if made_by != config_hash:
    raise ValueError(
      f"{path} belongs to a prior of config {made_by}, this one is {config_hash}: move it away and "
      f"{again}."
    )
  return table


def _digest(table: ErrorTable, config_hash: str) -> str:
  digest = hashlib.sha256(config_hash.encode())
  for array in table:
    digest.update(f"{array.shape}".encode())
    digest.update(np.ascontiguousarray(array, "<f4").tobytes())
  return digest.hexdigest()
