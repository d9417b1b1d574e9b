"""A typed experiment: what it refuses and in which words, what it accepts, what it identifies."""

import pathlib
import subprocess
import sys

import ml_collections
import pytest

from downscaling import experiment
from downscaling.experiment import Experiment
from downscaling.runtime import settings, stage_folder

ROOT = pathlib.Path(__file__).parents[1]
SEVERAL = {"train.ema_decay": "(0.999,0.9999)"}
# Overrides of ks:smoke that were once accepted, or ended in a traceback.
NONSENSE = {
  "seed": ["99999999999999999999", "-1", "1.5"],
  "optimizer.peak": ["nan", "-0.01", "0", "inf"],
  "optimizer.clip": ["-1", "0", "nan"],
  "noise.mean": ["nan", "inf"],
  "noise.std": ["0", "-1"],
  "plan.save_minutes": ["nan", "-1"],
  "debias.epsilon": ["inf", "1e-30", "0.3", "0"],
  "debias.check_every": ["0"],
  "debias.save_seconds": ["-1"],
  "data.burn_in": ["inf", "-1"],
  "data.hfhr.train": ["0", "-4"],
  "data.dir": ["hdfs://host/data", "file:///data", "gs:/bucket/data", "s3://"],
  "train.dir": ["hdfs://host/prior"],
  "model.channels": ["(0,8)", "(-8,16)", "()"],
  "model.strides": ["(0,4)"],
  "model.stem": ["0"],
  "model.embedding": ["0"],
  "model.blocks": ["-1", "0"],
  "sampling.levels.steps": ["0", "-1"],
  "sampling.levels.rho": ["0"],
  "sampling.guidance.alpha": ["nan"],
  "sampling.solver.eta": ["nan", "-1"],
  "sampling.sets": ["('ot+diffusion','ot+diffusion')", "()"],
  "label": ["../../escape", "a/b", ".."],
  "train.augment": ["perhaps", "1"],
  "fine.dt": ["nan", "text"],
}


@pytest.mark.parametrize(
  ("key", "value"),
  [(key, value) for key, values in NONSENSE.items() for value in values],
)
def test_nonsense_is_refused_by_name(key, value):
  """As typed on the command line: the key, what came, the range, and what to type."""
  with pytest.raises(
    ValueError, match=rf"^config\.{key}=.*: need .*--config\.{key}="
  ) as caught:
    experiment.load("ks:smoke", **{key: value})
  assert "\n" not in str(caught.value)


def test_the_value_that_an_error_suggests_is_accepted():
  for key in NONSENSE:
    with pytest.raises(ValueError, match="need") as caught:
      experiment.load("ks:smoke", **{key: NONSENSE[key][0]})
    suggested = str(caught.value).rpartition(f"--config.{key}=")[2]
    if suggested:
      experiment.load("ks:full", **{key: suggested})


def test_several_decays_by_the_command_line():
  """A tuple in quotes or not, and one number."""
  for given, decays in (
    ("(0.999,0.9999)", (0.999, 0.9999)),
    ((0.5, 0.25), (0.5, 0.25)),
    (0.5, (0.5,)),
    ("0.5", (0.5,)),
  ):
    assert (
      experiment.load("ks:smoke", **{"train.ema_decay": given}).train.ema_decay
      == decays
    )


def test_every_key_can_be_overridden(execute, tmp_path):
  """As a process: a tuple, a key that the config file leaves out, a keyword of a solver."""
  keys = (
    "model.channels=(4,8)",
    "keep.every=3",
    "coarse.integrator=euler",
    "train.augment=True",
  )
  command = [
    sys.executable,
    "-m",
    "downscaling",
    "train",
    "--config=ks:smoke",
    "--dry_run",
  ]
  flags = [f"--config.{key}" for key in keys]
  done = execute([*command, f"--workdir={tmp_path / 'run'}", *flags])
  assert done.returncode == 0, done.stderr
  assert "20 steps of batch 16" in done.stdout + done.stderr
  assert not (tmp_path / "run").exists()


def test_an_unknown_key_is_refused_with_a_guess():
  for keys, words in (
    ({"train.bacth": 3}, r'config.train has no key \'bacth\'. Did you mean "batch"\?'),
    ({"trian.batch": 3}, r'the config has no key \'trian\'. Did you mean "train"\?'),
    ({"fine.shceme": 3}, r"config.fine has no key 'shceme'"),
    ({"train": 3}, r"config.train=3: need a block of keys"),
  ):
    with pytest.raises(ValueError, match=words):
      experiment.load("ks:smoke", **keys)


def test_a_config_may_be_empty_or_a_config_dict():
  assert Experiment.of({}) == Experiment.of(ml_collections.ConfigDict())
  given = ml_collections.ConfigDict({"train": {"batch": 64}})
  assert Experiment.of(given).train.batch == 64
  assert Experiment.of(given.to_dict()).differences() == {"train": {"batch": 64}}


@pytest.mark.parametrize(
  "config", ["ks:full", "ks:series", "kolmogorov:8x", "kolmogorov:smoke"]
)
def test_differences_and_everything_make_the_same_experiment(config):
  """They come back from JSON, as markers hold them."""
  made = experiment.load(config)
  for told in (made.differences(), made.everything()):
    assert Experiment.of(stage_folder.plain(told)) == made


def test_an_experiment_cannot_be_changed_in_place():
  made = experiment.load("ks:smoke")
  with pytest.raises(AttributeError):
    made.seed = 3  # pyright: ignore[reportAttributeAccessIssue]
  with pytest.raises(AttributeError):
    made.train.batch = 3  # pyright: ignore[reportAttributeAccessIssue]
  assert made.changed(seed=3).seed == 3


def test_a_new_key_leaves_old_identities_valid():
  """What an identity says is what differs from the defaults, so defaults are not in it."""
  plain = Experiment.of({})
  assert plain.identity("data") == {}
  assert plain.identity("train") == {"generator": plain.identity("train")["generator"]}
  changed = plain.changed(**{"debias.points": 4096, "plan.log_every": 3})
  assert changed.identity("debias")["debias"] == {"points": 4096}


def test_every_rule_says_what_it_needs_and_means():
  """The reference page of all keys is made of these words."""
  for key, field in settings.keys(Experiment):
    rule = field.metadata.get("rule")
    if rule is None:
      assert key in ("fine", "coarse")  # keywords of the equation's solvers
      continue
    assert len(rule.help) > 5, key
    assert rule.words, key


def test_settings_need_no_jax():
  """The documentation site reads all keys where jax is not installed."""
  code = "import sys, downscaling.blocks; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
