"""Which layers of a model need more for their keys than a format gives, found before anything is stored.

`moments` holds what is known of a layer's keys, queries and values, from the weights or from a text; `merit` says how much
noise a format adds to the scores and chooses formats; `plan` is the file `kvturbo.json` that carries the choice.
"""

from kvturbo.guard.merit import choose_format, key_excess, make_plan, value_excess
from kvturbo.guard.moments import LayerMoments, moments_of_folder, moments_of_weights
from kvturbo.guard.plan import PLAN_FILE, LayerPlan, Plan, read_plan, write_plan

__all__ = [
    "PLAN_FILE",
    "LayerMoments",
    "LayerPlan",
    "Plan",
    "choose_format",
    "key_excess",
    "make_plan",
    "moments_of_folder",
    "moments_of_weights",
    "read_plan",
    "value_excess",
    "write_plan",
]
