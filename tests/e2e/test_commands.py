"""The commands as a user meets them: in the sidebar tab, the menus and the palette, on our templates and the host's."""

from __future__ import annotations

import importlib.util
import json
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from browser import Page, keep_picture
from playwright.sync_api import Locator, expect

from workflows import TEMPLATES, classic_only

OURS = (
    "2 - SD 1.5 faster - DeepCache, CFG Cutoff and FreeU",
    "5 - Tiled VAE - 4K on a small card",
    "5 - FP16-Fix VAE on SDXL",
)
WITHOUT_US = {
    "sdxl_simple_example": "two samplers of two models",
    "image_qwen_image": "all in a subgraph, with a switch before the sampler",
    "flux_dev_full_text_to_image": "a guider of its own, in a subgraph",
}
"""Of the host's, and what each has."""

MANY = (
    "3d_hunyuan3d-v2.1", "Image_capybara_v0_1_text_to_image", "audio_ace_step_1_t2a_song", "flux_fill_inpaint_example",
    "flux_kontext_dev_basic", "hidream_e1_full", "image_chroma_text_to_image", "image_flux2", "image_lotus_depth_v1_1",
    "image_omnigen2_t2i", "image_qwen_image_edit_2509", "image_z_image_turbo", "sd3.5_simple_example",
    "sdxlturbo_example", "sdxl_revision_text_prompts", "templates-1_click_multiple_scene_angles-v1.0",
    "video_ltx2_t2v", "video_wan2_2_14B_i2v", "video_wan_vace_14B_t2v", "wan2.1_flf2v_720_f16",
)  # fmt: skip
"""Twenty more of the host's, of each family and with each thing that a workflow can have."""

FIND = """
(type) => {
  const find = (graph, prefix) => graph.nodes.flatMap((node) => [
    ...(node.type === type ? [`${prefix}${node.id}`] : []),
    ...(node.subgraph ? find(node.subgraph, `${prefix}${node.id}:`) : [])
  ])
  return find(app.rootGraph ?? app.graph, '')
}
"""

OVERLAPS = """
(ids) => ids.flatMap((id) => {
  const node = slipstreamTest.node(id)
  const box = ({ pos, size }) => [pos[0], pos[1] - 30, pos[0] + size[0], pos[1] + size[1]]
  const [left, top, right, bottom] = box(node)
  return node.graph.nodes.filter((other) => {
    const [x, y, endX, endY] = box(other)
    return other !== node && x < right && left < endX && y < bottom && top < endY
  }).map((other) => [id, other.type])
})
"""

TOOK = """
() => new Promise((resolve) => {
  const button = document.querySelectorAll('.slipstream-goal button')[1], began = performance.now()
  app.api.addEventListener('graphChanged', () => {
    if (app.graph.nodes.some(({ type }) => type === 'SlipstreamRecipe')) resolve(performance.now() - began)
  })
  button.click()
})
"""


def of_the_host(name: str) -> dict[str, Any]:
    """A workflow of the host's template packages."""
    spec = importlib.util.find_spec("comfyui_workflow_templates_json")
    if spec is None or spec.origin is None:
        pytest.skip("this ComfyUI's templates are not in a package of workflows")
    path = Path(spec.origin).parent / "templates" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"this ComfyUI has no template {name}")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def said(page: Page) -> str:
    """What the last command told."""
    # The second is that of newer hosts.
    told = page.page.locator(".p-toast-message, ol.fixed > li", has_text="Slipstream").last
    told.wait_for()
    return str(told.inner_text()).split("\n", 1)[1]


def tab(page: Page) -> Locator:
    """The button of the sidebar tab; the second is that of newer hosts."""
    return page.page.locator(".slipstream-tab-button, nav button[aria-label^='Slipstream']").first


def command(page: Page, name: str, goal: str | None = None) -> str:
    """Runs a command as the palette does, and chooses a goal if it asks for one."""
    page.page.evaluate("(id) => { app.extensionManager.command.execute(id) }", f"Slipstream.{name}")
    if goal is not None:
        page.page.locator(".slipstream-goal").get_by_text(goal, exact=True).click()
        page.page.locator(".slipstream-goal").wait_for(state="detached")
    page.settle()
    return said(page)


def found(page: Page, kind: str) -> list[str]:
    return list(page.page.evaluate(FIND, kind))


def graph(page: Page) -> dict[str, Any]:
    """The workflow, but for what the host reckons anew as it draws it: sizes, and the order in which nodes run."""
    workflow = page.workflow()
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    for one in graphs:
        # Ids are not used again.
        for name in ("last_node_id", "last_link_id", "state", "version"):
            one.pop(name, None)
        for node in one["nodes"]:
            node.pop("size")
            node.pop("order")
    return workflow


def undo(page: Page) -> None:
    """Takes the last step back. The host loads the graph anew for that, which a busy page takes its time for, and may
    lose the key."""
    before = graph(page)

    def press() -> None:
        page.page.evaluate("() => { document.activeElement?.blur(); app.canvas.canvas.focus() }")
        page.page.keyboard.press("Control+z")

    page.until(lambda: graph(page) != before, press)
    page.settle()


def refused_by_server(page: Page) -> set[tuple[str, str, str]]:
    """What the server finds wrong with the open workflow. It has none of the files, so that nothing begins."""
    answer = page.page.request.post(f"{page.server.url}/prompt", data=json.dumps({"prompt": page.prompt()})).json()
    errors = {
        (node, one["type"], one["details"])
        for node, told in answer.get("node_errors", {}).items()
        for one in told["errors"]
    }
    if "error" in answer and not errors:
        errors.add(("", answer["error"]["type"], str(answer["error"].get("details"))))
    assert errors, "this workflow would run here"
    return errors


def tour(page: Page, renderer: str, name: str, workflow: dict[str, Any]) -> None:
    """Each command on a workflow, one undo after each, and Remove at the end."""
    page.load(workflow, name)
    before, prompt = graph(page), page.prompt()
    has_ours = bool(any(node["type"].startswith("Slipstream") for node in before["nodes"]))

    assert " is on the model of " in command(page, "SpeedUp", "balanced")
    recipes = found(page, "SlipstreamRecipe")
    assert recipes
    assert not page.page.evaluate(OVERLAPS, recipes)
    undo(page)
    assert graph(page) == before
    assert page.prompt() == prompt
    command(page, "SpeedUp", "fastest")
    assert found(page, "SlipstreamRecipe") == recipes

    with_recipe, told = graph(page), command(page, "Benchmark")
    benchmarks = found(page, "SlipstreamBenchmark")
    assert bool(benchmarks) == told.endswith("run the workflow."), told
    assert (graph(page) == with_recipe) == (not benchmarks)
    without_tune, told = graph(page), command(page, "Tune")
    tunes = found(page, "SlipstreamTune")
    assert bool(tunes) == told.endswith("run the workflow."), told
    assert (graph(page) == without_tune) == (not tunes)
    assert not page.page.evaluate(OVERLAPS, [*benchmarks, *tunes])
    if ":" in recipes[0]:
        page.enter_subgraph(recipes[0].rpartition(":")[0])
    page.page.evaluate("() => app.canvas.deselectAll()")
    page.fit()
    keep_picture(page, f"commands-{name}-{renderer}")
    page.leave_subgraph()

    measured, on = graph(page), page.prompt()
    assert command(page, "Toggle").startswith("Slipstream is off: ")
    if not has_ours:
        assert page.prompt() == prompt
    undo(page)
    assert graph(page) == measured
    command(page, "Toggle")
    assert command(page, "Toggle").startswith("Slipstream is on: ")
    assert page.prompt() == on

    assert command(page, "Remove").startswith("Removed: ")
    assert not [one for kind in ("Recipe", "Benchmark", "Tune") for one in found(page, f"Slipstream{kind}")]
    if not has_ours:
        assert page.prompt() == prompt
    undo(page)
    assert graph(page) == measured
    assert not page.problems()


def test_each_command_on_a_template_of_ours(page, renderer):
    tour(page, renderer, OURS[0], TEMPLATES[OURS[0]])


@pytest.mark.long
@pytest.mark.parametrize("name", OURS[1:])
def test_each_command_on_other_templates_of_ours(name, page, renderer):
    tour(page, renderer, name, TEMPLATES[name])


@pytest.mark.long_in_vue
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (i > 0)) for i, name in enumerate(WITHOUT_US)]
)
def test_each_command_on_a_template_of_the_hosts(name, page, renderer):
    tour(page, renderer, name, of_the_host(name))


@pytest.mark.long
@classic_only
@pytest.mark.parametrize("name", MANY)
def test_the_server_would_take_what_is_made_of_the_hosts_templates(name, page):
    page.load(of_the_host(name), name)
    page.close_errors()
    prompt, wrong = page.prompt(), refused_by_server(page)
    assert " is on the model of " in command(page, "SpeedUp", "balanced")
    assert refused_by_server(page) <= wrong
    for name in ("Benchmark", "Tune"):
        command(page, name)
        assert refused_by_server(page) <= wrong
    command(page, "Remove")
    assert page.prompt() == prompt
    # The pictures and clips that they come with are not there.
    assert not [problem for problem in page.problems() if "/view?type=input" not in problem]


def small(page: Page) -> None:
    """What takes long in a template, lower."""
    for kind, values in {"EmptyLatentImage": {"width": 128, "height": 128}}.items():
        for node in found(page, kind):
            for widget, value in values.items():
                page.set_widget(node, widget, value)


def test_from_a_template_of_the_hosts_to_a_faster_picture(page, renderer):
    """Four clicks: the tab, the command, a goal, Run. Then the tab tells what it gave, and a click goes to a node."""
    # Of its own, or it would have the verdicts of the other renderer's, and the host would answer from its cache.
    page.server.post("/free", {"free_memory": True})
    page.load({**of_the_host("sdxl_simple_example"), "id": str(uuid.uuid4())}, "faster")
    small(page)
    began = time.perf_counter()
    tab(page).click()
    panel = page.page.locator(".slipstream-panel")
    expect(panel).to_contain_text("No Slipstream node in this workflow yet.")
    keep_picture(page, f"panel-empty-{renderer}")
    panel.get_by_text("Speed up this workflow", exact=True).click()
    page.page.locator(".slipstream-goal").wait_for()
    keep_picture(page, f"goal-{renderer}")
    command_s = page.page.evaluate(TOOK) / 1000
    clicked = time.perf_counter() - began
    expect(panel.get_by_text("not run yet")).to_have_count(2)
    outcome = page.run()
    assert outcome.status == "success", outcome
    print(f"\n{renderer}: three clicks in {clicked:.1f} s; the command itself {command_s:.2f} s")

    text = panel.inner_text()
    assert "The last run took " in text
    assert " predictions of the model left out" in text
    recipes = found(page, "SlipstreamRecipe")
    for recipe in recipes:
        shown = panel.locator(f"[data-node='{recipe}']")
        for line in page.verdicts(recipe):
            assert line.text in shown.inner_text()
    assert not page.page.evaluate(OVERLAPS, recipes)
    keep_picture(page, f"panel-{renderer}")
    panel.locator(f"[data-node='{recipes[1]}']").click()
    page.settle()
    assert page.page.evaluate("() => [...app.canvas.selectedItems].map(({ id }) => String(id))") == [recipes[1]]
    tab(page).click()
    assert not page.problems()


@classic_only
def test_a_click_goes_into_a_subgraph(page):
    page.load(of_the_host("image_qwen_image"), "inside")
    command(page, "SpeedUp", "balanced")
    (recipe,) = found(page, "SlipstreamRecipe")
    tab(page).click()
    page.page.locator(f".slipstream-panel [data-node='{recipe}']").click()
    page.settle()
    page.page.wait_for_function("(id) => app.canvas.graph === slipstreamTest.node(id).graph", arg=recipe)
    page.leave_subgraph()
    tab(page).click()
    assert not page.problems()


@classic_only
def test_the_benchmark_runs_as_it_was_put(page, workflow):
    page.load(workflow.data, "measured")
    assert " measures " in command(page, "Benchmark")
    (node,) = found(page, "SlipstreamBenchmark")
    page.set_widget(node, "runs", 1)
    assert page.run().status == "success"
    assert page.verdicts(node)[0].state == "active"
    assert not page.problems()


@pytest.mark.long
@classic_only
def test_the_tune_runs_as_it_was_put(page, workflow):
    page.load(workflow.data, "tuned")
    assert " measures " in command(page, "Tune")
    (node,) = found(page, "SlipstreamTune")
    for name, value in {"seeds": 1, "minutes": 0.1}.items():
        page.set_widget(node, name, value)
    assert page.run().status == "success"
    assert page.verdicts(node)[0].state in ("active", "inert")
    assert not page.problems()


@classic_only
def test_what_stands_after_our_nodes_is_copied_for_the_model_without_us(page, workflow):
    shifted = workflow.add("ModelSamplingDiscrete", {"model": "MODEL"}, ["MODEL"], ["v_prediction", False])
    workflow.link(workflow.node("SlipstreamFreeU"), 0, shifted, "model")
    workflow.link(shifted, 0, workflow.node("KSampler"), "model")
    page.load(workflow.data, "copied")
    before = graph(page)
    assert command(page, "Benchmark").endswith("copied for the model without Slipstream.")
    (node,) = found(page, "SlipstreamBenchmark")
    _, copy = sorted(found(page, "ModelSamplingDiscrete"), key=int)
    prompt = page.prompt()
    loader = str(workflow.id("CheckpointLoaderSimple"))
    assert prompt[node]["inputs"]["baseline"] == [copy, 0]
    assert prompt[copy]["inputs"] == {"model": [loader, 0], "sampling": "v_prediction", "zsnr": False}
    assert not page.page.evaluate(OVERLAPS, [node, copy])
    undo(page)
    assert graph(page) == before
    command(page, "Benchmark")
    (node,) = found(page, "SlipstreamBenchmark")
    page.set_widget(node, "runs", 1)
    assert page.run().status == "success"
    assert not page.problems()


@classic_only
def test_what_is_left_of_subgraphs(page, workflow):
    """One of our nodes alone goes; one with other nodes goes on passing the model."""
    ours = [workflow.id(kind) for kind in ("SlipstreamDeepCache", "SlipstreamCFGCutoff", "SlipstreamFreeU")]
    page.load(workflow.data, "plain")
    command(page, "Remove")
    plain = page.prompt()
    page.load(workflow.data, "shell")
    page.to_subgraph(ours)
    assert command(page, "Remove") == "Removed: 3 nodes."
    assert page.prompt() == plain
    page.load(workflow.data, "mixed")
    outer = page.to_subgraph([ours[0], workflow.id("EmptyLatentImage")])
    command(page, "Remove")
    sampler = str(workflow.id("KSampler"))
    assert page.prompt()[sampler]["inputs"]["model"] == plain[sampler]["inputs"]["model"]
    assert page.prompt()[sampler]["inputs"]["latent_image"][0].startswith(f"{outer}:")
    assert not page.problems()


@classic_only
def test_the_menus_and_what_cannot_be_done(page, workflow):
    page.load(workflow.data, "menus")
    assert command(page, "Remove") == "Removed: 3 nodes."
    before = graph(page)
    assert (
        command(page, "Benchmark") == "No Slipstream node is on the model of KSampler 8. First: Speed up this workflow."
    )
    assert command(page, "Toggle") == "No Slipstream node is in this workflow."
    assert graph(page) == before
    items = "(id) => app.canvas.getNodeMenuOptions(slipstreamTest.node(id)).map((item) => item?.content)"
    ours = {"Speed up this workflow", "Benchmark this sampler", "Tune this sampler"}
    assert ours <= set(page.page.evaluate(items, workflow.id("KSampler")))
    assert not ours & set(page.page.evaluate(items, workflow.id("VAEDecode")))

    page.page.locator(".comfy-menu-button-wrapper").click()
    page.page.get_by_role("menuitem", name="Slipstream").first.hover()
    page.page.get_by_role("menuitem", name="Speed up this workflow").click()
    page.page.locator(".slipstream-goal").get_by_text("Cancel", exact=True).click()
    page.settle()
    assert graph(page) == before
    assert not page.problems()


@pytest.mark.parametrize("theme", [pytest.param("dark", marks=pytest.mark.long), "light"])
def test_in_chinese(theme, open_page):
    page = open_page("vue", theme=theme, settings={"Comfy.Locale": "zh"})
    page.load(TEMPLATES[OURS[0]], "zh")
    tab(page).click()
    panel = page.page.locator(".slipstream-panel")
    panel.get_by_text("加速此工作流", exact=True).click()
    page.page.locator(".slipstream-goal").wait_for()
    keep_picture(page, f"goal-zh-{theme}")
    page.page.locator(".slipstream-goal").get_by_text("balanced", exact=True).click()
    page.settle()
    assert said(page).endswith("的模型上。")
    expect(panel.locator("[data-node]")).to_have_count(4)
    page.page.locator(".comfy-menu-button-wrapper").click()
    remove = page.page.get_by_role("menuitem", name="从此工作流移除 Slipstream")
    # The menu opens what is below an entry some time after the pointer came, where it is not still opening itself.

    def point() -> None:
        page.page.mouse.move(0, 0)
        page.page.get_by_role("menuitem", name="Slipstream").first.hover()

    page.until(remove.is_visible, point)
    expect(remove).to_be_visible()
    assert not page.problems()
