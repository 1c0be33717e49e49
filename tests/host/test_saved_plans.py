"""Save Plan and Load Plan: plans in files, from here and from elsewhere."""

from __future__ import annotations

import json
import os

import folder_paths
import hosted
import pytest
import torch
from hosted import NODES, execute, run_node, sample

saved_plans = hosted.engine("saved_plans")
plan_of = hosted.engine("plan.plan").plan_of
saved = hosted.engine("plan.saved")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where plans are, in a scratch folder for users."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return tmp_path / "user" / "slipstream" / "plans"


def planned(model):
    model = run_node("SlipstreamForecast", model, "1", error_budget=0.1)
    return run_node("SlipstreamCFGCutoff", model, "2", cutoff=0.5)


def save(model, name="mine"):
    return execute("SlipstreamSavePlan", "8", model=model, save_as=name)


def load(model, name="mine"):
    return execute("SlipstreamLoadPlan", "9", model=model, plan=name).result[0]


def test_a_plan_moves_from_one_model_to_another_bit_for_bit(model, folder, last_lines):
    with_plan = planned(model)
    passed, text = save(with_plan).result
    assert passed is with_plan
    assert saved.from_json(text) == saved.from_json((folder / "mine.json").read_text())
    assert last_lines("8") == [
        ("active", "saved as mine: CFG Cutoff, cutoff 0.5; Forecast, error_budget 0.1"),
    ]
    loaded = load(model)
    assert saved.as_data(plan_of(loaded)) == saved.as_data(plan_of(with_plan))
    assert torch.equal(sample(loaded, steps=8), sample(with_plan, steps=8))
    assert {state for state, _ in last_lines("9")} == {"active"}
    assert not plan_of(model).entries


def test_a_methods_own_node_wins(model):
    save(planned(model))
    wired = [
        run_node("SlipstreamCFGCutoff", load(model), "3", cutoff=0.25),
        load(run_node("SlipstreamCFGCutoff", model, "3", cutoff=0.25)),
    ]
    for one in wired:
        assert [entry.config.cutoff for entry in plan_of(one).entries if entry.config.stem == "cfg_cutoff"] == [0.25]
    assert torch.equal(*(sample(one, steps=8) for one in wired))


def test_what_this_machine_or_model_cannot_do_is_left_out_and_told(model, folder, last_lines, monkeypatch):
    """A plan from a machine with another package, and from a model of another kind."""
    quantize = hosted.method("quantize")
    methods = [{"stem": "quantize"}, {"stem": "deepcache"}, {"stem": "cfg_cutoff", "settings": {"cutoff": 0.5}}]
    folder.mkdir(parents=True)
    (folder / "foreign.json").write_text(json.dumps({"version": 1, "methods": methods}))
    monkeypatch.setattr(quantize, "lacking", lambda scheme, device: "torchao is not installed.")
    dit = hosted.model("DiT")
    sample(load(dit, "foreign"))
    lines = dict(text.split(": ", 1) for _, text in last_lines("9"))
    assert lines["Quantize Model"].startswith("left out: torchao is not installed")
    assert lines["DeepCache"].startswith("left out: ")
    assert lines["CFG Cutoff"].startswith("no guidance")


def test_a_plan_is_replaced_by_one_of_its_name_and_the_cache_is_told(model, folder):
    fingerprint = NODES["SlipstreamLoadPlan"].fingerprint_inputs
    save(planned(model))
    before = fingerprint(plan="mine")
    assert fingerprint(plan="mine") == before != ""
    save(run_node("SlipstreamForecast", model, "1", error_budget=0.2), "mine.json")
    assert fingerprint(plan="mine", model=None) != before
    assert [path.name for path in folder.iterdir()] == ["mine.json"]
    (entry,) = plan_of(load(model)).entries
    assert entry.config.error_budget == 0.2


def test_the_list_has_the_users_plans_and_the_packs(model, folder):
    save(planned(model), "zebra")
    save(planned(model), "äpfel 2")
    (folder / "no plan.txt").touch()
    (folder / ".hidden.json").touch()
    # Its name leads to the pack's own.
    (folder / "mine (Slipstream).json").touch()
    found = saved_plans.choices()
    assert found[:2] == ["zebra", "äpfel 2"]
    assert len(found) == 5
    assert all(name.endswith(" (Slipstream)") for name in found[2:])


@pytest.mark.parametrize("name", saved_plans._names(saved_plans.OWN))
def test_the_packs_own_plans_serve_any_model(name):
    for family in ("minimal", "DiT"):
        loaded = load(hosted.model(family), f"{name} (Slipstream)")
        titles = {entry.config.title for entry in plan_of(loaded).entries}
        assert titles == {*name.split(" - ")[1].split(", ")}
        assert torch.isfinite(sample(loaded)).all()


ELSEWHERE = [
    *(
        "../evil",
        "..",
        ".",
        "",
        " ",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:evil",
        "C:\\evil",
        "~",
        ".hidden",
        "a\0b",
        "a\nb",
    ),
    *("CON", "nul", "com1.x", "x" * 101, "计" * 67, "-", "a.", "a:stream", "a*", "%2e%2e", "../nodes/plans/x", "..\\x"),
]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_name_that_is_none_or_leads_elsewhere_is_refused_in_one_sentence(name, model, tmp_path):
    with pytest.raises(ValueError, match=r"^Save Plan: a plan's name has letters, .* choose another one\.$"):
        save(planned(model), name)
    with pytest.raises(ValueError, match=r"^Load Plan: a plan's name has letters, .* choose another one\.$"):
        load(model, name)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert NODES["SlipstreamLoadPlan"].fingerprint_inputs(plan=name) == ""


def test_a_name_may_be_as_long_in_any_script_as_a_files_may(model):
    for name in ("x" * 100, "计" * 66):
        save(planned(model), name)
        assert plan_of(load(model, name)).entries
        assert name in saved_plans.names()


def test_a_link_to_elsewhere_is_neither_read_nor_written_through(model, folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("keep")
    folder.mkdir(parents=True)
    try:
        (folder / "link.json").symlink_to(secret)
    except OSError:
        pytest.skip("this system makes no links")
    for act in (lambda: load(model, "link"), lambda: save(planned(model), "link")):
        with pytest.raises(ValueError, match=r"is a link to elsewhere"):
            act()
    assert secret.read_text() == "keep"


def test_the_packs_own_plans_are_not_written_over(model):
    with pytest.raises(ValueError, match=r"names that end in \(Slipstream\) are the pack's own"):
        save(planned(model), "mine (Slipstream)")


BROKEN = {
    "not there": (None, "there is no plan 'broken'; there are "),
    "empty": (b"", "it must be JSON"),
    "no text": (b"\xff\xfe\x00", "it is no text"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "it is no text"),
    "too large": (b" " * 70000, "it has more than 64 KiB"),
    "a workflow": (b'{"nodes": [], "links": []}', "it must have no other members than version, methods"),
    "deep": (b"[" * 60000, "it must be JSON of a few levels"),
    "another method": (b'{"version": 1, "methods": [{"stem": "os"}]}', "the method 'os' is unknown"),
    "another setting": (
        b'{"version": 1, "methods": [{"stem": "forecast", "settings": {"code": "1"}}]}',
        "the settings of Forecast must have no other members",
    ),
    "newer": (b'{"version": 99, "methods": []}', "update Slipstream"),
    "out of range": (
        b'{"version": 1, "methods": [{"stem": "forecast", "settings": {"error_budget": 7}}]}',
        "error_budget",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_or_foreign_file_is_refused_in_one_sentence_on_the_node(name, model, folder, last_lines):
    data, expected = BROKEN[name]
    folder.mkdir(parents=True)
    if data is not None:
        (folder / "broken.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"^Load Plan: ") as refused:
        load(model, "broken")
    text = str(refused.value)
    assert expected in text
    assert "\n" not in text
    assert last_lines("9") == [("failed", text)]


def test_a_model_without_methods_is_passed_on_and_nothing_is_written(model, folder, last_lines):
    passed, text = save(model).result
    assert passed is model
    assert not saved.from_json(text).entries
    assert not folder.exists()
    assert last_lines("8")[0][0] == "off"


def test_a_plan_with_nothing_in_it_is_passed_on(model, folder, last_lines):
    folder.mkdir(parents=True)
    (folder / "nothing.json").write_text('{"version": 1, "methods": []}')
    assert load(model, "nothing") is model
    assert last_lines("9") == [("off", "off: the plan nothing has no methods in it")]


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="needs a folder that can't be written to")
def test_a_folder_that_cannot_be_written_to_is_told(model, folder):
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    with pytest.raises(RuntimeError, match="could not be written to"):
        save(planned(model))


def test_a_disk_that_is_full_is_told_and_leaves_the_old_plan(model, folder, monkeypatch):
    save(planned(model))
    before = (folder / "mine.json").read_text()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(folder), "write_text", full)
    with pytest.raises(RuntimeError, match=r"could not be written to .*: No space left on device"):
        save(run_node("SlipstreamForecast", model, "1", error_budget=0.3))
    assert (folder / "mine.json").read_text() == before
    assert [path.name for path in folder.iterdir()] == ["mine.json"]
