from comfy_api.latest import io

from .engine import add, model_node, option
from .methods.cfg_cutoff import MAX_REUSE, UNITS, CFGCutoff


class SlipstreamCFGCutoff(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamCFGCutoff",
            display_name="CFG Cutoff (Slipstream)",
            description=(
                "Turns guidance off for the last part of the run, where it hardly matters, and, if asked to, for its "
                "beginning; in between it reuses what guidance added before. Such steps evaluate the positive prompt "
                "alone, at half the work. For any model, guider and sampler."
            ),
            aliases=[
                "cfg",
                "guidance",
                "dynamic guidance",
                "guidance interval",
                "adaptive guidance",
                "speed",
                "faster",
            ],
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
                        "the work, 0.5 saves a quarter. 1 is never."
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
                option(
                    io.Float,
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Fraction of the run before which guidance is off, in the same unit. 0 is from the beginning. "
                        "It changes what a picture is of, not only its detail."
                    ),
                ),
                option(
                    io.Int,
                    "reuse_every",
                    default=1,
                    min=1,
                    max=MAX_REUSE,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Of how many guided evaluations in a row at least one is made in full. In the others the "
                        "positive prompt is evaluated alone, and what guidance adds follows from those before, as "
                        "long as that misses little. 2 saves a fifth of the work, 3 a quarter. 1 makes each in full."
                    ),
                ),
                option(
                    io.Float,
                    "adaptive",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Ends guidance before the cutoff, once what it still adds to the latent is under this "
                        "fraction of it. The cutoff is then the latest. 0 is off."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, model, cutoff, unit, start=0.0, reuse_every=1, adaptive=0.0):
        return add(cls, model, CFGCutoff(cutoff, unit, start, reuse_every, adaptive))
