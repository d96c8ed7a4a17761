"""Hugging Face transformers: TurboCache and the attention implementation `kvturbo`, registered by importing this."""

from kvturbo.hf.attention import attend, register
from kvturbo.hf.cache import TurboCache

__all__ = ["TurboCache", "attend"]

register()
