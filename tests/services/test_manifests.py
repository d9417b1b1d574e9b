"""Launch files for machines that are not here, read by the real parsers: Kubernetes and JobSet by
their schemas, xpk, gcloud, SkyPilot.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from downscaling.runtime import launchers
from tests.services.conftest import ROOT

pytestmark = pytest.mark.services
CRD = ROOT.parent / "shared" / "crd" / "jobset.yaml"
MANIFESTS = ("gke_jobset.yaml", "gke_jobset_gpu.yaml")
# Reads YAML documents in an environment that has a reader, and checks them by JobSet's schema, in
# which no unknown key is allowed.
CHECK = """
import json, sys, yaml, jsonschema
documents = [d for path in sys.argv[2:] for d in yaml.safe_load_all(open(path))]
schema = next(d for d in yaml.safe_load_all(open(sys.argv[1])) if d)
schema = schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
schema["properties"]["metadata"] = {"type": "object"}
def close(node):
  if isinstance(node, dict):
    if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
      node.setdefault("additionalProperties", False)
    if node.pop("x-kubernetes-int-or-string", None):
      node.pop("type", None)
    for value in node.values():
      close(value)
  elif isinstance(node, list):
    for value in node:
      close(value)
close(schema)
wrong = [e.message for d in documents for e in jsonschema.Draft7Validator(schema).iter_errors(d)]
if wrong:
  sys.exit("; ".join(wrong))
print(json.dumps(documents))
"""


def call(*argv, **kwargs):
  return subprocess.run(
    [str(each) for each in argv],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
    **kwargs,
  )


@pytest.fixture(scope="module")
def jobsets(parsers):
  """read(*paths) -> documents; those that are no JobSet are refused."""
  if not CRD.exists():
    pytest.skip("JobSet's schema is not beside this checkout")

  def read(*paths):
    done = call(parsers / "python", "-c", CHECK, CRD, *paths)
    assert done.returncode == 0, done.stderr[-600:]
    return json.loads(done.stdout)

  return read


def job_of(document):
  (replicated,) = document["spec"]["replicatedJobs"]
  return replicated["template"]["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_jobset_is_what_jobset_and_kubernetes_take(jobsets, parsers, name, tmp_path):
  path = ROOT / "launch" / name
  (document,) = jobsets(path)
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
  alone = tmp_path / "job.json"
  alone.write_text(json.dumps(job | {"spec": job_of(document)}))
  done = call(parsers / "kubernetes-validate", "--strict", alone)
  assert done.returncode == 0, done.stdout + done.stderr
  wrong = tmp_path / "wrong.yaml"
  wrong.write_text(path.read_text().replace("completionMode", "completionmode"))
  with pytest.raises(AssertionError, match="completionmode"):
    jobsets(wrong)


def test_processes_of_gpu_nodes_find_each_other(jobsets):
  """By the variables that Kubernetes and the manifest set, which a job reads."""
  (document,) = jobsets(ROOT / "launch" / "gke_jobset_gpu.yaml")
  job, name = job_of(document), document["metadata"]["name"]
  (container,) = job["template"]["spec"]["containers"]
  told = {each["name"]: each["value"] for each in container["env"]}
  replicated = document["spec"]["replicatedJobs"][0]["name"]
  assert job["completions"] == job["parallelism"] == int(told["JAX_PROCESS_COUNT"])
  for index in range(job["completions"]):
    place = launchers.place(told | {"JOB_COMPLETION_INDEX": str(index)})
    assert (place.rank, place.count) == (index, job["completions"])
    # JobSet's name of the first pod: JOBSET-JOB-REPLICA-POD.SUBDOMAIN
    assert place.address == f"{name}-{replicated}-0-0.{name}:8476"
  assert {"containerPort": 8476} in container["ports"]


XPK = {
  "gke_jobset.yaml": ["--tpu-type=v5litepod-16", "--num-slices=2"],
  "gke_jobset_gpu.yaml": ["--device-type=h100-mega-80gb-8", "--num-nodes=4"],
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_jobset_says_what_xpk_would(jobsets, parsers, name, tmp_path):
  """The line of the docs, and the fields that decide: hosts, restarts, time to save."""
  docs = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text()
  (line,) = [
    line for line in docs.replace("\\\n", " ").splitlines()
    if line.startswith("xpk workload create") and XPK[name][0] in line
  ]  # fmt: skip
  words = shlex.split(line)
  assert {*XPK[name]} <= {*words}
  out = tmp_path / "xpk.yaml"
  flags = [
    "--dry-run",
    "--skip-validation",
    f"--output-manifest-file={out}",
    "--project=p",
  ]
  env = os.environ | {"PATH": f"{parsers}:{os.environ['PATH']}", "HOME": str(tmp_path)}
  done = call(parsers / "xpk", *words[1:], *flags, env=env, cwd=tmp_path)
  assert done.returncode == 0, done.stdout[-600:] + done.stderr[-600:]
  (theirs,), (ours,) = jobsets_loosely(parsers, out), jobsets(ROOT / "launch" / name)
  for field in ("completions", "parallelism", "backoffLimit"):
    assert job_of(theirs)[field] == job_of(ours)[field], field
  for spec in (theirs["spec"], ours["spec"]):
    assert spec["failurePolicy"]["maxRestarts"] == 20
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == (
      "FailJobSet",
      ["PodFailurePolicy"],
    )
  replicas = [d["spec"]["replicatedJobs"][0]["replicas"] for d in (theirs, ours)]
  assert replicas[0] == replicas[1]
  pods = [job_of(d)["template"]["spec"] for d in (theirs, ours)]
  assert [p["terminationGracePeriodSeconds"] for p in pods] == [300, 300]
  machines = [pod.get("nodeSelector") or {} for pod in pods]
  for place in ("tpu-accelerator", "tpu-topology"):
    key = f"cloud.google.com/gke-{place}"
    assert machines[0].get(key) == machines[1].get(key)
  # Ours names the codes that end the set for good, theirs all that do not.
  ends = [retried(job_of(d)) for d in (theirs, ours)]
  for codes in ends:
    assert {75, 137, 143} <= codes
    assert 1 not in codes


def retried(job):
  """Exit codes after which a lost pod starts the set again."""
  found = {*range(1, 256)}
  for rule in job["podFailurePolicy"]["rules"]:
    codes, named = rule["onExitCodes"], {*rule["onExitCodes"]["values"]}
    assert rule["action"] == "FailJob"
    found -= named if codes["operator"] == "In" else found - named
  return found


def jobsets_loosely(parsers, path):
  """xpk writes empty lists and keys that the schema does not know."""
  read = "import json, sys, yaml; print(json.dumps([*yaml.safe_load_all(open(sys.argv[1]))]))"
  return [d for d in json.loads(call(parsers / "python", "-c", read, path).stdout) if d]


# ---------------------------------------------------------------- Cloud TPU


def tpu(*words, **env):
  env = {"ZONE": "us-central2-b", "PROJECT": "p"} | env
  return call(ROOT / "launch" / "tpu.sh", "--dry_run", *words, env=os.environ | env)


LINES = [
  ("create", "mine", "v4-16"),
  ("create", "mine", "v5litepod-16"),
  ("create", "mine", "v5p-16"),
  ("create", "mine", "v6e-16"),
  ("install", "mine"),
  ("run", "mine", "train", "--config=ks", "--workdir=/shared/it's here"),
  ("delete", "mine"),
]


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_gcloud_reads_every_line_of_tpu_sh(words, tmp_path):
  """Code 1: gcloud took the line and has no account. Code 2 is a line that it does not take."""
  if not shutil.which("gcloud"):
    pytest.skip("gcloud is not here")
  done = tpu(*words, SPOT="1")
  assert done.returncode == 0, done.stderr
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  assert lines
  env = os.environ | {
    "CLOUDSDK_CONFIG": str(tmp_path),
    "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
  }
  for argv in lines:
    said = call(*argv, env=env)
    assert said.returncode == 1, said.stderr
    assert "account" in said.stderr
  wrong = call(*lines[0], "--batch-size=3x", env=env)
  assert wrong.returncode == 2  # so that the test can fail


def test_what_a_host_would_run_keeps_its_words(tmp_path):
  (line,) = tpu(
    "run", "mine", "train", "--workdir=/shared/it's here"
  ).stdout.splitlines()
  command = next(w for w in shlex.split(line) if w.startswith("--command=")).partition(
    "="
  )[2]
  program = tmp_path / "downscaling" / ".venv" / "bin" / "downscaling"
  program.parent.mkdir(parents=True)
  # Twice preempted, then done; and what it was given.
  program.write_text(
    '#!/bin/bash\nprintf "%s\\n" "$@" >>said\n[ $(wc -l <said) -lt 6 ] && exit 143\nexit 0\n'
  )
  program.chmod(0o755)
  done = call("bash", "-c", command, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  said = (tmp_path / "downscaling" / "said").read_text().splitlines()
  assert said == ["train", "--workdir=/shared/it's here"] * 3


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (("create", "mine", "tpu7x-8"), "tpu7x-8 is had on GKE only"),
    (("create", "mine", "h100"), "need v4-N, v5litepod-N, v5p-N or v6e-N"),
    (("look", "mine"), "got 'look', need create, install, run or delete"),
    (("create",), "and a name: launch/tpu.sh create mine v5litepod-16"),
  ],
)
def test_tpu_sh_refuses_in_words(words, said):
  done = tpu(*words)
  assert done.returncode == 1
  assert said in done.stderr


# ---------------------------------------------------------------- SkyPilot


def test_skypilot_reads_the_task(parsers, tmp_path):
  code = """
import sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(resource,) = task.resources
print(task.num_nodes, resource.accelerators, sorted(task.envs))
"""
  env = os.environ | {"HOME": str(tmp_path)}
  done = call(
    parsers / "python", "-c", code, ROOT / "launch" / "sky.yaml", env=env, cwd=ROOT
  )
  assert done.returncode == 0, done.stderr[-600:]
  assert done.stdout.strip().endswith("2 {'H100': 8} ['EXTRA', 'JOB', 'WORKDIR']")


def test_locks_of_images_agree_with_the_one_of_the_checkout():
  """The same version of everything, but for what only one of them has."""

  def versions(path):
    lines = [
      line.split() for line in path.read_text().splitlines() if "==" in line[:80]
    ]
    return [words[0] for words in lines if not words[0].startswith(("#", "--"))]

  ours = {*versions(ROOT / "requirements.lock")}
  for extra, own in (
    ("cpu", ()),
    ("cuda12", ("nvidia", "jax-cuda12")),
    ("tpu", ("libtpu",)),
  ):
    found = {*versions(ROOT / "launch" / "locks" / f"{extra}.txt")}
    assert "jax==0.10.2" in found or f"jax=={sys.modules['jax'].__version__}" in found
    more = {each.partition("==")[0] for each in found - ours}
    assert all(
      name.startswith((*own, "requests", "pyyaml", "absl")) for name in more
    ), more


def test_every_launch_file_says_how_it_is_used():
  for path in sorted(pathlib.Path(ROOT / "launch").iterdir()):
    if path.is_file():
      assert (
        f"launch/{path.name}" in path.read_text()[:1200] or path.name == "install.sh"
      ), path
