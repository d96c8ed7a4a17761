"""Which backend class a layer gets. vLLM's automatic selection asks a fixed list of registry members, TURBOQUANT the last of
them; this class stands there, looks at the cache dtype and names the class that serves it: vLLM's own for vLLM's dtypes.
"""

from __future__ import annotations

import threading
from typing import Any

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend

from kvturbo.vllm.backend import BACKENDS
from kvturbo.vllm.sliding import engine_backend


class _Choice(threading.local):
    """The class that the selection under way in this thread has led to."""

    backend: type[AttentionBackend] = TurboQuantAttentionBackend


_CHOICE = _Choice()


class TurboQuantRouter(TurboQuantAttentionBackend):
    """Answers for the registry member TURBOQUANT. vLLM asks `validate_configuration` whether the member takes a layer, and, when it
    does, `full_cls_name` for the class to use; all else is asked of that class. Without a choice it is vLLM's own backend.
    """

    @classmethod
    def validate_configuration(cls, **configuration: Any) -> list[str]:
        """Reasons why the class that serves this cache dtype can't take the layer; none if it can."""
        packed = BACKENDS.get(configuration["kv_cache_dtype"])
        if packed is None:
            _CHOICE.backend = TurboQuantAttentionBackend
        elif configuration["has_sliding_window"]:
            try:
                _CHOICE.backend = engine_backend(packed, configuration)
            except ValueError as reason:
                return [f"sliding-window layers stay on vLLM's backends, none of which takes this one: {reason}"]
            return []
        else:
            _CHOICE.backend = packed
        reasons: list[str] = _CHOICE.backend.validate_configuration(**configuration)
        return reasons

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """Module and name of the class that was chosen last in this thread."""
        name: tuple[str, str] = _CHOICE.backend.full_cls_name()
        return name
