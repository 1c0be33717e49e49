"""Drives a real ComfyUI server and a real browser the way a user would.

::

    with Server(comfyui, base_directory, log, ["--cpu"]) as server, Browser(chromium) as browser:
        page = browser.open(server, renderer="vue")
        page.load(workflow)                  # or page.open_template("slipstream", "1 - Try it, no downloads")
        assert page.run().status == "success"
        assert page.verdicts(7)[0].state == "active"
        page.reload()
        assert page.verdicts(7)[0].is_last
        assert not page.problems()

Nodes are named by execution id: ``7`` in the root graph, ``"12:7"`` for node 7 inside subgraph node 12.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from comfyui import Server
from playwright.sync_api import BrowserContext, ConsoleMessage, FilePayload, Response, expect, sync_playwright
from playwright.sync_api import Page as PlaywrightPage
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

Renderer = Literal["classic", "vue"]
Theme = Literal["dark", "light"]
Status = Literal["success", "error", "interrupted", "refused"]
NodeId = int | str

T = TypeVar("T")

PATIENCE_MS = 300_000
"""How long anything that should happen may take: a machine that does three other things beside is no fault."""
expect.set_options(timeout=PATIENCE_MS)

AGAIN_MS = 5000
"""How long what a click is for may take to come about, before it is clicked again; then twice that, and so on."""

SETTLE_MS = 10_000
"""How long a page may go on moving."""

CHROMIUM_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# A page of ComfyUI without any pack reports these by itself: files that a fresh user does not have yet.
_STOCK_PROBLEMS = (
    "/user.css",
    "/favicon.ico",
    "/userdata",
    "graph accessed before initialization",
)

_HELPERS = """
() => {
  if (window.slipstreamTest) return
  const ends = {}
  for (const status of ['success', 'error', 'interrupted'])
    app.api.addEventListener(`execution_${status}`, ({ detail }) => { ends[detail.prompt_id] = { ...detail, status } })
  const node = (id) => {
    let graph = app.rootGraph ?? app.graph, found
    for (const part of String(id).split(':')) {
      found = graph?.nodes.find((node) => String(node.id) === part)
      graph = found?.subgraph
    }
    return found
  }
  window.slipstreamTest = { ends, node }
}
"""

# Verdicts that the page asked the server for, and has not shown yet.
_COUNT_WAITING = """
  const fetched = window.fetch
  window.slipstreamWaiting = 0
  window.fetch = async (...args) => {
    if (!String(args[0]?.url ?? args[0]).includes('/slipstream/verdicts')) return fetched(...args)
    window.slipstreamWaiting++
    // What waits for the answer goes on before a timer does.
    const done = () => setTimeout(() => window.slipstreamWaiting--)
    try {
      const response = await fetched(...args)
      const json = response.json.bind(response)
      response.json = () => json().finally(done)
      if (!response.ok) done()
      return response
    } catch (error) {
      done()
      throw error
    }
  }
"""

# Drawn on the processor, what fades or is blurred takes most of it: a template of the host's took 12 s to open, not 2.
_KEEP_STILL = """
  addEventListener('DOMContentLoaded', () => {
    const style = document.createElement('style')
    const none = ['animation', 'transition', 'backdrop-filter'].map((name) => `${name}: none !important`)
    style.textContent = `*, ::before, ::after { ${none.join('; ')} }`
    document.head.append(style)
  })
"""

_UNTIL_STILL = """
async (limit) => {
  const look = () => {
    const rows = [...document.querySelectorAll('.slipstream-verdict__row')].map((row) => {
      const { x, y, width, height } = row.getBoundingClientRect()
      return [row.textContent, x, y, width, height]
    })
    const { ds, graph } = app.canvas
    return JSON.stringify([ds.scale, ...ds.offset, graph.nodes.map(({ size }) => [...size]), rows])
  }
  const frame = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 40)))
  const end = performance.now() + limit
  let before, still = 0
  while (still < 3 && performance.now() < end) {
    await frame()
    const now = look()
    still = now === before && !window.slipstreamWaiting ? still + 1 : 0
    before = now
  }
}
"""

# The host names a tab the active one before, or after, its workflow is what is drawn: the page is busy in between.
_IS_DRAWN = """
(name) => {
  const { activeWorkflow } = app.extensionManager.workflow
  const state = activeWorkflow?.activeState, graph = app.rootGraph ?? app.graph
  if (activeWorkflow?.filename !== name || state?.id !== graph.id) return false
  // The id may be there before the nodes are.
  const isThere = ({ id, type }) => graph.getNodeById(id)?.type === type
  return state.nodes.length === graph.nodes.length && state.nodes.every(isThere)
}
"""

_READ_VERDICTS = """
(id) => {
  const node = slipstreamTest.node(id)
  if (!node) throw new Error(`no node ${id}`)
  const widget = node.widgets?.find((widget) => widget.element?.matches('.slipstream-verdict') && !widget.hidden)
  return [...(widget?.element.querySelectorAll('[data-state]') ?? [])].map((row) => {
    const box = row.getBoundingClientRect()
    const x = box.x + box.width / 2, y = box.y + box.height / 2
    return {
      state: row.dataset.state,
      text: row.querySelector('.slipstream-verdict__text').textContent,
      is_last: row.hasAttribute('data-last'),
      is_visible: row.contains(document.elementFromPoint(x, y))
    }
  })
}
"""

_SLOTS = """
(ends) => ends.map(([id, name, isInput]) => {
  const node = slipstreamTest.node(id), { ds, canvas } = app.canvas, frame = canvas.getBoundingClientRect()
  const slot = (isInput ? node.inputs : node.outputs).findIndex((slot) => slot.name === name)
  const [x, y] = node.getConnectionPos(isInput, slot)
  return [frame.x + (x + ds.offset[0]) * ds.scale, frame.y + (y + ds.offset[1]) * ds.scale]
})
"""

_CLOSE_OTHERS = """
async () => {
  const { workflow } = app.extensionManager
  for (const other of [...workflow.openWorkflows])
    if (other !== workflow.activeWorkflow) await workflow.closeWorkflow(other)
}
"""

# The Templates browser draws those further down as one comes near them.
_COME_NEARER = """
(name) => {
  const cards = [...document.querySelectorAll("[data-testid^='template-workflow-']")]
  cards.at(-1)?.scrollIntoView()
  return cards.some((card) => card.dataset.testid === name)
}
"""

_IS_WIRED = """
([source, target, name]) => {
  const node = slipstreamTest.node(target)
  const { link } = node.inputs.find((slot) => slot.name === name)
  return link != null && String(node.graph.links.get(link).origin_id) === String(source)
}
"""


def _choose(context: BrowserContext, server: Server, renderer: Renderer, theme: Theme, more: dict[str, Any]) -> None:
    chosen = {
        "Comfy.TutorialCompleted": True,
        "Comfy.VueNodes.Enabled": renderer == "vue",
        "Comfy.ColorPalette": theme,
        "Comfy.Locale": "en",
        **more,
    }
    answer = context.request.post(f"{server.url}/api/settings", data=json.dumps(chosen))
    if not answer.ok:
        raise RuntimeError(f"the server refused the settings {chosen}: {answer.status}")


class Browser:
    """A headless Chromium.

    Args:
        executable: Its path; None for the one that playwright installed.
    """

    def __init__(self, executable: str | None = None) -> None:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=executable, args=list(CHROMIUM_ARGUMENTS))

    def open(
        self,
        server: Server,
        renderer: Renderer = "classic",
        theme: Theme = "dark",
        settings: dict[str, Any] | None = None,
    ) -> Page:
        """A new user's page, with the canvas ready. Settings are the server's, so a later page changes them for all."""
        context = self._browser.new_context(viewport={"width": 1500, "height": 900})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        _choose(context, server, renderer, theme, settings or {})
        return Page(context, server)

    def close(self) -> None:
        """Closes the browser with all its pages."""
        self._browser.close()
        self._playwright.stop()

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class VerdictLine:
    """One line that a node shows.

    Attributes:
        state: ``running``, ``active``, ``inert``, ``off``, ``failed`` or ``interrupted``.
        text: As displayed.
        is_last: Shown as from the run before.
        is_visible: In view and not covered: what is in its middle is this line.
    """

    state: str
    text: str
    is_last: bool
    is_visible: bool


@dataclass(frozen=True)
class Outcome:
    """How a prompt ended.

    Attributes:
        status: ``refused``: the server did not accept the prompt.
        prompt_id: Empty if it was refused.
        message: The exception's or the refusal's, empty otherwise.
        node_id: The execution id of the node that raised, empty otherwise.
    """

    status: Status
    prompt_id: str
    message: str = ""
    node_id: str = ""


@dataclass
class Page:
    """One browser window with ComfyUI in it. ``page`` is playwright's own, for whatever is missing here."""

    context: BrowserContext
    server: Server
    page: PlaywrightPage = field(init=False)
    _problems: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.add_init_script(_COUNT_WAITING)
        self.page.add_init_script(_KEEP_STILL)
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self._problems.append(f"exception: {error}"))
        self.page.goto(self.server.url)
        self._wait_until_ready()

    def _note_console(self, message: ConsoleMessage) -> None:
        url = (message.location or {}).get("url", "")
        is_ours = "/extensions/" in url or "slipstream" in message.text.lower()
        if message.type == "error" or (message.type == "warning" and is_ours):
            self._problems.append(f"{message.type}: {message.text} ({url})")

    def problems(self) -> list[str]:
        """Exceptions, console errors, and warnings about extensions, without those that the host makes by itself."""
        return [
            problem
            for problem in self._problems
            if not any(stock in problem for stock in _STOCK_PROBLEMS)
            and not ("Failed to load resource" in problem and self.server.url not in problem)
        ]

    def forget_problems(self) -> None:
        """For a page that several tests use: the next one begins without the problems of those before."""
        self._problems.clear()

    def _wait_until_ready(self) -> None:
        self.page.wait_for_function("() => window.app?.vueAppReady && app.graph?.nodes && app.api?.clientId")
        self.page.evaluate(_HELPERS)
        self.page.get_by_test_id("queue-button").or_(self.page.locator(".queue-button-group")).first.wait_for()
        self.settle()

    def settle(self) -> None:
        """Waits until the page has drawn what it knows, and nothing moves: however busy the machine is."""
        self.page.evaluate(_UNTIL_STILL, SETTLE_MS)

    def reload(self) -> None:
        """Reloads the page, and waits until ComfyUI has opened the same workflows again."""
        name = self.tab()
        self.page.wait_for_timeout(1000)  # the host saves its draft of an unsaved workflow half a second after a change
        self.page.reload()
        self._wait_until_ready()
        self.page.wait_for_function(_IS_DRAWN, arg=name)
        self.settle()

    def load(self, workflow: dict[str, Any], name: str = "test") -> None:
        """Opens a workflow (the saved format, not the API's) in a new tab, as File > Open does."""
        self.open_file(f"{name}.json", "application/json", json.dumps(workflow).encode())

    def open_file(self, name: str, mime_type: str, data: bytes) -> None:
        """Opens a file in a new tab, as File > Open does: a workflow, or an image that tells of one."""
        with self._another_workflow():
            file = FilePayload(name=name, mimeType=mime_type, buffer=data)
            self.page.locator("#comfy-file-input").set_input_files(file)

    def _new_workflow(self) -> None:
        with self._another_workflow():
            self.page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")

    @contextmanager
    def _another_workflow(self) -> Iterator[None]:
        active = "app.extensionManager.workflow.activeWorkflow"
        self.page.evaluate(f"() => {{ slipstreamTest.before = {active} }}")
        yield
        self.page.wait_for_function(f"() => {active} && {active} !== slipstreamTest.before")
        self.settle()

    def open_template(self, pack: str, title: str) -> None:
        """Opens a template of a pack (its folder's name) by title (its file's name) from the Templates browser.

        The host opens no second tab for the template that is already in front.
        """
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        dialog = self.page.get_by_role("dialog").last
        # Events instead of clicks, which wait until nothing moves: the cards do while pictures arrive.
        dialog.get_by_text(pack, exact=True).first.dispatch_event("click")
        name = f"template-workflow-{title}"
        self.page.wait_for_function(_COME_NEARER, arg=name, polling=100)
        dialog.get_by_test_id(name).dispatch_event("click")
        is_open = "(title) => app.extensionManager.workflow.activeWorkflow?.filename.startsWith(title)"
        self.page.wait_for_function(is_open, arg=title)
        self.settle()

    def start_over(self, renderer: Renderer) -> None:
        """Leaves nothing of the tests before: an empty workflow, and every other one closed.

        Args:
            renderer: the page's own, for when it reloads: the settings are the server's, and another page changed them.
        """
        _choose(self.context, self.server, renderer, "dark", {})
        self._new_workflow()
        self.page.evaluate(_CLOSE_OTHERS)
        self.forget_problems()

    def fit(self) -> None:
        """Moves and zooms the view so that all nodes are in it."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.settle()

    def blank_canvas(self) -> None:
        """Opens a new, empty workflow, and zooms out so that a small one fits the window."""
        self._new_workflow()
        self.page.evaluate("() => { app.canvas.ds.reset(); app.canvas.ds.changeScale(0.6, [0, 0]) }")
        self.settle()

    def add_by_search(self, name: str, at: tuple[int, int] = (750, 850)) -> int:
        """Puts a node on the canvas by double-clicking it and typing what the node is called. Returns its id.

        Args:
            name: what is typed; the first node found is taken.
            at: where, in the window's pixels: an empty spot.
        """
        before = self.page.evaluate("() => app.canvas.graph.nodes.map((node) => node.id)")
        has_search = partial(self.page.evaluate, "() => document.activeElement?.tagName === 'INPUT'")
        # A page that is busy takes the two clicks for one each.
        self.until(has_search, lambda: self.page.mouse.dblclick(*at))
        self.settle()
        self.page.keyboard.type(name)
        self.settle()
        self.page.keyboard.press("Enter")
        added = "(before) => app.canvas.graph.nodes.find((node) => !before.includes(node.id))?.id"
        node = int(self.page.wait_for_function(added, arg=before).json_value())
        # The search goes slowly, and takes clicks while it does.
        is_canvas = "(at) => !document.elementFromPoint(...at)?.closest('.p-dialog-mask')"
        self.page.wait_for_function(is_canvas, arg=list(at))
        # Newer hosts let the node follow the pointer until it is clicked.
        is_put = partial(self.page.evaluate, "(id) => !slipstreamTest.node(id).flags.ghost", node)
        self.until(is_put, lambda: self.page.mouse.click(*at))
        self.settle()
        return node

    def wire(self, source: NodeId, output: str, target: NodeId, name: str) -> None:
        """Drags a wire from a node's output to another's input, named as on the canvas."""
        ends = self.page.evaluate(_SLOTS, [[source, output, False], [target, name, True]])

        def drag() -> None:
            self.page.mouse.move(*ends[0])
            self.page.mouse.down()
            self.page.mouse.move(*ends[1], steps=5)
            self.page.mouse.up()

        self.until(partial(self.page.evaluate, _IS_WIRED, [source, target, name]), drag)
        self.settle()

    def until(self, has_come: Callable[[], object], act: Callable[[], object]) -> None:
        """Does something again, ever more patiently, until what it is for has come about.

        Raises:
            TimeoutError: It never did.
        """
        deadline = time.monotonic() + PATIENCE_MS / 1000
        patience = AGAIN_MS
        while True:
            act()
            try:
                self.wait_for(has_come, bool, patience)
                return
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
            patience *= 2

    def wait_for(self, read: Callable[[], T], accept: Callable[[T], object], patience: float = PATIENCE_MS) -> T:
        """What is read, as soon as ``accept`` likes it.

        Args:
            patience: milliseconds.

        Raises:
            TimeoutError: It never did; the message holds what was read last.
        """
        deadline = time.monotonic() + patience / 1000
        while not accept(found := read()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {patience / 1000:.0f} s: {found}")
            self.page.wait_for_timeout(50)
        return found

    def tab(self) -> str:
        """The name of the open workflow's tab."""
        return str(self.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.filename"))

    def open_tab(self, name: str) -> None:
        """Goes to an open workflow's tab."""
        # The row of tabs moves as it brings one into view.
        is_drawn = partial(self.page.evaluate, _IS_DRAWN, name)
        self.until(is_drawn, self.page.locator(".workflow-tabs").get_by_text(name, exact=True).click)
        self.settle()

    def queue(self) -> str | Outcome:
        """Presses Run. Returns the prompt's id, or the outcome if the server, or ComfyUI-Distributed's part of it,
        refused it."""

        def is_answer(response: Response) -> bool:
            return response.request.method == "POST" and response.url.endswith(("/prompt", "/distributed/queue"))

        with self.page.expect_response(is_answer) as posted:
            self.page.get_by_test_id("queue-button").first.click()
        answer = posted.value.json()
        if "prompt_id" in answer:
            return str(answer["prompt_id"])
        if "node_errors" not in answer:
            return Outcome("refused", "", answer["error"])
        errors = [
            error["details"] or error["message"] for node in answer["node_errors"].values() for error in node["errors"]
        ]
        return Outcome("refused", "", "; ".join([answer["error"]["message"], *errors]))

    def wait(self, prompt_id: str) -> Outcome:
        """Waits until the page has heard of a prompt's end."""
        end = self.page.wait_for_function("(id) => slipstreamTest.ends[id]", arg=prompt_id).json_value()
        self.settle()
        node_id = str(end.get("node_id", "")) if end["status"] != "success" else ""
        return Outcome(end["status"], prompt_id, end.get("exception_message", "").strip(), node_id)

    def run(self) -> Outcome:
        """Presses Run and waits for the end."""
        queued = self.queue()
        return queued if isinstance(queued, Outcome) else self.wait(queued)

    def interrupt(self) -> None:
        """Stops the running prompt, as its Cancel button does."""
        self.page.evaluate("() => app.api.interrupt()")

    def verdicts(self, node: NodeId) -> list[VerdictLine]:
        """What a node says about its last run, line by line; empty if it shows nothing."""
        self.settle()
        return self._verdicts_now(node)

    def _verdicts_now(self, node: NodeId) -> list[VerdictLine]:
        return [VerdictLine(**line) for line in self.page.evaluate(_READ_VERDICTS, node)]

    def wait_for_verdict(self, node: NodeId, accept: Callable[[list[VerdictLine]], bool]) -> list[VerdictLine]:
        """The node's lines as soon as ``accept`` likes them.

        Raises:
            TimeoutError: It never did; the message holds what was shown last.
        """
        return self.wait_for(lambda: self._verdicts_now(node), accept)

    def set_widget(self, node: NodeId, widget: str, value: object) -> None:
        """Gives a node's widget a value."""
        self.page.evaluate(
            """([id, name, value]) => {
                const node = slipstreamTest.node(id)
                const widget = node.widgets.find((widget) => widget.name === name)
                widget.value = value
                widget.callback?.(value, app.canvas, node)
            }""",
            [node, widget, value],
        )

    def press(self, keys: str, node: NodeId) -> None:
        """Selects one node and presses keys on the canvas: ``Control+b`` bypasses, ``Control+m`` mutes."""
        self.page.evaluate(
            """(id) => {
                app.canvas.canvas.focus()
                app.canvas.deselectAll()
                app.canvas.select(slipstreamTest.node(id))
            }""",
            node,
        )
        self.page.keyboard.press(keys)
        self.settle()

    def mode(self, node: NodeId) -> int:
        """A node's mode: 0 runs, 2 is muted, 4 is bypassed."""
        return int(self.page.evaluate("(id) => slipstreamTest.node(id).mode", node))

    def to_subgraph(self, nodes: list[int]) -> int:
        """Makes a subgraph of nodes of the root graph, and returns the id of the node that it is there."""
        outer = self.page.evaluate(
            """(ids) => {
                const nodes = app.rootGraph.nodes.filter((node) => ids.includes(Number(node.id)))
                return app.rootGraph.convertToSubgraph(new Set(nodes)).node.id
            }""",
            nodes,
        )
        self.settle()
        return int(outer)

    def inner(self, outer: int, kind: str) -> str:
        """The execution id of the first node of a type in a subgraph node."""
        find = "([id, type]) => slipstreamTest.node(id).subgraph.nodes.find((node) => node.type === type).id"
        return f"{outer}:{self.page.evaluate(find, [outer, kind])}"

    def enter_subgraph(self, node: NodeId) -> None:
        """Opens a subgraph node."""
        self.page.evaluate(
            "(id) => { const n = slipstreamTest.node(id); app.canvas.openSubgraph(n.subgraph, n) }", node
        )
        self.settle()

    def leave_subgraph(self) -> None:
        """Goes back to the root graph."""
        self.page.evaluate("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")
        self.settle()

    def workflow(self) -> dict[str, Any]:
        """The open workflow as it would be saved, but for the view's position."""
        saved = json.loads(self.page.evaluate("() => JSON.stringify((app.rootGraph ?? app.graph).serialize())"))
        saved.get("extra", {}).pop("ds", None)
        return dict(saved)

    def prompt(self) -> dict[str, Any]:
        """The open workflow as it would be queued."""
        return dict(self.page.evaluate("async () => (await app.graphToPrompt()).output"))

    def is_modified(self) -> bool:
        """Whether the host thinks that the open workflow has changes to save."""
        return bool(self.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.isModified"))

    def saved(self, prompt_id: str, node: NodeId) -> bytes:
        """The file of the last image that a node saved in a prompt."""
        outputs = self.page.request.get(f"{self.server.url}/history/{prompt_id}").json()[prompt_id]["outputs"]
        image = outputs[str(node)]["images"][-1]
        return self.page.request.get(f"{self.server.url}/view", params=image).body()

    def shows_image(self, node: NodeId) -> bool:
        """Whether a node shows a picture that has been loaded: painted by the classic renderer, or in the page. It may
        come a moment after the run."""
        try:
            self.page.wait_for_function(
                """async (id) => {
                    const node = slipstreamTest.node(id)
                    const inPage = document.querySelector(`[data-node-id="${id}"] img[src*='/view']`)
                    const image = inPage ?? node.imgs?.[0]
                    await image?.decode?.()
                    return image?.naturalWidth > 1 && (inPage === null || inPage.offsetWidth > 1)
                }""",
                arg=node,
            )
        except PlaywrightTimeoutError:
            return False
        return True

    def errors(self) -> list[str]:
        """The error messages that the page shows its user."""
        shown = self.page.locator(".p-toast-message-error, [data-testid='error-overlay'], [role='dialog']")
        return [text for text in shown.all_inner_texts() if text.strip()]

    def close_errors(self) -> None:
        """Closes what :meth:`errors` returned. On older hosts it is a dialog over the whole page."""
        while self.page.get_by_role("dialog").count():
            self.page.keyboard.press("Escape")
            self.settle()

    def screenshot(self, path: Path) -> None:
        """Writes a picture of the page."""
        self.page.screenshot(path=str(path))


def keep_picture(page: Page, name: str) -> None:
    """Writes a picture of the page into the folder that SLIPSTREAM_SCREENSHOTS names, if it is set."""
    if folder := os.environ.get("SLIPSTREAM_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(Path(folder) / f"{name.replace('/', '_')}.png")
