from comfy_api.latest import io

from .engine import cfg_option, node_schema, sampler_options
from .engine.refiner_handoff import Call, Part, hand_over, mode_option


class SlipstreamRefinerHandoff(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        seed, steps, cfg, *sampler = sampler_options(has_denoise=False)
        return node_schema(
            node_id="SlipstreamRefinerHandoff",
            display_name="Refiner Handoff (Slipstream)",
            category="Slipstream/sampling",
            description=(
                "Samples with a base and a refiner in one run: the base makes the image, and hands it over, still a "
                "little noisy, to the refiner for the details. For SDXL and its refiner, Wan 2.2's two models, or any "
                "two that share a kind of latent."
            ),
            search_aliases=["refiner", "sdxl refiner", "ensemble of experts", "denoising_end", "two models", "handoff"],
            inputs=[
                io.Model.Input("base", tooltip="The model that begins."),
                io.Model.Input(
                    "refiner",
                    tooltip="The model that goes on: SDXL's refiner, Wan 2.2's for low noise, another SDXL model.",
                ),
                io.Conditioning.Input("base_positive", tooltip="The prompt for the base."),
                io.Conditioning.Input("base_negative", tooltip="The negative prompt for the base."),
                io.Latent.Input("latent_image", tooltip="The latent: size, batch, mask."),
                seed,
                steps,
                cfg,
                cfg_option("refiner_cfg", "cfg for the refiner's steps."),
                *sampler,
                mode_option(),
                io.Conditioning.Input(
                    "refiner_positive",
                    optional=True,
                    tooltip=(
                        "The prompt for the refiner, made with its own CLIP. Without it the base's is used: an SDXL "
                        "base's has what the SDXL refiner needs."
                    ),
                ),
                io.Conditioning.Input(
                    "refiner_negative",
                    optional=True,
                    tooltip="The negative prompt for the refiner. Without it the base's is used.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The finished latent."),
                io.Latent.Output(
                    display_name="base_latent",
                    tooltip="The base's latent at the handoff: with its noise left in an ensemble, else finished.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        base,
        refiner,
        base_positive,
        base_negative,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        refiner_cfg,
        mode,
        refiner_positive=None,
        refiner_negative=None,
    ):
        return hand_over(
            cls,
            Part("base", base, base_positive, base_negative, cfg),
            Part("refiner", refiner, refiner_positive, refiner_negative, refiner_cfg),
            Call(latent_image, seed, steps, sampler_name, scheduler),
            mode,
        )
