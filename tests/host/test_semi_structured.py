"""Quantize Model's 2:4 sparse: the first evaluation and the others, what it follows, and that nothing stays."""

from __future__ import annotations

import copy
import re
import statistics

import comfy.model_management
import hosted
import pytest
import torch
from hosted import (
    PlantedError,
    add_lora,
    compile_model,
    hooked_prompt,
    prompt,
    relative_error,
    run_node,
    sample,
)
from small_models import transformer, transformer_latent, transformer_prompt

MODEL = "base"
"""Its layers have the sides that kernels take."""

method = hosted.method("semi_structured")


def sparse(patcher, node_id="1", **values):
    """With every layer that can be pruned, as random weights bear no bound."""
    given = {"min_features": 0, "sparse_error": 1.0, **values}
    return run_node("SlipstreamQuantize", patcher, node_id, scheme="2:4 sparse", **given)


def draw(patcher, *args, **kwargs):
    return sample(patcher, *args, **{"steps": 2, "image": hosted.latent(patcher, 8), **kwargs})


def linear_layers(patcher):
    unet = patcher.model.diffusion_model
    return {path: part for path, part in unet.named_modules() if isinstance(part, torch.nn.Linear)}


def pruned_paths(layers):
    fours = {path: layer.weight.detach().unflatten(-1, (-1, 4)) for path, layer in layers.items()}
    return {path for path, four in fours.items() if int((four != 0).sum(-1).max()) <= 2}


def watch(patcher):
    """For each call of the model, the layers whose weights are pruned in it."""
    layers, found = linear_layers(patcher), []
    block = patcher.model.diffusion_model.middle_block[0]
    return found, block.register_forward_pre_hook(lambda *_: found.append(pruned_paths(layers)))


def test_the_first_evaluation_is_dense_and_the_others_are_sparse(model, last_lines):
    exact, first, own = draw(model, steps=1), draw(sparse(model), steps=1), draw(model)
    assert torch.equal(first, exact)
    assert last_lines("1") == [
        ("inert", "changed nothing: the run had one evaluation, which is the one that is observed")
    ]
    found, handle = watch(model)
    try:
        image = draw(sparse(model))
    finally:
        handle.remove()
    assert not found[0]
    layers, total = len(found[1]), len(linear_layers(model))
    assert 0.5 * total < layers < total
    assert all("attn" in path or "ff" in path or "proj" in path for path in found[1])
    assert 1e-6 < relative_error(image, own) < 0.5
    ((told, text),) = last_lines("1")
    assert told == "active"
    assert text.startswith(f"2:4 sparse: {layers} of {total} linear layers, ")
    assert "; 100% of the multiplications of the layers that it is for; outputs lose " in text
    assert "of time embeddings" in text
    assert text.endswith("; computed dense, so no faster and no smaller, since a CPU has no kernels for it")


def test_corrected_is_nearer(model, monkeypatch, last_lines):
    def lost():
        return float(re.search(r"outputs lose ([\d.]+)% at most", last_lines("1")[0][1])[1])

    exact = draw(model)
    corrected, least = relative_error(draw(sparse(model)), exact), lost()
    monkeypatch.setattr(method, "prune", method.magnitudes)
    assert corrected < relative_error(draw(sparse(model)), exact)
    assert least < 0.25 * lost()


def test_the_same_settings_give_the_same_bits_whatever_ran_before(model):
    node = sparse(model)
    image = draw(node)
    draw(node, prompt(model, 20), prompt(model, 21), steps=2)
    draw(add_lora(node))
    assert torch.equal(draw(node), image)
    assert torch.equal(draw(sparse(hosted.model(MODEL))), image)


def test_a_lora_is_merged_first_and_followed(model):
    plain = draw(sparse(model))
    for strength in (0.5, 0.9):
        exact = draw(add_lora(model, strength=strength))
        below, above = sparse(add_lora(model, strength=strength)), add_lora(sparse(model), strength=strength)
        image = draw(below)
        assert relative_error(image, exact) < relative_error(plain, exact)
        assert torch.equal(draw(above), image)
    assert torch.equal(draw(sparse(model)), plain)


def test_layers_that_hooks_change_stay_whole(model, last_lines):
    positive = hooked_prompt(model)
    exact, plain = draw(model, positive), draw(model)
    assert relative_error(draw(sparse(model), positive), exact) < relative_error(draw(sparse(model)), exact)
    assert re.search(r"[, ]\d+ that hooks change", last_lines("1")[0][1]) is None
    draw(sparse(model), positive)
    assert re.search(r" \d+ that hooks change", last_lines("1")[0][1])
    assert torch.equal(draw(model), plain)


def interrupt():
    raise comfy.model_management.InterruptProcessingException


def fail():
    raise PlantedError("planted")


@pytest.mark.parametrize("end", [None, interrupt, fail])
@pytest.mark.parametrize("call", [1, 2])
def test_the_model_finds_its_own_weights_however_a_run_ends(end, call, model):
    """In the evaluation that is observed, and in one with sparse weights."""
    exact, node = draw(model), sparse(model)
    before, calls = hosted.fingerprint(model.model), []

    def hook(*_):
        calls.append(len(layer._forward_pre_hooks))
        if end is not None and len(calls) == call:
            end()

    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q
    handle = model.model.diffusion_model.middle_block[0].register_forward_hook(hook)
    try:
        if end is None:
            draw(node)
        else:
            with pytest.raises((comfy.model_management.InterruptProcessingException, PlantedError)):
                draw(node)
    finally:
        handle.remove()
    # One that looks, and none afterwards.
    assert calls == [1, 0][: 2 if end is None else call]
    assert hosted.fingerprint(model.model) == before
    assert torch.equal(draw(model), exact)


def test_between_two_calls_the_model_has_its_own_weights(model):
    draw(model)
    # But what the host knows of its patcher.
    state = lambda: [one for one in hosted.fingerprint(model.model) if isinstance(one, tuple)]  # noqa: E731
    before, found = state(), []
    draw(sparse(model), callback=lambda *_: found.append(state() == before))
    assert found == [True] * 2


def test_of_an_evaluation_that_is_made_again_the_last_attempt_counts(model, monkeypatch):
    """What another method did not accept may be anything: not finite, for one."""
    kind = hosted.method("attention_backend").AttentionBackendRun

    def both(patcher):
        return run_node("SlipstreamAttention", sparse(patcher), "2", backend="math")

    expected, refused = draw(both(model)), []

    def accepts(self, evaluation, denoised):
        refused.append(not refused)
        return not refused[-1]

    monkeypatch.setattr(kind, "accepts", accepts)
    look = method.Inputs.add
    # As it is after an attention that overflowed.
    monkeypatch.setattr(method.Inputs, "add", lambda self, x: look(self, x if refused else x * torch.nan))
    assert torch.equal(draw(both(model)), expected)
    assert refused == [True, False, False]


def test_bounds_on_the_error_and_on_the_share_are_kept(model, monkeypatch, last_lines):
    exact = draw(model)
    assert torch.equal(draw(sparse(model, sparse_error=0.0)), exact)
    ((told, text),) = last_lines("1")
    assert told == "inert"
    assert re.match(r"pruned none of \d+ linear layers; left out: \d+ whose outputs would lose more than", text)

    own, gains = hosted.engine("model.pruned").PrunedLayers._prune, {}

    def prune(self, layer, inputs):
        found = own(self, layer, inputs)
        gains[layer.path] = inputs.seen * layer.module.weight.numel() / found[0] ** 2
        return found

    monkeypatch.setattr(hosted.engine("model.pruned").PrunedLayers, "_prune", prune)

    def of(**values):
        found, handle = watch(model)
        draw(sparse(model, **values), steps=2)
        handle.remove()
        return found[1], last_lines("1")[0][1]

    whole, _ = of()
    half, text = of(sparse_share=0.5)
    assert half < whole
    share = int(re.search(r"(\d+)% of the multiplications", text)[1])
    assert 35 < share <= 50
    assert "beyond sparse_share" in text
    # Of those that gain most for the square of what they lose.
    taken, left = ([gains[path] for path in paths] for paths in (half, whole - half))
    assert max(taken) == max(gains.values())
    assert statistics.median(taken) > statistics.median(left)
    most = float(re.search(r"outputs lose ([\d.]+)% at most", text)[1])
    few, text = of(sparse_error=most / 200)
    assert few < whole
    assert float(re.search(r"outputs lose ([\d.]+)% at most", text)[1]) <= most / 2


def test_what_several_layers_are_given_is_kept_once(model, monkeypatch):
    """q, k and v of self-attention, and the prompt for all of cross-attention."""
    kind, made = hosted.engine("model.pruned").Inputs, []
    own = kind.__init__

    def init(self, *args):
        made.append(self)
        own(self, *args)

    monkeypatch.setattr(kind, "__init__", init)
    found, handle = watch(model)
    draw(sparse(model), steps=2)
    handle.remove()
    prompts = [path for path in found[1] if path.endswith(("attn2.to_k", "attn2.to_v"))]
    others = [path for path in found[1] if path.endswith(("attn1.to_k", "attn1.to_v"))]
    assert len(made) == len(found[1]) - len(prompts) + 1 - len(others)


class Calling(torch.nn.Module):
    """Another node's part, that calls one layer by the name of its input and another with no rows."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.idle = layer, copy.deepcopy(layer)

    def forward(self, x):
        self.idle(x[:, :0])
        return self.layer(input=x)


def test_layers_are_observed_however_they_are_called(model, last_lines):
    attention = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1
    attention.to_q = Calling(attention.to_q)
    found, handle = watch(model)
    draw(sparse(model))
    handle.remove()
    name = "middle_block.1.transformer_blocks.0.attn1.to_q"
    assert f"{name}.layer" in found[1]
    assert f"{name}.idle" not in found[1]
    assert "1 not used in the first evaluation" in last_lines("1")[0][1]


def test_kernels_are_used_where_they_are(model, monkeypatch, last_lines):
    given = []

    def packed(weight):
        given.append(weight.shape)
        return weight.to(torch.float32).clone()

    expected = draw(sparse(model))
    monkeypatch.setattr(method, "lacks_kernels", lambda *_: None)
    monkeypatch.setattr(method, "packed", packed)
    assert torch.equal(draw(sparse(model)), expected)
    text = last_lines("1")[0][1]
    assert f": {len(given)} of " in text
    assert "computed dense" not in text


@pytest.mark.parametrize("name", ["Flux", "DiT"])
def test_of_a_transformer_the_blocks_are_pruned(name, last_lines):
    if name == "DiT":
        model, given, prompts = hosted.model("DiT"), {}, ()
    else:
        model = transformer(name)
        given = {"image": transformer_latent(name), "scheduler": "simple", "cfg": 1.0}
        prompts = [transformer_prompt(name, 1)] * 2
    exact = draw(model, *prompts, **given)
    assert 1e-4 < relative_error(draw(sparse(model), *prompts, **given), exact) < 1
    text = last_lines("1")[0][1]
    assert "of modulation" in text
    assert "first, last or embedding" in text


def test_beside_other_methods_any_order_gives_the_same_bits(model, last_lines):
    """Compiled, joined, in another precision and cached: the first evaluation is looked at without graphs."""
    nodes = {
        "SlipstreamQuantize": {"scheme": "2:4 sparse", "min_features": 0, "sparse_error": 1.0},
        "SlipstreamPrecision": {"compute_dtype": "bf16"},
        "SlipstreamAttention": {"backend": "math", "fuse_qkv": True},
        "SlipstreamDeepCache": {"cache_interval": 2},
    }

    def wired(names):
        patcher = model
        for number, name in enumerate(names, 1):
            patcher = run_node(name, patcher, str(number), **nodes[name])
        return patcher

    images = [draw(wired(names)) for names in (list(nodes), list(nodes)[::-1])]
    assert torch.equal(*images)
    assert "Quantize Model prunes their projections" in last_lines("2")[0][1]


@pytest.mark.parametrize("name", ["minimal", "DiT"])
def test_compiled_it_gives_the_same_bits_and_says_what_ran_without_graphs(name, last_lines):
    model = hosted.model(name)
    image = draw(sparse(model))
    compiled = compile_model(sparse(model), "2")
    for _ in range(2):
        assert torch.equal(draw(compiled), image)
        assert "a method looks at what layers are given in the first evaluation" in last_lines("2")[0][1]


def test_a_backend_that_keeps_weights_is_refused(monkeypatch):
    monkeypatch.setattr(hosted.compiling("backends").ALL["eager"], "follows_weights", False, raising=False)
    with pytest.raises(RuntimeError, match=r"Compile Model: eager keeps weights, and can't keep quantized ones\."):
        draw(compile_model(sparse(hosted.model("minimal")), "2"))
