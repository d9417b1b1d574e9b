"""Package metadata: loose ranges live here, the exact set in requirements.lock."""

from setuptools import find_packages, setup

TEST = ["pytest>=8", "pytest-xdist>=3.6"]
DEV = [
  *TEST,
  "ruff>=0.9",
  "setuptools>=77",
]  # setuptools: the editable install builds without the network
# The documentation site; launch/docs.sh installs these alone, without the package's own needs.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0,<2"]

setup(
  name="downscaling",
  version="0.1.0",
  description="Statistical downscaling: debias coarsely by optimal transport, sample conditionally by diffusion.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["downscaling", "downscaling.*"]),
  install_requires=[
    "absl-py>=2.1",
    "array-record>=0.5",
    "clu>=0.0.12",
    "exponax>=0.2.0",
    "flax>=0.10",
    "grain>=0.2.18",
    "h5netcdf>=1.3",
    "jax>=0.10,<0.12",
    "matplotlib>=3.9",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "ott-jax>=0.6.0",
    "pillow>=10",
    "rich>=13",
    "scipy>=1.13",
    "tensorboardX>=2.6.5",
    "tensorflow-datasets>=4.9.10",
    "tensorstore>=0.1.86",
    "xarray>=2025.1",
    "zarr>=3.1",
  ],
  extras_require={
    "test": TEST,
    "dev": DEV,
    "docs": DOCS,
    # The names jax itself uses: pip install "downscaling[cuda13]".
    "cuda13": ["jax[cuda13]>=0.10,<0.12"],
    "tpu": ["jax[tpu]>=0.10,<0.12"],
  },
  entry_points={"console_scripts": ["downscaling = downscaling.main:run"]},
)
