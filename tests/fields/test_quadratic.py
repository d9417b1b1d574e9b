"""Quadratic terms as data: closed forms, NumPy and JAX agree, equality by numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.fields import quadratic
from downscaling.runtime import mesh as meshes


@pytest.mark.parametrize(
  ("make", "space"), [("burgers", (24,)), ("advection", (16, 16))]
)
def test_numpy_and_jax_agree_and_equal_terms_are_one_key(make, space):
  term, same = getattr(quadratic, make)(space), getattr(quadratic, make)(space)
  assert term == same
  assert hash(term) == hash(same)
  assert term != getattr(quadratic, make)(tuple(n + 2 for n in space))
  y = np.random.default_rng(0).normal(size=(3, *space))
  with meshes.float64():
    found = np.asarray(term(jnp.asarray(y), jnp))
  # Two FFTs of float64, values of size 10.
  np.testing.assert_allclose(found, term(y), atol=1e-13)


def test_burgers_of_a_wave():
  """−½ ∂ₓ sin² x = −½ sin 2x."""
  x = np.arange(24) * 2 * np.pi / 24
  found = quadratic.burgers((24,))(np.sin(x)[None])[0]
  np.testing.assert_allclose(found, -np.sin(2 * x) / 2, atol=1e-14)


def test_another_grid_and_impossible_arrays_are_refused():
  term = quadratic.burgers((24,))
  with pytest.raises(ValueError, match=r"the quadratic term is of a grid \(24,\)"):
    term(np.zeros((2, 12)))
  with pytest.raises(ValueError, match="'outer' of shape"):
    quadratic.Quadratic((24,), term.left, term.right, np.zeros(5, complex))
