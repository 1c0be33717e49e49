"""The report: what follows from the runs, as data and as Markdown."""

from __future__ import annotations

import json

import pytest
from slipstream_pack.nodes.measuring.fidelity import Fidelity, mean, worst
from slipstream_pack.nodes.measuring.memory import Peak
from slipstream_pack.nodes.measuring.report import Measured, Report, Variant, to_markdown


def measured(step_s=1.0, increase=100.0, steps=4, **values):
    seconds = step_s * steps + 0.1
    peak = Peak(1000 + increase, increase)
    return Measured(seconds, 0.5, (step_s,) * steps, steps, 2 * steps, 2 * steps, peak, peak, **values)


def report(*variants, is_device=False, **values):
    settings = {"seed": 7, "runs": 3}
    return Report("SD15, 64x64", settings, {"device": "cpu"}, "what it is", is_device, list(variants), 8, **values)


@pytest.fixture
def two():
    baseline = Variant("baseline", "baseline", warm_up=measured(), runs=[measured(1.0 + i / 100) for i in range(3)])
    candidate = Variant("candidate", "candidate", warm_up=measured(3.0, graphs=2, compile_s=8.0))
    candidate.runs = [measured(0.5, 40.0) for _ in range(3)]
    candidate.fidelity = Fidelity(0.02, False, 0.97, 31.5)
    candidate.verdicts = [{"title": "DeepCache", "state": "active", "text": "reused 3 of 4"}]
    return report(baseline, candidate, status="finished")


def test_what_follows_from_the_runs(two):
    baseline, candidate = two.as_dict()["variants"]
    assert baseline["time_s"] == pytest.approx({"median": 4.14, "minimum": 4.1, "maximum": 4.18})
    assert baseline["step_s"]["median"] == pytest.approx(1.01)
    assert baseline["speedup"] is None
    assert candidate["speedup"]["value"] == pytest.approx(4.14 / 2.1)
    assert candidate["speedup"]["is_difference"]
    assert candidate["memory_mib"]["median"] == 40
    assert (candidate["evaluations"], candidate["predictions"], candidate["rows"], candidate["recompiles"]) == (
        4,
        8,
        8,
        0,
    )


def test_a_devices_memory_is_its_peak_and_not_its_increase(two):
    two.is_device_memory = True
    assert two.as_dict()["variants"][1]["memory_mib"]["median"] == 1040


def test_it_is_plain_data(two):
    assert json.loads(json.dumps(two.as_dict()))["variants"][1]["fidelity"]["ssim"] == 0.97


def test_the_summary_says_how_fast_and_how_alike(two):
    assert two.as_dict()["summary"].startswith("candidate: 1.97x faster (")
    assert two.as_dict()["summary"].endswith("over 3 rounds, SSIM 0.970")
    two.variants[1].fidelity = Fidelity(0.0, True, 1.0, None)
    assert two.as_dict()["summary"].endswith("the same picture")
    two.variants[1].fidelity = None
    two.variants[1].problems = ["its latent has NaN or infinite values"]
    assert two.as_dict()["summary"].endswith("over 3 rounds, its latent has NaN or infinite values")


def test_the_markdown_holds_every_column(two):
    text = to_markdown(two.as_dict())
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert len({len(row) for row in table}) == 1
    head, _, baseline, candidate = table
    row = dict(zip(head, candidate, strict=True))
    assert row["time (min to max)"] == "2.10 s (2.10 to 2.10)"
    assert row["step (min to max)"] == "500.00 ms (500.00 to 500.00)"
    assert (row["memory"], row["rows"], row["SSIM"], row["PSNR"]) == ("40 MiB", "8", "0.9700", "31.5 dB")
    assert "decode" not in row
    assert dict(zip(head, baseline, strict=True))["SSIM"] == "-"
    assert "DeepCache: reused 3 of 4; first run 12.10 s" in text
    assert "2 graphs compiled in 8.0 s, 0 after it" in text


def test_of_several_pictures_the_worst_is_beside_the_mean(two):
    found = [Fidelity(0.02, False, 0.97, 30.0), Fidelity(0.04, False, 0.91, 20.0), Fidelity(0.0, True, 1.0, None)]
    two.settings["seeds"] = 3
    two.variants[1].fidelity, two.variants[1].worst = mean(found), worst(found)
    data = two.as_dict()
    assert data["variants"][1]["fidelity"]["latent_error"] == pytest.approx(0.02)
    # Of the squared errors, 0.001, 0.01 and 0.
    assert data["variants"][1]["fidelity"]["psnr_db"] == pytest.approx(24.357, abs=1e-3)
    assert data["variants"][1]["worst"] == {"latent_error": 0.04, "is_identical": False, "ssim": 0.91, "psnr_db": 20.0}
    assert data["summary"].endswith("SSIM 0.960, 0.910 at the worst")
    text = to_markdown(data)
    head, _, baseline, candidate = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    )
    assert len(head) == len(baseline) == len(candidate)
    assert dict(zip(head, candidate, strict=True))["worst SSIM"] == "0.9100"
    assert "seed 7 and the 2 after it" in text


def test_without_pictures_the_worst_is_that_of_the_latents(two):
    found = [Fidelity(0.02, False), Fidelity(0.04, False)]
    two.variants[1].fidelity, two.variants[1].worst = mean(found), worst(found)
    assert two.as_dict()["summary"].endswith("latent error 3.00%, 4.00% at the worst")
    assert mean(found).psnr_db is None


def test_decoding_gets_a_column_where_it_was_measured(two):
    two.variants[1].runs = [measured(decode_s=0.25, decode_memory=Peak(10, 5))] * 3
    text = to_markdown(two.as_dict())
    assert "| decode |" in text
    assert "250.00 ms" in text


def test_a_report_of_what_was_measured_so_far(two):
    two.status, two.done = "interrupted", 3
    two.variants[0].runs, two.variants[1].runs = two.variants[0].runs[:2], two.variants[1].runs[:1]
    assert "(one round: no interval)" in to_markdown(two.as_dict())
    two.variants[1].runs = []
    assert two.as_dict()["summary"] == "nothing measured yet"
    assert to_markdown(two.as_dict())
    two.variants[0].runs, two.variants[0].warm_up = [], None
    assert to_markdown(two.as_dict())


def test_runs_of_different_numbers_of_steps_are_compared_whole(two):
    """Adaptive samplers choose their steps by themselves."""
    two.variants[1].runs = [measured(0.5, steps=steps) for steps in (3, 4, 5)]
    assert two.as_dict()["variants"][1]["speedup"]["value"] == pytest.approx(4.14 / 2.1)
