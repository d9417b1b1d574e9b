"""Samplers on a stationary Gaussian field: the denoiser is known, the posterior given C′x = y′ has
a closed form.

  python benchmarks/gaussian.py [--members=8192] [--seed=0]

32 points, unit variance, S_k ∝ 1/(1 + (k/3)⁴), C′ every 4th point, one condition. mean: |mean −
exact| in units of the posterior's total spread √tr; cov: relative error of the covariance,
Frobenius norm; spread: √(tr cov/tr exact). "exact draws" is what as many independent draws of the
closed form give: the floor of each column.
Levels: edm, exponential for Euler–Maruyama, or guided (gain.levels).
low: starts at σ = 3 from a draw of the Gaussian posterior plus noise (gain.gaussian_start), else
  from noise at σ = 80.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.diffusion import schedules
from downscaling.fields.operators import Strided
from downscaling.sampling import gaussian_gain, guidance, solvers

POINTS, FACTOR, LOWEST = 32, 4, 1e-2
EM = ("euler_maruyama", 256, {"schedule": schedules.vp_linear()}, False)
SDE = ("dpm_solver_pp_2m_sde", 64, {}, False)
JOB = (
  "dpm_solver_pp_2m_sde",
  24,
  {"eta": 10.0, "levels": "guided"},
  True,
)  # as configs/ks.py draws
CASES = (
  ("wiener", {}, EM),
  ("wiener", {}, ("heun", 32, {}, False)),
  ("wiener", {}, ("dpm_solver_pp_2m", 32, {}, False)),
  ("wiener", {}, ("dpm_solver_pp_2m", 16, {}, True)),
  ("wiener", {}, SDE),
  *(
    ("wiener", {}, ("dpm_solver_pp_2m_sde", n, {"eta": e}, True))
    for n, e in ((16, 2.5), (64, 2.5), (16, 5.0), (32, 5.0))
  ),
  ("wiener", {}, ("dpm_solver_pp_2m_sde", 24, {"eta": 10.0}, True)),
  ("wiener", {}, JOB),
  ("moment", {}, ("dpm_solver_pp_2m", 16, {}, True)),
  ("moment", {}, JOB),
  *(("paper", {"alpha": a}, EM) for a in (0.5, 1.0, 2.0, 3.0)),
  *(("paper", {"alpha": a}, SDE) for a in (0.5, 1.0, 2.0, 3.0)),
  *(("scaled", {"alpha": a}, SDE) for a in (0.5, 1.0, 2.0, 3.0)),
  (
    "scaled",
    {"alpha": 3.0, "final": "gain"},
    ("dpm_solver_pp_2m_sde", 16, {"eta": 2.5}, True),
  ),
)


def spectrum() -> np.ndarray:
  """S [N, 1]."""
  s = 1 / (1 + (np.abs(np.fft.fftfreq(POINTS, 1 / POINTS)) / 3) ** 4)
  return (s / s.mean())[:, None]


def draw(
  name: str,
  how: dict,
  solver: str,
  steps: int,
  options: dict,
  low: bool,
  y: jax.Array,
  keys,
) -> np.ndarray:
  """Samples [M, N] for conditions y [M, n, 1]."""
  s, op, high = spectrum(), Strided.on((POINTS,), FACTOR), 3.0 if low else 80.0
  g = gaussian_gain.Gain(op, gaussian_gain.prior_variance(s))
  options = dict(options)
  if options.pop("levels", None) == "guided":
    levels = gaussian_gain.levels(g, steps, high, LOWEST)
  else:
    levels = schedules.levels(
      "exponential" if solver == "euler_maruyama" else "edm", steps, high, LOWEST
    )

  def denoise(x, sigma):
    weight = jnp.asarray(s, x.dtype) / (
      jnp.asarray(s, x.dtype) + sigma[:, None, None] ** 2
    )
    return jnp.fft.ifft(jnp.fft.fft(x, axis=1) * weight, axis=1).real

  @jax.jit
  def run(keys, y):
    guided = guidance.make(name, denoise, op, y, gain=g, **how)
    x = (
      gaussian_gain.gaussian_start(keys, g, y, high)
      if low
      else solvers.initial(keys, (POINTS, 1), high)
    )
    return getattr(solvers, solver)(
      guided.denoise, x, levels, keys, last=guided.last, **options
    )

  return np.asarray(run(keys, y), np.float64)[..., 0]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--members", type=int, default=8192)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  rng = np.random.default_rng(args.seed)
  c = Strided.on((POINTS,), FACTOR).matrix()
  wave = np.fft.fft(np.eye(POINTS), norm="ortho")
  prior = (wave.conj().T @ (spectrum() * wave)).real
  to_fine = prior @ c.T @ np.linalg.inv(c @ prior @ c.T)
  y = c @ np.linalg.cholesky(prior) @ rng.normal(size=POINTS)
  mean, cov = to_fine @ y, prior - to_fine @ c @ prior

  def show(title, x):
    off = np.linalg.norm(x.mean(0) - mean) / np.sqrt(np.trace(cov))
    error = np.linalg.norm(np.cov(x.T) - cov) / np.linalg.norm(cov)
    print(
      f"{title:<58}{off:>7.3f}{error:>7.3f}{np.sqrt(np.trace(np.cov(x.T)) / np.trace(cov)):>8.3f}",
      flush=True,
    )

  print(f"{'guidance, solver':<58}{'mean':>7}{'cov':>7}{'spread':>8}")
  show("exact draws", rng.multivariate_normal(mean, cov, args.members, method="eigh"))
  conditions = jnp.broadcast_to(
    jnp.asarray(y, jnp.float32)[:, None], (args.members, len(y), 1)
  )
  keys = jax.random.split(jax.random.key(args.seed), args.members)
  for name, how, (solver, steps, options, low) in CASES:
    said = [f"{k} {v}" for k, v in {**how, **options}.items() if k != "schedule"] + [
      "low"
    ] * low
    title = " ".join(
      [name, *said[: len(how)], f"| {solver} {steps}", *said[len(how) :]]
    )
    show(title, draw(name, how, solver, steps, options, low, conditions, keys))


if __name__ == "__main__":
  main()
