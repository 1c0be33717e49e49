"""What things are by what is in them: unlike ones apart, equal ones together, whatever process they are in and whatever
ran."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import comfy.hooks
import hosted
import pytest
import small_models
import torch
from hosted import latent, prompt, run_node, sample

identity = hosted.engine("host.identity")
benchmark = hosted.engine("benchmark")
trying = hosted.engine("trying")


def weights(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer {number}": torch.randn(4, 4, generator=generator) for number in range(count)}


def hooked(strength=1.0, seed=1, keyframe=0.5, count=4):
    """A conditioning with a LoRA of its own, as the host's nodes make it; a scheduled one."""
    hooks = comfy.hooks.create_hook_lora(weights(seed, count), strength, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(keyframe))
    hooks.set_keyframes_on_hooks(frames)
    return comfy.hooks.set_hooks_for_conditioning([[torch.ones(1, 4, 8), {}]], hooks)


@pytest.mark.parametrize("count", [4, 40])
def test_hooks_go_by_what_is_in_them(count):
    one, equal = (identity.digest(hooked(count=count)) for _ in range(2))
    others = [hooked(0.5, count=count), hooked(seed=2, count=count), hooked(keyframe=0.6, count=count), hooked(count=5)]
    assert one == equal
    assert len({one, *map(identity.digest, others)}) == 5


def test_hooks_are_what_they_were_after_a_run(model):
    conditioning = [[tensor, {**values, **hooked()[0][1]}] for tensor, values in prompt(model, 10)]
    before = identity.digest(conditioning)
    sample(model, conditioning, prompt(model, 11))
    assert identity.digest(conditioning) == before


def test_controlnets_go_by_their_weights_and_those_before_them(model):
    def controlled(seed, *before):
        conditioning = hosted.with_control(prompt(model, 10), hosted.controlnet(model, seed))
        for other in before:
            conditioning[0][1]["control"].set_previous_controlnet(hosted.controlnet(model, other))
        return conditioning

    found = [identity.digest(controlled(*seeds)) for seeds in ((5,), (6,), (5, 6), (6, 6))]
    assert len(set(found)) == 4
    assert identity.digest(controlled(5, 6)) == found[2]
    conditioning = controlled(5)
    sample(model, conditioning, prompt(model, 11))
    assert identity.digest(conditioning) == found[0]


def test_models_within_go_by_weights_and_patches(model):
    hooks = [comfy.hooks.AdditionalModelsHook([one]) for one in (model, model.clone(), hosted.add_lora(model, seed=3))]
    one, equal, other = map(identity.digest, hooks)
    assert one == equal != other


def closure(value):
    return lambda args: value


def default(value):
    return lambda args, value=value: value


def keyword(value):
    def function(args, *, value=value):
        return value

    return function


def nested(value):
    inner = closure(value)
    return lambda args: inner(args)


class Scaled:
    def __init__(self, value):
        self.value = value
        self.count = 0

    def scaled(self, args):
        self.count += 1
        return args["denoised"]

    def __call__(self, args):
        return self.scaled(args)


KINDS = {
    "closure": closure,
    "default": default,
    "keyword": keyword,
    "function in a closure": nested,
    "partial": lambda value: partial(closure(0), value),
    "partial by name": lambda value: partial(closure(0), args=value),
    "method": lambda value: Scaled(value).scaled,
    "object": Scaled,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [(0.7, 0.1), ("a", "b"), (True, False), ([1, 2], [1, 3]), ((1,), (2,))], ids=str)
def test_functions_go_by_what_they_were_made_with(kind, values, model):
    def patched(value):
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(KINDS[kind](value))
        return identity.of_patches(clone)

    one, other = values
    assert patched(one) == patched(one) != patched(other)
    assert patched(one) != identity.of_patches(model)


@pytest.mark.parametrize(
    ("module", "node", "settings"),
    [
        ("model_advanced", "RescaleCFG", [{"multiplier": 0.7}, {"multiplier": 0.1}]),
        ("apg", "APG", [{"eta": 1.0, "norm_threshold": 5.0, "momentum": at} for at in (0.5, 0.7)]),
        (
            "easycache",
            "EasyCacheNode",
            [{"reuse_threshold": at, "start_percent": 0.1, "end_percent": 0.9, "verbose": False} for at in (0.1, 0.2)],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_hosts_own_nodes_go_by_their_settings_also_after_a_run(module, node, settings, model):
    """A run leaves in some of their functions what the next one overwrites."""
    kind = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), node)

    def patched(values):
        return kind().patch(model, **values)[0] if hasattr(kind, "patch") else kind.execute(model, **values).args[0]

    ones = [patched(values) for values in settings]
    before = [identity.of_patches(one) for one in ones]
    assert before[0] == identity.of_patches(patched(settings[0])) != before[1]
    for one in ones:
        sample(one, steps=4)
    assert [identity.of_patches(one) for one in ones] == before


def test_methods_of_our_own_are_the_same_after_a_run(model):
    one = run_node("SlipstreamForecast", run_node("SlipstreamCFGCutoff", model, "1", cutoff=0.5), "2")
    before = identity.of_patches(one)
    assert before == identity.of_patches(run_node("SlipstreamCFGCutoff", model, "9", cutoff=0.5))
    sample(one, steps=8)
    assert identity.of_patches(one) == before


def test_what_holds_itself_comes_to_an_end(model):
    one: dict = {"plain": 1}
    one["itself"] = [one]
    group = comfy.hooks.HookGroup()
    group.group = group

    def function(args):
        return function(args)

    function_of_itself = model.clone()
    function_of_itself.set_model_sampler_post_cfg_function(function)
    assert identity.digest(one, group) == identity.digest(one, group)
    assert identity.of_patches(function_of_itself) != identity.of_patches(model)


def test_a_batchs_place_in_a_larger_one_is_part_of_what_is_sampled(model):
    """The host makes other noise for it."""
    vae = small_models.vae()

    def about(**more):
        latent_image = {"samples": latent(model, 8), **more}
        call = benchmark.SamplerCall(None, None, latent_image, 1, 7, 5.0, "euler", "normal", 1.0, "Tune")
        return trying.comparable(model, vae, call)

    found = [about(), about(batch_index=[0]), about(batch_index=[3])]
    assert found[0] != found[1] != found[2]
    assert found[2] == about(batch_index=[3])


def everything():
    """A digest of all kinds of things, of small models made anew."""
    model = small_models.model("minimal")
    model = run_node("SlipstreamForecast", model, "1")
    for make in KINDS.values():
        model.set_model_sampler_post_cfg_function(make(0.7))
    model = hosted.add_lora(model, seed=3)
    controlled = hosted.with_control(prompt(model, 10), hosted.controlnet(model))
    held = identity.digest(hooked(), hooked(count=40), controlled, {"some": {"texts", "in", "a set"}})
    return f"{identity.of_weights(model)} {identity.of_patches(model)} {held}"


ELSEWHERE = """
import importlib.util, sys
sys.path[:0] = [{tests!r}, {host!r}]
from loading import load_all
load_all()
spec = importlib.util.spec_from_file_location({name!r}, {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.everything())
"""


@pytest.mark.long
def test_another_process_gives_the_same():
    host = Path(__file__).parent
    command = ELSEWHERE.format(tests=str(host.parent), host=str(host), name=__name__, file=__file__)
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=300, env=environment, check=True
    )
    assert other.stdout.splitlines()[-1] == everything()
