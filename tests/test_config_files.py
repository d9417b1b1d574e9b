"""Config files by name and by path."""

import pathlib

import pytest

from downscaling import config_files

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def test_names_are_those_of_the_folder():
  assert config_files.folder() == CONFIGS
  assert config_files.names() == ["kolmogorov", "ks"]


@pytest.mark.parametrize("variant", ["", ":quick", ":no-such-variant"])
def test_a_name_is_a_built_in_config_wherever_one_stands(
  tmp_path, monkeypatch, variant
):
  monkeypatch.chdir(tmp_path)
  assert config_files.resolve(f"ks{variant}") == f"{CONFIGS / 'ks.py'}{variant}"


@pytest.mark.parametrize("variant", ["", ":quick"])
def test_a_path_stays_a_path(tmp_path, monkeypatch, variant):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.py").touch()
  (tmp_path / "ks").touch()  # A file of one's own comes before a built-in name.
  for path in ("mine.py", "./mine.py", str(tmp_path / "mine.py"), "ks"):
    assert config_files.resolve(path + variant) == path + variant


@pytest.mark.parametrize(
  ("text", "needed"),
  [
    ("sk", ("--config=sk:", "no built-in config 'sk'")),
    ("sk:quick", ("--config=sk:quick:", "no built-in config 'sk'")),
    ("", ("--config=:", "no built-in config ''")),
    ("configs/sk.py:quick", ("--config=configs/sk.py:quick:", "no such file in")),
    ("../ks", ("--config=../ks:", "no such file in")),
    (".", ("--config=.:", "no such file in")),
  ],
)
def test_what_is_not_there_is_told_with_the_names_that_are(
  tmp_path, monkeypatch, text, needed
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError) as raised:
    config_files.resolve(text)
  said = str(raised.value)
  assert all(n in said for n in (*needed, "kolmogorov, ks", "--config=ks:quick"))
  assert "\n" not in said


def test_config_and_its_keys_are_split_off_a_command_line():
  """Both --config=VALUE and --config VALUE, with one dash or two; other flags stay as they are."""
  rest = ["downscaling", "train", "--workdir=ks", "--dry_run"]
  keys = ["--config.seed=1", "-config.model.channels=(8,16)", "--config.label", "one"]
  read = {"seed": 1, "model.channels": (8, 16), "label": "one"}
  for given in (["--config=ks:smoke"], ["-config=ks:smoke"], ["--config", "ks:smoke"]):
    found = config_files.from_arguments([*rest, *given, *keys])
    assert found == (["ks:smoke"], read, rest)
  assert config_files.from_arguments(["--config=a", "--config=b"])[0] == ["a", "b"]


def test_values_are_literals_or_text():
  """A number that is not finite stays text, so that an error can quote it."""
  for text, value in (
    ("3", 3),
    ("(1,2)", (1, 2)),
    ("ks", "ks"),
    ("True", True),
    ("", ""),
  ):
    assert config_files.literal(text) == value
  assert config_files.literal("1e999") == "1e999"
