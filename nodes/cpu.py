from comfy_api.latest import io

from .engine import model_node, option
from .engine.cpu import speed_up
from .methods.winograd import FORMS, MOST_MIB

OFF = "off"


class SlipstreamCPU(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamCPU",
            display_name="CPU (Slipstream)",
            description=(
                "Everything that makes a model faster on a processor (ComfyUI with --cpu): Winograd's 3x3 "
                "convolutions, computing in bfloat16, and torch's own attention. Each convolution runs as is fastest "
                "here. A node of its own for one of them, wherever it is wired, wins over this one."
            ),
            aliases=["cpu", "winograd", "processor", "bf16", "channels last", "sdpa", "faster"],
            options=[
                option(
                    io.Combo,
                    "winograd",
                    options=[*FORMS, OFF],
                    default=FORMS[0],
                    tooltip=(
                        "3x3 convolutions with fewer multiplications. auto measures, once after each start and for "
                        "each shape, what is fastest here, ComfyUI's own included. F(2x2) and F(4x4) are taken "
                        "everywhere, unmeasured: the same bits after each start if memory allows. F(2x2) rounds less."
                    ),
                ),
                option(
                    io.Boolean,
                    "bf16",
                    default=True,
                    tooltip=(
                        "Compute transformers in bfloat16 where the processor has instructions for it, and "
                        "convolutions that are fastest so. What goes from block to block stays in float32. With "
                        "winograd off: all of it."
                    ),
                ),
                option(
                    io.Boolean,
                    "sdpa",
                    default=True,
                    tooltip="torch's own attention, in the place of the one in slices that ComfyUI takes on a CPU.",
                ),
                option(
                    io.Int,
                    "filters_mib",
                    default=0,
                    min=0,
                    max=MOST_MIB,
                    step=256,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "The most memory that winograd's filters may take, in MiB. What does not fit runs as the next "
                        "faster variant that does, or as ComfyUI's own. 0 is half of what was free when ComfyUI first "
                        "made some."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, model, winograd, bf16, sdpa, filters_mib=0):
        return speed_up(cls, model, None if winograd == OFF else winograd, bf16, sdpa, filters_mib)
