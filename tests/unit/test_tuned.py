"""What Tune reports of a search: its figures, its one sentence, and the text."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from slipstream_pack.nodes.measuring import tuned

spec = importlib.util.spec_from_file_location("simulated", Path(__file__).with_name("test_search.py"))
simulated = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simulated)


def reported(floor=0.95, chosen=None, **options):
    """The report of a simulated search, as the node makes it."""
    machine = simulated.Machine(noise=0.0, **options)
    search = machine.search(floor=floor)
    found = search.run()
    report = {
        "title": "SD15, 256x256",
        "metric": "SSIM",
        "floor": floor,
        "status": "finished",
        "reason": "",
        "notes": ["a note"],
        "machine": {"device": "a CPU", "device_memory_mib": None},
        **tuned.as_dict(search, found),
    }
    report["chosen"] = chosen or report["best"]
    report["summary"] = tuned.summary(report)
    return json.loads(json.dumps(report, allow_nan=False)), machine, found


def test_its_figures_are_those_of_the_trials():
    report, machine, found = reported()
    plan = next(plan for plan in report["plans"] if plan["name"] == report["best"])
    assert plan["state"] == "holds"
    assert plan["speed"]["value"] == pytest.approx(1 / machine.ratio(found.best))
    worst = max(machine.error(found.best, picture) for picture in simulated.PICTURES)
    assert plan["worst"] == pytest.approx(1 - worst)
    assert plan["next"] < plan["worst"] < plan["mean"] < 1
    assert plan["next"] >= 0.95
    assert report["runs"] == len(machine.ran)
    speeds = [plan["speed"]["value"] for plan in report["plans"]]
    assert speeds == sorted(speeds, reverse=True)


def test_its_sentence_tells_what_was_seen_on_fresh_seeds():
    report, _, _ = reported()
    check = report["checks"][-1]
    assert report["summary"].startswith(
        f"{report['best']}: {check['speed']['text']}, SSIM {check['worst']:.4f} at the worst"
    )


def test_its_text_has_every_plan_and_what_became_of_it():
    def spoiled(one, picture):
        return "out of memory" if "deepcache" in one.key else None

    report, _, _ = reported(spoiled=spoiled)
    text = tuned.to_markdown(report)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(report["plans"]) + 2
    assert sum("**chosen**" in row for row in rows) == 1
    assert "failed: out of memory" in text
    assert "- a note\n" in text
    assert text.endswith("device a CPU.\n")


def test_a_machine_that_was_not_as_fast_all_the_time_is_told():
    slowed, _, _ = reported(pace=lambda runs: 1.0 if runs < 12 else 2.0)
    usual, _, _ = reported()
    assert slowed["unsteady"] > 0
    assert any(line.startswith("the machine was faster or slower after") for line in tuned.told(slowed))
    assert not any(line.startswith("the machine") for line in tuned.told(usual))


def test_fewer_steps_that_hold_too_are_told():
    report, _, _ = reported(spoiled=lambda one, picture: 0.0001 if one.steps else None)
    assert f"{report['rival']} alone are as fast as the plan and hold too" in tuned.to_markdown(report)
    assert "hold too" not in tuned.to_markdown(reported()[0])


def test_what_compiles_first_pays_back_after_some_pictures():
    report, _, _ = reported()
    plan = report["plans"][0]
    plan |= {"first_s": 10.0, "pays_back": 14}
    assert f"{plan['name']}: 10.00 s more the first time, pays back after 14 pictures" in tuned.to_markdown(report)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"floor": 1.0, "spoiled": lambda one, picture: 0.1}, "nothing is faster with SSIM 1 or more"),
        ({"spoiled": lambda one, picture: 0.2 if "fresh" in picture else None}, "no plan: 3 failed on fresh seeds"),
        ({"chosen": "forecast 0"}, "chosen: forecast 0; the best one is "),
    ],
)
def test_other_ends_have_their_own_sentence(options, sentence):
    report, _, _ = reported(**options)
    assert report["summary"].startswith(sentence)
    tuned.to_markdown(report)


def test_a_search_that_is_not_over_says_so():
    machine = simulated.Machine()
    search = machine.search(minutes=0)
    report = {"metric": "SSIM", "floor": 0.95, "chosen": None, **tuned.as_dict(search, search.run())}
    assert tuned.summary(report).startswith("no plan yet: it has not been measured to the end")


def test_a_search_that_is_not_over_says_so_after_a_check_that_failed():
    spoiled = {"spoiled": lambda one, picture: 0.2 if "fresh" in picture else None}
    machine = simulated.Machine(noise=0.0, **spoiled)
    search = machine.search(minutes=27 / 60)
    report = {"metric": "SSIM", "floor": 0.95, "chosen": None, **tuned.as_dict(search, search.run())}
    assert 0 < len(report["checks"]) < 3
    sentence = f"no plan yet: {len(report['checks'])} failed on fresh seeds, and it has not been measured to the end"
    assert tuned.summary(report).startswith(sentence)


def test_a_search_that_was_stopped_tells_the_best_plan_so_far():
    machine = simulated.Machine(noise=0.0, stops_after=21)
    search = machine.search()
    with pytest.raises(simulated.StoppedError):
        search.run()
    report = {"metric": "SSIM", "floor": 0.95, "chosen": None, **tuned.as_dict(search, search.found)}
    plan = next(plan for plan in report["plans"] if plan["name"] == report["best"])
    report["chosen"] = report["best"]
    assert report["checks"] == []
    assert tuned.summary(report).startswith(
        f"{plan['name']}: {plan['speed']['text']}, SSIM {plan['worst']:.4f} at the worst so far, not checked on fresh "
        "seeds yet ("
    )
    assert "run it again" in tuned.summary(report)
