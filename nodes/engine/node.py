"""What a node file needs: a schema that every supported host takes, and `add`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..compiling.settings import DYNAMIC, MODES, SCOPES
from ..methods.method import Configuration
from .apply import with_entries
from .plan.plan import Entry, Node
from .telling import verdicts


def supported(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """The arguments that this host's `function` knows (``advanced=`` came with 0.15, ``search_aliases=`` later)."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in known}


def option(kind: Any, name: str, **arguments: Any) -> Any:
    """An input, such as ``option(io.Float, "cutoff", default=0.75, ...)``."""
    return kind.Input(name, **supported(kind.Input.__init__, **arguments))


def percent_range(starts: str, ends: str) -> list[Any]:
    """The inputs start_percent and end_percent, fractions of the timesteps, told as `starts` and `ends`."""
    common = {"min": 0.0, "max": 1.0, "step": 0.01, "advanced": True}
    return [
        option(io.Float, "start_percent", default=0.0, tooltip=f"{starts} 0 is the noisiest.", **common),
        option(io.Float, "end_percent", default=1.0, tooltip=ends, **common),
    ]


def cfg_option(name: str, tooltip: str) -> Any:
    """A scale of guidance, as the host's KSampler has it."""
    return option(io.Float, name, default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def sampler_options(has_denoise: bool = True, keeps_seed: bool = False) -> list[Any]:
    """The inputs of the host's KSampler that are no models, prompts or latents.

    Args:
        keeps_seed: whether a node placed by hand keeps its seed after a run, on hosts that know of it; else the page
            draws another one.
    """
    following = getattr(getattr(io, "ControlAfterGenerate", None), "fixed", True) if keeps_seed else True
    denoise = option(
        io.Float,
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="How much of the latent is made anew. Below 1 it stays like the image it came from.",
    )
    return [
        option(
            io.Int,
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=following,
            tooltip="The seed of the noise.",
        ),
        option(io.Int, "steps", default=20, min=1, max=10000, tooltip="The number of steps."),
        cfg_option("cfg", "The scale of classifier-free guidance. 1 evaluates the positive prompt alone."),
        option(io.Combo, "sampler_name", options=comfy.samplers.SAMPLER_NAMES, tooltip="The sampling algorithm."),
        option(
            io.Combo,
            "scheduler",
            options=comfy.samplers.SCHEDULER_NAMES,
            tooltip="How noise is removed over the steps.",
        ),
        *([denoise] if has_denoise else []),
    ]


def backend_options(has_scope: bool) -> Any:
    """The input `backend` of the nodes that compile, with each backend's own options.

    Args:
        has_scope: whether there are blocks that could be compiled by themselves.
    """
    tooltips = {
        "mode": (
            "inductor's preset. default compiles fastest. max-autotune tries many kernels for each operation, which "
            "takes long. reduce-overhead and max-autotune record CUDA graphs"
            + (", which needs scope model." if has_scope else ".")
        ),
        "scope": (
            "blocks: each kind of block is compiled once and shared by all of its kind: compiles several times faster, "
            "and works with everything that is put inside the model. model: one graph; a little faster on some GPUs."
        ),
        "dynamic": (
            "Sizes. auto: what changes is made dynamic when it first does, so a second resolution compiles once more "
            "and a third does not. on: from the beginning. off: new graphs for each size, each as fast as can be."
        ),
        "fullgraph": "Raise an error where a graph would break, instead of telling it.",
        "tuned": (
            "What diffusers' guide sets for inductor: coordinate descent tuning, 1x1 convolutions as matrix "
            "multiplications, no epilogue fusion. Compiles much longer."
        ),
        "onediff_backend": "What OneDiff compiles with: nexfort, oneflow, or one that another package registered.",
    }

    def combo(name: str, choices: tuple[str, ...]) -> Any:
        return option(io.Combo, name, options=list(choices), default=choices[0], tooltip=tooltips[name])

    def switch(name: str) -> Any:
        return option(io.Boolean, name, default=False, tooltip=tooltips[name], advanced=True)

    scope = [combo("scope", SCOPES)] if has_scope else []
    sizes = [*scope, combo("dynamic", DYNAMIC)]
    named = option(io.String, "onediff_backend", default="nexfort", tooltip=tooltips["onediff_backend"])
    choices = {
        "auto": sizes,
        "inductor": [combo("mode", MODES), *sizes, switch("fullgraph"), switch("tuned")],
        "cudagraphs": [],
        "tensorrt": sizes,
        "openvino": scope,
        "onediff": [named],
        "stable-fast": [],
        "xla": sizes,
    }
    return option(
        io.DynamicCombo,
        "backend",
        options=[io.DynamicCombo.Option(name, inputs) for name, inputs in choices.items()],
        tooltip=(
            "What compiles. auto takes the best one that is available here and says which. inductor comes with torch; "
            "the others are packages of their own: see the help page."
        ),
    )


def node_schema(**arguments: Any) -> io.Schema:
    """The schema of a node of ours, as far as this host knows its fields.

    Every node gets the host's hidden inputs, and an output cache of its own: its id is part of what
    it tells or returns, so two equal nodes must not share one output.
    """
    hidden = [io.Hidden.unique_id, io.Hidden.dynprompt]
    return io.Schema(**supported(io.Schema, **arguments, hidden=hidden, not_idempotent=True))


def model_node(node_id: str, display_name: str, description: str, aliases: list[str], options: list[Any]) -> io.Schema:
    """The schema of a node that takes a MODEL and returns it with one more configuration."""
    return node_schema(
        node_id=node_id,
        display_name=display_name,
        category="Slipstream/model",
        description=description,
        search_aliases=aliases,
        inputs=[io.Model.Input("model", tooltip="The model. It is not changed itself."), *options],
        outputs=[io.Model.Output(tooltip="The model with this method in its plan.")],
    )


def add(node: type[io.ComfyNode], model: Any, config: Configuration) -> io.NodeOutput:
    """A node's output: the model with one more configuration in its plan.

    The model that came in is not touched. Settings that do nothing return that very model, and the
    node says so.

    Args:
        node: the node class, as `execute` gets it, with the host's hidden inputs.
        model: ModelPatcher.
        config: the settings.

    Raises:
        ValueError: the settings do not fit the model, or the plan has the method with other ones.
        RuntimeError: the model cannot be served.
    """
    off = config.off()
    if off is not None:
        return pass_through(node, model, off)
    return _add(model, [Entry(config, (node_of(node),))])


def suggest(node: type[io.ComfyNode], model: Any, configs: list[Configuration], told: str = "") -> io.NodeOutput:
    """The output of a node that adds several methods: for each, a node of its own wins, wherever it is wired, and one
    that can't serve the model, with all that is put on it, is left out of the run.

    Args:
        told: what the node says of them, above what becomes of each in the run.

    Others, and errors, as with `add`.
    """
    source = replace(node_of(node), has_several=True, told=told)
    return _add(model, [Entry(config, (source,), suggested=True) for config in configs])


def pass_through(node: type[io.ComfyNode], model: Any, why: str) -> io.NodeOutput:
    """A node's output where it does nothing: the very model that came in. The node says why."""
    verdicts.publish_off(node_of(node), why)
    return io.NodeOutput(model)


def _add(model: Any, entries: list[Entry]) -> io.NodeOutput:
    (source,) = {node for entry in entries for node in entry.nodes}
    try:
        added = with_entries(model, entries)
    except (ValueError, RuntimeError) as error:
        # Else the success of an earlier run would stay on the node.
        verdicts.publish_refused(source, error)
        raise
    verdicts.publish_added(source)
    return io.NodeOutput(added)


def node_of(node: type[io.ComfyNode]) -> Node:
    """The executing node, from the node class that `execute` gets, with the host's hidden inputs."""
    unique_id, graph = str(node.hidden.unique_id), node.hidden.dynprompt
    # A node that another one expanded into is shown as that one.
    shown = str(graph.get_display_node_id(unique_id)) if graph is not None else unique_id
    is_expanded = shown != unique_id
    return Node(
        shown, graph.get_node(shown)["class_type"] if is_expanded else node.define_schema().node_id, is_expanded
    )
