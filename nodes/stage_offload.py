from comfy_api.latest import io

from .engine import node_schema, option
from .engine.stage_offload import STAGES, free_stages


class SlipstreamStageOffload(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        passed = io.MatchType.Template("value")
        return node_schema(
            node_id="SlipstreamStageOffload",
            display_name="Stage Offload (Slipstream)",
            category="Slipstream/memory",
            description=(
                "Passes a value through, and takes models that have done their part off the GPU at that point of the "
                "workflow: the text encoders before sampling, the diffusion model before decoding. They wait in RAM "
                "and come back when they are needed."
            ),
            search_aliases=["free memory", "unload", "clear vram", "offload", "low vram", "purge"],
            inputs=[
                option(
                    io.MatchType,
                    "value",
                    template=passed,
                    tooltip="Anything: it is passed through. Models are freed when it is ready, and before it is used.",
                ),
                option(
                    io.Combo,
                    "stages",
                    options=list(STAGES),
                    default=STAGES[0],
                    tooltip=(
                        "What to free: text encoders, diffusion models, or every model but those in value (a MODEL, "
                        "CLIP, VAE, GUIDER or CONTROL_NET, or a CONDITIONING with one; for anything else every model)."
                    ),
                ),
                option(
                    io.AnyType,
                    "after",
                    optional=True,
                    tooltip="Anything that is to be ready as well before models are freed, such as the other prompt.",
                ),
            ],
            outputs=[io.MatchType.Output(template=passed, display_name="value", tooltip="The value, as it came.")],
        )

    @classmethod
    def execute(cls, value, stages, after=None):
        return free_stages(cls, value, stages)
