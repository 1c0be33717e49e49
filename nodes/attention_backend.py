from comfy_api.latest import io

from .engine import add, model_node, option
from .methods.attention_backend import BACKENDS, AttentionBackend


class SlipstreamAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return model_node(
            node_id="SlipstreamAttention",
            display_name="Attention Backend (Slipstream)",
            description=(
                "Which kernel computes attention, for this model alone: PyTorch's flash, efficient, cuDNN or math, or "
                "one that multiplies in eight bits. Where it does not serve a shape, ComfyUI's own does, and the node "
                "says so. For any model; on a CPU auto is faster than ComfyUI's own."
            ),
            aliases=[
                "sdpa",
                "flash attention",
                "sage attention",
                "int8 attention",
                "cudnn",
                "fuse qkv",
                "scaled dot product",
                "faster",
            ],
            options=[
                option(
                    io.Combo,
                    "backend",
                    options=list(BACKENDS),
                    default="auto",
                    tooltip=(
                        "auto: PyTorch's choice for each shape, where ComfyUI would use none of its kernels. flash, "
                        "efficient, cudnn, math: that kernel. host: ComfyUI's attention as it is. sage, "
                        "comfy_kitchen_int8: products in eight bits on a GPU, approximate; where they overflow, the "
                        "step is computed again with ComfyUI's own. sage needs the package sageattention."
                    ),
                ),
                option(
                    io.Boolean,
                    "fuse_qkv",
                    default=False,
                    tooltip=(
                        "One projection for self-attention's q, k and v in place of three. Takes memory for a copy of "
                        "their weights. For SD 1.x, SD 2.x, SDXL, SSD-1B and refiner models."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, model, backend, fuse_qkv):
        return add(cls, model, AttentionBackend(backend, fuse_qkv))
