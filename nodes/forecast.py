from comfy_api.latest import io

from .engine import add, model_node, option, percent_range
from .methods.forecast import MAX_BUDGET, MAX_SKIPS, Forecast


class SlipstreamForecast(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamForecast",
            display_name="Forecast (Slipstream)",
            description=(
                "Skips evaluations of the model that can be foretold from those before, and holds what that costs "
                "under a budget of error, which it measures as it runs. For any model (SD, SDXL, Flux, Qwen-Image, "
                "Wan, ...), any guider and nearly any sampler. Says how many evaluations it skipped, and at what error."
            ),
            aliases=["step cache", "easycache", "teacache", "taylorseer", "speed", "faster"],
            options=[
                option(
                    io.Float,
                    "error_budget",
                    default=0.05,
                    min=0.0,
                    max=MAX_BUDGET,
                    step=0.005,
                    round=0.0001,
                    tooltip=(
                        "What a row of skipped evaluations may leave in the latent, as a fraction of it. 0.01 is very "
                        "close to the exact image, 0.05 a good trade, 0.1 fast. 0 is off."
                    ),
                ),
                option(
                    io.Int,
                    "max_skips",
                    default=3,
                    min=1,
                    max=MAX_SKIPS,
                    tooltip="How many evaluations in a row may be skipped at most, whatever the budget.",
                ),
                *percent_range(
                    "Fraction of the timesteps before which nothing is skipped.",
                    "Fraction of the timesteps after which nothing is skipped.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, error_budget, max_skips, start_percent, end_percent):
        return add(cls, model, Forecast(error_budget, max_skips, start_percent, end_percent))
