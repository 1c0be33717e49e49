"""How the host gets the pack's nodes."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from comfy_api.latest import ComfyExtension

from . import NODES

logger = logging.getLogger(__name__)


class SlipstreamExtension(ComfyExtension):
    """The pack, as the host sees it."""

    async def get_node_list(self) -> list[type[Any]]:
        """The node classes. One that cannot be imported is left out with one line in the log:
        a host update or a broken optional package must never take the others down."""
        loaded = []
        for file, name in NODES:
            try:
                loaded.append(getattr(importlib.import_module(f".{file}", __package__), name))
            except Exception as error:
                logger.error("Slipstream: %s could not be loaded and is left out: %r", name, error)
        # Not in `on_load`, which hosts as old as 0.8 do not call.
        try:
            importlib.import_module(".engine.verdicts", __package__).add_routes()
        except Exception as error:
            logger.error("Slipstream: verdicts cannot be served again after a reload: %r", error)
        return loaded
