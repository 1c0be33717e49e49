/**
 * What can be done to the open workflow in one go, as the host's commands, and the sidebar tab that lists our nodes. Each
 * command is one step of the host's undo, and says in one line what it did, or why it did nothing.
 */
import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'
import { Refusal, benchmark, remove, speedUp, toggle, tune } from './commands/edit.mjs'
import { askGoal } from './commands/goal.mjs'
import { drawPanel, tookMs } from './commands/panel.mjs'
import { RECIPE, isSampler } from './commands/walk.mjs'
import { sentence, wordsOf } from './commands/words.mjs'
import { afterDraw } from './verdicts.js'

const TAB = 'slipstream'
const SHOWN_MS = 10_000
const KEPT_TIMES = 100

const STYLE = `
.slipstream-goal {
  width: min(420px, 90vw); margin: auto; padding: 16px; border: 1px solid var(--border-color, #4e4e4e); border-radius: 8px;
  background: var(--comfy-menu-bg, #353535); color: var(--fg-color, #fff); font: 14px/1.4 Inter, system-ui, sans-serif;
}
.slipstream-goal::backdrop { background: #0008; }
.slipstream-goal h2, .slipstream-panel__title { margin: 0 0 12px; font-size: 16px; font-weight: 600; }
.slipstream-goal form { display: flex; flex-direction: column; gap: 6px; }
.slipstream-goal button, .slipstream-panel button {
  padding: 8px 12px; border: 1px solid var(--border-color, #4e4e4e); border-radius: 6px; text-align: left;
  background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); font: inherit; cursor: pointer;
}
.slipstream-goal button { display: flex; flex-wrap: wrap; gap: 0 10px; align-items: baseline; }
.slipstream-goal button b { min-width: 92px; font-weight: 600; }
.slipstream-goal :is(button:hover, button:focus-visible), .slipstream-panel :is(button:hover, button:focus-visible) {
  border-color: #3b82f6; outline: none;
}
.slipstream-goal button:last-child { justify-content: center; margin-top: 6px; }

.slipstream-panel {
  box-sizing: border-box; height: 100%; padding: 16px; overflow-y: auto; container-type: inline-size;
  color: var(--fg-color, #fff); font: 13px/1.4 Inter, system-ui, sans-serif;
}
.slipstream-panel :is(p, ul) { margin: 12px 0 0; padding: 0; }
.slipstream-panel__commands { display: flex; flex-direction: column; gap: 6px; }
.slipstream-panel__commands button:first-child { border-color: #3b82f6; }
.slipstream-panel__summary { font-weight: 600; font-variant-numeric: tabular-nums; }
.slipstream-panel__list { display: flex; flex-direction: column; gap: 6px; list-style: none; }
.slipstream-panel__list button { display: flex; flex-direction: column; gap: 3px; width: 100%; }
.slipstream-panel__list b { font-weight: 600; }
.slipstream-panel :is(small, .slipstream-panel__none) { font-size: 12px; opacity: 0.75; }
.slipstream-panel__line { display: flex; gap: 6px; white-space: pre-wrap; }
.slipstream-panel__line[data-last] { opacity: 0.75; }
.slipstream-panel__line > :last-child { min-width: 0; overflow-wrap: anywhere; }
.slipstream-panel__line .slipstream-verdict__symbol { color: color-mix(in srgb, var(--state) 75%, currentcolor); }
`

/** What was told last: the next one takes its place. @type {object | null} */
let told = null

/** Of the tab, while it is open. @type {HTMLElement | null} */
let panel = null

function language() {
  return String(app.extensionManager?.setting?.get('Comfy.Locale') ?? 'en')
}

/** @param {string} key */
function word(key) {
  return wordsOf(language())[key]
}

function root() {
  return app.rootGraph ?? app.graph
}

/** @param {string} type */
function create(type) {
  return window.LiteGraph.createNode(type)
}

/**
 * Does something to the graph, as one step of undo, and says what came of it.
 * @param {() => import('./commands/edit.mjs').Done} command
 */
function run(command) {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker
  // What was changed before is a step of its own.
  if (tracker?.captureCanvasState) tracker.captureCanvasState()
  else tracker?.checkState?.()
  app.canvas.emitBeforeChange?.()
  try {
    const { facts, nodes } = command()
    tell('success', facts)
    const here = nodes.filter((node) => node.graph === app.canvas.graph)
    if (here.length) app.canvas.selectItems?.(here)
  } catch (error) {
    if (!(error instanceof Refusal)) throw error
    tell('warn', [[error.key, ...error.about]])
  } finally {
    app.canvas.setDirty(true, true)
    app.canvas.emitAfterChange?.()
    redraw()
  }
}

/** @param {'success' | 'warn'} severity @param {import('./commands/edit.mjs').Fact[]} facts */
function tell(severity, facts) {
  const { toast } = app.extensionManager
  if (told) toast.remove?.(told)
  told = { severity, summary: 'Slipstream', detail: sentence(facts, language()), life: SHOWN_MS }
  toast.add(told)
}

async function askAndSpeedUp() {
  const goals = create(RECIPE).widgets.find(({ name }) => name === 'goal').options.values
  const goal = await askGoal([...goals], wordsOf(language()))
  if (goal) run(() => speedUp(root(), goal, create))
}

/** In the order that menu and tab show them. @type {Record<string, () => void | Promise<void>>} */
const COMMANDS = {
  speedUp: askAndSpeedUp,
  benchmark: () => run(() => benchmark(root(), create)),
  tune: () => run(() => tune(root(), create)),
  toggle: () => run(() => toggle(root())),
  remove: () => run(() => remove(root(), create))
}

/** @param {string} key */
function idOf(key) {
  return `Slipstream.${key[0].toUpperCase()}${key.slice(1)}`
}

function buttons() {
  return Object.entries(COMMANDS).map(([key, run]) => ({ label: word(key), tip: word(`${key}Tip`), run }))
}

/** Brings a node into view, also one in a subgraph. @param {any} node */
async function goTo(node) {
  const { canvas } = app
  if (canvas.graph !== node.graph) {
    canvas.subgraph = node.graph === root() ? undefined : node.graph
    canvas.setGraph(node.graph)
    await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))
  }
  canvas.deselectAll()
  canvas.select(node)
  if (canvas.animateToBounds) canvas.animateToBounds(node.boundingRect)
  else canvas.centerOnNode(node)
}

function redraw() {
  if (panel) drawPanel(panel, root(), wordsOf(language()), buttons(), goTo)
}

const style = new CSSStyleSheet()
style.replaceSync(STYLE)
document.adoptedStyleSheets.push(style)

/** When each prompt began. @type {Map<string, number>} */
const began = new Map()

api.addEventListener('execution_start', ({ detail }) => began.set(detail.prompt_id, performance.now()))
api.addEventListener('execution_success', ({ detail }) => {
  if (began.has(detail.prompt_id)) tookMs.set(detail.prompt_id, performance.now() - began.get(detail.prompt_id))
  for (const times of [began, tookMs]) if (times.size > KEPT_TIMES) times.delete(times.keys().next().value)
  redraw()
})
api.addEventListener('graphChanged', redraw)
afterDraw.add(redraw)

app.registerExtension({
  name: 'slipstream.commands',
  commands: Object.entries(COMMANDS).map(([key, run]) => ({
    id: idOf(key), function: run, label: () => word(key), tooltip: () => word(`${key}Tip`)
  })),
  menuCommands: [{ path: ['Slipstream'], commands: Object.keys(COMMANDS).map(idOf) }],

  setup() {
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: 'pi pi-bolt',
      title: 'Slipstream',
      tooltip: 'Slipstream',
      type: 'custom',
      render(element) {
        panel = element
        redraw()
      },
      destroy() {
        panel = null
      }
    })
  },

  /** @param {any} node */
  getNodeMenuItems(node) {
    if (!isSampler(node) && !node.inputs?.some(({ type }) => type === 'GUIDER')) return []
    return [
      null,
      { content: word('speedUp'), callback: COMMANDS.speedUp },
      { content: word('benchmarkThis'), callback: () => run(() => benchmark(root(), create, node)) },
      { content: word('tuneThis'), callback: () => run(() => tune(root(), create, node)) }
    ]
  },

  afterConfigureGraph: redraw
})
