"""What a compiled program costs, as compiler and jaxpr have it: messages, memory, FLOPs; and what a
chip can do.
"""

import dataclasses
import math
import re
from typing import Any

import jax

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf"= (?P<shape>[^%\"]*?) (?P<kind>{'|'.join(KINDS)})(?P<half>-start|-done)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,<=]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a compiled program, as often as it stands there: inside a loop, once.

  kind: one of KINDS. bytes: of its whole result on one device, operands that were combined
  together: all-reduce and all-to-all, as much as goes in; all-gather, the gathered array;
  reduce-scatter, the one share.
  group_size: devices that take part; 2 for a collective-permute. operands: arrays that it sends at
    once.
  """

  kind: str
  bytes: int
  group_size: int
  operands: int = 1


def collectives(compiled: Any) -> list[Collective]:
  """The collectives of jax's Compiled (or of the text of an HLO module) among more than one device.

  An asynchronous pair, -start and -done, counts once.
  """
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  header = m.group() if (m := re.search(r"HloModule .*", text)) else ""
  devices = math.prod(
    int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
  )
  found = []
  for line in text.splitlines():
    if not (m := _LINE.search(line)) or m.group("half") == "-done":
      continue
    kind, shape = m.group("kind"), m.group("shape")
    if m.group("half") and kind != "all-reduce" and shape.startswith("("):
      shape = _parts(shape[1:])[
        1
      ]  # (operands, results, what the runtime keeps); of an all-reduce, results alone
    size = 2 if kind == "collective-permute" else _group_size(line, devices)
    if size > 1:
      arrays = [_bytes(*a) for a in _ARRAY.findall(shape)]
      found.append(Collective(kind, sum(arrays), size, len(_parts(line[m.end() :]))))
  return found


def _parts(text: str) -> list[str]:
  """What stands between commas up to the bracket that closes: "a, b[1,2]), c" -> ["a", " b[1,2]"]."""
  parts, depth = [""], 0
  for char in text:
    depth += (char in "([{") - (char in ")]}")
    if depth < 0:
      break
    if char == "," and not depth:
      parts.append("")
    else:
      parts[-1] += char
  return [p for p in parts if p.strip()]


def _bytes(dtype: str, shape: str) -> int:
  bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
  return math.prod(int(n) for n in shape.replace("<=", "").split(",") if n) * bits // 8


def _group_size(line: str, devices: int) -> int:
  if m := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):  # {{0,1},{2,3}}
    return max(len(group.split(",")) for group in re.findall(r"\{([\d,]*)\}", m.group(1)))
  if m := re.search(r"replica_groups=\[\d+,(\d+)\]", line):  # [groups,size]<=[...], perhaps T(...)
    return int(m.group(1))
  if m := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):  # axes of a named mesh
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", m.group(1)))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", m.group(2)))
  return devices


def traffic(c: Collective) -> float:
  """Bytes that each device sends when the collective goes around a ring; c.bytes are of the result,
  see Collective.

  all-to-all: what is not for itself, once. collective-permute: of a device that is the source of a
  pair.
  """
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
  """Bytes on one device: arguments, outputs, temporaries, aliased (outputs that lie in donated
  arguments) and peak.

  peak is the compiler's own figure; where it gives none, all of them at once, which is an upper
  bound.
  """
  m = compiled.memory_analysis()
  together = (
    m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
  )
  return {
    "arguments": m.argument_size_in_bytes,
    "outputs": m.output_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
    "aliased": m.alias_size_in_bytes,
    "peak": getattr(m, "peak_memory_in_bytes", 0) or together,
  }


def flops(fn, *args) -> float:
  """Model FLOPs of fn(*args), over all devices: those of matrix products and convolutions, 2 a
  multiply-add.

  Element-wise work and FFTs are not counted: this is the numerator of the utilisation as it is
  usually given. args may be ShapeDtypeStructs. Counted as the jaxpr has it: what remat computes
  again counts again; so do the zeros that pad or dilate a convolution, and each device's copy of
  the same work under shard_map, whose body is what one device does. A while loop counts once, as
  its length is not known; of the branches of a cond, the dearest.
  """
  return _jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxpr_flops(jaxpr) -> float:
  return sum(_equation_flops(e) for e in jaxpr.eqns)


def _equation_flops(e) -> float:
  if e.primitive.name == "dot_general":
    (contract, _), _ = e.params["dimension_numbers"]
    return (
      2.0
      * math.prod(e.outvars[0].aval.shape)
      * math.prod(e.invars[0].aval.shape[a] for a in contract)
    )
  if e.primitive.name == "conv_general_dilated":
    kernel, out = e.invars[1].aval.shape, e.params["dimension_numbers"].rhs_spec[0]
    return (
      2.0 * math.prod(e.outvars[0].aval.shape) * math.prod(kernel) / kernel[out]
    )  # groups: in both shapes
  inner = [_jaxpr_flops(j) for j in _inner(e.params)]
  if e.primitive.name == "cond":
    return max(inner, default=0.0)
  times = {"scan": e.params.get("length", 1)}.get(e.primitive.name, 1)
  if e.primitive.name == "shard_map":  # its body is what one device does
    mesh = e.params["mesh"]
    axes = e.params.get(
      "newly_manual_axes", e.params.get("manual_axes", mesh.axis_names)
    )  # jax 0.10, older
    times = math.prod(mesh.shape[a] for a in axes)
  return times * sum(inner)


def _inner(params: dict):
  for value in params.values():
    for x in value if isinstance(value, tuple | list) else (value,):
      if hasattr(x, "jaxpr") and hasattr(x.jaxpr, "eqns"):
        yield x.jaxpr
      elif hasattr(x, "eqns"):
        yield x


# Dense peak of one device of jax in 1e12 FLOP/s: bfloat16, and what jax does with float32 by
# default (TF32 on NVIDIA from the A100 on; one bfloat16 pass of the matrix unit on TPU). Data
# sheets of NVIDIA give twice as much, "with sparsity". A key is device_kind itself (TPU) or whole
# words of it (NVIDIA), the more special first.
PEAKS = {
  "B200": (2250.0, 1125.0),  # NVIDIA HGX B200 data sheet, an eighth of it
  "H200 NVL": (835.0, 417.5),  # NVIDIA H200 data sheet
  "H200": (989.0, 494.5),  # NVIDIA H200 data sheet, SXM
  "H100 PCIe": (756.0, 378.0),  # NVIDIA H100 data sheet
  "H100 NVL": (835.0, 417.5),  # NVIDIA H100 data sheet
  "H100": (989.0, 494.5),  # NVIDIA H100 data sheet, SXM
  "A100": (312.0, 156.0),  # NVIDIA A100 data sheet, SXM and PCIe
  "L4": (121.0, 60.0),  # NVIDIA L4 data sheet
  "V100-PCIE": (None, 14.0),  # NVIDIA V100 data sheet; its tensor cores know float16 alone
  "V100": (None, 15.7),  # NVIDIA V100 data sheet, SXM2
  "TPU7x": (
    1153.5,
    1153.5,
  ),  # Google Cloud TPU7x documentation: 2307 a chip, which shows itself as two devices
  "TPU v6 lite": (918.0, 918.0),  # v6e: Google Cloud TPU v6e documentation
  "TPU v6e": (918.0, 918.0),
  "TPU v5 lite": (197.0, 197.0),  # v5e: Google Cloud TPU v5e documentation
  "TPU v5e": (197.0, 197.0),
  "TPU v5": (459.0, 459.0),  # v5p: Google Cloud TPU v5p documentation
  "TPU v5p": (459.0, 459.0),
  "TPU v4": (275.0, 275.0),  # Google Cloud TPU v4 documentation
  "TPU v3": (
    61.5,
    61.5,
  ),  # Google Cloud TPU v3 documentation: 123 a chip of two cores, and jax shows cores
}


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
  """Dense FLOP/s of one device as jax names it, for dtype "bfloat16" or "float32" (TF32 on NVIDIA,
  see PEAKS).

  None for what is not in PEAKS: a CPU, a MIG slice, another dtype.
  """
  if dtype not in ("bfloat16", "float32") or "MIG" in device_kind:
    return None
  for name, peaks in PEAKS.items():
    words = rf"(?<!\w){re.escape(name)}(?!\w)"
    if device_kind == name or (not name.startswith("TPU") and re.search(words, device_kind)):
      peak = peaks[("bfloat16", "float32").index(dtype)]
      return None if peak is None else 1e12 * peak
  return None
