"""Which symmetries the bias respects: names of subgroups, what the test sees, how often it is
wrong.
"""

import numpy as np
import pytest

from downscaling.debias import bias_symmetry
from downscaling.debias.equivariant import moments
from downscaling.equations import kolmogorov, ks
from downscaling.fields import symmetry

N = 12
GROUP = ks.group(N)
TURN = 2 * np.pi * np.arange(N) / N


def fields(seed, trajectories=300, snapshots=4, space=(N,), slope=1.0, memory=0.8):
  """(red Gaussian fields [S, *space], ids [S]): stationary, symmetric, snapshots of a trajectory
  alike.
  """
  rng = np.random.default_rng(seed)
  y = rng.normal(size=(trajectories, snapshots, *space))
  for k in range(1, snapshots):
    y[:, k] = memory * y[:, k - 1] + np.sqrt(1 - memory**2) * y[:, k]
  z = moments.waves(y.reshape(-1, *space)) * (1.0 + moments.shells(space)) ** -slope
  y = moments.fields(z, space)
  return y / y.std(), np.repeat(np.arange(trajectories), snapshots)


def verdicts(raw, true, ids, group=GROUP):
  return bias_symmetry.largest(raw, true, group, (ids, ids))


def test_subgroups_by_name():
  sizes = lambda group, space: {
    name: len(part) for name, part in bias_symmetry.subgroups(group, space).items()
  }
  assert sizes(ks.group(24), (24,)) == {
    "full": 48,
    "shifts": 24,
    "reflection": 2,
    "trivial": 1,
  }
  found = sizes(kolmogorov.group(16), (16, 16))
  # 16 shifts of x, 8 glides, 2 turns; half of the glides keep the sign, and are shifts of y
  assert found == {
    "full": 256,
    "unsigned": 128,
    "shifts": 64,
    "shifts_x": 16,
    "reflection": 2,
    "trivial": 1,
  }
  assert sizes(symmetry.trivial(5), (5,)) == {"full": 1, "trivial": 1}


@pytest.mark.parametrize(
  ("group", "space"), [(ks.group(6), (6,)), (kolmogorov.group(8), (8, 8))]
)
def test_subgroups_are_closed(group, space):
  """The product of two elements is one of the elements."""
  for part in bias_symmetry.subgroups(group, space).values():
    known = {
      (index.tobytes(), sign) for index, sign in zip(part.index, part.sign, strict=True)
    }
    for i in range(0, len(part), 5):
      for j in range(0, len(part), 3):
        assert (
          part.index[j][part.index[i]].tobytes(),
          part.sign[i] * part.sign[j],
        ) in known


@pytest.mark.parametrize(
  ("bias", "expected"),
  [
    (lambda u: u, "full"),
    (lambda u: 1.2 * u, "full"),
    (lambda u: u + 0.1 * u**3, "full"),  # odd: commutes with a change of sign
    (lambda u: u + 0.1 * u**2, "shifts"),  # not odd, alike everywhere
    (lambda u: u + 0.2, "shifts"),
    (lambda u: u * (1 + 0.3 * np.sin(TURN)) + 0.4 * np.cos(TURN), "trivial"),
    # Even about the first point.
    (lambda u: u * (1 + 0.3 * np.cos(TURN)), "reflection"),
  ],
)
def test_the_largest_group_that_the_bias_respects(bias, expected):
  (raw, ids), (true, _) = fields(0, slope=1.2), fields(1)
  assert verdicts(bias(raw), true, ids)[-1].name == expected


def test_what_both_worlds_share_is_no_bias():
  """A mean and a spread that vary from place to place, alike in both: no symmetric law, but a
  symmetric bias.
  """
  (raw, ids), (true, _) = fields(0), fields(1)
  place = lambda u: u * (1 + 0.3 * np.sin(TURN)) + 2 * np.cos(TURN)
  assert verdicts(place(raw), place(true), ids)[-1].name == "full"


def test_the_verdict_says_where_and_by_how_much():
  (raw, ids), (true, _) = fields(0), fields(1)
  raw[:, 3] += 0.5
  worst = verdicts(raw, true, ids)[0]
  assert (worst.statistic, worst.point, worst.passes) == ("mean", 3, False)
  # 1/2 of a standard deviation of 1, less what values clipped at two of them lose
  assert worst.size == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("tails", [0.0, 0.1])
def test_false_alarms(tails):
  """About one in a thousand biases that respect the group is said to break it.

  150 trials at .0015 (measured with 2000) give .2 alarms, and more than 2 with a probability of
  1e-3. Skewness of values that are not held within REACH alarms in a fifth of such trials, with
  heavy tails and few trajectories.
  """
  trajectories, snapshots, alarms = 24, 2, 0
  for trial in range(150):
    (raw, ids), (true, _) = (
      fields(2 * trial + k, trajectories, snapshots) for k in (0, 1)
    )
    raw, true = raw + tails * raw**3, true + tails * true**3
    alarms += not verdicts(raw, true, ids)[0].passes
  assert alarms <= 2


def test_rows_of_a_trajectory_are_one_unit():
  """Eight copies of each row say no more than one: taken as rows of their own they would be sure of
  anything.
  """
  (raw, _), (true, _) = fields(0, 40, 1), fields(1, 40, 1)
  ids = np.arange(40)
  once = verdicts(raw, true, ids)[0]
  again = verdicts(
    np.repeat(raw, 8, axis=0), np.repeat(true, 8, axis=0), np.repeat(ids, 8)
  )[0]
  assert again.worst == pytest.approx(
    once.worst, rel=0.02
  )  # the limits of REACH interpolate between other rows


def test_units():
  assert bias_symmetry.units(6, np.array([7, 7, 3, 3, 9, 9])).tolist() == [
    1,
    1,
    0,
    0,
    2,
    2,
  ]
  assert bias_symmetry.units(6, None).tolist() == [0, 1, 2, 3, 4, 5]
  assert (
    np.bincount(bias_symmetry.units(6400, None)).tolist() == [100] * bias_symmetry.RUNS
  )
  assert bias_symmetry.units(10_000, np.arange(10_000)).max() == bias_symmetry.UNITS - 1


def test_a_point_that_never_varies_is_left_out():
  (raw, ids), (true, _) = fields(0), fields(1)
  raw[:, 5] = true[:, 5] = 0.0
  found = verdicts(raw, true, ids)[0]
  assert np.isfinite(found.worst)


def test_an_unknown_name():
  with pytest.raises(
    ValueError,
    match=r"config.debias.group='flips' is unknown on this grid; use one of auto, full",
  ):
    bias_symmetry.check_name("flips", GROUP, (N,))
