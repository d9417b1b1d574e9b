"""Mean, standard deviation and spectrum of the training split; normalisation and its inverse.

One mean and one standard deviation a channel: fields on a homogeneous domain have no preferred
point.
"""

import dataclasses
import os
import pathlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Statistics:
  """mean, std: [C], units of the data. spectrum: [*space, C], E|x̂_k|²/N of the *normalised* field,
  on the full FFT grid (N = number of points; sums to N times the variance, 1, plus nothing
  else)."""

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
    """Of so many frames folded into the channels (windows.py): on the attractor all times have the
    same statistics.
    """
    if frames == 1:
      return self
    return Statistics(
      *(
        np.concatenate([values] * frames, axis=-1)
        for values in (self.mean, self.std, self.spectrum)
      )
    )

  def save(self, path: str | os.PathLike) -> None:
    """All or nothing: a temporary file, then a rename."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.npz")
    try:
      np.savez(temporary, mean=self.mean, std=self.std, spectrum=self.spectrum)
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)


def _last(values: np.ndarray, like) -> np.ndarray:
  """[C] -> [1, ..., 1, C] of the rank and dtype of `like`."""
  return values.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def load(path: str | os.PathLike) -> Statistics:
  """Raises FileNotFoundError or ValueError, with the fix, if the file is missing or damaged."""
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(
      f"{path} is missing: run `downscaling generate` with the same --config and --workdir."
    )
  try:
    with (
      open(path, "rb") as file,
      np.load(file, allow_pickle=False) as stored,
    ):  # np.load leaves a damaged file open
      return Statistics(**{k: stored[k] for k in ("mean", "std", "spectrum")})
  except Exception as error:
    raise ValueError(
      f"{path} is damaged ({error}): move it away and run `downscaling generate` again."
    ) from error


def measure(source, space: tuple[int, ...], chunk: int = 2048) -> Statistics:
  """Streams a source of examples {"u": [*space, C]} once, in float64.

  Raises: ValueError if a field is not finite or a channel is constant.
  """
  axes = tuple(range(1, 1 + len(space)))
  count, total, squares = 0, 0.0, 0.0
  power = 0.0
  mean_field = 0.0
  for first in range(0, len(source), chunk):
    rows = source.__getitems__(list(range(first, min(first + chunk, len(source)))))
    u = np.stack([r["u"] for r in rows]).astype(np.float64)
    if not np.isfinite(u).all():
      bad = rows[int(np.argmin(np.isfinite(u).reshape(len(u), -1).all(1)))]["trajectory"]
      raise ValueError(
        f"trajectory {bad} of the training split holds NaN or infinity: generate the data anew."
      )
    count += len(u)
    total = total + u.sum((0, *axes))
    squares = squares + (u**2).sum((0, *axes))
    power = power + (np.abs(np.fft.fftn(u, axes=axes)) ** 2).sum(0)
    mean_field = mean_field + u.sum(0)
  points = int(np.prod(space))
  mean = np.asarray(total / (count * points))
  std = np.sqrt(squares / (count * points) - mean**2)
  if (std < 1e-12).any():
    raise ValueError(
      f"channel {int(np.argmin(std))} of the training split is constant: there is nothing to learn."
    )
  spectrum = np.asarray(power / count / points)
  zero = (0,) * len(space)
  spectrum[zero] -= points * mean**2  # the normalised field has no mean
  return Statistics(
    mean.astype(np.float32), std.astype(np.float32), (spectrum / std**2).astype(np.float32)
  )
