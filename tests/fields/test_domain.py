"""Domains: what they refuse, JSON and CF there and back, coarse domains, symmetries as data."""

import numpy as np
import pytest

from downscaling.equations import kolmogorov, ks
from downscaling.fields import grid_symmetry, operators
from downscaling.fields.domain import Axis, Channel, Domain, box


def rotated_grid():
  """Two channels on unlike axes, not periodic, with unequal cells."""
  lat = Axis(
    "rlat", np.linspace(36.0, 44.0, 6), "degrees", standard_name="grid_latitude"
  )
  lon = Axis(
    "rlon", np.linspace(-9.0, 3.0, 8), "degrees", standard_name="grid_longitude"
  )
  channels = (Channel("tas", "K", 2.0, "air temperature"), Channel("pr", "mm day-1"))
  areas = np.broadcast_to(np.cos(np.deg2rad(lat.values))[:, None], (6, 8))
  return Domain((lat, lon), channels, areas)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: Axis("x", [0.0, 1.0, 1.0]), "neither rise nor fall"),
    (
      lambda: Axis("x", [0.0, 1.0, 3.0], periodic=True),
      "a periodic axis must be evenly spaced",
    ),
    (lambda: Axis("x", [0.0, np.nan]), "finite values"),
    (lambda: Axis("a/b", [0.0]), "without '/'"),
    (lambda: Channel("t", weight=0.0), "need a number > 0"),
    (lambda: Domain(()), "need one of each"),
    (lambda: Domain((Axis("x", [0.0]), Axis("x", [1.0]))), "name 'x' twice"),
    (lambda: Domain((Axis("x", [0.0, 1.0]),), areas=np.ones(3)), "one area a cell"),
    (lambda: Domain((Axis("x", [0.0, 1.0]),), areas=-np.ones(2)), "one area a cell"),
    (
      lambda: Domain((Axis("x", [0.0]),), mask=np.ones(1)),
      "a mask is not supported yet",
    ),
    (
      lambda: Domain((Axis("x", [0.0, 1.0]),), symmetries=(grid_symmetry.shift(0, 1),)),
      "beyond its ends, which is not periodic",
    ),
    (
      lambda: rotated_grid().check(np.zeros((3, 6, 8))),
      r"need \[..., rlat=6, rlon=8, channels=2\]",
    ),
    (
      lambda: rotated_grid().coarsen(4),
      "factor 4 does not divide axis 'rlat' of 6 points",
    ),
    (lambda: Domain.from_json("{}"), "this is no domain that can be read"),
  ],
)
def test_what_it_refuses(make, words):
  with pytest.raises(ValueError, match=words):
    make()


@pytest.mark.parametrize(
  "domain", [rotated_grid(), ks.domain(12, 64.0), kolmogorov.domain(16)]
)
def test_json_there_and_back(domain):
  again = Domain.from_json(domain.to_json())
  assert again.same(domain)
  assert again.symmetries == domain.symmetries
  for one, two in zip(again.axes, domain.axes, strict=True):
    np.testing.assert_array_equal(one.values, two.values)


def test_what_makes_domains_unlike():
  domain = ks.domain(12, 64.0)
  assert domain.same(ks.domain(12, 64.0))
  for other in (ks.domain(24, 64.0), ks.domain(12, 32.0), box(("x",), (12,), 64.0)):
    assert not domain.same(other)
  assert not rotated_grid().same(Domain(rotated_grid().axes, rotated_grid().channels))


def test_coarse_coordinates_and_areas():
  """Strided points keep their place; means lie in the middle; areas add up."""
  domain = rotated_grid()
  strided = domain.coarsen((2, 4))
  np.testing.assert_array_equal(strided.axes[1].values, domain.axes[1].values[[0, 4]])
  means = domain.coarsen(operators.BlockMean.on((6, 8), (2, 4)))
  np.testing.assert_allclose(means.axes[0].values[0], domain.axes[0].values[:2].mean())
  np.testing.assert_allclose(means.areas.sum(), domain.areas.sum())
  assert means.channels == domain.channels


@pytest.mark.parametrize(
  ("domain", "group"),
  [
    (ks.domain(12, 64.0), ks.group(12)),
    (kolmogorov.domain(8), kolmogorov.group(8)),
  ],
)
def test_the_group_of_a_domain_is_the_equations(domain, group):
  """The same set of index tables and signs, in whatever order."""
  mine = domain.group()

  def rows(of):
    return {
      (*index, float(sign)) for index, sign in zip(of.index, of.sign, strict=True)
    }

  assert rows(mine) == rows(group)


def test_a_coarse_grid_keeps_what_it_can():
  """Every second point of 12 keeps even shifts, and reflections about a point that it has."""
  coarse = ks.domain(12, 64.0).coarsen(2)
  assert coarse.same(ks.domain(6, 64.0))


def test_attributes_are_those_of_cf():
  coords = rotated_grid().coords()
  assert coords["rlat"][1] == {
    "long_name": "position",
    "units": "degrees",
    "standard_name": "grid_latitude",
    "axis": "Y",
  }
  assert (
    "axis"
    not in rotated_grid().coords("_coarse", " of the coarse points")["rlat_coarse"][1]
  )
  assert rotated_grid().attributes(0) == {"units": "K", "long_name": "air temperature"}
