"""Tasks, one file each; `kvturbo.eval.registry.TASKS` finds them here."""
