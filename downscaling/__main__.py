"""python -m downscaling JOB ..."""

from downscaling import main

main.run()
