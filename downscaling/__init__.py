"""Statistical downscaling: debias coarsely, sample conditionally (Wan et al. 2023,
arXiv:2305.15618).
"""

__version__ = "0.1.0"
