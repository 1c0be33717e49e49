from comfy_api.latest import io

from .engine import node_schema
from .engine.vae.tiled_vae import encode, tile_options


class SlipstreamVAEEncodeTiled(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node_schema(
            node_id="SlipstreamVAEEncodeTiled",
            display_name="VAE Encode Tiled (Slipstream)",
            category="Slipstream/vae",
            description=(
                "Encodes an image in tiles, in one pass without seams: the same latent as encoded whole, in a fraction "
                "of the memory. For the KL autoencoders of SD, SDXL, SD 3, Flux and the like."
            ),
            search_aliases=["tiled vae", "vae encode tiled", "vae slicing", "tile", "seamless", "low vram", "4k"],
            inputs=[
                io.Image.Input("pixels", tooltip="The image to encode. Sides that are no multiple of 8 are cropped."),
                io.Vae.Input("vae", tooltip="The VAE. It is not changed itself."),
                *tile_options(),
            ],
            outputs=[io.Latent.Output(tooltip="The encoded latent.")],
        )

    @classmethod
    def execute(cls, pixels, vae, **settings):
        return encode(cls, pixels, vae, settings)
