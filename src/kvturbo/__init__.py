"""kvturbo keeps the KV cache of a language model at 2-4 bits per element and attends to it directly."""

from kvturbo.cache import PagedKVCache
from kvturbo.config import KVFormat, format_names
from kvturbo.layout import PageLayout
from kvturbo.outliers import choose_outlier_channels
from kvturbo.pool import OutOfPagesError
from kvturbo.quantizer import Packed, dequantize, quantize

__version__ = "0.1.0"

__all__ = [
    "KVFormat",
    "OutOfPagesError",
    "Packed",
    "PageLayout",
    "PagedKVCache",
    "choose_outlier_channels",
    "dequantize",
    "format_names",
    "quantize",
]
