"""What is drawn of a prior while it trains."""

import numpy as np
import pytest

from downscaling import evaluators
from downscaling.evaluation import canvas


@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (1, 16, 16), (3, 16, 16)], ids=str)
def test_a_gallery_has_a_panel_for_every_field(shape):
  """Of one field too: matplotlib then gives no array of axes unless it is told to."""
  fields = np.random.default_rng(0).normal(size=shape)
  figure = evaluators.gallery(fields, 2 * fields)(canvas.LIGHT)
  assert len(figure.axes) == 2 * len(fields)
  assert canvas.pixels(evaluators.gallery(fields, 2 * fields)).ndim >= 3
