"""Caches to compare with, one file each; `kvturbo.eval.registry.BASELINES` finds them here."""
