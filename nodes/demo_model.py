from comfy_api.latest import io

from .engine import node_schema
from .engine.demo_model import ARCHITECTURES, load


class SlipstreamDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node_schema(
            node_id="SlipstreamDemoModel",
            display_name="Demo Model (Slipstream)",
            category="Slipstream/loaders",
            description=(
                "A small model that comes with the pack, in the shape of SD 1.5 or as a transformer: landscapes of "
                "256x256 in a few seconds, on any machine, with nothing to download. It knows some twenty words, and "
                "lists them when it runs."
            ),
            search_aliases=["demo", "try", "example", "checkpoint", "tiny", "toy"],
            inputs=[
                io.Combo.Input(
                    "architecture",
                    options=list(ARCHITECTURES),
                    default=ARCHITECTURES[0],
                    optional=True,
                    tooltip=(
                        "UNet: SD 1.5 in small. transformer: AuraFlow in small, a diffusion transformer with flow "
                        "matching, as most newer models are. Both know the same words and use the same VAE."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model."),
                io.Clip.Output(tooltip="Its text encoder, for CLIPTextEncode."),
                io.Vae.Output(tooltip="Its VAE, in TAESD's architecture."),
            ],
        )

    @classmethod
    def execute(cls, architecture=ARCHITECTURES[0]):
        return load(cls, architecture)
