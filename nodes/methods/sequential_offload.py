"""Sequential Offload: a memory budget for one model's weights. What exceeds it waits in RAM, and comes as it is used.

Source: diffusers' `enable_sequential_cpu_offload`; here by the host's own partial loading, which keeps what
fits and brings the rest ahead of its use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .method import Configuration, Loaded, MethodRun, Model, Run, State, check_number

MAX_MIB = 1024 * 1024


@dataclass(frozen=True)
class SequentialOffload(Configuration):
    """Attributes:
    budget_mib: what the weights may take on the device in MiB, with room for those on their way, 0 to 1048576;
        0 keeps none there: they come layer by layer.
    """

    budget_mib: int = 0

    stem = "sequential_offload"
    title = "Sequential Offload"
    phase = "load"
    is_exact = True

    def __post_init__(self) -> None:
        check_number(self.title, "budget_mib", self.budget_mib, 0, MAX_MIB)

    def off(self) -> str | None:
        return None

    def check(self, model: Model) -> None:
        """Any model can be loaded in part."""

    def begin(self, run: Run) -> SequentialOffloadRun:
        return SequentialOffloadRun(self)


class SequentialOffloadRun(MethodRun):
    """Tells what stayed on the device."""

    def __init__(self, config: SequentialOffload) -> None:
        self.config = config
        self.look: Callable[[], Loaded] | None = None

    def load(self, look: Callable[[], Loaded]) -> None:
        self.look = look

    def verdict(self) -> tuple[State, str]:
        if self.look is None:
            return "inert", "offloaded nothing: the run did not begin"
        loaded = self.look()
        state, text = self._told(loaded)
        if loaded.peak_mib is not None:
            text += f"; at most {loaded.peak_mib:.0f} MiB were in use there in this run, other programs included"
        return state, text

    def _told(self, loaded: Loaded) -> tuple[State, str]:
        if loaded.is_dynamic:
            return "inert", (
                f"passed through: DynamicVRAM already brings this model's weights to {loaded.device} as they are used, "
                "as many as there is room for. For a budget start ComfyUI with --disable-dynamic-vram"
            )
        if loaded.spread:
            return "inert", (
                f"passed through: DisTorch, from another node, has the say over where this model's weights are "
                f"({loaded.spread}), whatever the budget. Load the model without it, or take this node out"
            )
        if loaded.is_kept_there:
            return "inert", f"offloaded nothing: this model's weights are kept on {loaded.device}, where they are used"
        if loaded.resident_layers == loaded.layers:
            return "inert", (
                f"offloaded nothing: all {loaded.size_mib:.0f} MiB of weights are on {loaded.device}, within the "
                f"budget of {self.config.budget_mib} MiB"
            )
        if loaded.resident_layers:
            kept = (
                f"kept {loaded.resident_mib:.0f} of {loaded.size_mib:.0f} MiB of weights on {loaded.device} "
                f"({loaded.resident_layers} of {loaded.layers} layers); the others"
            )
        else:
            kept = (
                f"kept none of the {loaded.size_mib:.0f} MiB of weights on {loaded.device}: all {loaded.layers} layers"
            )
        how = f"over {loaded.streams} streams" if loaded.streams else "each one waited for"
        return "active", f"{kept} came as they were used, {how}"
