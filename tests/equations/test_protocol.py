"""Every equation has what the protocol lists, and its two worlds fit each other."""

import pytest

from downscaling.equations import protocol
from downscaling.experiment import EQUATIONS


@pytest.mark.parametrize("name", EQUATIONS)
def test_equations_are_equations(name):
  room = EQUATIONS[name]
  assert isinstance(room, protocol.Equation)
  assert name == room.NAME
  fine, coarse = room.Fine(), room.Coarse()
  assert isinstance(fine, protocol.FineSolver)
  assert isinstance(coarse, protocol.CoarseSolver)
  assert {*fine.shared} == {*coarse.shared}
  assert fine.domain.rank == coarse.domain.rank == room.RANK
  assert fine.domain.channels == coarse.domain.channels
  assert fine.stream != coarse.stream  # else equal ids would give paired worlds
  if room.quadratic is not None:
    assert room.quadratic(coarse.domain.shape).space == coarse.domain.shape
