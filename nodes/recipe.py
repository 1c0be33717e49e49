from comfy_api.latest import io

from .engine import model_node, option
from .engine.recipe import plan_for
from .methods.recipe import BALANCED, GOALS


class SlipstreamRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamRecipe",
            display_name="Recipe (Slipstream)",
            description=(
                "A plan for a goal, in one node: chooses the methods that serve this model and are installed on this "
                "machine, and lists each with why and what it costs. A method's own node on the same model, wherever "
                "it is wired, wins over this one."
            ),
            aliases=["recipe", "preset", "auto", "optimize", "faster", "low vram", "speed up"],
            options=[
                option(
                    io.Combo,
                    "goal",
                    options=list(GOALS),
                    default=BALANCED,
                    tooltip=(
                        "best quality: the same picture up to rounding. balanced: faster, and very near to it. "
                        "fastest: with less fine detail. under N GB: GPU memory for sampling with this model, at "
                        "pictures of 1024x1024 and below."
                    ),
                )
            ],
        )

    @classmethod
    def execute(cls, model, goal):
        return plan_for(cls, model, goal)
