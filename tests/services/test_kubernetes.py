"""Pods of an indexed Job that find each other through the cluster's API, as jax asks it.

Each process has a name, a service account and a file of hosts of its own, by namespaces of Linux,
and an address of loopback. The API is a server there too; it answers what jax's detection reads.
"""

import contextlib
import http.server
import importlib.util
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import urllib.parse

import pytest

from downscaling.runtime import launchers

pytestmark = pytest.mark.services
TOKEN = "a-token-of-a-test"
ADDRESSES = ("127.0.0.1", "127.0.0.2")
# What a pod sees, for one process only: $1 holds its hosts and its service account.
POD = """
set -e
mount -t tmpfs none /run
mkdir -p /run/secrets/kubernetes.io
if [ -d "$1/serviceaccount" ]; then cp -r "$1/serviceaccount" /run/secrets/kubernetes.io; fi
mount --bind "$1/hosts" /etc/hosts
hostname "$HOSTNAME"
shift
exec "$@"
"""


class Api(http.server.BaseHTTPRequestHandler):
  """Pods, a job and no service of the namespace `runs`."""

  def do_GET(self):
    cluster = self.server.cluster
    url = urllib.parse.urlparse(self.path)
    cluster.asked.append(url.path)
    if cluster.forbidden or self.headers["authorization"] != f"bearer {TOKEN}":
      self._answer(403, {"kind": "Status", "status": "Failure", "reason": "Forbidden"})
    elif url.path == "/api/v1/namespaces/runs/pods":
      (selector,) = urllib.parse.parse_qs(url.query)["fieldSelector"]
      address = selector.removeprefix("status.podIP=")
      pods = [pod(ADDRESSES.index(address))] if address in ADDRESSES else []
      self._answer(200, {"kind": "PodList", "items": pods})
    elif url.path == "/apis/batch/v1/namespaces/runs/jobs/flow":
      self._answer(200, job(cluster.processes))
    else:
      self._answer(404, {"kind": "Status", "status": "Failure", "reason": "NotFound"})

  def _answer(self, code, body):
    text = json.dumps(body).encode()
    self.send_response(code)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(text)))
    self.end_headers()
    self.wfile.write(text)

  def log_message(self, *_):
    pass


def pod(index):
  owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "flow", "uid": "1"}
  return {
    "metadata": {
      "name": f"flow-{index}-x",
      "namespace": "runs",
      "labels": {"job-name": "flow"},
      "ownerReferences": [owner | {"controller": True}],
    },
    "spec": {"subdomain": "pods", "containers": [{"name": "downscaling"}]},
    "status": {"podIP": ADDRESSES[index]},
  }


def job(processes):
  return {
    "metadata": {"name": "flow", "namespace": "runs", "labels": {}},
    "spec": {
      "parallelism": processes,
      "completions": processes,
      "completionMode": "Indexed",
      "template": {"spec": {"containers": [{"name": "downscaling"}]}},
    },
  }


class Cluster:
  """The API, and pods that are processes of this machine."""

  def __init__(self, folder, unshare, on_cpus, port):
    self.folder, self.unshare, self.on_cpus, self.port = folder, unshare, on_cpus, port
    self.processes, self.forbidden, self.asked = 2, False, []

  def start(self, index, *flags, account=True, indexed=True, **variables):
    """A pod's process that runs the doctor."""
    folder = self.folder / f"pod-{index}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    hosts = "127.0.0.1 localhost flow-0 flow-0.pods\n127.0.0.2 flow-1 flow-1.pods\n"
    (folder / "hosts").write_text(hosts)
    if account:
      shutil.copytree(self.folder / "serviceaccount", folder / "serviceaccount")
    env = {k: v for k, v in os.environ.items() if k not in launchers.VARIABLES}
    env |= self.on_cpus | variables
    env |= {"KUBERNETES_SERVICE_HOST": "127.0.0.1"}
    env |= {"KUBERNETES_SERVICE_PORT": str(self.port), "HOSTNAME": f"flow-{index}"}
    if indexed:
      env["JOB_COMPLETION_INDEX"] = str(index)
    doctor = [sys.executable, "-m", "downscaling", "doctor", *flags]
    return subprocess.Popen(
      [*self.unshare, "sh", "-c", POD, "pod", str(folder), *doctor],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )


def ends(*processes):
  """[(exit code, what it said)]"""
  try:
    said = [process.communicate(timeout=240)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  codes = [process.returncode for process in processes]
  assert not any("Traceback" in words for words in said), said
  return [*zip(codes, said, strict=True)]


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


@pytest.fixture(scope="module")
def unshare():
  """The command by which a process has mounts and a host's name of its own."""
  for flags in ([], ["--map-root-user"]):
    argv = ["unshare", *flags, "--mount", "--uts"]
    tried = [*argv, "mount", "-t", "tmpfs", "none", "/run"]
    with contextlib.suppress(OSError):
      if subprocess.run(tried, capture_output=True, check=False).returncode == 0:
        return argv
  pytest.skip("unshare gives no process mounts and a name of its own here")


@pytest.fixture
def cluster(unshare, on_cpus, tmp_path):
  if not importlib.util.find_spec("kubernetes"):
    pytest.skip("the package kubernetes is not here: the extra k8s has it")
  if not shutil.which("openssl"):
    pytest.skip("openssl is not here, which makes the certificate of the API")
  account = tmp_path / "serviceaccount"
  account.mkdir()
  (account / "token").write_text(TOKEN)
  (account / "namespace").write_text("runs")
  argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
  argv += ["-subj", "/CN=kubernetes", "-addext", "subjectAltName=IP:127.0.0.1"]
  argv += ["-keyout", tmp_path / "key.pem", "-out", account / "ca.crt"]
  subprocess.run(argv, capture_output=True, check=True)
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(account / "ca.crt", tmp_path / "key.pem")
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
  server.socket = context.wrap_socket(server.socket, server_side=True)
  server.cluster = Cluster(tmp_path, unshare, on_cpus, server.server_port)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield server.cluster
  server.shutdown()
  server.server_close()


def test_two_pods_of_a_job_join(cluster):
  port = str(free_port())
  pods = [cluster.start(i, JAX_COORDINATOR_PORT=port) for i in (0, 1)]
  (code, said), (other, _) = ends(*pods)
  assert (code, other) == (0, 0), said
  assert f"Kubernetes: process 0 of 2, coordinator flow-0.pods:{port}" in said
  assert "processes  2 on 2 host(s)" in said
  assert "all is well" in said
  assert "/apis/batch/v1/namespaces/runs/jobs/flow" in cluster.asked


def test_one_pod_is_alone(cluster):
  """A Job of one pod; and a pod of no Job, which then need not be allowed to ask."""
  cluster.processes = 1
  ((code, said),) = ends(cluster.start(0))
  assert code == 0, said
  assert "alone: Kubernetes started one process only" in said
  cluster.forbidden = True
  cluster.asked.clear()
  ((code, said),) = ends(cluster.start(0, indexed=False))
  assert code == 0, said
  assert "alone: no launcher was found" in said
  assert not cluster.asked


def test_an_api_that_does_not_tell_is_told_in_words(cluster):
  """Else process 0 would go on alone beside the others."""
  cluster.forbidden = True
  for code, said in ends(*(cluster.start(i) for i in (0, 1))):
    assert code == 1, said
    assert "its API does not say how many processes there are: Kubernetes API" in said
    assert "403 - Forbidden" in said
    assert "Let the pod's service account list pods and services and get jobs" in said
  ((code, said),) = ends(cluster.start(0, "--distributed=off"))
  assert code == 0, said


def test_without_a_service_account(cluster):
  """jax's detection raises there, once more as it joins."""
  bare, second, first = (
    cluster.start(i, account=False, indexed=i != 2) for i in (2, 1, 0)
  )
  (code, said), (refused, why), (alone, words) = ends(bare, second, first)
  assert (code, refused, alone) == (0, 1, 0), said + why + words
  assert "alone: no launcher was found" in said
  assert "alone: no launcher was found" in words
  assert "JOB_COMPLETION_INDEX=1: other processes are announced, but nothing" in why
  address = f"flow-0.pods:{free_port()}"
  told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_COUNT": "2"}
  pods = [cluster.start(i, account=False, **told) for i in (0, 1)]
  (code, said), (other, _) = ends(*pods)
  assert (code, other) == (0, 0), said
  assert f"Kubernetes: process 0 of 2, coordinator {address}" in said
  assert not cluster.asked
