"""Energy spectra over shells of wavenumber, and their mean log ratio (Wan et al. 2023,
arXiv:2305.15618, §4).

Fields are [S, N] or [S, N₀, N₁], without a channel axis. Shell k holds the modes with k − ½ ≤ |m| <
k + ½, with m in waves a box; k = 0, the mean, is left out. In 2-D the corners beyond the shortest
axis's finest wave are left out too: their shells are not whole.
"""

import dataclasses
import math

import numpy as np

from downscaling.fields.basis import Trigonometric
from downscaling.fields.domain import Domain
from downscaling.metrics import distances

ENERGY_SHARE = 0.999999


@dataclasses.dataclass(frozen=True)
class Shells:
  """The shells of a grid whose axes are of unlike length, or do not close on themselves.

  basis: waves, and along axes that are not periodic cosines, each half a wave finer than the last.
  lengths: of the axes, in any unit; m counts waves in the longest of them.
  """

  basis: Trigonometric
  lengths: tuple[float, ...]

  @property
  def scales(self) -> list[float]:
    """Waves in the longest axis for one wave in each."""
    return [max(self.lengths) / length for length in self.lengths]

  @property
  def count(self) -> int:
    """The last whole shell."""
    finest = [
      n / 2 * scale
      for n, scale in zip(
        self.basis.space,
        self.scales,
        strict=True,
      )
    ]
    return int(min(finest))

  def numbers(self) -> np.ndarray:
    """The shell of each mode of a table, [*space] int."""
    squares = np.zeros(())
    axes = zip(self.basis.space, self.basis.periodic, self.scales, strict=True)
    for points, periodic, scale in axes:
      waves = np.fft.fftfreq(points, 1 / points) if periodic else np.arange(points) / 2
      squares = squares[..., None] + (scale * waves) ** 2
    return np.floor(np.sqrt(squares) + 0.5).astype(int)

  def energies(self, x: np.ndarray) -> np.ndarray:
    """`shell_energies` of rows that are known to be good, [S, count]."""
    numbers = self.numbers().ravel()
    out = np.empty((len(x), self.count))
    for first, block in distances.chunks(x):
      power = self.basis.power(block[..., None]).reshape(len(block), -1) / numbers.size
      for k in range(1, self.count + 1):
        out[first : first + len(block), k - 1] = power[:, numbers == k].sum(axis=1)
    return out


def shells_of(domain: Domain) -> Shells | None:
  """The shells of a domain; None for a periodic box of equal sides, which needs no account of them.

  Lengths are those of the coordinates. Axes in unlike units are measured in points.
  """
  axes = domain.axes
  alike = len({axis.unit for axis in axes}) == 1
  lengths = tuple(len(axis) * (axis.spacing if alike else 1.0) for axis in axes)
  if domain.periodic and np.ptp(lengths) <= 1e-6 * max(lengths):
    return None
  return Shells(domain.basis(), lengths)


def shell_energies(
  x: np.ndarray, name: str = "fields", shells: Shells | None = None
) -> np.ndarray:
  """Energy of each row in each shell, [S, K], k = 1, 2, ...; units of the field squared.

  The energy of all modes is the row's variance about its own mean (Parseval); in 1-D no mode lies
  beyond the last shell.
  shells: None for a periodic box of equal sides, whose K is min(N)//2.
  Raises ValueError, naming the set, for NaN or for other than one or two space axes.
  """
  x = np.asarray(x)
  distances.rows(x, name, least=1)
  if x.ndim not in (2, 3) or min(x.shape[1:]) < 2:
    raise ValueError(
      f"{name} has shape {x.shape}: spectra need [samples, N] or [samples, N₀, N₁], one channel at "
      "a time."
    )
  if shells is not None:
    return shells.energies(x)
  space = x.shape[1:]
  index, weight = _shells(space)
  top = min(space) // 2
  out = np.empty((len(x), top))
  for first, block in distances.chunks(x):
    power = np.abs(np.fft.rfftn(block, axes=tuple(range(1, x.ndim)))) ** 2 * (
      weight / math.prod(space) ** 2
    )
    power = power.reshape(len(block), -1)
    for k in range(1, top + 1):
      out[first : first + len(block), k - 1] = power[:, index[k]].sum(axis=1)
  return out


def _shells(space: tuple[int, ...]) -> tuple[list[np.ndarray], np.ndarray]:
  """Flat positions of each shell's modes in a half spectrum (rfftn), and how many modes each
  position stands for.
  """
  shell, twice = shell_numbers(space)
  index = [np.flatnonzero(shell.ravel() == k) for k in range(min(space) // 2 + 1)]
  return index, np.broadcast_to(twice, shell.shape)


def shell_numbers(space: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """The shell of each mode of rfftn, int, and how many modes each k of its last axis stands for,
  [N//2 + 1].
  """
  n = space[-1]
  last = np.arange(n // 2 + 1)
  twice = np.where((last == 0) | (2 * last == n), 1.0, 2.0)
  if len(space) == 1:
    size = last.astype(float)
  else:
    first = np.fft.fftfreq(space[0], 1 / space[0])
    size = np.hypot(first[:, None], last[None])
  return np.floor(size + 0.5).astype(int), twice


def energies(
  x: np.ndarray, name: str = "fields", shells: Shells | None = None
) -> np.ndarray:
  """E(k): `shell_energies` averaged over the rows, [K]."""
  return shell_energies(x, name, shells).mean(axis=0)


def energy_holding_shells(
  ref_energies: np.ndarray, share: float = ENERGY_SHARE
) -> np.ndarray:
  """Mask [k] of the fewest shells that together hold `share` of the energy: beyond them rounding is
  measured.
  """
  order = np.argsort(-ref_energies, kind="stable")
  held = np.cumsum(ref_energies[order]) / ref_energies.sum()
  mask = np.zeros(len(ref_energies), bool)
  mask[order[: int(np.searchsorted(held, share)) + 1]] = True
  return mask


def log_ratios(pred_energies: np.ndarray, ref_energies: np.ndarray) -> np.ndarray:
  """|ln E_pred(k)/E_ref(k)|, [k]. Energies are held above 1e-30 of the reference's total."""
  if pred_energies.shape != ref_energies.shape:
    raise ValueError(
      f"spectra of {pred_energies.size} and {ref_energies.size} shells: compare fields on one grid "
      "(coarse with coarse, fine with fine)."
    )
  total = float(ref_energies.sum())
  if total <= 0:
    raise ValueError(
      "the reference has no energy in any shell: its fields are constant in space."
    )
  return np.abs(
    np.log(
      np.maximum(pred_energies, 1e-30 * total) / np.maximum(ref_energies, 1e-30 * total)
    )
  )


def melr(pred_energies: np.ndarray, ref_energies: np.ndarray) -> dict[str, float]:
  """Mean energy log ratio Σ_k w_k |ln E_pred(k)/E_ref(k)| for three weights.

  unweighted: w = 1/K over all shells. weighted: w = E_ref/ΣE_ref. energy: w = 1/K over
    `energy_holding_shells`.
  """
  ratio = log_ratios(pred_energies, ref_energies)
  return {
    "unweighted": float(ratio.mean()),
    "weighted": float(ratio @ ref_energies / ref_energies.sum()),
    "energy": float(ratio[energy_holding_shells(ref_energies)].mean()),
  }


def band(shells: np.ndarray, others: int, width: float = 2.0) -> np.ndarray:
  """Relative half width [k] of where E(k)/E_ref(k) falls for another draw of the same law.

  `width` standard errors √(var_k (1/S + 1/R))/E_k, with S = len(shells) rows and R = others; rows
  taken as independent.
  """
  mean = shells.mean(axis=0)
  spread = shells.std(axis=0, ddof=1) if len(shells) > 1 else np.zeros_like(mean)
  return (
    width
    * spread
    * math.sqrt(1 / len(shells) + 1 / others)
    / np.maximum(mean, np.finfo(float).tiny)
  )
