"""The command line of `./slipstream bench`, turned into a prompt: against what a server describes."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
from loading import ROOT

sys.path.insert(0, str(ROOT / "demo"))

import bench
from bench_options import add_options
from comfyui import refusal


def node(category="x", **inputs):
    return {"category": category, "input": {"required": inputs}}


BENCHMARK = (
    *("baseline", "candidate", "positive", "negative", "latent_image", "seed", "steps", "cfg"),
    *("sampler_name", "scheduler", "denoise", "runs", "ablation", "save"),
)
NODES = {
    "CheckpointLoaderSimple": node(ckpt_name=[["a.safetensors"], {}]),
    "SlipstreamDemoModel": node("Slipstream/loaders"),
    "CLIPTextEncode": node(text=["STRING", {}], clip=["CLIP"]),
    "EmptyLatentImage": node(
        width=["INT", {"default": 512}], height=["INT", {"default": 512}], batch_size=["INT", {"default": 1}]
    ),
    "SlipstreamDeepCache": node(
        "Slipstream/model",
        model=["MODEL"],
        cache_interval=["INT", {"default": 3}],
        schedule=["COMBO", {"options": ["uniform", "quadratic"]}],
    ),
    "SlipstreamCFGCutoff": node("Slipstream/model", model=["MODEL"], cutoff=["FLOAT", {"default": 0.75}]),
    "SlipstreamFreeU": node("Slipstream/model", model=["MODEL"], preset=["COMBO", {"options": ["auto"]}]),
    "SlipstreamReport": node("Slipstream/measure", model=["MODEL"]),
    "SlipstreamBenchmark": {
        "category": "Slipstream/measure",
        "input": {
            "required": {name: ["ANY"] for name in BENCHMARK},
            "optional": {"vae": ["VAE"], "candidate_vae": ["VAE"]},
        },
    },
}


def arguments(*argv):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args([*argv, "--size", "64"])


def prompt(*argv, checkpoint="a.safetensors", is_random=False):
    return bench.build_prompt(NODES, checkpoint, arguments(*argv), is_random)


def test_the_candidate_is_the_checkpoint_with_the_methods_in_a_chain():
    built = prompt("--method", "DeepCache:cache_interval=5,schedule=quadratic", "--method", "SlipstreamCFGCutoff")
    kinds = {number: entry["class_type"] for number, entry in built.items()}
    (number,) = (number for number, kind in kinds.items() if kind == "SlipstreamBenchmark")
    inputs = built[number]["inputs"]
    cutoff = built[inputs["candidate"][0]]
    deepcache = built[cutoff["inputs"]["model"][0]]
    assert cutoff == {
        "class_type": "SlipstreamCFGCutoff",
        "inputs": {"model": cutoff["inputs"]["model"], "cutoff": 0.75},
    }
    assert deepcache["inputs"] == {"model": inputs["baseline"], "cache_interval": 5, "schedule": "quadratic"}
    assert kinds[inputs["baseline"][0]] == "CheckpointLoaderSimple"
    assert inputs["vae"] == [inputs["baseline"][0], 2]
    assert (inputs["runs"], inputs["save"], inputs["ablation"]) == (3, True, "each alone")
    latent = built[inputs["latent_image"][0]]["inputs"]
    assert latent == {"width": 64, "height": 64, "batch_size": 1}


def test_without_methods_it_is_all_three_and_random_weights_have_no_pictures():
    built = prompt(is_random=True)
    assert [
        entry["class_type"] for entry in built.values() if entry["class_type"] in NODES and "model" in entry["inputs"]
    ] == [
        "SlipstreamDeepCache",
        "SlipstreamCFGCutoff",
        "SlipstreamFreeU",
    ]
    assert next(entry for entry in built.values() if "cutoff" in entry["inputs"])["inputs"]["cutoff"] == 0.5
    assert "vae" not in list(built.values())[-1]["inputs"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Nothing", r"should name a Slipstream node on a model \(CFGCutoff, DeepCache, FreeU\), but is Nothing"),
        ("Report", "but is Report"),
        ("DeepCache:interval=3", r"should set its inputs \(cache_interval, schedule\), but sets interval"),
        ("DeepCache:model=3", "but sets model"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(method, message):
    with pytest.raises(RuntimeError, match=message):
        prompt("--method", method)


def test_without_a_checkpoint_it_is_the_demo_model_with_its_own_words_and_pictures():
    built = prompt(checkpoint=None)
    loader = next(number for number, entry in built.items() if entry["class_type"] == "SlipstreamDemoModel")
    texts = [entry["inputs"] for entry in built.values() if entry["class_type"] == "CLIPTextEncode"]
    assert [text["clip"] for text in texts] == [[loader, 1], [loader, 1]]
    assert "lake" in texts[0]["text"]
    assert list(built.values())[-1]["inputs"]["vae"] == [loader, 2]


def test_on_the_demo_model_it_measures_what_the_template_does():
    template = json.loads((ROOT / "workflows" / "9 - Benchmark - what each optimization gives.json").read_text())
    models = {kind for kind, entry in NODES.items() if entry["category"] == "Slipstream/model"}
    kept = {node["type"]: node["widgets_values_named"] for node in template["nodes"] if node["type"] in models}
    built = [entry for entry in prompt(checkpoint=None).values() if entry["class_type"] in models]
    assert {entry["class_type"] for entry in built} == kept.keys()
    for entry in built:
        settings = {name: value for name, value in entry["inputs"].items() if name != "model"}
        assert settings.items() <= kept[entry["class_type"]].items()
    assert bench.DEMO_POSITIVE in [node.get("widgets_values", [""])[0] for node in template["nodes"]]


@pytest.mark.parametrize(
    ("checkpoint", "chosen", "model"),
    [
        ("folder/a.safetensors", (), "--checkpoint a.safetensors"),
        ("a.safetensors", ("--random", "sd15"), "--random sd15"),
        (None, ("--demo",), "--demo"),
        (None, (), "--demo"),
    ],
)
def test_the_command_that_repeats_it_fixes_every_choice_and_names_no_place_of_this_machine(checkpoint, chosen, model):
    given = (*chosen, "--method", "DeepCache:cache_interval=5", "--output", "/c", "--json", "/d.json")
    assert bench.repeatable(arguments(*given), checkpoint) == (
        f"./slipstream bench {model} --method DeepCache:cache_interval=5 --size 64 --steps 20 --cfg 7.5 "
        "--sampler euler --scheduler normal --seed 1 --runs 3 --ablation 'each alone'"
    )


def test_a_value_of_another_type_is_told():
    with pytest.raises(RuntimeError, match="of type INT such a value, but gives 'often'"):
        prompt("--method", "DeepCache:cache_interval=often")


def test_a_refusal_is_one_sentence():
    error = {"message": "Value 0 smaller than min of 1", "details": "cache_interval"}
    answer = {
        "error": {"message": "Prompt outputs failed validation"},
        "node_errors": {"2": {"class_type": "SlipstreamDeepCache", "errors": [error]}},
    }
    assert refusal(answer) == "SlipstreamDeepCache: Value 0 smaller than min of 1 (cache_interval)"
    assert refusal({**answer, "node_errors": {}}) == "Prompt outputs failed validation"
