from comfy_api.latest import io

from .engine import node_schema
from .engine.report import show_last_run


class SlipstreamReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node_schema(
            node_id="SlipstreamReport",
            display_name="Report (Slipstream)",
            category="Slipstream/measure",
            description=(
                "Shows the last run of a model: its time, its steps, and what each Slipstream method on it did. "
                "Samples nothing by itself."
            ),
            search_aliases=["report", "timing", "statistics", "verdict"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled, as it went into the sampler."),
                io.MultiType.Input(
                    "after",
                    types=[io.Latent, io.Image],
                    tooltip="What the sampler made of it, or an image of that: the report comes after it.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The report as text.")],
        )

    @classmethod
    def execute(cls, model, after):
        return show_last_run(cls, model)
