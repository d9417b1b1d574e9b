"""GPUs that idle or are shared, told from what processes say of themselves: none is needed here."""

import pytest

from downscaling.runtime import idle_devices


def process(host, gpus, given=8, asked=""):
  return {"host": host, "gpus": gpus, "given": given, "asked": asked}


EIGHT = [str(i) for i in range(8)]


@pytest.mark.parametrize(
  ("told", "words"),
  [
    ([process("a", [gpu]) for gpu in EIGHT], []),
    ([process("a", EIGHT), process("b", EIGHT)], []),
    ([process("a", [], given=0)], []),
    ([process("a", [], asked="cpu")], []),  # as was asked for
    (
      [process("a", ["0"]), process("b", ["0"])],
      ["a has 8 GPUs, and its 1", "b has 8 GPUs"],
    ),
    (
      [process("a", [])],
      ["its 1 process(es) use 0: start one process a GPU (Slurm: --ntasks-per-"],
    ),
    (
      [process("a", ["3"], 2), process("a", ["3"], 2)],
      ["processes of a share GPU 3: give each"],
    ),
  ],
)
def test_what_is_said(told, words):
  said = idle_devices.judged(told)
  assert len(said) == len(words)
  assert all(part in text for part, text in zip(words, said, strict=True))


def test_what_a_host_was_given(tmp_path):
  (tmp_path / "0000:65:00.0").mkdir()
  assert idle_devices.given({}, tmp_path) == 1
  assert idle_devices.given({}, tmp_path / "none") == 0
  assert idle_devices.given({"CUDA_VISIBLE_DEVICES": "4,5"}, tmp_path) == 2
  assert idle_devices.given({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
  slurm = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0"}
  assert idle_devices.given(slurm, tmp_path) == 8


def test_here_nothing_is_wrong():
  assert idle_devices.problems() == []
