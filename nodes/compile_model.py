from comfy_api.latest import io

from .engine import add, backend_options, model_node
from .methods.compile_model import CompileModel


class SlipstreamCompileModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamCompileModel",
            display_name="Compile Model (Slipstream)",
            description=(
                "Compiles the diffusion model: the same image, faster, after a longer first run. Follows LoRA, other "
                "sizes and prompts, and works with Forecast, DeepCache, CFG Cutoff, FreeU, Quantize, ControlNet and "
                "IPAdapter. For any model: UNets and transformers such as Flux, Qwen-Image, Z-Image, Wan and SD 3.5."
            ),
            aliases=["torch compile", "inductor", "tensorrt", "openvino", "onediff", "stable-fast", "xla", "faster"],
            options=[backend_options(has_scope=True)],
        )

    @classmethod
    def execute(cls, model, backend):
        return add(cls, model, CompileModel(**backend))
