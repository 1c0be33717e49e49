from comfy_api.latest import io

from .engine import backend_options, node_schema
from .engine.vae.compile_vae import CompileVAE, compiled


class SlipstreamCompileVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node_schema(
            node_id="SlipstreamCompileVAE",
            display_name="Compile VAE (Slipstream)",
            category="Slipstream/vae",
            description=(
                "Compiles a VAE's decoder and encoder: the same pixels, faster, after a longer first call. For image "
                "VAEs, Tiny VAEs included. Worth it for many images of one size, or for tiles."
            ),
            search_aliases=["torch compile", "vae compile", "decode faster", "inductor"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE to compile. It is not changed itself."),
                backend_options(has_scope=False),
            ],
            outputs=[io.Vae.Output(tooltip="The VAE, compiled when it is first used.")],
        )

    @classmethod
    def execute(cls, vae, backend):
        return io.NodeOutput(compiled(cls, vae, CompileVAE(**backend)))
