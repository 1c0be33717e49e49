"""The host layer: the only place that touches ComfyUI's internals.

A node calls `add`, and the model it returns carries one more configuration in its plan. The rest
happens when sampling begins: `sampling` reads the plan and runs its methods, `record` counts,
`verdicts` tells each node what became of it.
"""

from .node import (
    add,
    backend_options,
    cfg_option,
    model_node,
    node_schema,
    option,
    percent_range,
    sampler_options,
    suggest,
)
from .plan.models import describe
from .plan.plan import Plan, plan_of

__all__ = [
    "Plan",
    "add",
    "backend_options",
    "cfg_option",
    "describe",
    "model_node",
    "node_schema",
    "option",
    "percent_range",
    "plan_of",
    "sampler_options",
    "suggest",
]
