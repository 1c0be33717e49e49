from comfy_api.latest import io

from .engine import add, model_node, option
from .methods.sequential_offload import MAX_MIB, SequentialOffload


class SlipstreamSequentialOffload(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamSequentialOffload",
            display_name="Sequential Offload (Slipstream)",
            description=(
                "Gives this model a budget of GPU memory: what exceeds it waits in RAM and comes as it is used. The "
                "same image, slower, with room left for larger images and for other models. For any model; ComfyUI's "
                "DynamicVRAM, where it is on, does this by itself."
            ),
            aliases=["offload", "low vram", "lowvram", "memory budget", "block swap", "cpu offload", "small gpu"],
            options=[
                option(
                    io.Int,
                    "budget_mib",
                    default=0,
                    min=0,
                    max=MAX_MIB,
                    step=64,
                    tooltip=(
                        "GPU memory in MiB for this model's weights, with room for those on their way. 0 keeps none "
                        "there: they come layer by layer, which takes the least memory and the most time."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, model, budget_mib):
        return add(cls, model, SequentialOffload(budget_mib))
