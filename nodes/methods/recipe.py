"""Recipe: which methods for which goal, as a table, and what of it holds for one machine and one model.

Source: the conclusions of the SDXL guide that this pack follows, where this project's own measurements bear them out.
The figures in the table are the project's: pictures of the demo model (SSIM), a full-size SD 1.5 UNet on a processor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .method import NO_BF16, Configuration, Model

BEST, BALANCED, FASTEST = "best quality", "balanced", "fastest"
LIMITS = {"under 8 GB": 8192, "under 6 GB": 6144, "under 4 GB": 4096}
"""The memory that these goals allow, in MiB: as cards are sold, a GB has 1024 of them."""

GOALS = (BEST, BALANCED, FASTEST, *LIMITS)
SPEED = (BALANCED, FASTEST)
PICTURE = (BEST, *SPEED)
MEMORY = tuple(LIMITS)

RESERVED_MIB = 1024
"""What of a limit is never given to weights or features: about half of it is the GPU's context and its libraries'
workspaces, the rest what torch's cache keeps in pieces, and the screen."""

LEAST_ACTIVATIONS_MIB = 256
"""At least this for features, whatever the host reckons."""


@dataclass(frozen=True)
class Given:
    """What a recipe is chosen by. Totals only: what is free at some moment would give another plan the next time.

    Attributes:
        model: without what other nodes put on it, which may come later in the graph.
        device_mib: all memory of its device; of a processor, the RAM.
        size_mib: its weights.
        int8_mib: what Quantize Model would make of its linear layers.
        activations_mib: what the host reckons for the features of a guided picture of 1024x1024.
        has_bf16: whether the device has bf16 arithmetic.
        has_ram_apart: whether weights that are not in use can wait outside the device's memory.
        is_dynamic: whether the host's DynamicVRAM loads it.
        is_reloadable: whether it can be loaded without that.
    """

    model: Model
    device_mib: float
    size_mib: float
    int8_mib: float
    activations_mib: float
    has_bf16: bool = True
    has_ram_apart: bool = True
    is_dynamic: bool = False
    is_reloadable: bool = True

    @property
    def is_gpu(self) -> bool:
        return self.model.device != "cpu"

    @property
    def beside_mib(self) -> float:
        """What sampling takes beside weights."""
        return RESERVED_MIB + max(self.activations_mib, LEAST_ACTIVATIONS_MIB)

    def room_mib(self, goal: str) -> float:
        """What a goal's limit leaves for weights. Below 0, the features alone are beyond it."""
        return LIMITS[goal] - self.beside_mib

    def exceeds(self, goal: str) -> bool:
        """Whether the weights are more than a goal's limit leaves for them, and can wait elsewhere."""
        return self.is_gpu and self.has_ram_apart and self.size_mib > self.room_mib(goal)


FEW_STEPS = ("FluxSchnell",)
"""Models whose class tells that they are made for about four steps without guidance. Most classes do not tell: Turbo
and Lightning are the same as what they come from, or a LoRA on it."""

Holds = Callable[[Given, str], bool]

NEEDS: dict[str, tuple[Holds, str]] = {
    "GPU": (lambda given, _: given.is_gpu, "it pays on a GPU only"),
    "processor": (lambda given, _: not given.is_gpu, "for processors, and this model runs on {device}"),
    "bf16": (lambda given, _: given.has_bf16, NO_BF16),
    "no bf16": (lambda given, _: not given.has_bf16, "{device} has bf16"),
    "UNet": (lambda given, _: given.model.is_unet, "{model} is none of Stable Diffusion's UNets"),
    "other": (lambda given, _: not given.model.is_unet, "{model} is one of Stable Diffusion's UNets"),
    "whole": (
        lambda given, _: given.size_mib + given.beside_mib <= given.device_mib,
        "not all of {model} fits into the {device_mib:.0f} MiB of {device}",
    ),
    "no DynamicVRAM": (
        lambda given, _: given.is_reloadable or not given.is_dynamic,
        "its loader can't load it without DynamicVRAM, which compiled code can't follow",
    ),
    "DynamicVRAM": (lambda given, _: given.is_dynamic, "DynamicVRAM is off"),
    "apart": (lambda given, _: given.has_ram_apart, "ComfyUI keeps weights on {device}, there is no other place"),
    "too large": (Given.exceeds, "all {size_mib:.0f} MiB of weights fit into the {room_mib:.0f} MiB left for them"),
    "far too large": (
        lambda given, goal: 0.75 * given.size_mib > given.room_mib(goal),
        "three quarters of the weights or more stay on {device}",
    ),
    "int8 fits": (
        lambda given, goal: given.int8_mib <= given.room_mib(goal),
        "its linear layers in int8, {int8_mib:.0f} MiB, would not fit into {room_mib:.0f} MiB either",
    ),
    "not quantized": (
        lambda given, _: given.int8_mib > 0,
        "{model} has no linear layers that are not quantized already, or not ComfyUI's own",
    ),
    "few steps": (lambda given, _: given.model.name in FEW_STEPS, "{model} may make many steps"),
    "no room": (lambda given, goal: given.room_mib(goal) <= 0, "there is room"),
}
"""What a row may need, by name: whether it holds, and what to say where it does not."""


def budget_mib(given: Given, goal: str, stems: tuple[str, ...]) -> int:
    """What is left for the model's own weights; quantized ones come on top of them."""
    return max(0, int(given.room_mib(goal) - (given.int8_mib if "quantize" in stems else 0)))


@dataclass(frozen=True)
class Row:
    """A method for some goals.

    Attributes:
        goals: which.
        stem: the method.
        settings: those that are not its defaults; a function gets what is given, the goal and the methods before it.
        needs: what must hold, of `NEEDS`; beside that, its own check must pass: it is installed and serves the model.
        why: what it gives.
        costs: what it costs.
    """

    goals: tuple[str, ...]
    stem: str
    settings: Mapping[str, Any]
    needs: tuple[str, ...]
    why: str
    costs: str


@dataclass(frozen=True)
class Against:
    """Why a method is never part of some goals."""

    goals: tuple[str, ...]
    stem: str
    why: str


@dataclass(frozen=True)
class Advice:
    """What a goal asks for elsewhere in the workflow."""

    goals: tuple[str, ...]
    needs: tuple[str, ...]
    text: str


# fmt: off
ROWS = (
    Row(PICTURE, "compile_model", {"backend": "inductor"}, ("GPU", "whole", "no DynamicVRAM"),
        "fused code, the same picture up to rounding",
        "a minute or more before the first picture, once more at a second size, then none"),
    Row(PICTURE, "attention_backend", {"fuse_qkv": True}, ("GPU", "UNet", "whole"),
        "q, k and v in one product, the same picture", "memory for those weights once more (SDXL in fp16: 586 MiB)"),
    Row(GOALS, "attention_backend", {}, ("processor",),
        "torch's attention in place of ComfyUI's slices, faster and in less memory", "rounding in the last bits"),
    Row(SPEED, "precision", {"scope": "transformers"}, ("processor", "UNet", "bf16"),
        "transformers compute in bf16", "rounding as on GPUs, half as much memory more for their weights"),
    Row(SPEED, "precision", {}, ("processor", "other", "bf16"),
        "computes in bf16", "rounding as on GPUs, half as much memory more for the weights"),
    Row(SPEED, "winograd", {"bf16": True}, ("processor", "UNet"),
        "each convolution as is fastest here", "seconds of measuring once, up to half of the free memory, rounding"),
    Row((BALANCED,), "forecast", {}, (),
        "evaluations that can be foretold are skipped, 30 to 45 % of them", "approximate (SSIM 0.999)"),
    Row((FASTEST,), "forecast", {"error_budget": 0.2}, (),
        "evaluations that can be foretold are skipped, about half of them", "approximate (SSIM 0.993)"),
    Row((BALANCED,), "cfg_cutoff", {"cutoff": 0.75}, (),
        "half the work in the last quarter of the steps", "approximate (SSIM 0.994)"),
    Row((FASTEST,), "cfg_cutoff", {"cutoff": 0.5}, (),
        "half the work in the last half of the steps", "approximate (SSIM 0.971)"),
    Row(MEMORY, "quantize", {"scheme": "int8 weight-only", "offload_originals": "on"},
        ("GPU", "apart", "too large", "far too large", "not quantized", "int8 fits"),
        "linear layers in half of fp16's memory, so that fewer come as they are used",
        "approximate; unpacking at each use, a transfer in each run"),
    Row(MEMORY, "sequential_offload", {"budget_mib": budget_mib}, ("GPU", "apart", "too large"),
        "so many MiB of weights stay on the GPU, the others wait in RAM", "the time to bring them in each step"),
    Row(MEMORY, "forecast", {}, ("GPU", "apart", "too large"),
        "gives back some of the time that offloading takes", "approximate (SSIM 0.999)"),
    Row(MEMORY, "cfg_cutoff", {"cutoff": 0.75}, ("GPU", "apart", "too large"),
        "gives back some of the time that offloading takes", "approximate (SSIM 0.994)"),
)

NEVER = (
    Against((BEST,), "precision", "rounds more"),
    Against((BEST,), "winograd", "rounds more"),
    Against((BEST,), "forecast", "approximate"),
    Against((BEST,), "deepcache", "approximate"),
    Against(SPEED, "deepcache", "Forecast is nearer to the exact picture in as much time"),
    Against((BEST,), "cfg_cutoff", "approximate"),
    Against(PICTURE, "quantize", "approximate; what it saves beside the others is not measured"),
    Against(PICTURE, "sequential_offload", "saves memory, not time"),
    Against(MEMORY, "compile_model", "takes memory to compile, and can't compile what is offloaded"),
    Against(MEMORY, "precision", "takes memory for weights in another form"),
    Against(MEMORY, "winograd", "takes memory for filters"),
    Against(MEMORY, "deepcache", "takes memory for features"),
    Against(GOALS, "freeu", "changes the picture on purpose"),
)

ADVICE = (
    Advice(SPEED, ("few steps",),
        "{model} is made for four steps at cfg 1: of these Forecast and CFG Cutoff leave out none, and change nothing"),
    Advice((FASTEST,), (), "Tiny VAE decodes in a fraction of the time, with a little less detail"),
    Advice(GOALS, ("GPU", "no bf16"),
        "FP16-Fix VAE: {device} has no bf16, so that ComfyUI decodes in fp32, in twice the memory"),
    Advice(MEMORY, ("GPU", "apart"),
        "Stage Offload behind the prompts and before VAE Decode: {goal} counts this model alone"),
    Advice(("under 6 GB", "under 4 GB"), ("GPU",),
        "VAE Decode Tiled or Tiny VAE: decoding 1024x1024 as a whole takes more than 4 GB"),
    Advice(MEMORY, ("DynamicVRAM",),
        "DynamicVRAM is on and takes what is free, without a budget; --disable-dynamic-vram turns it off"),
    Advice(MEMORY, ("GPU", "no room"),
        "smaller pictures: the features of 1024x1024, {activations_mib:.0f} MiB, leave nothing for weights"),
    Advice(MEMORY, ("processor",),
        "memory is RAM here, and all {size_mib:.0f} MiB of weights stay in it. VAE Decode Tiled, Tiny VAE and smaller "
        "pictures take less of it"),
)
# fmt: on


@dataclass(frozen=True)
class Choice:
    """A method of a recipe, and the row that it comes from."""

    config: Configuration
    row: Row
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        settings = "".join(f", {name} {_plain(value)}" for name, value in self.settings.items())
        return f"+ {self.config.title}{settings}: {self.row.why}. Costs: {self.row.costs}"


@dataclass
class Recipe:
    """What was chosen for a goal.

    Attributes:
        headline: the goal, the model and the machine.
        chosen: the methods.
        left: those that were considered and left out: the reason by the title.
        advice: what the goal asks for elsewhere in the workflow.
    """

    headline: str
    chosen: list[Choice] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        left = (f"- no {title}: {why}" for title, why in self.left.items())
        return "\n".join([self.headline, *map(str, self.chosen), *left, *(f"> {text}" for text in self.advice)])


def choose(goal: str, given: Given, kind: Callable[[str], Any]) -> Recipe:
    """The recipe for a goal: the same for the same machine and model.

    Args:
        goal: one of `GOALS`.
        given: the machine and the model.
        kind: the class of a method's configurations, by its stem. Their checks say what is missing here.
    """
    words = _words(goal, given)
    recipe = Recipe("{goal}, for {model} ({size_mib:.0f} MiB) on {device} ({device_mib:.0f} MiB):".format(**words))
    stems: tuple[str, ...] = ()
    left: dict[str, str] = {}
    for row in ROWS:
        if goal not in row.goals or row.stem in stems:
            continue
        why = _unmet(row.needs, given, goal, words)
        if why is None:
            settings = {
                name: value(given, goal, stems) if callable(value) else value for name, value in row.settings.items()
            }
            config = kind(row.stem)(**settings)
            why = _lacking(config, given.model)
        if why is None:
            recipe.chosen.append(Choice(config, row, settings))
            stems = (*stems, row.stem)
        else:
            left.setdefault(row.stem, why)
    left |= {against.stem: against.why for against in NEVER if goal in against.goals}
    recipe.left = {kind(stem).title: why for stem, why in left.items() if stem not in stems}
    told = (advice for advice in ADVICE if goal in advice.goals and not _unmet(advice.needs, given, goal, words))
    recipe.advice = [advice.text.format(**words) for advice in told]
    return recipe


def _words(goal: str, given: Given) -> dict[str, Any]:
    words = {**vars(given), "goal": goal, "model": given.model.name, "device": given.model.device}
    return words | ({"room_mib": max(0, given.room_mib(goal))} if goal in LIMITS else {})


def _unmet(needs: tuple[str, ...], given: Given, goal: str, words: Mapping[str, Any]) -> str | None:
    """What to say of the first need that does not hold."""
    unmet = (text for holds, text in map(NEEDS.__getitem__, needs) if not holds(given, goal))
    return next((text.format(**words) for text in unmet), None)


def _lacking(config: Configuration, model: Model) -> str | None:
    """What a method's own check says, in its first sentence."""
    try:
        config.check(model)
    except (ValueError, RuntimeError) as error:
        return str(error).removeprefix(f"{config.title}: ").split(". ")[0].rstrip(".")
    return None


def _plain(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
