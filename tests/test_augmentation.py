"""Training fields moved by symmetries of the equation: what moves, how a config asks for it."""

import numpy as np
import pytest

from downscaling import checks, experiment
from downscaling.assembly import prior
from downscaling.equations import kolmogorov, ks
from downscaling.fields import statistics
from downscaling.runtime import mesh as meshes


def smoke(name, **changes):
  return experiment.load(f"{name}:smoke", **changes)


@pytest.mark.parametrize("room", [ks, kolmogorov], ids=["ks", "kolmogorov"])
def test_moves_are_the_group_of_the_fine_grid(room):
  solver = room.Fine(points=32, dt=0.02)
  group, u = (
    room.group(32),
    np.random.default_rng(0).normal(size=(2, *(32,) * room.RANK)).astype(np.float32),
  )
  assert solver.symmetries == len(group)
  for element in (0, 1, 31, 32, 40, len(group) - 1):
    np.testing.assert_array_equal(
      solver.move(u, element), group.act(element, u.reshape(2, -1)).reshape(u.shape)
    )


def test_the_forcing_is_what_pushes_and_no_symmetry_moves_it():
  solver = kolmogorov.Fine(points=32, dt=0.02)
  forcing = solver.static()["forcing"]
  # From rest, nothing else acts.
  pushed = np.asarray(solver.step(np.zeros((32, 32), np.float32)))
  np.testing.assert_allclose(
    pushed / pushed.std(), forcing, atol=1e-5
  )  # float32 FFTs; −1 would be the wrong phase
  for element in range(solver.symmetries):
    np.testing.assert_allclose(solver.move(forcing, element), forcing, atol=1e-6)


def test_a_static_field_by_an_unknown_name_is_refused_and_none_is_the_prior_of_before():
  c, stats = (
    smoke("kolmogorov"),
    statistics.Statistics(
      *np.ones((2, 1), np.float32), np.ones((64, 64, 1), np.float32)
    ),
  )
  assert prior.network(c, stats).static.shape == (64, 64, 1)
  without = c.changed(**{"model.static": ()})
  assert prior.network(without, stats).static is None
  assert "static" not in without.identity("train")["model"]
  assert without.identity("train") != c.identity("train")
  c = c.changed(**{"model.static": ("orography",)})
  with pytest.raises(
    ValueError,
    match=r"config.model.static='orography' is unknown; use one of \['forcing'\]",
  ):
    prior.network(c, stats)


def test_fields_are_moved_before_they_are_normalised():
  """A sampled mean is not 0, and a sign that acts on what is left of it would be no symmetry."""
  c = smoke("ks", **{"train.augment": True})
  rng = np.random.default_rng(1)
  u = rng.normal(0.3, 2.0, (192, 1)).astype(np.float32)
  stats = statistics.Statistics(
    np.full(1, 0.3, np.float32),
    np.full(1, 2.0, np.float32),
    np.ones((192, 1), np.float32),
  )
  count, move = prior.augmentation(c, stats)
  assert count == 384
  for element in (5, 192 + 7):
    want = stats.normalise(np.asarray(ks.move(u[:, 0], element))[:, None])
    np.testing.assert_allclose(
      move(stats.normalise(u), element), want, atol=1e-6
    )  # of values up to 4, rounded thrice


def test_augmented_priors_are_other_priors_and_plain_ones_stay_what_they_were():
  c = smoke("ks")
  plain = c.identity("train")
  assert "augment" not in plain["train"]
  assert c.changed(**{"train.augment": True}).identity("train") != plain


def test_two_worlds_forced_by_different_waves_are_refused():
  c = smoke("kolmogorov", **{"fine.wave": 4, "coarse.wave": 2})
  with pytest.raises(
    ValueError,
    match=r"config.fine.wave=4 and config.coarse.wave=2: .* Set both to the same wave",
  ):
    checks.check(c, meshes.make(1))
