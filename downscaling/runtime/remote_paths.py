"""Paths on object stores, gs:// and s3://, with the methods of pathlib that this package uses.

They are read and written by TensorStore, which retries, and which finds credentials as the clouds'
own tools do. An object is written whole or not at all. Folders exist only through what lies in
them. Nothing here caches: a reader sees the last write of any host.

Settings of the environment: AWS_REGION, AWS_ENDPOINT_URL (another server that speaks S3),
STORAGE_EMULATOR_HOST (of Google's client libraries, for tests).
"""

import fnmatch
import functools
import io
import os
import pathlib
import re
from collections.abc import Iterator
from typing import IO, Any, NoReturn

import tensorstore

DRIVERS = {"gs": "gcs", "s3": "s3"}
REACH = 30.0  # seconds in which a store must answer for the first time
_FORM = re.compile(r"(\w[\w+.-]*):/+(.*)")


class Version(str):
  """Which write of an object this is, in hexadecimal; "" of one that is not there.

  Two equal writes to S3 have the same one.
  """


class RemotePath(pathlib.PosixPath):
  """SCHEME://BUCKET/KEY. Functions that take a local file refuse it."""

  # ---------------------------------------------------------------- the name

  def __str__(self) -> str:
    first, *rest = self.parts or (".",)
    # What is relative to another path has no scheme.
    return f"{first}//{'/'.join(rest)}" if first.endswith(":") else "/".join(self.parts)

  def __repr__(self) -> str:
    return f"RemotePath({str(self)!r})"

  def __fspath__(self) -> NoReturn:
    raise TypeError(f"{self} is on an object store, and no local file: use its methods")

  @property
  def scheme(self) -> str:
    """A key of DRIVERS."""
    return self.parts[0].removesuffix(":")

  @property
  def bucket(self) -> str:
    """Its name."""
    return self.parts[1]

  @property
  def key(self) -> str:
    """The object's name in the bucket; "" for the bucket itself."""
    return "/".join(self.parts[2:])

  def is_absolute(self) -> bool:
    return True

  def absolute(self) -> "RemotePath":
    return self

  def expanduser(self) -> "RemotePath":
    return self

  def kvstore(self) -> dict[str, Any]:
    """The folder as TensorStore's key-value store, in JSON."""
    return _store(self.scheme, self.bucket) | {"path": f"{self.key}/"}

  # ---------------------------------------------------------------- reading

  def reach(self) -> None:
    """Raises OSError, in REACH seconds at the most, if the store refuses this host."""
    try:
      self._done(self._bucket.read(f"{self.key}/nothing"), REACH)
    except TimeoutError:
      raise OSError(
        f"{self.scheme}://{self.bucket} does not answer within {REACH:g} s: is the bucket's name "
        "right, and does this host have a network and credentials for it?"
      ) from None

  def fetch(self) -> tuple[bytes, Version]:
    """The object and its version. Raises: FileNotFoundError; OSError if the store refuses."""
    return self._read()

  def version(self) -> Version:
    """Of the object; "" if there is none."""
    try:
      return self._read(slice(0, 1))[1]
    except FileNotFoundError:
      return Version("")

  def read_bytes(self) -> bytes:
    return self.fetch()[0]

  def read_text(self, encoding=None, errors=None, newline=None) -> str:
    return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

  def open(
    self, mode="r", buffering=-1, encoding=None, errors=None, newline=None
  ) -> IO[Any]:
    """The whole object in memory. Writing goes through files.all_or_nothing."""
    if mode not in ("r", "rb"):
      raise ValueError(f"{self} cannot be opened as {mode!r}: it is written whole")
    data = io.BytesIO(self.read_bytes())
    return (
      data
      if mode == "rb"
      else io.TextIOWrapper(data, encoding or "utf-8", newline=newline)
    )

  def is_file(self) -> bool:
    return self.version() != ""

  def is_dir(self) -> bool:
    if self.is_file():
      return False
    # A Zarr store answers without a list of its chunks.
    return (self / "zarr.json").is_file() or bool(self._below())

  def exists(self, **_) -> bool:
    return self.is_file() or self.is_dir()

  # ---------------------------------------------------------------- lists

  def iterdir(self) -> Iterator["RemotePath"]:
    yield from (
      self / name for name in dict.fromkeys(k.split("/")[0] for k in self._below())
    )

  def glob(self, pattern: str, **_) -> Iterator["RemotePath"]:
    """Of names in this folder, or of as many levels as the pattern has."""
    wanted = pattern.split("/")
    beginning = re.match(r"[^*?[]*", pattern)
    assert beginning is not None
    found = {}
    for key in self._below(beginning.group()):
      names = key.split("/")[: len(wanted)]
      if len(names) == len(wanted) and all(map(fnmatch.fnmatchcase, names, wanted)):
        found["/".join(names)] = None
    yield from (self / name for name in found)

  def rglob(self, pattern: str, **_) -> Iterator["RemotePath"]:
    """Objects in this folder and below, by their last names."""
    for key in self._below():
      if fnmatch.fnmatchcase(key.rpartition("/")[2], pattern):
        yield self / key

  def _below(self, beginning: str = "") -> list[str]:
    """Names of all objects below this folder, and with this beginning, in order."""
    folder = f"{self.key}/" if self.key else ""
    first = folder + beginning
    last = first[:-1] + chr(ord(first[-1]) + 1) if first else ""
    keys = self._done(self._bucket.list(tensorstore.KvStore.KeyRange(first, last)))
    found = (key.decode() for key in keys)
    # Some servers return more than the range; consoles leave empty objects for folders.
    names = (k[len(folder) :] for k in found if k.startswith(first))
    return sorted(name for name in names if name and not name.endswith("/"))

  # ---------------------------------------------------------------- writing

  def write_bytes(self, data) -> int:
    written = bytes(data)
    self._done(self._bucket.write(self.key, written))
    return len(written)

  def write_text(self, data: str, encoding=None, errors=None, newline=None) -> int:
    return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

  def swap(self, data: bytes, expected: Version) -> bool:
    """Writes the object if its version is the expected one, "" for none; False if it is not.

    Of several hosts that try, one succeeds.
    """
    if self.version() != expected:
      return False
    stamp = bytes.fromhex(expected) if expected else _nothing()
    written = self._done(self._bucket.write(self.key, data, if_equal=stamp))
    return written.generation != b""

  def mkdir(self, mode=0o777, parents=False, exist_ok=False) -> None:
    """Nothing: a folder is there once something lies in it."""

  def rmdir(self) -> None:
    """Nothing: a folder is gone with what lay in it."""

  def unlink(self, missing_ok: bool = False) -> None:
    if not missing_ok and not self.is_file():
      raise FileNotFoundError(f"{self} is not there")
    self._done(self._bucket.write(self.key, None))

  def rename(self, target: str | os.PathLike) -> "RemotePath":
    """Copies an object, or all that lies below a folder, then deletes it here."""
    assert isinstance(target, RemotePath)
    names = [""] if self.is_file() else self._below()
    for name in names:
      (target / name).write_bytes((self / name).read_bytes())
    for name in names:
      (self / name).unlink()
    return target

  # ---------------------------------------------------------------- the store

  @property
  def _bucket(self) -> tensorstore.KvStore:
    return _opened(self.scheme, self.bucket)

  def _read(self, part: slice | None = None) -> tuple[bytes, Version]:
    try:
      found = self._done(self._bucket.read(self.key, byte_range=part))
    except OSError:
      if part is None:
        raise
      found = self._done(
        self._bucket.read(self.key)
      )  # no part can be read of an empty object
    if found.state != "value":
      raise FileNotFoundError(f"{self} is not there")
    return found.value, Version(found.stamp.generation.hex())

  def _done(self, future: tensorstore.Future, patience: float | None = None) -> Any:
    """Waits. Raises OSError, naming the path, for what the store refuses."""
    try:
      return future.result(patience)
    except ValueError as error:
      words = (str(error).splitlines() or [""])[0][:200]
      raise OSError(
        f"{self.scheme}://{self.bucket} refuses or cannot be reached, at {self.key}: {words}. Is "
        f"the bucket's name right, and does this host have credentials for it?"
      ) from error


def remote(text: str | os.PathLike) -> bool:
  """Is it SCHEME://..., known or not?"""
  return isinstance(text, RemotePath) or bool(_FORM.match(os.fspath(text)))


def parse(text: str) -> RemotePath:
  """Of SCHEME://BUCKET/KEY. Raises: ValueError for another scheme, or without a bucket."""
  form = _FORM.fullmatch(text)
  scheme, rest = form.groups() if form else ("", "")
  if scheme not in DRIVERS or not text.startswith(f"{scheme}://"):
    raise ValueError(f"{text!r} is no local path, nor one of {_known()}")
  parts = rest.split("/")
  if not rest or {"", ".", ".."} & set(parts[:-1] if parts[-1] == "" else parts):
    raise ValueError(f"{text!r} needs a bucket, and no empty or dotted names")
  emulator = os.environ.get("STORAGE_EMULATOR_HOST")
  if scheme == "gs" and emulator:  # before TensorStore is first asked, also by orbax
    os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
  return RemotePath(text)


def _known() -> str:
  return ", ".join(f"{scheme}://BUCKET/FOLDER" for scheme in DRIVERS)


def _store(scheme: str, bucket: str) -> dict[str, Any]:
  """A bucket as TensorStore's JSON has it."""
  driver = DRIVERS[scheme]
  retries = {f"{driver}_request_retries": {"max_retries": 8}}
  spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "context": retries}
  if scheme == "s3":
    endpoint = _first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    region = _first("AWS_REGION", "AWS_DEFAULT_REGION")
    spec |= {"endpoint": endpoint} if endpoint else {}
    # Without either, TensorStore asks the bucket for its region.
    spec |= {"aws_region": region or "us-east-1"} if region or endpoint else {}
  return spec


def _first(*names: str) -> str:
  """The first of these variables that is set; "" if none is."""
  return next(filter(None, map(os.environ.get, names)), "")


@functools.cache
def _opened(scheme: str, bucket: str) -> tensorstore.KvStore:
  return tensorstore.KvStore.open(_store(scheme, bucket)).result()


@functools.cache
def _nothing() -> bytes:
  """What TensorStore calls the generation of an object that is not there."""
  store = tensorstore.KvStore.open({"driver": "memory"}).result()
  return store.read("nothing").result().stamp.generation
