"""Tasks for vLLM servers, one file each; `kvturbo.eval.registry.SERVED_TASKS` finds them here."""
