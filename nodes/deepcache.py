from comfy_api.latest import io

from .engine import add, model_node, option, percent_range
from .methods.deepcache import MAX_BRANCH, MAX_INTERVAL, SCHEDULES, DeepCache


class SlipstreamDeepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamDeepCache",
            display_name="DeepCache (Slipstream)",
            description=(
                "Reuses the UNet's deep features between steps: two to three times faster, at a small loss of detail. "
                "For SD 1.x, SD 2.x, SDXL, SSD-1B and refiner models. Works with ControlNet, IPAdapter, LoRA, regional "
                "prompts, FreeU and CFG Cutoff."
            ),
            aliases=["deep cache", "feature cache", "speed", "faster"],
            options=[
                option(
                    io.Int,
                    "cache_interval",
                    default=3,
                    min=1,
                    max=MAX_INTERVAL,
                    tooltip=(
                        "One step in this many runs the whole UNet. 2 is safe, 3 a good trade, above 5 loses detail. "
                        "1 is off."
                    ),
                ),
                option(
                    io.Int,
                    "cache_branch_id",
                    default=0,
                    min=0,
                    max=MAX_BRANCH,
                    tooltip=(
                        "The skip connection at which cached features join: 0 is the outermost, fastest and coarsest; "
                        "each one deeper runs two more blocks. Up to 11 for SD 1.x and 2.x and the refiner, 8 for SDXL."
                    ),
                ),
                option(
                    io.Combo,
                    "schedule",
                    options=list(SCHEDULES),
                    default=SCHEDULES[0],
                    tooltip=(
                        "uniform: every cache_interval-th step is full. quadratic: as many full steps, but densest at "
                        "30 % of the run, where features change fastest; better at large intervals."
                    ),
                ),
                *percent_range(
                    "Fraction of the timesteps before which every step is full.",
                    "Fraction of the timesteps after which every step is full.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, cache_interval, cache_branch_id, schedule, start_percent, end_percent):
        return add(cls, model, DeepCache(cache_interval, cache_branch_id, schedule, start_percent, end_percent))
