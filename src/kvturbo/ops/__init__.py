"""The three operations on packed pages, and prefix attention built from gather."""

from kvturbo.ops import library
from kvturbo.ops.decode import decode
from kvturbo.ops.gather import gather
from kvturbo.ops.prefix import prefix_attention
from kvturbo.ops.store import store

__all__ = ["decode", "gather", "library", "prefix_attention", "store"]
