"""Steps that earn their place: taken where there is something to gain and rows enough, dropped
where not.
"""

import numpy as np
import pytest

from downscaling.debias.equivariant import moments, recipes, step_selection
from downscaling.equations import ks
from downscaling.fields import quadratic as quadratic_terms
from downscaling.runtime import supervision

N = 12
GROUP = ks.group(N)


def fields(seed, size, slope=1.0, bend=0.0):
  """Red fields; bend gives them third moments that shifts and (x, u) -> (−x, −u) leave alone."""
  y = np.random.default_rng(seed).normal(size=(size, N))
  y = moments.fields(moments.waves(y) * (1.0 + moments.shells((N,))) ** -slope, (N,))
  y = y / y.std()
  term = quadratic_terms.burgers(y.shape[1:])(y)
  return y + bend * term / term.std()


def chosen(source, target, order="GM", **kwargs):
  term = quadratic_terms.burgers((N,))
  return step_selection.select(
    source, target, order, group=GROUP, quadratic=term, **kwargs
  )


def test_matching_is_taken_with_many_rows_and_dropped_with_few():
  few = chosen(fields(0, 250, 1.5), fields(1, 250, bend=0.05))  # gains of 283 and -22
  assert few.letters == "G"
  assert few.dropped == "M"
  many = chosen(fields(0, 1500, 1.3), fields(1, 1500, bend=0.3))
  assert many.letters == "GM"
  gains = [trial["gain"] for trial in many.trials]
  assert min(gains) > 10  # in units of what sampling does: no near thing


def test_no_bias_no_step():
  """Two sets of one law: a map of what sampling differs in makes new rows worse, by as much again,
  in most draws.
  """
  dropped = [
    chosen(fields(2 * k, 200), fields(2 * k + 1, 200), "G").letters == ""
    for k in range(6)
  ]
  # each with a probability of about .8; fewer than 3 of 6 once in sixty
  assert sum(dropped) >= 3


def test_a_step_that_pays_only_with_the_next_is_tried_with_it(monkeypatch):
  """A first step of harm and a second that mends it and more: neither alone is taken, both together
  are.
  """
  shift = {"Q": 1.0, "S": -1.5}

  def take(self, letter):
    step = lambda rows: rows + shift[letter]
    self.advance(step)
    return [step]

  monkeypatch.setattr(recipes.Fitting, "take", take)
  group = step_selection.symmetry.trivial(N)
  together = step_selection.select(
    fields(0, 400) + 0.5, fields(1, 400), "QS", group=group
  )
  assert together.letters == "QS"
  alone = step_selection.select(fields(0, 400) + 1.5, fields(1, 400), "QS", group=group)
  assert (alone.letters, alone.dropped) == ("S", "Q")


def test_a_trial_leaves_the_rows_of_the_other_way_alone():
  source, target = fields(0, 200), fields(1, 200, 1.3)
  one = recipes.Fitting(source, target, GROUP, quadratic_terms.burgers((N,)))
  other = one.copy()
  other.take("G")
  np.testing.assert_array_equal(one.current, source)
  assert not np.array_equal(other.current, source)


def test_stopped_between_steps():
  with pytest.raises(supervision.Interrupted, match="stopped while trying step 1 of 2"):
    chosen(fields(0, 60), fields(1, 60), stop=lambda: True)


def test_families_are_those_of_the_statistics():
  """The numbers of each family are found in the order in which the values stand."""
  judge = step_selection._Judge(
    fields(1, 200, bend=0.3), GROUP, quadratic_terms.burgers((N,))
  )
  y = fields(2, 50, bend=0.3)
  found = judge.summary(y)
  energy = (np.abs(np.fft.rfft(y - judge.centre) / N) ** 2).mean(axis=0)
  shells = [energy[k] * (2 if 2 * k < N else 1) for k in range(1, N // 2 + 1)]
  np.testing.assert_allclose(found["energy"], shells, rtol=1e-10)
  slopes = ((np.roll(y, -1, 1) - y) ** 4).mean()
  np.testing.assert_allclose(found["slopes"], [slopes], rtol=1e-10)
  assert "mean" not in judge.noise  # the reflection forbids one
