"""Where the time of attempts goes: closed forms from forged records, and one real attempt."""

import time

import jax
import jax.numpy as jnp
import pytest

from downscaling.runtime import files, ledger


def forge(
  folder, name, began, seen, saved=None, outcome="done", process=0, host="a", **seconds
):
  spent = dict.fromkeys(ledger.KINDS, 0.0) | {
    k.replace("_", " "): v for k, v in seconds.items()
  }
  (folder / ledger.FOLDER).mkdir(exist_ok=True)
  record = {
    "host": host,
    "process": process,
    "devices": "1 × x",
    "began": began,
    "seen": seen,
  }
  record |= {
    "saved": seen if saved is None else saved,
    "outcome": outcome,
    "seconds": spent,
  }
  files.write_json(folder / ledger.FOLDER / f"{name}.json", record)


def test_seconds_of_three_attempts(tmp_path):
  """[0, 100] killed 30 s after its last save; nobody for 50 s; [150, 250] stopped by a signal;
  [200, 300] of another host beside it.
  """
  assert ledger.account(tmp_path) is None
  forge(tmp_path, "1", 0, 100, saved=70, outcome="", compiling=20, saving=5)
  forge(tmp_path, "2", 150, 250, outcome="stopped", restoring=10)
  forge(tmp_path, "3", 200, 300, outcome="done", host="b", waiting_for_input=25)
  found = ledger.account(tmp_path, now=1000)
  assert (found.attempts, found.hosts, found.under_way) == (3, 2, 0)
  assert (found.wall, found.apart, found.busy) == (300, 50, 300)
  assert found.lost == 30
  assert found.spent == {
    "compiling": 20, "restoring": 10, "saving": 5, "waiting for input": 25,
  }  # fmt: skip
  assert found.productive == 300 - 60 - 30
  assert ledger.seconds(tmp_path) == 300
  assert ledger.devices(tmp_path) == ["1 × x"]


def test_who_is_alive_has_lost_nothing(tmp_path):
  forge(tmp_path, "1", 0, 100, saved=70, outcome="")
  found = ledger.account(tmp_path, now=101)
  assert (found.under_way, found.lost, found.productive) == (1, 0, 100)
  (tmp_path / ledger.FOLDER / "2.json").write_text("{")  # damaged: left out
  assert ledger.account(tmp_path, now=101) == found


def test_overlapping_compilations_count_once(tmp_path):
  account = ledger.Attempt(tmp_path, 0, "x")
  (tmp_path / ledger.FOLDER).mkdir()
  for span in ((0, 10), (5, 12), (20, 25), (21, 22)):
    account.add("compiling", *span)
  account.add("restoring", 8, 18)  # four of its ten seconds are a compilation's
  account.write()
  seconds = ledger.read(tmp_path)[0]["seconds"]
  assert seconds["compiling"] == 17
  assert seconds["restoring"] == 6


def test_an_attempt_hears_of_compilations_and_says_how_it_ended(tmp_path):
  with pytest.raises(RuntimeError), ledger.attempt(tmp_path, 0, "x"):
    fail()
  with ledger.attempt(tmp_path, 0, "x"):
    with ledger.spend("restoring"):
      time.sleep(0.2)
    jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.ones((31, 17)))
  failed, done = ledger.read(tmp_path)
  assert (failed["outcome"], done["outcome"]) == ("failed", "done")
  assert 0.2 <= done["seconds"]["restoring"] < 2
  assert 0 < done["seconds"]["compiling"] < done["seen"] - done["began"]
  with ledger.spend("saving"):  # without an attempt: nothing
    pass


def fail():
  jax.jit(lambda x: x + 1)(jnp.ones(3))
  raise RuntimeError
