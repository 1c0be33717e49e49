from comfy_api.latest import io

from .engine import node_schema, option, sampler_options
from .engine.tune import METRIC, SamplerCall, Wanted, fingerprint, tune
from .methods.tune import MAY_USE

MORE = (2, 3, 4, 5)


class SlipstreamTune(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node_schema(
            node_id="SlipstreamTune",
            display_name="Tune (Slipstream)",
            category="Slipstream/measure",
            description=(
                "Finds the fastest settings that keep your pictures: tries Slipstream's methods and their combinations "
                "on your model, prompts and seeds, and returns the model with the fastest plan whose worst picture "
                "stays above a floor. For any model."
            ),
            search_aliases=["tune", "auto tune", "optimize", "find settings", "search", "speed", "fastest"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model, with all that belongs to it: LoRA and the like."),
                io.Vae.Input("vae", tooltip="Decodes the pictures that are compared. It is no part of the plan."),
                io.Conditioning.Input("positive", tooltip="A prompt as you use them. More prompts make it surer."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Latent.Input("latent_image", tooltip="The latent: size, batch, mask."),
                *sampler_options(keeps_seed=True),
                option(
                    io.Combo,
                    "metric",
                    options=[METRIC],
                    default=METRIC,
                    tooltip="How alike two pictures are: SSIM, 1 for equal ones.",
                ),
                option(
                    io.Float,
                    "floor",
                    default=0.95,
                    min=0.0,
                    max=0.9999,
                    step=0.001,
                    round=0.0001,
                    tooltip=(
                        "How alike the worst picture must be to the exact one. 0.99: differences are hard to see. "
                        "0.95: small details differ. 0.9: some things are drawn otherwise."
                    ),
                ),
                option(
                    io.Int,
                    "seeds",
                    default=3,
                    min=1,
                    max=20,
                    tooltip=(
                        "Seeds that each prompt is tried with, from seed on. Fewer than three pictures in all say "
                        "little of others."
                    ),
                ),
                option(
                    io.Float,
                    "minutes",
                    default=10.0,
                    min=0.1,
                    max=1440.0,
                    step=1.0,
                    round=0.1,
                    tooltip="A limit. What was measured is kept: run the node again, and it goes on from there.",
                ),
                option(
                    io.Combo,
                    "may_use",
                    options=list(MAY_USE),
                    default=MAY_USE[0],
                    tooltip=(
                        "exact and approximate: whatever works at once. exact only: the same picture up to rounding. "
                        "everything: also what compiles or quantizes first, which takes minutes."
                    ),
                ),
                option(
                    io.String,
                    "save_as",
                    default="",
                    tooltip="Saves the plan under this name, for Load Plan. Empty: it is not saved.",
                ),
                *(
                    one
                    for number in MORE
                    for one in (
                        io.Conditioning.Input(f"positive_{number}", optional=True, tooltip="Another prompt."),
                        io.Conditioning.Input(
                            f"negative_{number}",
                            optional=True,
                            tooltip="Its negative prompt. Without it, the first one's is used.",
                        ),
                    )
                ),
                option(
                    io.String,
                    "chosen",
                    default="",
                    optional=True,
                    tooltip=(
                        "The name of a plan that was tried, as the report has it, to be used in the place of the best "
                        "one; a click in the chart writes it. Nothing is measured then. Empty: the best one."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the plan that was found, or as it came."),
                io.Image.Output(display_name="images", tooltip="The exact pictures, then those of the plan."),
                io.String.Output(display_name="report", tooltip="The report in Markdown."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return fingerprint()

    @classmethod
    def execute(
        cls,
        model,
        vae,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        denoise,
        metric,
        floor,
        seeds,
        minutes,
        may_use,
        save_as,
        chosen="",
        **prompts,
    ):
        call = SamplerCall(positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise, "Tune")
        others = [(prompts.get(f"positive_{number}"), prompts.get(f"negative_{number}")) for number in MORE]
        return tune(cls, model, vae, call, others, Wanted(floor, seeds, minutes, may_use, save_as, chosen))
