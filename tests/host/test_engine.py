"""What every node promises, whichever it is: parametrized over all of them."""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from types import SimpleNamespace

import comfy.model_management
import hosted
import pytest
import torch
from comfy_api.latest import io
from comfy_execution.utils import CurrentNodeContext
from hosted import (
    METHODS,
    PlantedError,
    add_core_freeu,
    add_lora,
    controlnet,
    latent,
    orders,
    prompt,
    run_node,
    with_control,
)


def sample(*args, steps=7, **kwargs):
    """The fewest steps of which Forecast skips one."""
    return hosted.sample(*args, steps=steps, **kwargs)


ON = {
    "SlipstreamForecast": {"error_budget": 0.5},
    "SlipstreamDeepCache": {"cache_interval": 2},
    "SlipstreamCFGCutoff": {"cutoff": 0.5},
    "SlipstreamFreeU": {"preset": "SD 1.5"},
    "SlipstreamPrecision": {"compute_dtype": "bf16"},
    "SlipstreamAttention": {"backend": "math", "fuse_qkv": True},
    "SlipstreamQuantize": {"min_features": 0},
    "SlipstreamCompileModel": {"backend": {"backend": "eager"}},
    "SlipstreamSequentialOffload": {"budget_mib": 0},
    "SlipstreamCPU": {"winograd": "F(4x4)"},
    "SlipstreamRecipe": {"goal": "best quality"},
}
OFF = {
    "SlipstreamForecast": {"error_budget": 0.0},
    "SlipstreamDeepCache": {"cache_interval": 1},
    "SlipstreamCFGCutoff": {"cutoff": 1.0},
    "SlipstreamFreeU": {"preset": "custom", "b1": 1.0, "b2": 1.0, "s1": 1.0, "s2": 1.0},
    "SlipstreamAttention": {"backend": "host", "fuse_qkv": False},
    "SlipstreamCPU": {"winograd": "off", "bf16": False, "sdpa": False},
}
OTHER = {
    "SlipstreamForecast": {"error_budget": 0.5, "max_skips": 1},
    "SlipstreamDeepCache": {"cache_interval": 3},
    "SlipstreamCFGCutoff": {"cutoff": 0.25},
    "SlipstreamFreeU": {"preset": "SDXL"},
    "SlipstreamPrecision": {"compute_dtype": "fp32", "channels_last": "on"},
    "SlipstreamAttention": {"backend": "auto", "fuse_qkv": True},
    "SlipstreamQuantize": {"scheme": "int8 weight-only", "min_features": 0},
    "SlipstreamCompileModel": {"backend": {"backend": "eager", "scope": "model"}},
    "SlipstreamSequentialOffload": {"budget_mib": 512},
    "SlipstreamCPU": {"winograd": "F(2x2)"},
}
EXACT = {"SlipstreamCompileModel", "SlipstreamSequentialOffload"}
"""They leave the image as it is: dynamo's graphs, run as they are, have the eager bits, and so have weights that come
as they are used."""
NEVER_OFF = {
    *("SlipstreamCompileModel", "SlipstreamPrecision", "SlipstreamQuantize", "SlipstreamSequentialOffload"),
    "SlipstreamRecipe",
}
"""They have no settings that do nothing."""
NEVER_REFUSED = {"SlipstreamRecipe"}
"""Of its goals on a processor, those that are not measured first suggest nothing that differs: see test_recipe."""

every_node = pytest.mark.parametrize("name", list(METHODS))


def wire(patcher, *names, start=1):
    for node_id, name in enumerate(names, start):
        patcher = run_node(name, patcher, str(node_id), **ON[name])
    return patcher


def test_every_node_is_tested_here():
    assert set(METHODS) == set(ON) == set(OFF) | NEVER_OFF == set(OTHER) | NEVER_REFUSED


@every_node
def test_it_changes_the_image_and_not_the_input_model(name, model):
    before = sample(model)
    options, attachments, wrappers = repr(model.model_options), dict(model.attachments), repr(model.wrappers)
    changed = wire(model, name)
    assert torch.equal(sample(changed), before) == (name in EXACT)
    assert torch.equal(sample(model), before)
    assert (repr(model.model_options), model.attachments, repr(model.wrappers)) == (options, attachments, wrappers)
    assert changed.model is model.model


@every_node
def test_it_leaves_nothing_on_the_model_that_carries_it(name, model):
    carrying = wire(model, name)
    options = repr(carrying.model_options)
    first = sample(carrying)
    assert repr(carrying.model_options) == options
    assert torch.equal(sample(carrying), first)


@pytest.mark.parametrize("name", list(OFF))
def test_off_is_the_very_same_model(name, model, last_lines):
    assert run_node(name, model, "1", **OFF[name]) is model
    ((state, text),) = last_lines("1")
    assert state == "off"
    assert text.startswith("off: ")


@every_node
def test_the_plan_survives_clones_that_other_nodes_make(name, model):
    carrying = wire(model, name)
    expected = sample(carrying)
    assert torch.equal(sample(carrying.clone()), expected)
    assert torch.equal(sample(carrying.clone().clone()), expected)


@every_node
def test_twice_with_equal_settings_is_once(name, model, last_lines):
    once, twice = wire(model, name), wire(wire(model, name), name, start=2)
    assert torch.equal(sample(twice), sample(once))
    sample(twice)
    assert last_lines("1") == last_lines("2")


@pytest.mark.parametrize("name", list(OTHER))
def test_twice_with_different_settings_is_refused_naming_both_nodes(name, model, last_lines):
    carrying = run_node(name, model, "41", **ON[name])
    with pytest.raises(ValueError, match=r"node 42 and node 41.*different settings"):
        # Of a node that only suggests, the run is refused: another one may yet be explicit.
        sample(run_node(name, carrying, "42", **OTHER[name]))
    lines = last_lines("42")
    assert lines
    for state, text in lines:
        assert state == "failed"
        assert "node 42 and node 41" in text
    sample(carrying)


def test_an_explicit_node_wins_over_a_suggestion_wherever_it_is_wired(model):
    plan = hosted.engine("plan.plan")
    config = hosted.method("cfg_cutoff").CFGCutoff
    explicit = plan.Entry(config(0.5), (plan.Node("1", "SlipstreamCFGCutoff"),))
    suggested = plan.Entry(config(0.75), (plan.Node("2", "SlipstreamRecipe"),), suggested=True)
    for first, second in ((explicit, suggested), (suggested, explicit)):
        (entry,) = plan.Plan().adding(first).adding(second).entries
        assert (entry.config, entry.nodes, entry.suggested) == (explicit.config, explicit.nodes, False)
        assert entry.others == (suggested,)
    equal = plan.Entry(config(0.5), suggested.nodes, suggested=True)
    (entry,) = plan.Plan().adding(equal).adding(explicit).adding(suggested).entries
    assert set(entry.nodes) == {*explicit.nodes, *suggested.nodes}
    assert not entry.suggested
    other = plan.Entry(config(0.6), (plan.Node("3", "SlipstreamRecipe"),), suggested=True)
    for order in itertools.permutations((explicit, suggested, other)):
        merged = plan.Plan()
        for added in order:
            merged = merged.adding(added)
        (entry,) = merged.entries
        assert entry.nodes == explicit.nodes
        assert set(entry.others) == {suggested, other}


def test_suggestions_that_differ_are_refused_in_the_run_unless_a_node_is_explicit(model, last_lines):
    plan, sampling = hosted.engine("plan.plan"), hosted.engine("run.sampling")
    config = hosted.method("cfg_cutoff").CFGCutoff
    some = plan.Plan()
    for node, cutoff in (("2", 0.75), ("3", 0.6)):
        some = some.adding(plan.Entry(config(cutoff), (plan.Node(node, "SlipstreamRecipe"),), suggested=True))
    with pytest.raises(ValueError, match=r"node 3 and node 2 are on .* \(cutoff 0.6 against 0.75\)"):
        sample(sampling.with_plan(model, some))
    assert [last_lines(node)[0][0] for node in "23"] == ["failed", "failed"]
    explicit = plan.Entry(config(0.5), (plan.Node("4", "SlipstreamCFGCutoff"),))
    expected = sample(run_node("SlipstreamCFGCutoff", model, cutoff=0.5))
    assert torch.equal(sample(sampling.with_plan(model, some.adding(explicit))), expected)


SURROUNDINGS = ("alone", "core FreeU", "LoRA", "ControlNet", "all")


@pytest.mark.parametrize(
    "surroundings",
    [name if name == "all" else pytest.param(name, marks=pytest.mark.long) for name in SURROUNDINGS],
)
def test_every_order_gives_the_same_bits_above_and_below_other_nodes(surroundings, model):
    """Orders of the nodes, and with each the next place of the others' nodes between them."""
    others = {
        "alone": [],
        "core FreeU": [add_core_freeu],
        "LoRA": [add_lora],
        "ControlNet": [],
        "all": [add_core_freeu, add_lora],
    }[surroundings]
    positive = negative = None
    if surroundings in ("ControlNet", "all"):
        control = controlnet(model)
        positive, negative = (with_control(prompt(model, seed), control, 64, both=True) for seed in (10, 11))
    images = []
    # With one other node half of them: all are run with all of these nodes.
    stride = 1 if surroundings in ("alone", "all") else 2
    for place, order in enumerate(orders()[::stride]):
        below = place % (len(order) + 1)
        patcher = wire(model, *order[:below])
        for other in others:
            patcher = other(patcher)
        patcher = wire(patcher, *order[below:], start=below + 1)
        images.append(sample(patcher, positive, negative, image=latent(model, 8)))
    assert len(images) == 2 * len(METHODS) // stride
    assert all(torch.equal(image, images[0]) for image in images)
    plain = model
    for other in others:
        plain = other(plain)
    assert not torch.equal(sample(plain, positive, negative, image=latent(model, 8)), images[0])


# Of a recipe, whose methods are all here by themselves, see test_recipe.
PAIRS = list(itertools.combinations([name for name in METHODS if name != "SlipstreamRecipe"], 2))
SAMPLERS = itertools.cycle(["euler", "heun", "dpmpp_2m", "euler_cfg_pp", "dpmpp_2s_ancestral"])


@pytest.mark.parametrize(
    ("pair", "sampler"),
    list(zip(PAIRS, SAMPLERS, strict=False)),
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else value,
)
def test_pairs_commute_with_every_kind_of_sampler(pair, sampler, model):
    images = [sample(wire(model, *order), sampler=sampler, image=latent(model, 8)) for order in (pair, pair[::-1])]
    assert torch.equal(*images)


def interrupt():
    raise comfy.model_management.InterruptProcessingException


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fail():
    raise PlantedError("a planted error\nwith a second line")


RAISED = (comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError, PlantedError)
ENDS = {"interrupt": (interrupt, "interrupted"), "out of memory": (out_of_memory, "failed"), "error": (fail, "failed")}
EVERYTHING = tuple(METHODS)


@pytest.mark.parametrize("end", list(ENDS))
@pytest.mark.parametrize(
    "where",
    [
        *("step 0", "step 5", "middle block", "PREPARE_SAMPLING"),
        *(
            pytest.param(where, marks=pytest.mark.long)
            for where in (*(f"step {i}" for i in range(1, 5)), "output block")
        ),
    ],
)
def test_nothing_is_left_behind_however_the_run_ends(end, where, model, last_lines):
    """At any step, by the sampler's callback; and inside the model, in the middle of a UNet call."""
    stop, state = ENDS[end]
    untouched, carrying = sample(model), wire(model, *EVERYTHING)
    expected, options = sample(carrying), repr(carrying.model_options)
    kwargs, handle, stopping = {}, None, carrying
    if where.startswith("step"):
        step = int(where.split()[1])
        kwargs["callback"] = lambda i, *_: stop() if i == step else None
    elif where == "PREPARE_SAMPLING":
        stopping = carrying.clone()
        stopping.add_wrapper_with_key("prepare_sampling", "test", lambda *a, **k: stop())
    else:
        unet = model.model.diffusion_model
        block = unet.middle_block if where == "middle block" else unet.output_blocks[-1]
        handle = block[0].register_forward_hook(lambda *_: stop())
    try:
        with pytest.raises(RAISED):
            sample(stopping, **kwargs)
    finally:
        if handle is not None:
            handle.remove()
    for node_id in ("1", "2", "3"):
        ((told, text),) = last_lines(node_id)
        assert told == state
        if end == "error":
            assert "a planted error" in text
            assert "second line" not in text
        assert "not guided anyway" not in text
    assert repr(carrying.model_options) == options
    assert torch.equal(sample(model), untouched)
    assert torch.equal(sample(carrying), expected)
    assert last_lines(str(EVERYTHING.index("SlipstreamDeepCache") + 1))[0][0] == "active"


@pytest.mark.parametrize("end", ["success", *ENDS])
def test_what_a_run_made_is_freed_with_it(end, model):
    """The engine's run, the methods' objects and the kept features: none outlives the run, however it ends."""
    made = []

    def look(executor, *args, **kwargs):
        output = executor(*args, **kwargs)
        wrappers = executor.class_obj.model_options["transformer_options"]["wrappers"]
        run = wrappers["predict_noise"]["slipstream"][0].__self__
        features = [kept for _, kept in run.around_unet.features.values()]
        made.extend(weakref.ref(thing) for thing in (run, *run.methods, *features))
        if len(made) > 20 and end in ENDS:
            ENDS[end][0]()
        return output

    carrying = wire(model, *EVERYTHING)
    carrying.add_wrapper("predict_noise", look)
    try:
        sample(carrying)
    except RAISED:
        assert end != "success"
    gc.collect()
    assert len(made) > 20
    assert not [reference() for reference in made if reference() is not None]


def test_a_second_copy_of_the_wrapper_does_not_start_a_second_engine(model):
    carrying = wire(model, "SlipstreamFreeU")
    expected = sample(carrying)
    doubled = carrying.clone()
    doubled.add_wrapper_with_key("outer_sample", "somebody", hosted.engine("run.sampling").outer_sample)
    assert torch.equal(sample(doubled), expected)


def test_two_models_in_one_workflow_do_not_meet(model):
    other = hosted.model("minimal", seed=9)
    plain, fast = sample(other), wire(model, *EVERYTHING)
    expected = sample(fast)
    for _ in range(2):
        assert torch.equal(sample(other), plain)
        assert torch.equal(sample(fast), expected)


def test_two_samplers_with_one_model_are_two_runs(model):
    """A second sampler, of another size and with other prompts, finds nothing of the first."""
    fast = wire(model, *EVERYTHING)
    first = sample(fast)
    second = sample(fast, image=hosted.latent(model, 24), seed=5)
    for _ in range(2):
        assert torch.equal(sample(fast, image=hosted.latent(model, 24), seed=5), second)
        assert torch.equal(sample(fast), first)


def test_a_node_that_no_sampler_ran_says_so(model, last_lines):
    wire(model, *EVERYTHING)
    for node_id in ("1", "2", "3"):
        assert last_lines(node_id) == [("inert", "in the model's plan, but no sampler has run it in this prompt")]


def test_a_sampler_that_passes_the_guider_by_is_named_as_the_reason(model, last_lines):
    import comfy.samplers

    def by_itself(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        guider = denoiser.inner_model
        conds = [guider.conds["positive"]]
        return comfy.samplers.calc_cond_batch(
            guider.inner_model, conds, x, sigmas[:1].expand(x.shape[0]), extra_args["model_options"]
        )[0]

    hosted.sample_by_hand(wire(model, *EVERYTHING), by_itself, torch.tensor([5.0, 1.0, 0.0]))
    for node_id in ("1", "2", "3"):
        assert last_lines(node_id) == [("inert", "did nothing: the sampler calls the model by itself, past the guider")]


@pytest.fixture
def run_as_prompt(monkeypatch):
    """Samples as a server's prompt would have it. Of the server only what is asked of it."""

    def run(patcher, info):
        item = (0, "p", {"3": {"class_type": "KSampler"}}, {"extra_pnginfo": info, "client_id": "c"}, [])
        instance = SimpleNamespace(
            prompt_queue=SimpleNamespace(get_current_queue_volatile=lambda: ([item], [])),
            client_id="c",
            send_progress_text=lambda text, node, client: sent.append((text, node, client)),
        )
        monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
        verdicts = hosted.engine("telling.verdicts")
        verdicts._kept.clear()
        with CurrentNodeContext("p", "3"):
            sample(patcher)
        ((key, verdict),) = verdicts._kept.items()
        return key, verdict, sent[-1]

    sent = []
    return run


def test_two_of_our_nodes_inside_one_that_expands_share_it_with_a_line_each(model, run_as_prompt):
    """They are shown on the expanding node, under its type and with each method's name."""

    class Graph:
        def get_display_node_id(self, node_id):
            return "5"

        def get_node(self, node_id):
            return {"class_type": "Expander"}

    patcher = model
    for name, node_id in (("SlipstreamDeepCache", "5.0.0.1"), ("SlipstreamCFGCutoff", "5.0.0.2")):
        hidden = {io.Hidden.unique_id: node_id, io.Hidden.dynprompt: Graph()}
        clone = METHODS[name].PREPARE_CLASS_CLONE({"hidden_inputs": hidden, "dynamic_paths": None})
        inputs = {option.id: option.default for option in METHODS[name].define_schema().inputs[1:]}
        patcher = clone.EXECUTE_NORMALIZED(model=patcher, **inputs).result[0]
    key, verdict, _ = run_as_prompt(patcher, {"workflow": {"id": "w"}})
    assert key == ("w", "5")
    assert verdict.node.type == "Expander"
    assert [line["text"].split(": ")[0] for line in verdict.lines.values()] == ["CFG Cutoff", "DeepCache"]


@pytest.mark.parametrize("info", [None, "text", {"workflow": "text"}, {"workflow": {"id": "w"}}, {}])
def test_whatever_a_client_sends_as_workflow_the_run_goes_on(info, model, run_as_prompt):
    key, verdict, sent = run_as_prompt(wire(model, "SlipstreamFreeU"), info)
    assert key == ("w" if info == {"workflow": {"id": "w"}} else None, "1")
    assert [line["sampler"] for line in verdict.lines.values()] == ["KSampler 3"]
    assert sent[0].startswith("v2 with b1")
    assert sent[1:] == ("1", "c")
