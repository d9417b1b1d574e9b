"""Which devices are neighbours along which axis: of TPU slices, by stand-ins for their devices."""

import dataclasses

import jax
import numpy as np
import pytest

from downscaling.runtime import mesh as meshes


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the layout of a mesh asks of a device of a slice."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "cpu"
  device_kind: str = "cpu"


def chips(slices, each):
  """In an order that mixes the slices."""
  return [Chip(s * each + i, s) for i in range(each) for s in range(slices)]


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_fsdp_stays_within_a_slice(fsdp):
  found = meshes._slices(chips(2, 4))
  array = meshes._across(found, fsdp)
  assert array.shape == (8 // fsdp, fsdp)
  for row in array:
    assert len({chip.slice_index for chip in row}) == 1
  assert {chip.id for chip in array.flat} == {*range(8)}
  # Rows of a slice are together, so that a reduction within it comes before the one across.
  assert [row[0].slice_index for row in array] == sorted(
    row[0].slice_index for row in array
  )


def test_devices_that_are_in_no_slices_or_in_unlike_ones():
  assert meshes._slices(jax.devices()) == [[*jax.devices()]]
  unlike = chips(2, 4)[:-1]
  assert meshes._slices(unlike) == [unlike]


def test_a_mesh_of_the_devices_here():
  mesh = meshes.make(fsdp=2)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2}
  assert [d.id for d in mesh.devices.flat] == [d.id for d in jax.devices()]
  np.testing.assert_array_equal(meshes.make().devices[:, 0], jax.devices())
