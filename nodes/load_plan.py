from comfy_api.latest import io

from .engine import node_schema, option
from .engine.saved_plans import choices, fingerprint, load


class SlipstreamLoadPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node_schema(
            node_id="SlipstreamLoadPlan",
            display_name="Load Plan (Slipstream)",
            category="Slipstream/model",
            description=(
                "Puts a saved plan on a model: the methods and settings that Save Plan or Tune wrote. What this "
                "machine or this model can't do is left out and told. A method's own node, wherever it is wired, wins."
            ),
            search_aliases=["load plan", "preset", "import", "settings", "json"],
            inputs=[
                io.Model.Input("model", tooltip="The model. It is not changed itself."),
                option(
                    io.Combo,
                    "plan",
                    options=choices(),
                    tooltip=(
                        "The plan: a file in ComfyUI's folder user/slipstream/plans, or one that comes with "
                        "Slipstream. Press R for those that were saved since the page was loaded."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the plan's methods.")],
        )

    @classmethod
    def fingerprint_inputs(cls, plan, **inputs):
        return fingerprint(plan)

    @classmethod
    def execute(cls, model, plan):
        return load(cls, model, plan)
