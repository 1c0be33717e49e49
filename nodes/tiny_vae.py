from comfy_api.latest import io

from .engine import node_schema, option
from .engine.vae.tiny_vae import choices, tiny


class SlipstreamTinyVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node_schema(
            node_id="SlipstreamTinyVAE",
            display_name="Tiny VAE (Slipstream)",
            category="Slipstream/vae",
            description=(
                "Loads the tiny autoencoder (TAESD and its relatives) that fits a model: decodes in a fraction of a "
                "full VAE's time and memory, with a little less detail. Its decoder's file alone is enough."
            ),
            search_aliases=["taesd", "taesdxl", "taef1", "taehv", "preview", "fast decode", "vae loader"],
            inputs=[
                io.Model.Input("model", tooltip="The model whose latents are to be decoded. It is only looked at."),
                option(
                    io.Combo,
                    "name",
                    options=choices(),
                    default="auto",
                    tooltip="auto: the file in models/vae_approx that is made for the model's latents. Or one of them.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="The VAE, for every node that takes one.")],
        )

    @classmethod
    def execute(cls, model, name):
        return io.NodeOutput(tiny(cls, model, name))
