from comfy_api.latest import io

from .engine import node_schema, option
from .engine.saved_plans import save


class SlipstreamSavePlan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node_schema(
            node_id="SlipstreamSavePlan",
            display_name="Save Plan (Slipstream)",
            category="Slipstream/model",
            description=(
                "Saves which Slipstream methods are on a model, with their settings, as a small file: for other "
                "workflows, machines and people. Load Plan puts it on a model."
            ),
            search_aliases=["save plan", "preset", "export", "settings", "json"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model with the methods on it. It is not changed."),
                option(
                    io.String,
                    "save_as",
                    default="my plan",
                    tooltip=(
                        "The file's name, in ComfyUI's folder user/slipstream/plans. A plan that has it already is "
                        "replaced."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model as it came."),
                io.String.Output(display_name="plan", tooltip="The plan as JSON."),
            ],
        )

    @classmethod
    def execute(cls, model, save_as):
        return save(cls, model, save_as)
