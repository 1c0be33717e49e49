"""Slipstream: inference optimizations for ComfyUI that say what they did.

The host loads this file first. It imports nothing at module level, so that whatever breaks
further in can be told apart and told in one sentence.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What the host calls to get this pack's nodes (V3)."""
    from .nodes.extension import SlipstreamExtension

    return SlipstreamExtension()
