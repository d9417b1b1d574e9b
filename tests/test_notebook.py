"""The notebook of docs/notebooks runs from top to bottom, in less than a minute."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_first_ensemble(tmp_path):
  """In order, in one fresh process, as a reader's kernel would."""
  notebook = json.loads(
    (ROOT / "docs" / "notebooks" / "first_ensemble.ipynb").read_text()
  )
  cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
  picture = tmp_path / "members.png"
  program = "\n\n".join(
    [*cells, f"figure.savefig({str(picture)!r})", "print(members.shape)"]
  )
  environment = os.environ | {"MPLBACKEND": "Agg", "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", program],
    capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "(4, 8, 192, 1)" in done.stdout
  assert picture.stat().st_size > 10_000
  # Pictures are not committed.
  assert not any(cell.get("outputs") for cell in notebook["cells"])
