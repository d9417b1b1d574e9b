"""Package metadata: loose ranges live here, the exact set in requirements.lock."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
# The one place that says the version; read as text, as an import would need the requirements.
SOURCE = (ROOT / "downscaling" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE).group(1)

JAX = ">=0.10,<0.12"
TEST = ["pytest>=8", "pytest-xdist>=3.6"]
DEV = [
  *TEST,
  # With its own node from the package index, so that it needs no network later.
  "pyright[nodejs]>=1.1.400",
  "ruff>=0.9",
  # The editable install builds without the network.
  "setuptools>=77",
]
# The documentation site; launch/docs.sh installs these alone, without the package's own needs.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0,<2"]

setup(
  name="downscaling",
  version=VERSION,
  description=(
    "Statistical downscaling: debias coarsely by optimal transport, "
    "sample conditionally by diffusion."
  ),
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license_expression="Apache-2.0",
  license_files=["LICENSE"],
  classifiers=[
    "Development Status :: 3 - Alpha",
    "Environment :: Console",
    "Environment :: GPU :: NVIDIA CUDA",
    "Intended Audience :: Science/Research",
    "Operating System :: MacOS",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3 :: Only",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Atmospheric Science",
    "Topic :: Scientific/Engineering :: Physics",
    "Typing :: Typed",
  ],
  keywords=["downscaling", "diffusion models", "optimal transport", "jax", "debiasing"],
  python_requires=">=3.11",
  # Users read and edit configs/ at the root; a wheel holds a copy inside the package.
  packages=[
    *find_packages(include=["downscaling", "downscaling.*"]),
    "downscaling.configs",
  ],
  package_dir={"downscaling.configs": "configs"},
  package_data={"downscaling": ["py.typed"]},
  install_requires=[
    "absl-py>=2.1",
    "array-record>=0.5",
    "clu>=0.0.12",
    "etils[epath]>=1.12",
    "exponax>=0.2.0",
    "flax>=0.10",
    "fsspec>=2024.6",
    "grain>=0.2.18",
    "h5netcdf>=1.3",
    # h5netcdf leaves the choice of a reader of HDF5 to us.
    "h5py>=3.11",
    f"jax{JAX}",
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
    # The names that jax itself uses: pip install "downscaling[cuda13]".
    "cuda12": [f"jax[cuda12]{JAX}"],
    "cuda13": [f"jax[cuda13]{JAX}"],
    "tpu": [f"jax[tpu]{JAX}"],
    # Checkpoints on gs://; with these two, xarray opens gs:// and s3:// by itself.
    "gcs": ["gcsfs>=2024.6"],
    "s3": ["s3fs>=2024.6"],
    # With it, jax finds the processes of a Kubernetes Job through the cluster's API.
    "k8s": ["kubernetes>=29"],
  },
  entry_points={"console_scripts": ["downscaling = downscaling.main:run"]},
)
