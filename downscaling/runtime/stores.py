"""How arrays are stored in Zarr: compressed, and with a crc32c behind every chunk.

A reader that finds another checksum raises, so a flipped bit is never read as another number. The
index of a shard has a checksum by default.

zarr-python and xarray open what `store` gives, TensorStore what `kvstore` gives, here and on object
stores.
"""

import pathlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import tensorstore
from zarr.abc.store import (
  ByteRequest,
  OffsetByteRequest,
  RangeByteRequest,
  Store,
  SuffixByteRequest,
)
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype

from downscaling.runtime.remote_paths import RemotePath

CHECKED = (ZstdCodec(level=0), Crc32cCodec())


def store(path: pathlib.Path) -> Any:
  """A Zarr store as zarr.open_group and xarray.open_zarr take it."""
  return RemoteStore(path) if isinstance(path, RemotePath) else path


def kvstore(path: pathlib.Path) -> dict[str, Any]:
  """A folder as TensorStore's key-value store, in JSON."""
  if isinstance(path, RemotePath):
    return path.kvstore()
  return {"driver": "file", "path": f"{path.absolute()}/"}


class RemoteStore(Store):
  """A folder of an object store as a Zarr store."""

  supports_writes: bool = True  # pyright: ignore[reportAssignmentType]
  supports_deletes: bool = True  # pyright: ignore[reportAssignmentType]
  supports_listing: bool = True  # pyright: ignore[reportAssignmentType]

  def __init__(self, folder: RemotePath, *, read_only: bool = False):
    super().__init__(read_only=read_only)
    self.folder = folder
    self._kv = tensorstore.KvStore.open(folder.kvstore()).result()

  def with_read_only(self, read_only: bool = False) -> "RemoteStore":
    return RemoteStore(self.folder, read_only=read_only)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, RemoteStore) and self.folder == other.folder

  def __str__(self) -> str:
    return str(self.folder)

  async def get(
    self,
    key: str,
    prototype: BufferPrototype,
    byte_range: ByteRequest | None = None,
  ) -> Buffer | None:
    found = await self._kv.read(key, byte_range=_part(byte_range))
    return prototype.buffer.from_bytes(found.value) if found.state == "value" else None

  async def get_partial_values(
    self,
    prototype: BufferPrototype,
    key_ranges: Iterable[tuple[str, ByteRequest | None]],
  ) -> list[Buffer | None]:
    return [await self.get(key, prototype, part) for key, part in key_ranges]

  async def exists(self, key: str) -> bool:
    return (await self._kv.read(key, byte_range=slice(0, 1))).state == "value"

  async def set(self, key: str, value: Buffer) -> None:
    self._check_writable()
    await self._kv.write(key, value.to_bytes())

  async def delete(self, key: str) -> None:
    self._check_writable()
    await self._kv.write(key, None)

  async def list(self) -> AsyncIterator[str]:
    for key in self._keys():
      yield key

  async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
    for key in self._keys(prefix):
      yield key

  async def list_dir(self, prefix: str) -> AsyncIterator[str]:
    folder = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
    names = (key[len(folder) :].split("/")[0] for key in self._keys(folder))
    for name in dict.fromkeys(names):
      yield name

  def _keys(self, beginning: str = "") -> Iterable[str]:
    found = (str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))
    return [key for key in found if key.startswith(beginning)]


def _part(wanted: ByteRequest | None) -> slice | None:
  """Of an object's bytes, as TensorStore takes it."""
  match wanted:
    case RangeByteRequest(start, end):
      return slice(start, end)
    case OffsetByteRequest(offset):
      return slice(offset, None)
    case SuffixByteRequest(suffix):
      return slice(-suffix, None)
  return None
