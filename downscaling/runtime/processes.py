"""How the processes of a job talk, once they have joined (joining.py).

They exchange strings through the key-value store of jax's coordination service, on the hosts,
without any device. For a single process everything is trivial.
"""

import collections
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import jax

from downscaling.runtime import supervision

# Seconds: no limit in practice; a dead or hung peer is noticed otherwise.
LONG = 7 * 86_400.0

_calls: collections.Counter[str] = collections.Counter()


def client():
  """The store of the coordination service; None for a single process.

  jax gives no public way to it; orbax takes the same one.
  """
  return coordination().client if place()[1] > 1 else None


def coordination():
  """What jax holds of the joined processes; not public either."""
  from jax._src import distributed

  return distributed.global_state


def place() -> tuple[int, int]:
  """(number of this process, count of processes).

  jax.process_index() and process_count() would initialise the devices.
  """
  state = coordination()
  if not jax.distributed.is_initialized():
    return 0, 1
  return state.process_id, state.num_processes


def gather(name: str, value: Any, timeout: float = 600.0) -> list:
  """The values (JSON) of all processes, in order. Every process must make the same calls.

  Raises:
    TimeoutError: after `timeout` seconds, naming the processes that did not answer.
    ConnectionError: the store is gone, and process 0 with it.
  """
  text = json.dumps(value)
  store = client()
  if store is None:
    return [json.loads(text)]
  me, count = place()
  _calls[name] += 1
  key = f"downscaling/{name}/{_calls[name]}"
  deadline = time.monotonic() + timeout
  try:
    store.key_value_set(f"{key}/{me}", text)
    values = []
    for process in range(count):
      left = max(1, int(1000 * (deadline - time.monotonic())))
      values.append(json.loads(store.blocking_key_value_get(f"{key}/{process}", left)))
    if _calls[name] > 1:  # all are here, so none still reads what was said before
      store.key_value_delete(f"downscaling/{name}/{_calls[name] - 1}/{me}")
    return values
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      said = str(error).splitlines()[0][:200]
      raise ConnectionError(
        f"process 0, which holds what the processes tell each other, is gone ({name}: {said}). Its "
        "log says more; start all processes again."
      ) from error
    missing = [str(p) for p in range(count) if not _answered(store, f"{key}/{p}")]
    raise TimeoutError(
      f"process {', '.join(missing) or 'none'} of {count} did not answer within {timeout:g} s "
      f"({name}): it hangs, has ended, or is at another place. Its log says more; start all "
      "processes with the same command."
    ) from error


def _answered(store, key: str) -> bool:
  try:
    return bool(store.key_value_try_get(key))
  except jax.errors.JaxRuntimeError:  # not found
    return False


def barrier(name: str, timeout: float = 3600.0) -> None:
  """Returns once every process has called it. Raises: see gather."""
  gather(f"barrier/{name}", 0, timeout)


def main_first(
  name: str,
  work: Callable[[], Any],
  timeout: float = 3600.0,
) -> Any:
  """Calls work() on process 0, then on the others if that went well; returns this one's result.

  Args:
    timeout: seconds that the others wait for process 0.
  Raises: on process 0, what work() raised; on the others, PeerFailed with its text. See gather.
  """
  name = f"first/{name}"
  if place()[0]:
    failure = gather(name, "", timeout)[0]
    if failure:
      raise supervision.PeerFailed(f"process 0 failed: {failure}")
    return work()
  try:
    result = work()
  except BaseException as error:
    # Also when it is told to stop: the others would wait for it.
    gather(name, str(error) or type(error).__name__, timeout)
    raise
  gather(name, "", timeout)
  return result


def main_only(
  name: str,
  work: Callable[[], Any],
  timeout: float = LONG,
) -> Any:
  """Calls work() on process 0 while the others wait; returns its result (JSON) on every process.

  Raises: see main_first.
  """
  name = f"only/{name}"
  if place()[0]:
    failure, result = gather(name, ["", None], timeout)[0]
    if failure:
      raise supervision.PeerFailed(f"process 0 failed: {failure}")
    return result
  try:
    result = work()
  except BaseException as error:
    # Also when it is told to stop: the others would wait for it.
    gather(name, [str(error) or type(error).__name__, None], timeout)
    raise
  return gather(name, ["", result], timeout)[0][1]


def counter(name: str) -> Callable[[], int]:
  """Returns take() -> 0, 1, 2, ...; each number goes to one process, whichever asks first.

  Every process must call `counter` equally often.
  Raises: ConnectionError, by take, if process 0 is gone.
  """
  store = client()
  if store is None:
    return itertools.count().__next__
  _calls[f"counter/{name}"] += 1
  key = f"downscaling/counter/{name}/{_calls[f'counter/{name}']}"

  def take() -> int:
    try:
      return store.key_value_increment(key, 1) - 1
    except jax.errors.JaxRuntimeError as error:
      said = str(error).splitlines()[0][:200]
      raise ConnectionError(
        f"process 0, which deals out the work, is gone ({name}: {said}): start all again."
      ) from error

  return take


def same_everywhere(facts: dict[str, Any]) -> None:
  """Raises ValueError, on every process, if a fact differs between them."""
  found = differences(gather("facts", facts))
  if found:
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    raise ValueError(
      f"processes differ in {', '.join(found)}: {'; '.join(list(found.values())[:3])}{more}. "
      "Start every process with the same command, code and config."
    )


def differences(values: list[dict[str, Any]]) -> dict[str, str]:
  """Facts that differ between processes: {key: what process 0 and the first other one say}.

  The keys come in the order of the facts.
  """
  found = {}
  for process, other in enumerate(values):
    for key in dict.fromkeys([*values[0], *other]):
      ours, theirs = (facts.get(key, "absent") for facts in (values[0], other))
      if ours != theirs:
        found.setdefault(
          key, f"{key} is {ours} on process 0 and {theirs} on process {process}"
        )
  return found
