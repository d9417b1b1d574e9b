"""Long series from windows, on Gaussian fields: is time as it should be, within windows and across
seams?

  python benchmarks/series.py [--members=512] [--seed=0]

Increments are mean squared ones from frame to frame over the exact ones, within windows and across
seams; 1 is right.

First unconditional, AR(1) frames of correlation ρ, without Monte Carlo: the covariances that 400
steps of DPM-Solver++(2M) SDE, η 5, end with. equal: all frames of a window have one weight; place +
1: the distance from the window's edges and one more; ours: that distance (sampling/stitching.py).

Then with conditions: 32 points, S_k ∝ 1/(1 + (k/3)⁴), every 8th observed in each of 16 frames,
correlation in time exp(−τ²/32), τ in frames, so that neighbours have .97 in common; exact denoisers
of F frames, guided by the gain of each frame's exact error, 2M SDE with η 5. mean: |mean − exact|
over the posterior's total spread; spread: over exact.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.diffusion import schedules
from downscaling.fields.operators import Strided
from downscaling.sampling import gaussian_gain, guidance, solvers, stitching
from downscaling.sampling.stitching import Stitching

POINTS, FACTOR, FRAMES, FAR = 32, 8, 16, 4.0
OP = Strided.on((POINTS,), FACTOR)


class Placed(Stitching):
  """Windows whose frames count by another rule: `count` of the distance from the window's edges."""

  @functools.cached_property
  def weights(self):
    inner = np.stack(
      [self.rows - self.rows[:, :1], self.rows[:, -1:] - self.rows]
    ).astype(float)
    inner[0, 0], inner[1, -1] = np.inf, np.inf
    raw = self.count(np.minimum(inner.min(0), self.frames))
    return raw / np.bincount(self.rows.ravel(), raw.ravel())[self.rows]


class Equal(Placed):
  count = staticmethod(np.ones_like)


class OneMore(Placed):
  count = staticmethod(lambda place: place + 1)


# ---------------------------------------------------------------- unconditional, by covariances


def drawn_covariance(
  plan: Stitching, rho: float, eta: float = 5.0, steps: int = 400
) -> np.ndarray:
  """[L, L] of series drawn with the exact denoiser of AR(1) windows: solver and denoiser are linear
  in x and noise.
  """
  count, size = plan.series, range(plan.frames)
  window = rho ** np.abs(np.subtract.outer(size, size))

  def denoiser(sigma):
    d, whole = (
      window @ np.linalg.inv(window + sigma**2 * np.eye(plan.frames)),
      np.zeros((count, count)),
    )
    for rows, weights in zip(plan.rows, plan.weights, strict=True):
      whole[np.ix_(rows, rows)] += weights[:, None] * d
    return whole

  levels, eye, none = (
    schedules.levels("edm", steps, 80.0, 1e-3),
    np.eye(count),
    np.zeros((count, count)),
  )
  # Of x and the last D(x).
  state, last = np.block([[80.0**2 * eye, none], [none, none]]), None
  for s, t in zip(levels[:-1].astype(float), levels[1:].astype(float), strict=True):
    h, d = np.log(s / t), denoiser(s)
    more, share = -np.expm1(-(1 + eta) * h), 0.0 if last is None else h / (2 * last)
    step = np.block(
      [
        [t / s * np.exp(-eta * h) * eye + more * (1 + share) * d, -more * share * eye],
        [d, none],
      ]
    )
    state, last = step @ state @ step.T, h
    state[:count, :count] += t**2 * -np.expm1(-2 * eta * h) * eye
  d = denoiser(float(levels[-1]))
  return d @ state[:count, :count] @ d.T


def unconditional() -> None:
  print(
    f"{'AR(1), windows, weights':<40}{'within':>8}{'seams':>8}{'least variance':>16}"
  )
  for rho in (0.8, 0.95):
    for frames, overlap in ((4, 0), (4, 1), (4, 2), (8, 4)):
      for name, kind in (("equal", Equal), ("place + 1", OneMore), ("ours", Stitching)):
        if overlap < 2 and name != "ours":
          continue  # all the same there
        plan = kind(frames, overlap, 16)
        c = drawn_covariance(plan, rho)
        steps = (np.diag(c)[1:] + np.diag(c)[:-1] - 2 * np.diag(c, 1)) / (2 - 2 * rho)
        title = f"ρ {rho:g}, F {frames}, O {overlap}, {name}"
        parts = [steps[~plan.seams].mean(), steps[plan.seams].mean()]
        print(
          f"{title:<40}{parts[0]:>8.2f}{parts[1]:>8.2f}{np.diag(c).min():>16.2f}",
          flush=True,
        )


# ---------------------------------------------------------------- with conditions


def in_time(frames: int) -> np.ndarray:
  """Correlation [F, F]; a little white noise keeps smooth time invertible."""
  lag = np.subtract.outer(np.arange(frames), np.arange(frames))
  return 0.999 * np.exp(-(lag**2) / (2 * FAR**2)) + 0.001 * np.eye(frames)


def spectrum() -> np.ndarray:
  """S [N]."""
  s = 1 / (1 + (np.abs(np.fft.fftfreq(POINTS, 1 / POINTS)) / 3) ** 4)
  return s / s.mean()


def denoiser(frames: int):
  """Exact D of a window, [B, N, F]: modes of space by modes of time."""
  values, vectors = np.linalg.eigh(in_time(frames))
  variance = jnp.asarray(spectrum()[:, None] * values, jnp.float32)[None]
  vectors = jnp.asarray(vectors, jnp.float32)

  def denoise(x, sigma):
    modes = jnp.fft.fft(x @ vectors, axis=1) * (
      variance / (variance + sigma[:, None, None] ** 2)
    )
    return jnp.fft.ifft(modes, axis=1).real @ vectors.T

  return denoise


def error_of(frames: int) -> tuple[np.ndarray, np.ndarray]:
  """(σ [K], e [K, N, F]) of that denoiser, as diffusion/error_table.py tabulates them."""
  values, vectors = np.linalg.eigh(in_time(frames))
  sigmas, variance = np.geomspace(1e-3, 80, 44), spectrum()[:, None] * values
  left = variance[None] / (1 + variance[None] / sigmas[:, None, None] ** 2)
  return sigmas, left @ (vectors**2).T


def draw(plan: Stitching, y: np.ndarray, keys, steps: int, high: float) -> np.ndarray:
  """Members [M, N, L] given y [n, L]."""
  prior = gaussian_gain.Gain(
    OP, gaussian_gain.prior_variance(np.repeat(spectrum()[:, None], FRAMES, 1))
  )
  sigmas, table = error_of(plan.frames)
  measured = gaussian_gain.Gain(
    OP, gaussian_gain.measured_variance(sigmas, stitching.extended(table, plan))
  )
  denoise = stitching.stitched(denoiser(plan.frames), plan)

  @jax.jit
  def run(keys):
    rows = jnp.broadcast_to(jnp.asarray(y, jnp.float32), (len(keys), *y.shape))
    guided = guidance.make("measured", denoise, OP, rows, gain=measured)
    x = gaussian_gain.gaussian_start(keys, prior, rows, high)
    levels = schedules.levels("edm", steps, high, 3e-3)
    return solvers.dpm_solver_pp_2m_sde(
      guided.denoise, x, levels, keys, eta=5.0, last=guided.last
    )

  return np.asarray(run(keys), np.float64)


def conditional(members: int, seed: int) -> None:
  wave = np.fft.ifft(
    np.fft.fft(np.eye(POINTS), axis=0) * spectrum()[:, None], axis=0
  ).real
  prior, c = np.kron(wave, in_time(FRAMES)), np.kron(OP.matrix(), np.eye(FRAMES))
  to_fine = prior @ c.T @ np.linalg.inv(c @ prior @ c.T)
  rng = np.random.default_rng(seed)
  y = c @ np.linalg.cholesky(prior) @ rng.normal(size=len(prior))
  mean, cov = to_fine @ y, prior - to_fine @ c @ prior
  total = np.trace(cov)

  def show(title, x, plan):
    steps = (np.diff(x.reshape(len(x), POINTS, FRAMES), axis=2) ** 2).mean(
      (0, 1)
    ) / exact
    off = np.linalg.norm(x.mean(0) - mean) / np.sqrt(total)
    parts = [
      steps[which].mean() if which.any() else np.nan
      for which in (~plan.seams, plan.seams)
    ]
    wide = np.sqrt(x.var(0, ddof=1).sum() / total)
    print(
      f"{title:<40}{parts[0]:>8.2f}{parts[1]:>8.2f}{off:>8.3f}{wide:>8.3f}", flush=True
    )

  between = np.kron(np.eye(POINTS), np.diff(np.eye(FRAMES), axis=0))
  moves = np.diag(between @ cov @ between.T) + (between @ mean) ** 2
  exact = moves.reshape(POINTS, -1).mean(0)
  print(
    f"\n{'with conditions, windows, steps':<40}{'within':>8}{'seams':>8}{'mean':>8}{'spread':>8}"
  )
  show(
    "exact draws",
    rng.multivariate_normal(mean, cov, members, method="eigh"),
    Stitching(4, 2, FRAMES),
  )
  keys = jax.random.split(jax.random.key(seed), members)
  usual = [
    (sizes, 32, 10.0) for sizes in ((1, 0), (4, 0), (4, 2), (8, 4), (8, 6), (16, 0))
  ]
  for sizes, steps, high in (*usual, ((8, 4), 128, 10.0), ((8, 4), 32, 3.0)):
    plan = Stitching(*sizes, FRAMES)
    x = draw(plan, y.reshape(-1, FRAMES), keys, steps, high)
    show(
      f"F {sizes[0]}, O {sizes[1]}, {steps} steps from σ {high:g}",
      x.reshape(members, -1),
      plan,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--members", type=int, default=512)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  unconditional()
  conditional(args.members, args.seed)


if __name__ == "__main__":
  main()
