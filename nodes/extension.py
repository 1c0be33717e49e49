"""How the host gets the pack's nodes."""

from __future__ import annotations

import importlib
import logging
from collections import defaultdict
from typing import Any

from comfy_api.latest import ComfyExtension

from . import NODES

logger = logging.getLogger(__name__)


class SlipstreamExtension(ComfyExtension):
    """The pack, as the host sees it."""

    async def get_node_list(self) -> list[type[Any]]:
        """The node classes. One that cannot be loaded is left out, and those of one reason are told in one line of the
        log: a host update or a broken optional package must never take the others down."""
        loaded, left_out = [], defaultdict(list)
        for file, name in NODES:
            try:
                node = getattr(importlib.import_module(f".{file}", __package__), name)
                node.GET_SCHEMA()  # The host asks each for it, and at the first one that fails drops the whole pack.
                loaded.append(importlib.import_module(".engine.inputs", __package__).checked(node))
            # Some packages end the process where they cannot work.
            except (Exception, SystemExit) as error:
                logger.debug("Slipstream: where %s failed", name, exc_info=error)
                left_out[" ".join(repr(error).split())].append(name)
        for reason, names in left_out.items():
            logger.error("Slipstream: could not load, and leaves out, %s: %s", ", ".join(names), reason)
        # Not in `on_load`, which hosts as old as 0.8 do not call.
        for file, start, lost in (
            ("telling.verdicts", "add_routes", "verdicts cannot be served again after a reload"),
            ("telling.metadata", "listen", "saved images will not tell what made them"),
        ):
            try:
                getattr(importlib.import_module(f".engine.{file}", __package__), start)()
            except (Exception, SystemExit) as error:
                logger.error("Slipstream: %s: %r", lost, error)
        return loaded
