"""What a compiled program costs, as compiler and jaxpr have it: messages, memory, FLOPs; and what a chip can do."""

import dataclasses
import math
import re
from typing import Any

import jax

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<half>-start|-done)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a compiled program. bytes: of its result on one device. group_size: devices that take part."""

  kind: str
  bytes: int
  group_size: int


def collectives(compiled: Any) -> list[Collective]:
  """The collectives of jax's Compiled (or of the text of an HLO module) among more than one device."""
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  devices = int(m.group(1)) if (m := re.search(r"num_partitions=(\d+)", text)) else 1
  found = []
  for line in text.splitlines():
    if not (m := _LINE.search(line)) or m.group("half") == "-done":
      continue
    arrays = [_bytes(*a) for a in _ARRAY.findall(m.group("shape"))]
    if m.group("half") and len(arrays) > 1:  # (operands, results) of an asynchronous start
      arrays = arrays[len(arrays) // 2 :]
    size = 2 if m.group("kind") == "collective-permute" else _group_size(line, devices)
    if size > 1:
      found.append(Collective(m.group("kind"), sum(arrays), size))
  return found


def _bytes(dtype: str, shape: str) -> int:
  bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
  return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _group_size(line: str, devices: int) -> int:
  if m := re.search(r"replica_groups=\{\{([\d,]*)\}", line):  # {{0,1},{2,3}}
    return len(m.group(1).split(","))
  if m := re.search(r"replica_groups=\[\d+,(\d+)\]", line):  # [groups,size]<=[...]
    return int(m.group(1))
  if m := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):  # axes of a named mesh
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", m.group(1)))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", m.group(2)))
  return devices


def traffic(c: Collective) -> float:
  """Bytes that each device sends when the collective goes around a ring."""
  g = c.group_size
  share = {
    "all-reduce": 2 * (g - 1) / g,
    "all-gather": (g - 1) / g,
    "reduce-scatter": g - 1.0,
    "all-to-all": (g - 1) / g,
    "collective-permute": 1.0,
  }
  return share[c.kind] * c.bytes


def memory(compiled: Any) -> dict[str, int]:
  """Bytes on one device: arguments, outputs, temporaries, and aliased: outputs that lie in donated arguments."""
  m = compiled.memory_analysis()
  return {
    "arguments": m.argument_size_in_bytes,
    "outputs": m.output_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
    "aliased": m.alias_size_in_bytes,
  }


def flops(fn, *args) -> float:
  """Model FLOPs of fn(*args), over all devices: those of matrix products and convolutions, 2 a multiply-add.

  Element-wise work and FFTs are not counted: this is the numerator of the utilisation as it is usually given.
  args may be ShapeDtypeStructs. A while loop counts once, as its length is not known.
  """
  return _jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxpr_flops(jaxpr) -> float:
  return sum(_equation_flops(e) for e in jaxpr.eqns)


def _equation_flops(e) -> float:
  if e.primitive.name == "dot_general":
    (contract, _), _ = e.params["dimension_numbers"]
    return 2.0 * math.prod(e.outvars[0].aval.shape) * math.prod(e.invars[0].aval.shape[a] for a in contract)
  if e.primitive.name == "conv_general_dilated":
    kernel, out = e.invars[1].aval.shape, e.params["dimension_numbers"].rhs_spec[0]
    return 2.0 * math.prod(e.outvars[0].aval.shape) * math.prod(kernel) / kernel[out] / e.params["batch_group_count"]
  inner = [_jaxpr_flops(j) for j in _inner(e.params)]
  if e.primitive.name == "cond":
    return max(inner, default=0.0)
  times = {"scan": e.params.get("length", 1)}.get(e.primitive.name, 1)
  if e.primitive.name == "shard_map":  # its body is what one device does
    times = e.params["mesh"].size
  return times * sum(inner)


def _inner(params: dict):
  for value in params.values():
    for x in value if isinstance(value, tuple | list) else (value,):
      if hasattr(x, "jaxpr") and hasattr(x.jaxpr, "eqns"):
        yield x.jaxpr
      elif hasattr(x, "eqns"):
        yield x


# Dense peak in 1e12 FLOP/s: bfloat16, and what jax does with float32 by default (TF32 on NVIDIA; one bfloat16 pass of
# the matrix unit on TPU). Keys are what device_kind contains, the more special first.
PEAKS = {
  "H200": (989.0, 494.5),  # NVIDIA H200 data sheet, SXM
  "H100 PCIe": (756.0, 378.0),  # NVIDIA H100 data sheet
  "H100 NVL": (835.0, 417.5),
  "H100": (989.0, 494.5),  # SXM
  "A100": (312.0, 156.0),  # NVIDIA A100 data sheet
  "V100": (125.0, 15.7),  # float16 tensor cores; float32 has none
  "TPU v6": (918.0, 918.0),  # Google Cloud TPU v6e documentation
  "TPU v5 lite": (197.0, 197.0),  # v5e
  "TPU v5": (459.0, 459.0),  # v5p
  "TPU v4": (275.0, 275.0),
  "TPU v3": (61.5, 61.5),  # a core: 123 a chip of two, and jax shows cores
}


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
  """FLOP/s of one device as jax names it; None for what is not in PEAKS, a CPU among them."""
  for name, (bfloat16, float32) in PEAKS.items():
    if name.lower() in device_kind.lower():
      return 1e12 * (bfloat16 if dtype == "bfloat16" else float32)
  return None
