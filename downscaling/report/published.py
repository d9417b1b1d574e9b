"""The paper's numbers that stand beside ours: Wan et al. 2023 (arXiv:2305.15618), Table 1, the only
published ones.

Its sample sizes are not known, so neither are its floors. Its OT is an entropic map: it stands
under that row alone.
"""

from collections.abc import Mapping

NUMBERS = {
  "ks-8x": {
    "lflr": {
      "cov_rmse": 0.343,
      "melr_unweighted": 0.201,
      "melr_weighted": 0.144,
      "kld_sum": 1.464,
    },
    "entropic": {
      "cov_rmse": 0.081,
      "melr_unweighted": 0.020,
      "melr_weighted": 0.020,
      "kld_sum": 0.018,
    },
  },
  "kolmogorov-8x": {
    "lflr": {
      "cov_rmse": 0.458,
      "melr_unweighted": 1.254,
      "melr_weighted": 0.196,
      "kld_sum": 29.30,
    },
    "entropic": {
      "cov_rmse": 0.083,
      "melr_unweighted": 0.013,
      "melr_weighted": 0.026,
      "kld_sum": 0.033,
    },
  },
  "kolmogorov-16x": {
    "lflr": {
      "cov_rmse": 0.477,
      "melr_unweighted": 0.600,
      "melr_weighted": 0.200,
      "kld_sum": 12.26,
    },
    "entropic": {
      "cov_rmse": 0.079,
      "melr_unweighted": 0.016,
      "melr_weighted": 0.025,
      "kld_sum": 0.017,
    },
  },
}
NAMES = {"lflr": "LFLR", "entropic": "OT"}


def beside(experiment: str, row: str) -> Mapping[str, float] | None:
  """The paper's numbers of a row of the debias table, or None."""
  return NUMBERS.get(experiment, {}).get(row)
