"""Where intermediate results live between calls: the 0.3.2 interface, and files."""

from trak.errors import ModelIDException
from trak.savers._abstract import AbstractSaver
from trak.savers._mmap import MmapSaver
from trak.savers._sizes import StoreSizes, store_sizes

__all__ = [
    "AbstractSaver",
    "MmapSaver",
    "ModelIDException",
    "StoreSizes",
    "store_sizes",
]
