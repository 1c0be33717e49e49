from comfy_api.latest import io

from .engine import node_schema
from .engine.demo_model import load


class SlipstreamDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node_schema(
            node_id="SlipstreamDemoModel",
            display_name="Demo Model (Slipstream)",
            category="Slipstream/loaders",
            description=(
                "A small SD 1.5-shaped model that comes with the pack: landscapes of 256x256 in a few seconds, on any "
                "machine, with nothing to download. It knows some twenty words, and lists them when it runs."
            ),
            search_aliases=["demo", "try", "example", "checkpoint", "tiny", "toy"],
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The diffusion model, in the shape of SD 1.5."),
                io.Clip.Output(tooltip="Its text encoder, for CLIPTextEncode."),
                io.Vae.Output(tooltip="Its VAE, in TAESD's architecture."),
            ],
        )

    @classmethod
    def execute(cls):
        return load(cls)
