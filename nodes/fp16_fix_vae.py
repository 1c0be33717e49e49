from comfy_api.latest import io

from .engine import node_schema, option
from .engine.vae.fp16_fix_vae import METHODS, PRECISIONS, FP16Fix, fixed


class SlipstreamFP16FixVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node_schema(
            node_id="SlipstreamFP16FixVAE",
            display_name="FP16-Fix VAE (Slipstream)",
            category="Slipstream/vae",
            description=(
                "Runs a KL autoencoder (SD, SDXL, SD 3, Flux) in fp16 without black images: its weights are rescaled "
                "so that fp16 holds every activation, exactly, and no fixed file is needed. What still overflows is "
                "decoded again in a wider type."
            ),
            search_aliases=["sdxl vae fp16 fix", "half precision", "black image", "nan", "bf16"],
            inputs=[
                io.Vae.Input(
                    "vae", tooltip="The VAE, from a file of its own or a checkpoint. It is not changed itself."
                ),
                option(
                    io.Combo,
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="auto: fp16 where the device computes it fast, else bf16 where it has that, else fp32.",
                ),
                option(
                    io.Combo,
                    "method",
                    options=list(METHODS),
                    default="rescale",
                    tooltip=(
                        "rescale: measure the activations once, and rescale the weights if fp16 could not hold them. "
                        "as is: only change the type, for a file that is fixed already. Matters for fp16 only."
                    ),
                ),
            ],
            outputs=[io.Vae.Output(tooltip="The VAE in that precision.")],
        )

    @classmethod
    def execute(cls, vae, precision, method):
        return io.NodeOutput(fixed(cls, vae, FP16Fix(precision, method)))
