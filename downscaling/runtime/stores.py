"""How arrays are stored in Zarr: compressed, and with a crc32c behind every chunk.

A reader that finds another checksum raises, so a flipped bit is never read as another number. The
index of a shard has a checksum by default.
"""

from zarr.codecs import Crc32cCodec, ZstdCodec

CHECKED = (ZstdCodec(level=0), Crc32cCodec())
