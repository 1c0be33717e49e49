"""Verdicts on the canvas: several runs, failures, interrupts, cached prompts, tabs, subgraphs, no script of ours."""

from __future__ import annotations

import copy

from browser import Page

OURS = ("SlipstreamDeepCache", "SlipstreamCFGCutoff", "SlipstreamFreeU")


def texts(page, node_id):
    return [(line.state, line.text) for line in page.verdicts(node_id)]


def test_a_node_that_feeds_several_samplers_shows_one_line_for_each_run_in_order(page, workflow):
    first = workflow.node("KSampler")
    second = workflow.add(
        "KSampler",
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ["LATENT"],
        [9, "fixed", 4, 5.0, "euler", "normal", 1.0],
    )
    workflow.link(workflow.node("SlipstreamFreeU"), 0, second, "model")
    prompts = [node for node in workflow.data["nodes"] if node["type"] == "CLIPTextEncode"]
    workflow.link(prompts[0], 0, second, "positive")
    workflow.link(prompts[1], 0, second, "negative")
    workflow.link(first, 0, second, "latent_image")
    workflow.link(second, 0, workflow.node("VAEDecode"), "samples")
    page.load(workflow.data)
    assert page.run().status == "success"
    one, two = texts(page, workflow.id("SlipstreamDeepCache"))
    assert one == (
        "active",
        f"KSampler {first['id']}: reused the deep features in 5 of 8 steps: 5 of 8 UNet calls ran 2 of 25 blocks",
    )
    assert two == (
        "active",
        f"KSampler {second['id']}: reused the deep features in 2 of 4 steps: 2 of 4 UNet calls ran 2 of 25 blocks",
    )
    # Only the second one runs again: the node tells of that run, and not of the other as if it were new.
    page.set_widget(second["id"], "seed", 10_000)
    assert page.run().status == "success"
    assert texts(page, workflow.id("SlipstreamDeepCache")) == [("active", two[1].split(": ", 1)[1])]
    assert not page.problems()


def test_a_failed_run_takes_the_place_of_an_old_success(page, workflow):
    fault = workflow.add_fault()
    page.load(workflow.data)
    assert page.run().status == "success"
    assert all(texts(page, workflow.id(name))[0][0] == "active" for name in OURS)
    page.set_widget(fault["id"], "fail_at", 5)
    outcome = page.run()
    assert outcome.status == "error"
    assert "a planted fault" in outcome.message
    for name in OURS:
        ((state, text),) = texts(page, workflow.id(name))
        assert state == "failed"
        # Five evaluations went well; the sixth was only begun.
        assert text.startswith("the run failed in step 5 of 8 (RuntimeError: a planted fault); until then: ")
    page.set_widget(fault["id"], "fail_at", -1)
    assert page.run().status == "success"
    assert texts(page, workflow.id("SlipstreamDeepCache"))[0][0] == "active"


def test_an_interrupted_run_says_so(page, workflow):
    workflow.add_fault(step_s=2)
    page.load(workflow.data)
    queued = page.queue()
    page.wait_for_verdict(workflow.id("SlipstreamFreeU"), lambda lines: bool(lines) and lines[0].state == "running")
    page.page.wait_for_timeout(1000)
    page.interrupt()
    assert page.wait(queued).status == "interrupted"
    for name in OURS:
        ((state, text),) = texts(page, workflow.id(name))
        assert state == "interrupted"
        assert text.startswith("interrupted in step ")
    assert not page.problems()


def test_a_prompt_that_fails_before_sampling_leaves_the_verdict_marked_as_the_last_runs(page, workflow):
    page.load(workflow.data)
    assert page.run().status == "success"
    # A second DeepCache on the same model with other settings: refused when the graph runs, naming both nodes.
    conflicting = copy.deepcopy(workflow)
    other = conflicting.add("SlipstreamDeepCache", {"model": "MODEL"}, ["MODEL"], [5, 0, "uniform", 0.0, 1.0])
    conflicting.link(conflicting.node("SlipstreamFreeU"), 0, other, "model")
    conflicting.link(other, 0, conflicting.node("KSampler"), "model")
    page.load(conflicting.data, "conflict")
    outcome = page.run()
    assert outcome.status == "error"
    ids = (other["id"], workflow.id("SlipstreamDeepCache"))
    assert outcome.message == (
        "DeepCache: node {} and node {} are on the same model with different settings (cache_interval 5 against 3). "
        "Remove or bypass one of them, or give both the same settings.".format(*ids)
    )
    ((state, text),) = texts(page, other["id"])
    assert state == "failed"
    assert outcome.message == text
    page.open_tab("test")
    assert all(line.is_last for name in OURS for line in page.verdicts(workflow.id(name)))


def test_a_prompt_that_was_cached_whole_shows_the_last_runs_verdict_as_such(page, workflow):
    page.load(workflow.data)
    assert page.run().status == "success"
    before = [page.verdicts(workflow.id(name))[0] for name in OURS]
    assert not any(line.is_last for line in before)
    assert page.run().status == "success"
    for name, line in zip(OURS, before, strict=True):
        (now,) = page.verdicts(workflow.id(name))
        assert now.is_last
        assert now.text.endswith(line.text)


def test_a_prompt_that_another_workflow_had_run_shows_that_runs_verdict_as_the_last_ones(page, workflow):
    """The host's cache knows no workflows: it answers for the second tab, and nothing runs."""
    page.load(workflow.data, "one")
    assert page.run().status == "success"
    before = [page.verdicts(workflow.id(name))[0] for name in OURS]
    page.load(workflow.data, "two")
    assert not any(page.verdicts(workflow.id(name)) for name in OURS)
    assert page.run().status == "success"
    for name, line in zip(OURS, before, strict=True):
        (now,) = page.wait_for_verdict(workflow.id(name), bool)
        assert now.is_last
        assert now.text.endswith(line.text)
    assert not page.problems()


def test_a_node_switched_off_by_its_settings_says_so(page, workflow):
    workflow.set("SlipstreamDeepCache", 0, 1)
    page.load(workflow.data)
    assert page.run().status == "success"
    # The other renderer's test may have had the host cache the node: then it is the last run's word.
    ((state, text),) = texts(page, workflow.id("SlipstreamDeepCache"))
    assert state == "off"
    assert text.removeprefix("last run: ") == "off: cache_interval is 1, every step is a full one"
    assert texts(page, workflow.id("SlipstreamCFGCutoff"))[0][0] == "active"


def test_two_open_workflows_keep_their_own_verdicts(page, workflow):
    page.load(workflow.data, "one")
    assert page.run().status == "success"
    eight = texts(page, workflow.id("SlipstreamDeepCache"))
    workflow.set("KSampler", 2, 6)
    page.load(workflow.data, "two")
    assert not texts(page, workflow.id("SlipstreamDeepCache"))
    assert page.run().status == "success"
    assert "of 6 steps" in texts(page, workflow.id("SlipstreamDeepCache"))[0][1]
    page.open_tab("one")
    assert [text.removeprefix("last run: ") for _, text in texts(page, workflow.id("SlipstreamDeepCache"))] == [
        text for _, text in eight
    ]


def test_in_a_subgraph_the_inner_nodes_have_them_and_the_outer_one_a_summary(page, workflow):
    page.load(workflow.data)
    outer = page.to_subgraph([workflow.id(name) for name in OURS])
    assert page.run().status == "success"
    summary = texts(page, outer)
    assert [text.split(" (Slipstream): ")[0] for _, text in summary] == ["DeepCache", "CFG Cutoff", "FreeU"]
    page.enter_subgraph(outer)
    for name in OURS:
        ((state, text),) = texts(page, page.inner(outer, name))
        assert state == "active"
        assert any(line.endswith(text) for _, line in summary)
    assert not page.problems()


def test_without_our_script_the_hosts_own_text_on_the_node_says_it(open_page, server, workflow):
    context = open_page("classic").context
    context.route("**/extensions/slipstream/**", lambda route: route.abort())
    page = Page(context, server)  # another tab, which never had it
    page.load(workflow.data)
    # Newer frontends take the text off again when the prompt is through.
    page.page.evaluate(
        """(id) => {
            window.told = new Set()
            setInterval(() => {
                for (const widget of slipstreamTest.node(id).widgets) window.told.add(String(widget.value ?? ''))
            }, 10)
        }""",
        workflow.id("SlipstreamDeepCache"),
    )
    assert page.run().status == "success"
    told = page.page.evaluate("[...window.told].join(' ')")
    assert "reused the deep features in 5 of 8 steps" in told


def test_nothing_of_it_is_saved_or_queued(page, workflow):
    page.load(workflow.data)
    saved, queued = page.workflow(), page.prompt()
    assert page.run().status == "success"
    assert page.verdicts(workflow.id("SlipstreamDeepCache"))
    after = page.workflow()
    ours = {node["id"] for node in saved["nodes"] if node["type"].startswith("Slipstream")}
    assert [n for n in after["nodes"] if n["id"] in ours] == [n for n in saved["nodes"] if n["id"] in ours]
    assert page.prompt() == queued


def test_a_saved_image_opened_again_is_the_workflow_that_made_it(page, workflow):
    page.load(workflow.data)
    queued, outcome = page.prompt(), page.run()
    assert outcome.status == "success"
    image = page.saved(outcome.prompt_id, workflow.id("SaveImage"))
    page.open_file("image.png", "image/png", image)
    assert page.prompt() == queued
    assert page.run().status == "success"
    assert texts(page, workflow.id("SlipstreamDeepCache"))[0][0] == "active"
    assert not page.problems()
