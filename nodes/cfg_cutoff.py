from comfy_api.latest import io

from .engine import add, model_node, option
from .methods.cfg_cutoff import UNITS, CFGCutoff


class SlipstreamCFGCutoff(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamCFGCutoff",
            display_name="CFG Cutoff (Slipstream)",
            description=(
                "Turns guidance off for the last part of the run, where it hardly matters: each step then evaluates "
                "the positive prompt alone, at half the work. For any model, guider and sampler."
            ),
            aliases=["cfg", "guidance", "dynamic guidance", "speed", "faster"],
            options=[
                option(
                    io.Float,
                    "cutoff",
                    default=0.75,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Fraction of the run after which guidance is off. 0.75 is hard to see and saves an eighth of "
                        "the work, 0.5 saves a quarter. 1 is off."
                    ),
                ),
                option(
                    io.Combo,
                    "unit",
                    options=list(UNITS),
                    default=UNITS[0],
                    tooltip=(
                        "steps: of this run, from step int(cutoff * steps) on. timesteps: of the training timesteps, "
                        "so that an image-to-image run is cut off at the same noise level as a full one."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, model, cutoff, unit):
        return add(cls, model, CFGCutoff(cutoff, unit))
