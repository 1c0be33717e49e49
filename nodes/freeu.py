from comfy_api.latest import io

from .engine import add, describe, model_node, option, percent_range
from .methods.freeu import PRESETS, VERSIONS, FreeU, preset_values


def factor(name, default, tooltip):
    return option(io.Float, name, default=default, min=0.0, max=10.0, step=0.01, tooltip=tooltip)


class SlipstreamFreeU(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamFreeU",
            display_name="FreeU (Slipstream)",
            description=(
                "Rebalances the UNet's backbone and skip features for more structure and contrast, at no cost in time. "
                "For SD 1.x, SD 2.x, SDXL, SSD-1B and refiner models."
            ),
            aliases=["free lunch", "quality"],
            options=[
                option(
                    io.Combo,
                    "preset",
                    options=["auto", *PRESETS, "custom"],
                    default="auto",
                    tooltip=(
                        "auto: the authors' values for this model's family. custom: b1, b2, s1 and s2 below; any "
                        "other choice ignores them."
                    ),
                ),
                option(
                    io.Combo,
                    "version",
                    options=list(VERSIONS),
                    default="v2",
                    tooltip="v1 scales by a constant, v2 by a map that follows the features. v2 is the gentler one.",
                ),
                factor("b1", 1.3, "Backbone factor of the deepest blocks; used with preset custom. 1 changes nothing."),
                factor(
                    "b2", 1.4, "Backbone factor of the next wider blocks; used with preset custom. 1 changes nothing."
                ),
                factor("s1", 0.9, "Skip factor of the deepest blocks; used with preset custom. 1 changes nothing."),
                factor("s2", 0.2, "Skip factor of the next wider blocks; used with preset custom. 1 changes nothing."),
                *percent_range(
                    "Fraction of the timesteps at which it begins.",
                    "Fraction of the timesteps at which it ends.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, preset, version, b1, b2, s1, s2, start_percent, end_percent):
        if preset != "custom":
            b1, b2, s1, s2 = preset_values(preset, describe(model, model.model_options))
        return add(cls, model, FreeU(b1, b2, s1, s2, version, start_percent, end_percent))
