from comfy_api.latest import io

from .engine import node_schema
from .engine.vae.tiled_vae import decode, tile_options


class SlipstreamVAEDecodeTiled(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node_schema(
            node_id="SlipstreamVAEDecodeTiled",
            display_name="VAE Decode Tiled (Slipstream)",
            category="Slipstream/vae",
            description=(
                "Decodes a latent in tiles, in one pass without seams: the same image as decoded whole, in a fraction "
                "of the memory. For the KL autoencoders of SD, SDXL, SD 3, Flux and the like."
            ),
            search_aliases=["tiled vae", "vae decode tiled", "vae slicing", "tile", "seamless", "low vram", "4k"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to decode."),
                io.Vae.Input("vae", tooltip="The VAE. It is not changed itself."),
                *tile_options(),
            ],
            outputs=[io.Image.Output(tooltip="The decoded image.")],
        )

    @classmethod
    def execute(cls, samples, vae, **settings):
        return decode(cls, samples, vae, settings)
