"""Mean, standard deviation and spectrum of the training split; normalisation and its inverse.

One mean and one standard deviation a channel: fields on a homogeneous domain have no preferred
point.
"""

import dataclasses
import math
import os

import numpy as np

from downscaling.fields.basis import Basis
from downscaling.runtime import files


@dataclasses.dataclass(frozen=True)
class Statistics:
  """mean, std: [C], units of the data. spectrum: [*space, C], the variance of every mode of the
  *normalised* field, a table of a basis (fields/basis.py). Over N modes it sums to N.
  """

  mean: np.ndarray
  std: np.ndarray
  spectrum: np.ndarray

  def normalise(self, x):
    """[..., C] in data units -> zero mean, unit variance."""
    return (x - _last(self.mean, x)) / _last(self.std, x)

  def restore(self, x):
    """The inverse of normalise."""
    return x * _last(self.std, x) + _last(self.mean, x)

  def repeated(self, frames: int) -> "Statistics":
    """Of so many frames folded into the channels (datasets/time_windows.py).

    On the attractor all times have the same statistics.
    """
    if frames == 1:
      return self
    once = (self.mean, self.std, self.spectrum)
    return Statistics(*(np.concatenate([values] * frames, axis=-1) for values in once))

  def save(self, path: str | os.PathLike) -> None:
    """All or nothing."""
    files.write_npz(path, dataclasses.asdict(self))


def _last(values: np.ndarray, like) -> np.ndarray:
  """[C] -> [1, ..., 1, C] of the rank and dtype of `like`."""
  return values.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def load(path: str | os.PathLike) -> Statistics:
  """Raises FileNotFoundError or ValueError, with the fix, if the file is missing or damaged."""
  path = files.as_path(path)
  if not path.exists():
    raise FileNotFoundError(
      f"{path} is missing: run `downscaling generate` with the same --config and --workdir."
    )
  try:
    with (
      path.open("rb") as file,
      np.load(file, allow_pickle=False) as stored,
    ):  # np.load leaves a damaged file open
      return Statistics(**{k: stored[k] for k in ("mean", "std", "spectrum")})
  except Exception as error:
    raise ValueError(
      f"{path} is damaged ({error}): move it away and run `downscaling generate` again."
    ) from error


def measure(source, basis: Basis, chunk: int = 2048) -> Statistics:
  """Streams a source of examples {"u": [*space, C]} once, in float64.

  basis: of the domain; the spectrum is a table of it.
  Raises: ValueError if a field is not finite or a channel is constant.
  """
  axes = tuple(range(1, 1 + len(basis.space)))
  count, total, squares, power = 0, 0.0, 0.0, 0.0
  for first in range(0, len(source), chunk):
    rows = source.__getitems__(
      list(
        range(
          first,
          min(first + chunk, len(source)),
        )
      )
    )
    u = np.stack([r["u"] for r in rows]).astype(np.float64)
    if not np.isfinite(u).all():
      bad = rows[int(np.argmin(np.isfinite(u).reshape(len(u), -1).all(1)))][
        "trajectory"
      ]
      raise ValueError(
        f"trajectory {bad} of the training split holds NaN or infinity: generate the data anew."
      )
    count += len(u)
    total = total + u.sum((0, *axes))
    squares = squares + (u**2).sum((0, *axes))
    power = power + basis.power(u).sum(0)
  points = math.prod(basis.space)
  mean = np.asarray(total / (count * points))
  std = np.sqrt(squares / (count * points) - mean**2)
  if (std < 1e-12).any():
    raise ValueError(
      f"channel {int(np.argmin(std))} of the training split is constant: there is nothing to learn."
    )
  spectrum = np.asarray(power / count)
  zero = (0,) * len(basis.space)
  # The normalised field has no mean. Where fields do not vary in theirs, rounding is left.
  spectrum[zero] = np.maximum(spectrum[zero] - points * mean**2, 0)
  found = (mean, std, spectrum / std**2)
  return Statistics(*(values.astype(np.float32) for values in found))
