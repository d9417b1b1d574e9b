"""Google's object store on loopback: gcp-storage-emulator, and what it leaves out.

python gcs_emulator.py PORT BUCKET. Left out, and added here: an object's generation when it is
read, writes and reads on condition of one, the last bytes of an object, lists between two names,
empty objects. TensorStore asks for all of them.
"""

import json
import sys
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

ADDED = (objects.get, objects.download, objects.insert, objects.delete)


def faithful(handler):
  """The emulator's handler of a request for one object, with conditions and generations."""

  def answer(request, response, storage, *args, **kwargs):
    bucket = request.params["bucket_name"]
    name = request.params.get("object_id") or request.query.get("name", [""])[0]
    try:
      about = storage.get_file_obj(bucket, name)
    except NotFound:
      about = {"generation": 0, "size": 0}
    now = int(about["generation"])

    def asked(key):
      return [int(value) for value in request.query.get(key, [])]

    if handler is objects.insert and request.data is None:
      request._data = b""  # an empty object
    if any(value != now for value in asked("ifGenerationMatch")):
      response.status = HTTPStatus.PRECONDITION_FAILED
      return
    if now and now in asked("ifGenerationNotMatch"):
      response.status = HTTPStatus.NOT_MODIFIED
      return
    last = (request.get_header("range") or "").removeprefix("bytes=-")
    if last.isdigit():
      first = max(0, int(about["size"]) - int(last))
      header = request.get_header
      request.get_header = lambda key, default=None: (
        f"bytes={first}-" if key.lower() == "range" else header(key, default)
      )
    handler(request, response, storage, *args, **kwargs)
    if request.method == "GET" and now:
      response["x-goog-generation"] = str(now)

  return answer


def between(request, response, storage, *args, **kwargs):
  """The emulator's list, between the names that the request gives."""
  objects.ls(request, response, storage, *args, **kwargs)
  first, last = (request.query.get(k, [""])[0] for k in ("startOffset", "endOffset"))
  if response.status is HTTPStatus.OK:
    found = json.loads(response._content)
    found["items"] = [
      item
      for item in found["items"]
      if item["name"] >= first and (not last or item["name"] < last)
    ]
    response.json(found)


def added(handler):
  if handler is objects.ls:
    return between
  return faithful(handler) if handler in ADDED else handler


if __name__ == "__main__":
  server.HANDLERS = tuple(
    (path, {method: added(handler) for method, handler in methods.items()})
    for path, methods in server.HANDLERS
  )
  server.create_server("127.0.0.1", int(sys.argv[1]), True, sys.argv[2]).run()
