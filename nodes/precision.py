from comfy_api.latest import io

from .engine import add, model_node, option
from .methods.precision import DTYPES, SCOPES, SWITCH, Precision


class SlipstreamPrecision(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamPrecision",
            display_name="Precision (Slipstream)",
            description=(
                "What this model computes in, for its own runs alone: fp16, bf16 or fp32, TF32, and channels-last "
                "convolutions. On a CPU bf16 really computes in bf16, where ComfyUI's own flag only stores it. For any "
                "model; LoRA is followed."
            ),
            aliases=["bf16", "fp16", "fp32", "tf32", "channels last", "dtype", "cpu", "faster"],
            options=[
                option(
                    io.Combo,
                    "compute_dtype",
                    options=["auto", *DTYPES],
                    default="auto",
                    tooltip=(
                        "auto: bf16 on a processor that has it, elsewhere what ComfyUI computes in. bf16 has fp32's "
                        "range and 8 bits of precision. fp16 has 11, but overflows in some models."
                    ),
                ),
                option(
                    io.Combo,
                    "channels_last",
                    options=list(SWITCH),
                    default="auto",
                    tooltip=(
                        "The memory format of convolutions. auto: on where a CPU computes in bf16, elsewhere as it is. "
                        "Measure it on a GPU."
                    ),
                ),
                option(
                    io.Combo,
                    "tf32",
                    options=list(SWITCH),
                    default="auto",
                    tooltip=(
                        "Whether an NVIDIA GPU multiplies fp32 numbers at 11 bits, several times as fast. auto: "
                        "as it is set. Only where the model computes in fp32."
                    ),
                ),
                option(
                    io.Combo,
                    "scope",
                    options=list(SCOPES),
                    default=SCOPES[0],
                    tooltip=(
                        "model: all of it. transformers: only a UNet's transformers, on a CPU; convolutions stay in "
                        "fp32, so that less is lost. For SD 1.x, SD 2.x, SDXL, SSD-1B and refiner models."
                    ),
                    advanced=True,
                ),
            ],
        )

    @classmethod
    def execute(cls, model, compute_dtype, channels_last, tf32, scope):
        return add(cls, model, Precision(compute_dtype, channels_last, tf32, scope))
