"""Metrics, one file each; `kvturbo.eval.registry.METRICS` finds them here."""
