"""The plan as data: written and read back, refused where it is broken, and put on a model without nodes or a server."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import hosted
import pytest
import torch
from hosted import prompt, run_node, sample

plans, saved, registry = (hosted.engine(f"plan.{name}") for name in ("plan", "saved", "registry"))
apply = hosted.engine("apply").apply

SETTINGS = {
    "sequential_offload": {"budget_mib": 512},
    "precision": {"compute_dtype": "bf16", "channels_last": "on", "tf32": "off", "scope": "transformers"},
    "quantize": {
        "scheme": "int8 weight-only",
        "min_features": 64,
        "skip": 'attn2, "ff"\n\u4e2d',
        "offload_originals": "on",
        "sparse_error": 0.1,
        "sparse_share": 1 / 3,
    },
    "attention_backend": {"backend": "math", "fuse_qkv": True},
    "winograd": {"form": "auto", "bf16": True, "filters_mib": 512},
    "compile_model": {
        "backend": "inductor",
        "mode": "max-autotune",
        "scope": "model",
        "dynamic": "on",
        "fullgraph": True,
        "tuned": True,
        "onediff_backend": "oneflow",
    },
    "cfg_cutoff": {"cutoff": 0.1 + 0.2, "unit": "timesteps", "start": 0.1, "reuse_every": 3, "adaptive": 1 / 3},
    "forecast": {"error_budget": 0.1, "max_skips": 5, "start_percent": 0.2, "end_percent": 1 / 3},
    "deepcache": {
        "cache_interval": 5,
        "cache_branch_id": 2,
        "schedule": "quadratic",
        "start_percent": 0.1,
        "end_percent": 1 / 3,
    },
    "freeu": {
        "b1": 1.1,
        "b2": 1.2,
        "s1": 0.7,
        "s2": 0.6,
        "version": "v1",
        "start_percent": 1e-9,
        "end_percent": 0.5,
    },
}
"""Of every method all settings, none of them its default."""

DEFAULTS_1 = {
    "sequential_offload": {"budget_mib": 0},
    "precision": {"compute_dtype": "auto", "channels_last": "auto", "tf32": "auto", "scope": "model"},
    "quantize": {
        "scheme": "int8 dynamic",
        "min_features": 256,
        "skip": "",
        "offload_originals": "auto",
        "sparse_error": 0.05,
        "sparse_share": 1.0,
    },
    "attention_backend": {"backend": "auto", "fuse_qkv": False},
    "winograd": {"form": "auto", "bf16": False, "filters_mib": 0},
    "compile_model": {
        "backend": "auto",
        "mode": "default",
        "scope": "blocks",
        "dynamic": "auto",
        "fullgraph": False,
        "tuned": False,
        "onediff_backend": "nexfort",
    },
    "cfg_cutoff": {"cutoff": 0.75, "unit": "steps", "start": 0.0, "reuse_every": 1, "adaptive": 0.0},
    "forecast": {"error_budget": 0.05, "max_skips": 3, "start_percent": 0.0, "end_percent": 1.0},
    "deepcache": {
        "cache_interval": 3,
        "cache_branch_id": 0,
        "schedule": "uniform",
        "start_percent": 0.0,
        "end_percent": 1.0,
    },
    "freeu": {"version": "v2", "start_percent": 0.0, "end_percent": 1.0},
}
"""What a plan of version 1 means where it says nothing, for good."""


def plan_of(**settings):
    """A plan of some methods, by stem."""
    plan = plans.Plan()
    for stem, values in settings.items():
        plan = plan.adding(plans.Entry(registry.configuration(stem, **values), ()))
    return plan


def configs(patcher):
    return [entry.config for entry in plans.plan_of(patcher).entries]


# Written and read back


def test_the_settings_here_are_all_there_are_and_none_is_a_default():
    assert list(SETTINGS) == list(registry.METHODS)
    for stem, values in SETTINGS.items():
        assert list(values) == [field.name for field in fields(registry.kind(stem))]
        for name, value in saved.defaults(stem).items():
            # Winograd's other forms have no use for bf16.
            assert values[name] != value or (stem, name) == ("winograd", "form")


def test_a_plan_of_every_method_comes_back_equal():
    plan = plan_of(**SETTINGS)
    text = saved.to_json(plan)
    assert saved.from_json(text) == plan
    assert saved.to_json(saved.from_json(text)) == text
    assert saved.from_data(json.loads(text)) == plan
    assert json.loads(text)["methods"][0] == {"stem": "sequential_offload", "settings": {"budget_mib": 512}}


def test_each_method_comes_back_of_the_same_types():
    for stem, values in SETTINGS.items():
        (entry,) = saved.from_json(saved.to_json(plan_of(**{stem: values}))).entries
        assert [type(value) for value in asdict(entry.config).values()] == [type(value) for value in values.values()]


def test_nodes_and_suggestions_are_no_part_of_it():
    node = plans.Node("7", "SlipstreamRecipe", told="a recipe")
    config = registry.configuration("cfg_cutoff", cutoff=0.5)
    other = registry.configuration("cfg_cutoff", cutoff=0.6)
    bare = plan_of(cfg_cutoff={"cutoff": 0.5})
    several = plans.Plan().adding(plans.Entry(other, (node,), suggested=True)).adding(plans.Entry(config, (node,)))
    assert saved.to_json(several) == saved.to_json(bare)
    assert saved.from_json(saved.to_json(several)) == bare


def test_what_a_text_leaves_out_is_the_default_of_its_version(monkeypatch):
    assert {stem: saved.defaults(stem, 1) for stem in registry.METHODS} == DEFAULTS_1
    text = (
        '{"version": 1, "methods": [{"stem": "deepcache", "settings": {"cache_branch_id": 1}}, {"stem": "quantize"}]}'
    )
    assert saved.from_json(text) == plan_of(deepcache={"cache_branch_id": 1}, quantize={})
    # As if the next version had another default.
    monkeypatch.setattr(saved, "VERSION", 2)
    monkeypatch.setattr(saved, "FORMER", {1: {"deepcache": {"cache_interval": 4}}})
    assert saved.from_json(text).entries[1].config.cache_interval == 4
    assert saved.from_json(text.replace('"version": 1', '"version": 2')).entries[1].config.cache_interval == 3


def test_numbers_are_of_the_settings_type_however_they_are_written():
    text = '{"version": 1, "methods": [{"stem": "deepcache", "settings": {"cache_interval": 2.0, "end_percent": 1}}]}'
    (entry,) = saved.from_json(text).entries
    assert [(type(v), v) for v in (entry.config.cache_interval, entry.config.end_percent)] == [(int, 2), (float, 1.0)]


def test_the_order_of_a_text_does_not_matter():
    data = saved.as_data(plan_of(**SETTINGS))
    assert saved.from_data({**data, "methods": data["methods"][::-1]}) == plan_of(**SETTINGS)
    assert saved.from_json('{"methods": [], "version": 1}') == plans.Plan()


def one(method):
    return f'{{"version": 1, "methods": [{method}]}}'


def deepcache(settings):
    return one(f'{{"stem": "deepcache", "settings": {settings}}}')


BROKEN = {
    # name: (text, what is told of it)
    "no text": (None, "it must be a text in JSON, but is null"),
    "bytes": (b"{}", "it must be a text in JSON, but is of type bytes"),
    "empty": ("", "it must be JSON, but is not: Expecting value in line 1, column 1"),
    "cut off": ('{"version": 1, "methods": [', "it must be JSON, but is not: "),
    "more behind it": ('{"version": 1, "methods": []}}', "it must be JSON, but is not: Extra data"),
    "a byte order mark": ('\ufeff{"version": 1, "methods": []}', "it must be JSON, but is not: "),
    "too deep": ("[" * 100_000, "it must be JSON of a few levels, but has too many"),
    "endless digits": (
        '{"version": %s, "methods": []}' % ("9" * 5000),
        "it must be JSON, but is not: Exceeds the limit",
    ),
    "a list": ("[]", "it must be an object of version, methods, but is a list"),
    "a word": ('"plan"', "it must be an object of version, methods, but is 'plan'"),
    "no version": ('{"methods": []}', "it lacks version"),
    "no methods": ('{"version": 1}', "it lacks methods"),
    "a newer version": ('{"version": 99, "methods": []}', "it is of version 99, and this Slipstream reads 1 at most"),
    "version 0": ('{"version": 0, "methods": []}', "version must be a whole number from 1 on, but is 0"),
    "a version in words": ('{"version": "1", "methods": []}', "version must be a whole number from 1 on, but is '1'"),
    "version true": ('{"version": true, "methods": []}', "version must be a whole number from 1 on, but is True"),
    "methods by name": ('{"version": 1, "methods": {"freeu": {}}}', "methods must be a list, but is an object"),
    "another member": (
        '{"version": 1, "methods": [], "exec": 1}',
        "it must have no other members than .* but has 'exec'",
    ),
    "a method that is a word": (one('"deepcache"'), "each of its methods must be an object of stem, settings"),
    "a method without a stem": (one('{"settings": {}}'), "each of its methods lacks stem"),
    "a method with more": (one('{"stem": "freeu", "nodes": []}'), "each of its methods .* but has 'nodes'"),
    "an unknown stem": (
        one('{"stem": "teacache"}'),
        "the method 'teacache' is unknown; known are sequential_offload, ",
    ),
    "a stem that is a path": (one('{"stem": "../deepcache"}'), r"the method '\.\./deepcache' is unknown"),
    "a stem that is no method's": (one('{"stem": "method"}'), "the method 'method' is unknown"),
    "a stem that is none": (one('{"stem": null}'), "the method null is unknown"),
    "a method twice": (one('{"stem": "deepcache"}, {"stem": "deepcache"}'), "DeepCache is in it twice"),
    "settings in a list": (
        deepcache("[]"),
        "the settings of DeepCache must be an object of cache_interval, .*is a list",
    ),
    "an unknown setting": (deepcache('{"interval": 2}'), "the settings of DeepCache .* but has 'interval'"),
    "a setting twice": (
        deepcache('{"cache_interval": 2, "cache_interval": 3}'),
        "'cache_interval' is in one object twice",
    ),
    "a number in words": (deepcache('{"cache_interval": "3"}'), "cache_interval of DeepCache must be a whole number"),
    "half a step": (
        deepcache('{"cache_interval": 2.5}'),
        "cache_interval of DeepCache must be a whole number, but is 2.5",
    ),
    "true for a number": (deepcache('{"cache_interval": true}'), "cache_interval of DeepCache must be a whole number"),
    "null": (deepcache('{"schedule": null}'), "schedule of DeepCache must be a text, but is null"),
    "a list for a text": (
        deepcache('{"schedule": ["uniform"]}'),
        "schedule of DeepCache must be a text, but is a list",
    ),
    "an unknown choice": (deepcache('{"schedule": "random"}'), "DeepCache: schedule must be one of uniform, quadratic"),
    "out of range": (
        deepcache('{"cache_interval": 500}'),
        "DeepCache: cache_interval must be from 1 to 100, but is 500",
    ),
    "far out of range": (deepcache('{"cache_interval": 1e300}'), "DeepCache: cache_interval must be from 1 to 100"),
    "no number": (deepcache('{"end_percent": NaN}'), "end_percent of DeepCache must be a number, but is nan"),
    "infinite": (deepcache('{"end_percent": 1e999}'), "end_percent of DeepCache must be a number, but is inf"),
    "too many digits": (
        deepcache('{"end_percent": %s}' % ("9" * 400)),
        "end_percent of .* but is a number of many digits",
    ),
    "the wrong way round": (
        deepcache('{"start_percent": 0.9, "end_percent": 0.1}'),
        "DeepCache: start_percent must not be above",
    ),
    "a text for a switch": (
        one('{"stem": "attention_backend", "settings": {"fuse_qkv": "yes"}}'),
        "fuse_qkv of Attention Backend must be true or false, but is 'yes'",
    ),
    "a setting without a default": (one('{"stem": "freeu", "settings": {"b1": 1.1}}'), "FreeU lacks b2, s1, s2"),
    "settings that don't go together": (
        one('{"stem": "compile_model", "settings": {"backend": "inductor", "mode": "reduce-overhead"}}'),
        "Compile Model: mode reduce-overhead records CUDA graphs",
    ),
    "a long text": (one('{"stem": "%s"}' % ("x" * 500)), r"the method 'x{59}\.\.\. is unknown"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_text_gives_one_sentence(name):
    text, told = BROKEN[name]
    with pytest.raises(ValueError, match=f"^The plan can't be used: {told}") as error:
        saved.from_json(text)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert message.endswith(".")
    assert not message.endswith("..")
    assert len(message) < 500


# Put on a model


def test_it_is_what_nodes_make_bit_for_bit(model):
    plan = plan_of(deepcache={"cache_interval": 2}, cfg_cutoff={"cutoff": 0.5}, precision={"compute_dtype": "bf16"})
    by_nodes = run_node("SlipstreamDeepCache", model, "1", cache_interval=2)
    by_nodes = run_node("SlipstreamCFGCutoff", by_nodes, "2", cutoff=0.5)
    by_nodes = run_node("SlipstreamPrecision", by_nodes, "3", compute_dtype="bf16")
    untouched = sample(model)
    applied = apply(saved.from_json(saved.to_json(plan)), model)
    assert configs(applied) == configs(by_nodes)
    assert torch.equal(sample(applied), sample(by_nodes))
    assert torch.equal(sample(model), untouched)
    assert not configs(model)


def test_the_plan_of_another_model_goes_on_without_its_nodes(model):
    carrying = run_node("SlipstreamDeepCache", model, "7", cache_interval=2)
    (entry,) = plans.plan_of(apply(plans.plan_of(carrying), hosted.model("minimal", seed=3))).entries
    assert (entry.nodes, entry.suggested, entry.others) == ((), False, ())


def test_it_merges_with_the_plan_that_is_there_as_nodes_do(model, last_lines):
    carrying = run_node("SlipstreamDeepCache", model, "7", cache_interval=2)
    merged = apply(plan_of(deepcache={"cache_interval": 2}, cfg_cutoff={"cutoff": 0.5}), carrying)
    assert len(configs(merged)) == 2
    sample(merged)
    assert last_lines("7")[0][0] == "active"
    for add in (
        lambda: apply(plan_of(deepcache={"cache_interval": 3}), carrying),
        lambda: run_node("SlipstreamDeepCache", apply(plan_of(deepcache={"cache_interval": 3}), model), "7",
                         cache_interval=2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"DeepCache: (the plan and node 7|node 7 and the plan) are on the same"):
            add()
    with pytest.raises(ValueError, match="DeepCache: two plans are on the same model with different settings"):
        apply(plan_of(deepcache={"cache_interval": 3}), apply(plan_of(deepcache={"cache_interval": 2}), model))
    suggested = apply(plan_of(deepcache={"cache_interval": 3}), carrying, suggested=True)
    assert configs(suggested)[0].cache_interval == 2


def test_settings_that_do_nothing_return_the_very_model_that_came_in(model):
    off = plan_of(deepcache={"cache_interval": 1}, cfg_cutoff={"cutoff": 1.0}, attention_backend={"backend": "host"})
    assert apply(off, model) is model
    assert apply(plans.Plan(), model) is model
    assert apply(off, model, suggested=True) is model


def test_what_cannot_serve_the_model_is_refused_naming_the_plan_or_left_out_and_told(caplog):
    dit = hosted.model("DiT")
    plan = plan_of(deepcache={}, cfg_cutoff={"cutoff": 0.5})
    with pytest.raises(RuntimeError, match=r"DeepCache: this node works on .*\(DeepCache was added by the plan\.\)"):
        apply(plan, dit)
    applied = apply(plan, dit, suggested=True)
    with caplog.at_level(logging.INFO):
        image = sample(applied, prompt(dit, 10), prompt(dit, 11))
    assert "DeepCache: left out: this node works on Stable Diffusion UNets" in caplog.text
    assert "CFG Cutoff: no guidance from step 3 of 6" in caplog.text
    expected = sample(run_node("SlipstreamCFGCutoff", dit, cutoff=0.5), prompt(dit, 10), prompt(dit, 11))
    assert torch.equal(image, expected)


def test_what_is_put_on_later_is_refused_naming_the_plan(model):
    late = apply(plan_of(deepcache={"cache_interval": 2}), model).clone()
    late.model_options["torch_compile_kwargs"] = {}
    with pytest.raises(RuntimeError, match=r"TorchCompileModel.*\(DeepCache was added by the plan\.\)"):
        sample(late)


def test_a_model_that_only_dynamic_vram_can_load_is_refused_or_left_as_it_is(model, monkeypatch):
    """A stand-in for the host's class, which needs an NVIDIA GPU."""
    plan, plain = plan_of(compile_model={"backend": "eager"}), model.clone()
    dynamic = type("Dynamic", (type(model),), {"is_dynamic": lambda self: True})
    model.__class__ = dynamic
    monkeypatch.setattr(dynamic, "clone", lambda self, disable_dynamic=False: plain.clone(), raising=False)
    assert type(apply(plan, model)) is type(plain)

    def refuse(self, disable_dynamic=False):
        if disable_dynamic:
            raise RuntimeError("no cached_patcher_init")
        return plain.clone()

    monkeypatch.setattr(dynamic, "clone", refuse)
    with pytest.raises(RuntimeError, match=r"DynamicVRAM.*\(Compile Model was added by the plan\.\)"):
        apply(plan, model)
    assert len(configs(apply(plan, model, suggested=True))) == 1


ALONE = """
import sys, types
sys.path[:0] = [{tests!r}, {host!r}]
import torch
from loading import PACK, load_all
load_all()
import importlib, small_models
import comfy.sample
engine = f"{{PACK}}.nodes.engine"
apply = importlib.import_module(f"{{engine}}.apply").apply
plan = importlib.import_module(f"{{engine}}.plan.saved").from_json(sys.stdin.read())
context = [[torch.ones(1, 8, 64), {{}}]]
latent = torch.ones(1, 4, 8, 8)

def run(model):
    with torch.inference_mode():
        return comfy.sample.sample(
            model, latent, 4, 5.0, "euler", "normal", context, context, latent * 0, disable_pbar=True, seed=1
        )

def told():
    model = small_models.model("tiniest")
    plain, applied = run(model), run(apply(plan, model))
    return torch.equal(plain, applied), torch.isfinite(applied).all().item()

print(*told(), "server" in sys.modules)
stub = sys.modules["server"] = types.ModuleType("server")
print(*told(), vars(stub).get("PromptServer"))
stub.PromptServer = type("PromptServer", (), {{}})
print(*told(), vars(stub).get("PromptServer").__name__)
"""


def test_it_needs_no_server():
    """In a process that never imports the host's; then with a stub in its place, empty, and without an instance."""
    host = Path(__file__).parent
    script = ALONE.format(tests=str(host.parent), host=str(host))
    text = saved.to_json(plan_of(deepcache={"cache_interval": 2}, cfg_cutoff={"cutoff": 0.5}))
    done = subprocess.run([sys.executable, "-c", script], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["False True False", "False True None", "False True PromptServer"]
