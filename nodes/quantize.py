from comfy_api.latest import io

from .engine import add, model_node, option
from .methods.quantize import OFFLOAD, SCHEMES, Quantize


class SlipstreamQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamQuantize",
            display_name="Quantize Model (Slipstream)",
            description=(
                "The weights of the diffusion model's linear layers in eight bits, by torchao: a quarter of fp32's "
                "memory, half of fp16's, and faster where the device multiplies in eight bits. For any model; LoRA is "
                "merged first and followed. Goes with Compile Model, which most schemes need to be faster. Or 2:4 "
                "sparse: half of the weights zero."
            ),
            aliases=["torchao", "int8", "fp8", "float8", "quantization", "w8a8", "memory", "vram", "faster"],
            options=[
                option(
                    io.Combo,
                    "scheme",
                    options=list(SCHEMES),
                    default=SCHEMES[0],
                    tooltip=(
                        "dynamic: activations are quantized too, and multiplied in eight bits: faster. weight-only: "
                        "multiplies as before: less memory, closer to the original. fp8 dynamic needs an NVIDIA GPU of "
                        "compute capability 8.9 (RTX 40) or newer, or another one that multiplies in fp8. 2:4 sparse: "
                        "half of each layer's weights are left out, the rest corrected by what the first step of the "
                        "run shows; faster on NVIDIA GPUs from RTX 30 on at best, and far from exact: see the help."
                    ),
                ),
                option(
                    io.Int,
                    "min_features",
                    default=256,
                    min=0,
                    max=65536,
                    tooltip="Layers with fewer inputs or outputs stay as they are: they gain little.",
                    advanced=True,
                ),
                option(
                    io.String,
                    "skip",
                    default="",
                    tooltip=(
                        "Parts of layers' names, separated by commas, that stay as they are, such as attn2, proj_out. "
                        "The first and the last layers and time embeddings do so anyway."
                    ),
                    advanced=True,
                ),
                option(
                    io.Combo,
                    "offload_originals",
                    options=list(OFFLOAD),
                    default=OFFLOAD[0],
                    tooltip=(
                        "Whether the original weights leave the GPU while the quantized ones are used. It saves memory "
                        "and takes a transfer in each run. auto: where the model did not fit as a whole. On a CPU, "
                        "with hooks and under DynamicVRAM it does nothing."
                    ),
                    advanced=True,
                ),
                option(
                    io.Float,
                    "sparse_error",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    optional=True,
                    tooltip=(
                        "2:4 sparse: layers whose outputs would lose more than this in the first evaluation, relative "
                        "to them, stay whole. In later evaluations they lose more."
                    ),
                    advanced=True,
                ),
                option(
                    io.Float,
                    "sparse_share",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    optional=True,
                    tooltip=(
                        "2:4 sparse: the most of the layers' multiplications to prune, those first that save most for "
                        "what they lose."
                    ),
                    advanced=True,
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, scheme, min_features, skip, offload_originals, sparse_error=0.05, sparse_share=1.0
    ):  # fmt: skip
        config = Quantize(scheme, min_features, skip, offload_originals, sparse_error, sparse_share)
        return add(cls, model, config)
