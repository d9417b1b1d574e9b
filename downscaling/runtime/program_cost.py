"""What a compiled program costs (messages, memory, FLOPs), and the peak speed of known chips."""

import dataclasses
import math
import re
from typing import Any

import jax

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_LINE = re.compile(
  rf"= (?P<shape>[^%\"]*?) (?P<kind>{'|'.join(KINDS)})(?P<half>-start|-done)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,<=]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a compiled program. One inside a loop counts once.

  kind: one of KINDS.
  bytes: size of its whole result on one device, combined operands together. For all-reduce and
    all-to-all this is the size of the input; for all-gather, of the gathered array; for
    reduce-scatter, of one share.
  group_size: devices that take part; 2 for a collective-permute.
  operands: arrays that it sends at once.
  """

  kind: str
  bytes: int
  group_size: int
  operands: int = 1


def collectives(compiled: Any) -> list[Collective]:
  """The collectives of a program that involve more than one device.

  An asynchronous pair (-start and -done) counts once.

  Args:
    compiled: jax's Compiled, or the text of an HLO module.
  """
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  module = re.search(r"HloModule .*", text)
  header = module.group() if module else ""
  counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
  devices = math.prod(map(int, counts))
  found = []
  for line in text.splitlines():
    m = _LINE.search(line)
    if not m or m.group("half") == "-done":
      continue
    kind, shape = m.group("kind"), m.group("shape")
    if m.group("half") and kind != "all-reduce" and shape.startswith("("):
      # (operands, results, what the runtime keeps); an all-reduce has results alone
      shape = _parts(shape[1:])[1]
    size = 2 if kind == "collective-permute" else _group_size(line, devices)
    if size > 1:
      arrays = [_bytes(*a) for a in _ARRAY.findall(shape)]
      operands = _parts(line[m.end() :])
      found.append(Collective(kind, sum(arrays), size, len(operands)))
  return found


def _parts(text: str) -> list[str]:
  """Splits at commas up to the closing bracket: "a, b[1,2]), c" -> ["a", " b[1,2]"]."""
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
  """Bytes of an array as HLO writes it, e.g. ("f32", "8,24")."""
  digits = "".join(re.findall(r"\d+", dtype)[:1])
  bits = 8 if dtype == "pred" else int(digits)
  sizes = [int(n) for n in shape.replace("<=", "").split(",") if n]
  return math.prod(sizes) * bits // 8


def _group_size(line: str, devices: int) -> int:
  """Devices in each group of a collective."""
  m = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line)  # {{0,1},{2,3}}
  if m:
    groups = re.findall(r"\{([\d,]*)\}", m.group(1))
    return max(len(group.split(",")) for group in groups)
  # [groups,size]<=[...], perhaps T(...)
  m = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
  if m:
    return int(m.group(1))
  # Axes of a named mesh.
  m = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
  if m:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", m.group(1)))
    axes = re.findall(r"'([^']+)'", m.group(2))
    return math.prod(int(sizes[axis]) for axis in axes)
  return devices


def traffic(c: Collective) -> float:
  """Bytes that each device sends if the collective goes around a ring.

  all-to-all: what a device does not keep, sent once. collective-permute: for a device that is the
  source of a pair.
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
  """Bytes on one device: arguments, outputs, temporaries, aliased and peak.

  aliased: outputs that lie in donated arguments. peak: the compiler's figure if it gives one;
  otherwise the sum of all, which is an upper bound.
  """
  m = compiled.memory_analysis()
  together = (
    m.argument_size_in_bytes
    + m.output_size_in_bytes
    + m.temp_size_in_bytes
    - m.alias_size_in_bytes
  )
  return {
    "arguments": m.argument_size_in_bytes,
    "outputs": m.output_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
    "aliased": m.alias_size_in_bytes,
    "peak": getattr(m, "peak_memory_in_bytes", 0) or together,
  }


def flops(fn, *args) -> float:
  """Model FLOPs of fn(*args) over all devices: matrix products and convolutions, 2 a multiply-add.

  Element-wise work and FFTs are not counted, as usual for the numerator of the utilisation.
  The jaxpr is counted as it stands: recomputation by remat counts again; so do the zeros that pad
  or dilate a convolution, and the same work done by each device under shard_map. A while loop
  counts once, because its length is unknown. A cond counts as its most expensive branch.

  Args: fn and its arguments, which may be ShapeDtypeStructs.
  """
  return _jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxpr_flops(jaxpr) -> float:
  return sum(_equation_flops(e) for e in jaxpr.eqns)


def _equation_flops(e) -> float:
  if e.primitive.name == "dot_general":
    (contract, _), _ = e.params["dimension_numbers"]
    summed = e.invars[0].aval.shape
    return (
      2.0 * math.prod(e.outvars[0].aval.shape) * math.prod(summed[a] for a in contract)
    )
  if e.primitive.name == "conv_general_dilated":
    kernel = e.invars[1].aval.shape
    out = e.params["dimension_numbers"].rhs_spec[0]
    result = math.prod(e.outvars[0].aval.shape)
    return 2.0 * result * math.prod(kernel) / kernel[out]  # groups: in both shapes
  inner = [_jaxpr_flops(j) for j in _inner(e.params)]
  if e.primitive.name == "cond":
    return max(inner, default=0.0)
  times = e.params.get("length", 1) if e.primitive.name == "scan" else 1
  if e.primitive.name == "shard_map":  # its body is what one device does
    mesh = e.params["mesh"]
    older = e.params.get("manual_axes", mesh.axis_names)  # before jax 0.10
    axes = e.params.get("newly_manual_axes", older)
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
  # NVIDIA V100 data sheet; its tensor cores know float16 alone.
  "V100-PCIE": (None, 14.0),
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
    if device_kind == name or (
      not name.startswith("TPU") and re.search(words, device_kind)
    ):
      peak = peaks[("bfloat16", "float32").index(dtype)]
      return None if peak is None else 1e12 * peak
  return None
