"""Keys by purpose: no two uses of one seed share a key, and a process's flags change nothing."""

import jax
import numpy as np
import pytest

from downscaling.runtime import random_keys
from downscaling.sampling import ensemble


def words(key):
  return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_purposes_and_worlds_are_apart():
  keys = [random_keys.key(0, purpose) for purpose in random_keys.PURPOSES]
  keys += [random_keys.simulation_key(0, stream) for stream in range(16)]
  assert len({words(key) for key in keys}) == len(keys)


def test_a_member_is_no_training_step():
  run_key = jax.random.split(random_keys.key(0, "training"), 3)[1]
  steps = {words(jax.random.fold_in(run_key, step)) for step in range(64)}
  members = ensemble.keys(
    0,
    np.arange(8, dtype=np.uint32).repeat(8),
    np.tile(np.arange(8, dtype=np.uint32), 8),
  )
  assert not steps & {words(key) for key in members}


def test_the_generator_is_pinned():
  plain = words(random_keys.key(3, "ensemble"))
  with jax.default_prng_impl("rbg"):
    assert words(random_keys.key(3, "ensemble")) == plain


def test_unknown_purposes_are_refused():
  with pytest.raises(ValueError, match="purpose 'mine' is unknown: use one of"):
    random_keys.key(0, "mine")
