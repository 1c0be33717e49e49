"""The command line of `./slipstream tune`, turned into a prompt: against what a server describes."""

from __future__ import annotations

import argparse
import sys

import pytest
from loading import ROOT

sys.path.insert(0, str(ROOT / "demo"))

import tune
import tune_options
from slipstream_pack.nodes.methods.tune import MAY_USE

PLAIN = (
    *("model", "vae", "positive", "negative", "latent_image", "seed", "steps", "cfg", "sampler_name", "scheduler"),
    *("denoise", "floor", "seeds", "minutes", "may_use", "save_as"),
)
NODES = {
    "CheckpointLoaderSimple": {"input": {"required": {"ckpt_name": [["a.safetensors"], {}]}}},
    "SlipstreamDemoModel": {"input": {"required": {}}},
    "CLIPTextEncode": {"input": {"required": {"text": ["STRING", {}], "clip": ["CLIP"]}}},
    "EmptyLatentImage": {
        "input": {"required": {"width": ["INT", {}], "height": ["INT", {}], "batch_size": ["INT", {"default": 1}]}}
    },
    "SlipstreamTune": {
        "input": {
            "required": {**{name: ["ANY"] for name in PLAIN}, "metric": ["COMBO", {"options": ["SSIM"]}]},
            "optional": {
                f"{side}_{number}": ["CONDITIONING"] for side in ("positive", "negative") for number in (2, 3)
            },
        }
    },
}


def prompt(*argv, checkpoint=None):
    parser = argparse.ArgumentParser()
    tune_options.add_options(parser)
    arguments = parser.parse_args([*argv, "--size", "64"])
    return tune.build_prompt(NODES, checkpoint, arguments)


def node(prompt, kind):
    return next(entry["inputs"] for entry in prompt.values() if entry["class_type"] == kind)


def test_it_is_the_model_with_its_prompts_and_the_node_s_own_defaults():
    built = prompt(checkpoint="a.safetensors")
    found = node(built, "SlipstreamTune")
    assert (found["floor"], found["seeds"], found["minutes"], found["metric"]) == (0.95, 3, 10.0, "SSIM")
    texts = [built[found[name][0]]["inputs"]["text"] for name in ("positive", "positive_2", "negative")]
    assert texts == [*tune.PROMPTS, tune.NEGATIVE]
    assert "chosen" not in found
    assert node(built, "EmptyLatentImage")["width"] == 64


def test_without_a_checkpoint_it_is_the_demo_model_in_its_own_words():
    built = prompt()
    found = node(built, "SlipstreamTune")
    assert built[found["model"][0]]["class_type"] == "SlipstreamDemoModel"
    assert built[found["positive"][0]]["inputs"]["text"] == tune.DEMO_POSITIVE
    assert built[found["negative"][0]]["inputs"]["text"] == ""


def test_what_is_asked_for_is_what_is_searched():
    argv = ("--prompt", "a", "--prompt", "b", "--prompt", "c", "--negative", "n", "--floor", "0.9", "--minutes", "3")
    built = prompt(*argv, "--may-use", "everything", "--save-as", "mine", "--seeds", "2", "--sampler", "heun")
    found = node(built, "SlipstreamTune")
    assert [built[found[name][0]]["inputs"]["text"] for name in ("positive", "positive_2", "positive_3")] == [
        "a",
        "b",
        "c",
    ]
    names = ("floor", "minutes", "may_use", "save_as", "seeds", "sampler_name")
    assert [found[name] for name in names] == [0.9, 3.0, "everything", "mine", 2, "heun"]


def test_more_prompts_than_the_node_takes_are_refused():
    with pytest.raises(RuntimeError, match="--prompt should be given at most 5 times, but is given 6 times"):
        prompt(*(part for number in range(6) for part in ("--prompt", str(number))))


def test_the_choices_are_those_of_the_node():
    assert tune_options.MAY_USE == MAY_USE


def test_what_was_saved_is_what_this_search_saved(tmp_path):
    plans = tmp_path / "slipstream" / "plans"
    plans.mkdir(parents=True)
    file = plans / "mine.json"
    # Of an earlier search.
    file.touch()

    def saved(name="mine", status="finished", chosen="a plan"):
        return tune.saved_by({"status": status, "chosen": chosen}, name, tmp_path)

    assert [saved(), saved("mine.json"), saved(" mine ")] == [file] * 3
    assert [saved(chosen=None), saved(status="interrupted"), saved(status="failed"), saved("")] == [None] * 4


def test_the_plan_is_put_into_the_output_folder(tmp_path, capsys):
    (tmp_path / "mine.json").write_text("a plan")
    tune.put(tmp_path / "mine.json", tmp_path)
    assert (tmp_path / "plans" / "mine.json").read_text() == "a plan"
    assert capsys.readouterr().out.strip() == str(tmp_path / "plans" / "mine.json")
    tune.put(None, tmp_path)
    assert capsys.readouterr().out == ""


def test_where_nothing_can_be_tried_the_report_says_so():
    assert tune.was_measured({"plans": [], "status": "finished"})
    assert tune.was_measured({"plans": [{}], "status": "interrupted"})
    assert not tune.was_measured({"plans": [], "status": "interrupted"})
    assert not tune.was_measured({})
