"""The CPU node in the real host: convolutions run as Winograd's, follow their weights, and leave nothing behind."""

from __future__ import annotations

import comfy.hooks
import comfy.model_management
import hosted
import pytest
import torch
from hosted import compile_model, latent, prompt, run_node
from torch import nn

BOUND = 1e-4
"""Of the latent's error after a few steps, relative to its norm: rounding in float32."""


def faster(patcher, node_id="1", winograd="F(4x4)", **values):
    """Winograd alone: the rest belongs to other methods."""
    return run_node("SlipstreamCPU", patcher, node_id, winograd=winograd, bf16=False, sdpa=False, **values)


def sample(patcher, *args, steps=2, **kwargs):
    return hosted.sample(patcher, *args, steps=steps, **kwargs)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def convolutions(patcher):
    """The UNet's 3x3 convolutions of stride 1."""
    return [
        module
        for module in patcher.model.diffusion_model.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (1, 1)
    ]


def patched_convolution(patcher, strength=0.5):
    """A clone with a patch on one convolution's weight, as a LoRA for convolutions has it."""
    clone = patcher.clone()
    key = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    shape = patcher.model_state_dict()[key].shape
    change = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(4))
    assert clone.add_patches({key: ("diff", (change,))}, strength) == [key]
    return clone


@pytest.fixture
def made(monkeypatch):
    """The weights whose filters were transformed, in order."""
    winograd, weights = hosted.method("winograd"), []
    transform = winograd.transform_filters
    monkeypatch.setattr(
        winograd, "transform_filters", lambda weight, form: weights.append(weight) or transform(weight, form)
    )
    return weights


@pytest.fixture
def room(monkeypatch):
    """Sets the bytes that filters may take."""
    convolutions = hosted.engine("model.convolutions")
    return lambda size: monkeypatch.setattr(convolutions, "room", lambda: size)


@pytest.mark.parametrize(("family", "form"), [("SD15", "F(2x2)"), ("SDXL", "F(4x4)"), ("SDXLRefiner", "F(4x4)")])
def test_the_image_is_the_same_up_to_rounding(family, form, last_lines):
    model = hosted.model(family)
    expected, image = sample(model), sample(faster(model, winograd=form))
    assert 0 < relative_error(image, expected) < BOUND
    state, text = last_lines("1")[0]
    number = 2 * len(convolutions(model))
    assert state == "active"
    assert text.startswith(f"Winograd: {number} of {number} calls of 3x3 convolutions; ")
    assert f"{form} for " in text
    assert f" shapes ({number} calls)" in text


@pytest.mark.parametrize("size", [(9, 17), (2, 2)])
def test_sizes_and_batches(size):
    model = hosted.model("SD15")
    image = torch.zeros(3, 4, *size)
    assert relative_error(sample(faster(model), image=image), sample(model, image=image)) < BOUND


def test_measured_choices_stay_and_are_told(model, last_lines):
    measured = faster(model, winograd="auto")
    first = sample(measured)
    assert torch.equal(sample(measured), first)
    assert torch.equal(sample(faster(hosted.model("minimal"), winograd="auto")), first)
    assert relative_error(first, sample(model)) < BOUND
    ((_, text),) = last_lines("1")
    assert "measured" not in text, "it was measured a second time"
    assert "ComfyUI's own" in text or "calls of 3x3 convolutions" in text


def test_the_filters_are_made_once_and_kept_for_other_runs_and_nodes(model, made):
    sample(faster(model))
    assert len(made) == len(convolutions(model))
    sample(faster(model, "2"))
    sample(faster(model.clone(), "3"), image=latent(model, 24))
    assert len(made) == len(convolutions(model))


def test_the_filters_go_when_the_host_unloads_the_model(model, made):
    patcher = faster(model)
    expected = sample(patcher)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(patcher), expected)
    assert len(made) == 2 * len(convolutions(model))


def test_other_weights_get_other_filters(model, made):
    """A LoRA for convolutions comes and goes."""
    plain = sample(faster(model))
    patched = patched_convolution(model)
    image = sample(faster(patched))
    assert relative_error(image, sample(patched)) < BOUND
    assert relative_error(image, plain) > 10 * BOUND
    assert torch.equal(sample(faster(model)), plain)
    # All of them once, and that one anew each time.
    assert len(made) == len(convolutions(model)) + 2


def test_a_weight_that_is_edited_in_place_is_followed(model):
    before = sample(faster(model))
    weight = model.model.diffusion_model.input_blocks[1][0].in_layers[2].weight
    with torch.inference_mode():
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    image = sample(faster(model))
    assert relative_error(image, sample(model)) < BOUND
    assert relative_error(image, before) > 10 * BOUND


def test_weights_that_change_within_the_run_are_left_to_the_host(model, last_lines):
    """LoRA by hooks on one of the prompts."""
    key = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    change = 0.05 * torch.randn(model.model_state_dict()[key].shape, generator=torch.Generator().manual_seed(4))
    hook = comfy.hooks.WeightHook(1.0, 0.0)
    hook.weights, hook.need_weight_init = {key: ("diff", (change,))}, False
    group = comfy.hooks.HookGroup()
    group.add(hook)

    def run(patcher):
        patcher = patcher.clone()
        registered = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
        patcher.register_all_hook_patches(group, registered)
        return sample(patcher, prompt(patcher, 10, hooks=group))

    expected = run(model)
    image = run(faster(model))
    assert 0 < relative_error(image, expected) < BOUND
    state, text = last_lines("1")[0]
    assert state == "active"
    # The prompts run one after the other, since their weights differ.
    assert "1 shape (4 calls): weights are cast or patched as they are used" in text


def test_weights_that_are_patched_as_they_are_used_are_left_to_the_host(model, last_lines):
    """As where a model is loaded in part."""
    module = model.model.diffusion_model.input_blocks[1][0].in_layers[2]
    patch = lambda module, *_: module.__dict__.update(weight_function=[lambda weight: weight * 1.1])  # noqa: E731
    handle = module.register_forward_pre_hook(patch)
    image = sample(faster(model))
    assert relative_error(image, sample(model)) < BOUND
    handle.remove()
    assert "1 shape (2 calls): weights are cast or patched as they are used" in last_lines("1")[0][1]


def test_without_memory_for_filters_the_image_is_the_hosts(model, last_lines, room):
    room(0)
    assert torch.equal(sample(faster(model)), sample(model))
    ((state, text),) = last_lines("1")
    assert state == "inert"
    assert "filters would take more than they may (0 MiB" in text


def test_where_there_is_memory_for_some_filters_they_are_the_same_in_each_run(model, made, room, last_lines):
    """Whatever other runs and other models had before."""
    form = hosted.method("winograd").Form(4)
    sizes = [form.filter_bytes(module.weight) for module in convolutions(model)]
    room(sum(sizes) // 2)
    first = sample(faster(model))
    assert 0 < len(made) < len(sizes)
    ((_, text),) = last_lines("1")
    assert "F(4x4) for" in text
    assert "filters would take more than they may" in text
    for winograd in ("F(2x2)", "F(4x4)"):
        other = hosted.model("minimal")
        last = sample(faster(other, "2", winograd=winograd))
    assert torch.equal(last, first)
    assert torch.equal(sample(faster(model)), first)
    kept = sum(derived.size for derived in hosted.engine("model.convolutions")._all)
    assert 0 < kept <= sum(sizes) // 2


def test_a_bound_that_the_user_sets_is_kept_and_the_same_in_each_run(model, made, last_lines):
    form = hosted.method("winograd").Form(4)
    sizes = [form.filter_bytes(module.weight) for module in convolutions(model)]
    bound = sum(sizes) // 2**21
    assert bound > 0
    image = sample(faster(model, filters_mib=bound))
    assert 0 < sum(form.filter_bytes(weight) for weight in made) <= bound * 2**20
    assert f"filters would take more than they may ({bound} MiB)" in last_lines("1")[0][1]
    assert not torch.equal(sample(faster(model)), image)
    assert torch.equal(sample(faster(model, filters_mib=bound)), image)


@pytest.mark.parametrize("end", ["success", "error", "interrupt"])
def test_the_convolutions_are_the_hosts_again_after_each_call(end, model):
    found = convolutions(model)
    seen = []

    def look(module, *_):
        seen.append("_conv_forward" in module.__dict__)
        if end == "error":
            raise hosted.PlantedError
        if end == "interrupt":
            raise comfy.model_management.InterruptProcessingException

    handle = found[-1].register_forward_hook(look)
    try:
        sample(faster(model))
    except (hosted.PlantedError, comfy.model_management.InterruptProcessingException):
        assert end != "success"
    handle.remove()
    assert seen
    assert all(seen)
    assert not any("_conv_forward" in module.__dict__ for module in found)


def test_where_gradients_are_wanted_the_hosts_own_runs(model):
    convolution = hosted.engine("model.convolutions")._convolution
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(2, 4, 3, 3, requires_grad=True)
    convolution(x, weight, None).sum().backward()
    assert weight.grad is not None


def test_cached_steps_run_them_too(last_lines):
    model = hosted.model("SD15")
    cached = run_node("SlipstreamDeepCache", model, "2", cache_interval=3)
    expected = sample(cached, steps=4)
    assert relative_error(sample(faster(cached), steps=4), expected) < BOUND
    number = int(last_lines("1")[0][1].split("Winograd: ")[1].split(" of ")[0])
    assert 2 * len(convolutions(model)) < number < 4 * len(convolutions(model))


@pytest.mark.parametrize("scope", ["blocks", pytest.param("model", marks=pytest.mark.long)])
def test_compiled_graphs_call_them_and_do_not_keep_them(scope, model):
    """On and off and on again, with other weights: each time as without graphs."""
    expected, plain = sample(faster(model)), sample(model)
    assert not torch.equal(expected, plain)
    assert torch.equal(sample(compile_model(faster(model), "2", scope=scope)), expected)
    assert torch.equal(sample(compile_model(model, "2", scope=scope)), plain)
    assert torch.equal(sample(faster(compile_model(model, "2", scope=scope))), expected)
    other = patched_convolution(model)
    assert torch.equal(sample(compile_model(faster(other), "2", scope=scope)), sample(faster(other)))


def test_a_compiled_run_counts_as_many(model, last_lines):
    """Compile Model runs the first call a few times more, to tell what it gains."""
    sample(compile_model(faster(model), "2"))
    number = 2 * len(convolutions(model))
    counted = int(last_lines("1")[0][1].split("Winograd: ")[1].split(" of ")[0])
    assert counted == number


def test_a_node_of_its_own_wins_and_this_one_says_so(model, last_lines):
    plan, sampling = hosted.engine("plan.plan"), hosted.engine("run.sampling")
    explicit = plan.Entry(hosted.method("winograd").Winograd("F(2x2)"), (plan.Node("9", "SlipstreamOther"),))
    expected = sample(faster(model, winograd="F(2x2)"))
    before = sampling.with_plan(model, plan.Plan().adding(explicit))
    after = faster(model)
    for patcher in (faster(before), sampling.with_plan(after, plan.plan_of(after).adding(explicit))):
        assert torch.equal(sample(patcher), expected)
        assert last_lines("1") == [("inert", "Winograd: as node 9 sets it")]
        assert last_lines("9")[0][0] == "active"


def test_what_has_nothing_to_speed_up_passes_through(model, last_lines):
    dit = hosted.model("DiT")
    assert faster(dit) is dit
    assert last_lines("1") == [("off", "off: all of it is switched off, or not for this kind of model")]
    model.load_device = torch.device("cuda")
    assert faster(model) is model
    assert last_lines("1") == [("off", "off: this model runs on cuda, and this node is for processors")]
