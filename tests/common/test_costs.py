import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from downscaling.common import costs
from downscaling.common import mesh as meshes


def _sent(body, out, fsdp=1):
  """Collectives of body on 4 devices, each holding [8, 128] float32 = 4096 bytes."""
  mesh = meshes.make(fsdp=fsdp)
  many = jax.shard_map(body, mesh=mesh, in_specs=meshes.ROWS, out_specs=out, check_vma=False)
  x = jax.ShapeDtypeStruct((32, 128), jnp.float32, sharding=meshes.rows(mesh))
  return costs.collectives(jax.jit(many).lower(x).compile())


@pytest.mark.parametrize(
  ("body", "out", "fsdp", "expected", "traffic"),
  [
    (lambda x: jax.lax.psum(x, meshes.AXES), P(), 1, ("all-reduce", 4096, 4), 6144),  # 2 · 3/4
    (lambda x: jax.lax.psum(x, meshes.FSDP), P("data"), 2, ("all-reduce", 4096, 2), 4096),
    (lambda x: jax.lax.all_gather(x, meshes.AXES, tiled=True), P(), 1, ("all-gather", 16384, 4), 12288),
    (lambda x: jax.lax.psum_scatter(x, meshes.AXES, tiled=True), meshes.ROWS, 1, ("reduce-scatter", 1024, 4), 3072),
  ],
)
def test_collectives_of_a_compiled_program(body, out, fsdp, expected, traffic):
  (found,) = _sent(body, out, fsdp)
  assert (found.kind, found.bytes, found.group_size) == expected
  assert costs.traffic(found) == traffic


def test_no_collective_is_none():
  assert _sent(lambda x: 2 * x, meshes.ROWS) == []


def test_forms_that_other_backends_print():
  """Asynchronous pairs count once, by their result; groups as a list, as an iota, or of a named mesh."""
  text = """
  HloModule m, num_partitions=8
  %a = (bf16[4,128]{1,0}, bf16[16,128]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %b = bf16[16,128]{1,0} all-gather-done(%a)
  %c = (f32[64]{0}, f32[2,3]{1,0}) all-reduce(%x, %y), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %d = f32[10]{0} all-reduce(%z), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %e = pred[] all-reduce(%w), replica_groups={{0},{1}}, to_apply=%or
  """
  found = [(c.kind, c.bytes, c.group_size) for c in costs.collectives(text)]
  assert found == [("all-gather", 4096, 4), ("all-reduce", 280, 2), ("all-reduce", 40, 2)]


def test_flops_in_closed_form():
  a, b = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 32), jnp.float32)
  one = 2 * 8 * 16 * 32
  product = lambda a, b: (a @ b).sum()
  assert costs.flops(product, a, b) == one
  assert costs.flops(jax.jit(jax.grad(product, argnums=(0, 1))), a, b) == 3 * one  # forward, then two products
  looped = lambda a, b: jax.lax.scan(lambda c, _: (c + product(a, b), None), 0.0, length=5)[0]
  assert costs.flops(looped, a, b) == 5 * one
  x, k = jax.ShapeDtypeStruct((2, 10, 3), jnp.float32), jax.ShapeDtypeStruct((5, 3, 7), jnp.float32)
  conv = functools.partial(
    jax.lax.conv_general_dilated, window_strides=(1,), padding="VALID", dimension_numbers=("NWC", "WIO", "NWC")
  )
  assert costs.flops(conv, x, k) == 2 * (2 * 6 * 7) * (5 * 3)
  mesh = meshes.make()
  many = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(meshes.ROWS, P()), out_specs=meshes.ROWS)
  assert costs.flops(many, a, b) == one  # over all devices


def test_peaks():
  assert costs.peak_flops("NVIDIA H200", "bfloat16") == 989e12
  assert costs.peak_flops("NVIDIA H100 PCIe", "float32") == 378e12
  assert costs.peak_flops("TPU v5 lite") == 197e12
  assert costs.peak_flops("TPU v5p") == 459e12
  assert costs.peak_flops("cpu") is None
