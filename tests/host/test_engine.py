"""What every node promises, whichever it is: parametrized over all of them."""

from __future__ import annotations

import gc
import itertools
import weakref

import comfy.model_management
import hosted
import pytest
import torch
from hosted import NODES, PlantedError, add_core_freeu, add_lora, controlnet, prompt, run_node, sample, with_control

ON = {
    "SlipstreamDeepCache": {"cache_interval": 2},
    "SlipstreamCFGCutoff": {"cutoff": 0.5},
    "SlipstreamFreeU": {"preset": "SD 1.5"},
}
OFF = {
    "SlipstreamDeepCache": {"cache_interval": 1},
    "SlipstreamCFGCutoff": {"cutoff": 1.0},
    "SlipstreamFreeU": {"preset": "custom", "b1": 1.0, "b2": 1.0, "s1": 1.0, "s2": 1.0},
}
OTHER = {
    "SlipstreamDeepCache": {"cache_interval": 3},
    "SlipstreamCFGCutoff": {"cutoff": 0.25},
    "SlipstreamFreeU": {"preset": "SDXL"},
}

every_node = pytest.mark.parametrize("name", list(NODES))


def wire(patcher, *names, start=1):
    for node_id, name in enumerate(names, start):
        patcher = run_node(name, patcher, str(node_id), **ON[name])
    return patcher


def test_every_node_is_tested_here():
    assert set(NODES) == set(ON) == set(OFF) == set(OTHER)


@every_node
def test_it_changes_the_image_and_not_the_input_model(name, model):
    before = sample(model)
    options, attachments, wrappers = repr(model.model_options), dict(model.attachments), repr(model.wrappers)
    changed = wire(model, name)
    assert not torch.equal(sample(changed), before)
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


@every_node
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


@every_node
def test_twice_with_different_settings_is_refused_naming_both_nodes(name, model):
    carrying = run_node(name, model, "41", **ON[name])
    with pytest.raises(ValueError, match=r"node 42 and node 41.*different settings"):
        run_node(name, carrying, "42", **OTHER[name])
    sample(carrying)


def test_an_explicit_node_wins_over_a_suggestion_wherever_it_is_wired(model):
    plan = hosted.engine("plan")
    config = hosted.method("cfg_cutoff").CFGCutoff
    explicit = plan.Entry(config(0.5), (plan.Node("1", "SlipstreamCFGCutoff"),))
    suggested = plan.Entry(config(0.75), (plan.Node("2", "SlipstreamRecipe"),), suggested=True)
    assert plan.Plan().adding(explicit).adding(suggested).entries == (explicit,)
    assert plan.Plan().adding(suggested).adding(explicit).entries == (explicit,)
    other = plan.Entry(config(0.6), (plan.Node("3", "SlipstreamRecipe"),), suggested=True)
    with pytest.raises(ValueError, match="node 3 and node 2"):
        plan.Plan().adding(suggested).adding(other)


SURROUNDINGS = ("alone", "core FreeU", "LoRA", "ControlNet", "all")


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_every_order_gives_the_same_bits_above_and_below_other_nodes(surroundings):
    """The six orders of the three nodes, and each place of the others' nodes between them."""
    model = hosted.model("SD15")
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
        positive, negative = (with_control(prompt(model, seed), control, both=True) for seed in (10, 11))
    images = []
    for order in itertools.permutations(NODES):
        for below in range(len(order) + 1):
            patcher = wire(model, *order[:below])
            for other in others:
                patcher = other(patcher)
            patcher = wire(patcher, *order[below:], start=below + 1)
            images.append(sample(patcher, positive, negative))
            if not others:
                break
    assert len(images) >= 6
    assert all(torch.equal(image, images[0]) for image in images)
    plain = model
    for other in others:
        plain = other(plain)
    assert not torch.equal(sample(plain, positive, negative), images[0])


@pytest.mark.parametrize("pair", list(itertools.combinations(NODES, 2)), ids="+".join)
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_cfg_pp", "dpmpp_2s_ancestral"])
def test_pairs_commute_with_every_kind_of_sampler(pair, sampler, model):
    assert torch.equal(
        sample(wire(model, *pair), sampler=sampler), sample(wire(model, *reversed(pair)), sampler=sampler)
    )


def interrupt():
    raise comfy.model_management.InterruptProcessingException


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fail():
    raise PlantedError("a planted error\nwith a second line")


RAISED = (comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError, PlantedError)
ENDS = {"interrupt": (interrupt, "interrupted"), "out of memory": (out_of_memory, "failed"), "error": (fail, "failed")}
EVERYTHING = tuple(NODES)


@pytest.mark.parametrize("end", list(ENDS))
@pytest.mark.parametrize(
    "where", ["step 0", "step 1", "step 2", "step 5", "middle block", "output block", "PREPARE_SAMPLING"]
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
    assert repr(carrying.model_options) == options
    assert torch.equal(sample(model), untouched)
    assert torch.equal(sample(carrying), expected)
    assert last_lines("1")[0][0] == "active"


def test_what_a_run_made_is_freed_with_it(model):
    """The features and the methods' objects live in the run alone: a second sampling sees none of them."""
    engine, seen = hosted.engine("sampling"), []
    carrying = wire(model, *EVERYTHING)
    carrying.add_wrapper_with_key(
        "predict_noise",
        "test",
        lambda executor, *a, **k: (seen.append(weakref.ref(run_of(executor))), executor(*a, **k))[1],
    )

    def run_of(executor):
        return executor.class_obj.model_options["transformer_options"]["wrappers"]["predict_noise"][engine.KEY][
            0
        ].__self__

    sample(carrying)
    gc.collect()
    assert len(seen) == 6
    assert all(reference() is None for reference in seen)


def test_ten_runs_take_no_more_memory_than_three(model):
    import psutil

    carrying, process = wire(model, *EVERYTHING), psutil.Process()
    sizes = []
    for _ in range(10):
        sample(carrying, image=hosted.latent(model, 32))
        gc.collect()
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[2] < 32 * 2**20


def test_a_second_copy_of_the_wrapper_does_not_start_a_second_engine(model):
    carrying = wire(model, "SlipstreamFreeU")
    expected = sample(carrying)
    doubled = carrying.clone()
    doubled.add_wrapper_with_key("outer_sample", "somebody", hosted.engine("sampling").outer_sample)
    assert torch.equal(sample(doubled), expected)


def test_two_models_in_one_workflow_do_not_meet(model):
    other = hosted.model("SD15", seed=9)
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
