"""The README's figures are those of the files in benchmarks/results."""

from __future__ import annotations

import importlib.util
import json

import pytest
from loading import ROOT

spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)


def test_the_tables_are_what_the_results_give():
    """They drifted? `python benchmarks/readme.py` writes them anew."""
    text = readme.README.read_text(encoding="utf-8")
    assert readme.rendered(text) == text


def test_every_result_is_shown_and_every_table_has_one():
    shown = [found[2] for found in readme.TABLE.finditer(readme.README.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(path.name for path in readme.RESULTS.glob("*.json"))
    assert shown


def test_results_name_what_they_were_measured_on_and_the_command_that_repeats_it():
    for path in readme.RESULTS.glob("*.json"):
        report = json.loads(path.read_text(encoding="utf-8"))
        assert report["status"] == "finished"
        assert report["command"].startswith("./slipstream bench ")
        assert report["machine"]["processor"]
        assert report["machine"]["torch"]
        assert all(len(variant["runs"]) == report["settings"]["runs"] for variant in report["variants"])
        assert all(run["step_s"] for variant in report["variants"] for run in variant["runs"])


@pytest.mark.parametrize("weights", ["random", "trained"])
def test_a_table(weights):
    speedup = {"text": "2.50x faster (2.25 to 2.75)"}
    method = {"stem": "cfg_cutoff", "title": "CFG Cutoff", "settings": {"cutoff": 0.5, "unit": "steps"}}
    report = {
        "title": "SD15, 256x256, 20 steps of euler, normal, cfg 7.5",
        "weights": weights,
        "command": "./slipstream bench --random sd15",
        "machine": {
            "processor": "A CPU",
            "device": "cpu",
            "device_type": "cpu",
            "cores": 2,
            "comfyui": "1",
            "torch": "2",
        },
        "settings": {"runs": 3},
        "variants": [
            {"methods": [], "speedup": None, "fidelity": None},
            {"methods": [method], "speedup": speedup, "fidelity": {"ssim": 0.9876}},
        ],
    }
    text = readme.table(report)
    assert "A CPU, 2 cores" in text
    row = "| CFG Cutoff (cutoff 0.5) | 2.50x faster (2.25 to 2.75) |"
    assert row + (" 0.988 |" if weights == "trained" else "\n") in text
    assert ("Pictures of random weights mean nothing" in text) == (weights == "random")
    assert "`./slipstream bench --random sd15` repeats it." in text


def test_the_demo_models_figures_are_those_of_its_evaluation():
    text = readme.README.read_text(encoding="utf-8")
    results = ROOT / "training" / "results"
    figures = [json.loads((results / f"agreement{name}.json").read_text()) for name in ("", "-transformer")]
    table = text[text.index("| every attribute as in the caption |") :]
    told = [[cell.strip() for cell in row.split("|")[2:4]] for row in table.splitlines()[2:8]]
    drawn = "{:.1f} %".format(100 * figures[0]["the generator's own pictures"]["whole_captions"])
    assert told[0] == [drawn, ""]
    order = ("guided, 30 steps", "guided, 12 steps", "guided, 6 steps", "unguided, 30 steps")
    for row, name in zip(told[1:], (*order, "guided, 30 steps, captions shuffled"), strict=True):
        assert row == [f"{100 * one[name]['whole_captions']:.1f} %" for one in figures]
    shares = [100 * figures[0][name]["attributes"] for name in (order[0], "by chance")]
    shares.insert(1, 100 * figures[1][order[0]]["attributes"])
    assert "Of the single attributes {:.1f} % and {:.1f} % are the caption's at 30 steps, where {:.1f} %".format(
        *shares
    ) in " ".join(text.split())
