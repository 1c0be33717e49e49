from comfy_api.latest import io

from .engine import model_node, option
from .engine.cpu import speed_up
from .methods.winograd import FORMS, Winograd

OFF = "off"


class SlipstreamCPU(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamCPU",
            display_name="CPU (Slipstream)",
            description=(
                "Everything that makes a model faster on a processor (ComfyUI with --cpu): Winograd's 3x3 "
                "convolutions, computing in bfloat16 with channels-last features, and torch's own attention, each only "
                "where it is faster here. A node of its own for one of them wins over this one, wherever it is wired."
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
                        "everywhere, unmeasured: the same bits after each start. Of the two, F(2x2) rounds less."
                    ),
                ),
                option(
                    io.Boolean,
                    "bf16",
                    default=True,
                    tooltip="Compute in bfloat16, channels-last, where the processor has instructions for it.",
                ),
                option(
                    io.Boolean,
                    "sdpa",
                    default=True,
                    tooltip="torch's own attention, in the place of the one in slices that ComfyUI takes on a CPU.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, winograd, bf16, sdpa):
        chosen = None if winograd == OFF else Winograd(winograd, bf16)
        return speed_up(cls, model, chosen, bf16, sdpa)
