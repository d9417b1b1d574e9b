"""Statistical downscaling: debias coarsely, sample conditionally (Wan et al. 2023,
arXiv:2305.15618).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from downscaling.downscaler import Downscaler
  from downscaling.experiment import Experiment
  from downscaling.experiment import load as load_config

__version__ = "0.1.0"
__all__ = ["Downscaler", "Experiment", "__version__", "load_config"]


def __getattr__(name: str) -> Any:
  """Imports the library's face when it is asked for: `import downscaling` alone is fast."""
  if name == "Downscaler":
    from downscaling.downscaler import Downscaler

    return Downscaler
  if name in ("Experiment", "load_config"):
    from downscaling import experiment

    return {"Experiment": experiment.Experiment, "load_config": experiment.load}[name]
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
