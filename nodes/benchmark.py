from comfy_api.latest import io

from .engine import node_schema, option, sampler_options
from .engine.benchmark import ABLATIONS, SamplerCall, benchmark


class SlipstreamBenchmark(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node_schema(
            node_id="SlipstreamBenchmark",
            display_name="Benchmark (Slipstream)",
            category="Slipstream/measure",
            description=(
                "Samples with two models in turn, at the same seed, and shows what the second one gave: time, memory "
                "and image, with their spread. Also for each method on it by itself. For any model."
            ),
            search_aliases=["benchmark", "compare", "speed", "measure", "profile", "a/b", "ablation"],
            is_output_node=True,
            inputs=[
                io.Model.Input("baseline", tooltip="The model to compare with, such as the one from the checkpoint."),
                io.Model.Input("candidate", tooltip="The model with the optimizations to measure."),
                io.Conditioning.Input("positive", tooltip="The prompt for both."),
                io.Conditioning.Input("negative", tooltip="The negative prompt for both."),
                io.Latent.Input("latent_image", tooltip="The latent for both: size, batch, mask."),
                *sampler_options(),
                option(
                    io.Int,
                    "runs",
                    default=3,
                    min=1,
                    max=100,
                    tooltip=(
                        "Rounds that are measured, after a warm-up of each model. In each round every model runs once. "
                        "3 show a large difference; 5 to 10 show one of a few percent."
                    ),
                ),
                option(
                    io.Combo,
                    "ablation",
                    options=list(ABLATIONS),
                    default=ABLATIONS[0],
                    tooltip=(
                        "Measures more variants of the candidate: each alone, with one of its Slipstream methods, or "
                        "leave one out, with all but one. Each takes as long as another model."
                    ),
                ),
                option(
                    io.Boolean,
                    "save",
                    default=False,
                    tooltip=(
                        "Keeps the report in ComfyUI's output folder, under slipstream: JSON with every single time, "
                        "Markdown, and the images. Nothing is overwritten."
                    ),
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Decodes the images that are compared. Without it, latents are."
                ),
                io.Vae.Input(
                    "candidate_vae",
                    optional=True,
                    tooltip=(
                        "The candidate's own VAE, if it has another one. Decoding is then measured too, in each round."
                    ),
                ),
                option(
                    io.Boolean,
                    "rivals",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Measures what you could do without: fewer steps, and ComfyUI's own EasyCache, each with as "
                        "much work as the candidate."
                    ),
                ),
                option(
                    io.Int,
                    "seeds",
                    default=1,
                    min=1,
                    max=100,
                    optional=True,
                    tooltip=(
                        "Seeds that the rounds take in turn, from seed on: the report then has the worst picture "
                        "beside the mean. More seeds than rounds make more rounds."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", tooltip="Baseline, candidate, and their difference, eight times amplified."
                ),
                io.String.Output(display_name="report", tooltip="The report in Markdown."),
            ],
        )

    @classmethod
    def execute(
        cls,
        baseline,
        candidate,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        denoise,
        runs,
        ablation,
        save,
        vae=None,
        candidate_vae=None,
        rivals=False,
        seeds=1,
    ):
        call = SamplerCall(positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise)
        return benchmark(cls, baseline, candidate, call, runs, vae, candidate_vae, ablation, save, rivals, seeds)
