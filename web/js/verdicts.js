/**
 * Shows on every Slipstream node what it did: the verdict that the engine sends while and after a prompt runs.
 *
 * Verdicts live here, by workflow and node, never in the graph: what is drawn is a DOM widget that is left out of the
 * saved workflow, and so is the height it adds to its node. Both of the host's renderers show such a widget. A subgraph
 * node shows the verdicts of the Slipstream nodes inside it.
 *
 * @typedef {'running' | 'active' | 'inert' | 'off' | 'failed' | 'interrupted'} State
 * @typedef {{ sampler: string, state: State, text: string, times: number }} Line One sampling run, in the order they began;
 *   or several that came to the same; or, without a sampler, what the node says of itself.
 * @typedef {object} Verdict All that one node did in one prompt. A later one replaces it.
 * @property {string} prompt_id
 * @property {string | null} workflow_id Null for a prompt that came without a workflow: there is no node to draw it on.
 * @property {string} node_id The execution id: "7", or "12:7" for node 7 inside subgraph node 12.
 * @property {string} node_type
 * @property {Line[]} lines
 * @property {any} record What was counted or measured. Some types of node draw it: see `details`.
 * @property {Record<string, number>} [totals] Counts of all of the prompt's own runs that are over.
 * @property {boolean} [isLast] Whether it is from a prompt before the current one.
 *
 * @typedef {{ whose: string, verdict: Verdict }} Told A verdict on a node, and of which machine; '' for this server.
 * @typedef {{ state: State, text: string, isLast: boolean, instance: string, source: string }} Row One line on a node.
 *   `instance` names the subgraph node it comes through: the nodes of a subgraph that is used twice are the same objects.
 *   `source` is the execution id of the node whose line it is, and the machine's name before it.
 * @typedef {any} Node A LiteGraph node.
 * @typedef {object} Panel
 * @property {Node} node
 * @property {any} widget
 * @property {HTMLElement} content The rows, and what is drawn beneath them.
 * @property {HTMLElement} rows
 * @property {HTMLElement | null} detail
 * @property {number} height Of the content, in graph units; 0 until it has been laid out.
 * @property {number} bareHeight Of the node without the panel.
 * @property {string} drawn The rows on display, so that equal ones are left alone and a text selection survives.
 * @property {any} record What `detail` shows.
 */
import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'

const EVENT = 'slipstream.verdict'
const ROUTE = '/slipstream/verdicts'

/** Between two times that the nodes are drawn, where verdicts come in faster. */
const PAUSE_MS = 100
/** Rows of a node that shows those of others, above which it shows one of each. */
const MANY_ROWS = 24

const MUTED = 2
const BYPASSED = 4

const STRINGS = {
  en: {
    lastRun: 'last run:',
    times: '{} times',
    running: 'running',
    active: 'active',
    inert: 'no effect',
    off: 'off',
    failed: 'failed',
    interrupted: 'interrupted'
  },
  zh: {
    lastRun: '上次运行：',
    times: '{} 次',
    running: '运行中',
    active: '已生效',
    inert: '未生效',
    off: '已关闭',
    failed: '失败',
    interrupted: '已中断'
  }
}

/** @type {Record<State, string>} */
const SYMBOLS = { running: '…', active: '✓', inert: '!', off: '○', failed: '✕', interrupted: '■' }

/** Which line to show where there is room for one. @type {State[]} */
const WORST_FIRST = ['failed', 'interrupted', 'running', 'inert', 'active', 'off']

/** @type {Record<State, string>} */
const COLORS = {
  running: '#3b82f6',
  active: '#22a557',
  inert: '#e0930a',
  off: '#8a8a8a',
  failed: '#e5484d',
  interrupted: '#a370d8'
}

/** Of nodes that show more than fits into the host's width for a new node. @type {Record<string, number>} */
const NEW_NODE_WIDTHS = { SlipstreamBenchmark: 640, SlipstreamTune: 640, SlipstreamRecipe: 480 }

const STYLE = `
.slipstream-verdict {
  box-sizing: border-box;
  contain: inline-size;
  font: 12px/1.4 Inter, system-ui, sans-serif;
  cursor: text;
  user-select: text;
}
.slipstream-verdict__rows {
  display: flex;
  flex-direction: column;
  gap: 1px;
  overflow: hidden;
  border-radius: 4px;
}
.slipstream-verdict__row {
  display: flex;
  gap: 6px;
  padding: 4px 8px 4px 6px;
  border-left: 3px solid var(--state);
  background: var(--component-node-widget-background, var(--comfy-input-bg));
  color: var(--component-node-foreground, var(--input-text));
}
.slipstream-verdict__row[data-last] { border-left-style: dotted; }
.slipstream-verdict__row[data-last] > * { opacity: 0.7; }
.slipstream-verdict__symbol {
  flex: 0 0 1em;
  text-align: center;
  font-weight: 700;
  color: color-mix(in srgb, var(--state) 75%, currentcolor);
}
.slipstream-verdict__text {
  min-width: 0;
  white-space: pre-wrap;
  overflow-wrap: anywhere;
}
`

/**
 * What some types of node draw beneath their rows, from the verdict's record. Gets what it drew before, to change that
 * in place, and the node; null draws nothing.
 * @type {Map<string, (record: any, element: HTMLElement | null, node: Node) => HTMLElement | null>}
 */
export const details = new Map()

/**
 * Who else tells of nodes: asked at each drawing, by the open workflow's graph, for what gives the verdicts on a node.
 * @type {Set<(root: any) => (id: string, type: string) => Told[]>}
 */
export const elsewhere = new Set()

/** Called after the nodes were brought in line with the verdicts. @type {Set<() => void>} */
export const afterDraw = new Set()

/** The verdicts of each workflow, by the node's execution id. @type {Map<string, Map<string, Verdict>>} */
const workflows = new Map()

/** What is drawn, for as long as its node lives. @type {WeakMap<Node, Panel>} */
const panels = new WeakMap()

/** @type {WeakMap<Element, Panel>} */
const panelOfContent = new WeakMap()

const sizes = new ResizeObserver((entries) => {
  for (const { target, borderBoxSize } of entries) fit(panelOfContent.get(target), borderBoxSize[0].blockSize)
})

/** The pack's, on this server; undefined before its first answer. @type {string | undefined} */
export let version
let isReady = false
let widgetCount = 0
let isDrawing = false
let drawnAt = -PAUSE_MS
/** The client id that the server knows to have this script. @type {string | undefined} */
let announcedAs

/**
 * A text in the host's language.
 * @param {Record<string, Record<string, string>>} strings By language.
 * @param {string} key
 */
export function localized(strings, key) {
  const language = String(app.extensionManager?.setting?.get('Comfy.Locale') ?? 'en').split('-')[0]
  return (strings[language] ?? strings.en)[key]
}

/** @param {Verdict} verdict */
function keep(verdict) {
  if (verdict.workflow_id === null) return
  if (!workflows.has(verdict.workflow_id)) workflows.set(verdict.workflow_id, new Map())
  workflows.get(verdict.workflow_id).set(verdict.node_id, verdict)
}

/** Tells the server that this client draws verdicts itself, and gets the last ones. */
async function announce() {
  if (!api.clientId || api.clientId === announcedAs) return
  announcedAs = api.clientId
  await getLast({ client_id: api.clientId })
}

/** Gets the last verdicts. Of a prompt's nodes also those that equal nodes got in another workflow. @param {Record<string, string>} query */
async function getLast(query) {
  const response = await api.fetchApi(`${ROUTE}?${new URLSearchParams(query)}`)
  if (!response.ok) return
  const answer = await response.json()
  version = answer.version
  for (const verdict of answer.verdicts) {
    const known = workflows.get(verdict.workflow_id)?.get(verdict.node_id)
    const isCurrent = known && !known.isLast
    if (!isCurrent) keep({ ...verdict, isLast: !verdict.lines.some((line) => line.state === 'running') })
  }
  draw()
}

/** Draws soon: at once, or after a pause, since prompts of hundreds of runs tell of each one. */
export function drawSoon() {
  if (isDrawing) return
  isDrawing = true
  setTimeout(() => {
    isDrawing = false
    drawnAt = performance.now()
    draw()
  }, drawnAt + PAUSE_MS - performance.now())
}

/** The verdicts of the open workflow, by the node's execution id. @returns {Map<string, Verdict>} */
export function currentVerdicts() {
  return workflows.get((app.rootGraph ?? app.graph)?.id) ?? new Map()
}

/** Brings every node of the open workflow in line with the verdicts. */
function draw() {
  if (!isReady) return
  const root = app.rootGraph ?? app.graph
  const verdicts = currentVerdicts()
  const others = [...elsewhere].map((tellers) => tellers(root))
  /** @type {Map<Node, Row[]>} */
  const rows = new Map()
  /** @type {Map<Node, any>} */
  const records = new Map()

  /** @param {any} graph @param {string} prefix @param {Node[]} enclosing @param {boolean} isOff */
  function visit(graph, prefix, enclosing, isOff) {
    for (const node of graph.nodes) {
      const id = `${prefix}${node.id}`
      const isNodeOff = isOff || node.mode === MUTED || node.mode === BYPASSED
      if (!rows.has(node)) rows.set(node, [])

      const type = node.comfyClass ?? node.type
      const own = verdicts.get(id)
      if (own?.isLast && isNodeOff) verdicts.delete(id)
      /** @type {Told[]} */
      const told = others.flatMap((tell) => tell(id, type)).filter(({ verdict }) => !(verdict.isLast && isNodeOff))
      if (own?.node_type === type && verdicts.has(id)) {
        records.set(node, own.record)
        told.unshift({ whose: '', verdict: own })
      }
      for (const { whose, verdict } of told) {
        for (const line of verdict.lines) {
          const text = [whose, textOf(verdict, line)].filter(Boolean).join(': ')
          const row = { state: line.state, isLast: Boolean(verdict.isLast), source: `${whose} ${id}` }
          rows.get(node).push({ ...row, text, instance: instanceOf(prefix, enclosing) })
          enclosing.forEach((host, depth) => {
            const instance = instanceOf(id.split(':').slice(0, depth).join(':'), enclosing.slice(0, depth))
            rows.get(host).push({ ...row, text: `${node.title}: ${text}`, instance })
          })
        }
      }
      if (node.subgraph) visit(node.subgraph, `${id}:`, [...enclosing, node], isNodeOff)
    }
  }

  visit(root, '', [], false)
  for (const [node, nodeRows] of rows) show(node, nodeRows, records.get(node))
  for (const listener of afterDraw) listener()
}

/** What is shown of a line: of several, whose it is, and how often it came. @param {Verdict} verdict @param {Line} line */
export function textOf({ lines }, { sampler, times, text }) {
  const often = times > 1 && localized(STRINGS, 'times').replace('{}', String(times))
  const whose = [lines.length > 1 && sampler, often].filter(Boolean).join(', ')
  return whose ? `${whose}: ${text}` : text
}

/** @param {string} prefix @param {Node[]} enclosing */
function instanceOf(prefix, enclosing) {
  return enclosing.length ? `${enclosing.at(-1).title} ${prefix.replace(/:$/, '')}` : ''
}

/** @param {Node} node @param {Row[]} rows @param {any} record */
function show(node, rows, record) {
  if (!rows.length && !panels.has(node)) return
  const panel = panels.get(node) ?? attach(node)
  showDetail(panel, record)
  const shown = few(rows)
  const drawn = JSON.stringify(shown)
  if (drawn === panel.drawn) return

  const wasEmpty = panel.widget.hidden
  const isEmpty = !rows.length
  if (wasEmpty && !isEmpty) panel.bareHeight = isGrown(panel) ? Math.min(panel.bareHeight, node.size[1]) : node.size[1]
  if (isEmpty) shrink(panel)

  panel.drawn = drawn
  panel.widget.hidden = isEmpty
  panel.widget.element.hidden = isEmpty
  panel.rows.ariaBusy = String(rows.some((row) => row.state === 'running'))
  panel.rows.replaceChildren(...elements(shown))
  node.setDirtyCanvas(true, true)
}

/** The rows, or of many that come from several nodes each one's worst, and how many more it has. @param {Row[]} rows @returns {Row[]} */
function few(rows) {
  /** @type {Map<string, Row[]>} */
  const bySource = new Map()
  for (const row of rows) bySource.set(row.source, [...(bySource.get(row.source) ?? []), row])
  if (rows.length <= MANY_ROWS || bySource.size === 1) return rows
  return [...bySource.values()].map((ofOne) => {
    const worst = WORST_FIRST.map((state) => ofOne.findLast((row) => row.state === state)).find(Boolean)
    return ofOne.length > 1 ? { ...worst, text: `${worst.text} (+${ofOne.length - 1})` } : worst
  })
}

/** @param {Panel} panel @param {any} record */
function showDetail(panel, record) {
  const drawDetail = details.get(panel.node.comfyClass ?? panel.node.type)
  if (!drawDetail || record === panel.record) return
  const isEqual = JSON.stringify(record) === JSON.stringify(panel.record)
  panel.record = record
  if (isEqual) return

  const detail = record ? tryDetail(drawDetail, record, panel) : null
  if (detail === panel.detail) return
  panel.detail?.remove()
  panel.detail = detail
  if (detail) panel.content.append(detail)
}

/** What fails to draw one node must not leave the others without their verdicts. */
function tryDetail(drawDetail, record, { detail, node }) {
  try {
    return drawDetail(record, detail, node)
  } catch (error) {
    console.error('Slipstream: the details of a node could not be drawn', error)
    return null
  }
}

/** @param {Row[]} rows @returns {HTMLElement[]} */
function elements(rows) {
  const isShared = new Set(rows.map((row) => row.instance)).size > 1
  return rows.map(({ state, text, isLast, instance }, index) => {
    const isFirstLast = isLast && !rows[index - 1]?.isLast
    const words = [isFirstLast && localized(STRINGS, 'lastRun'), isShared && `${instance}:`, text].filter(Boolean)

    const row = make('div', 'slipstream-verdict__row')
    row.dataset.state = state
    row.toggleAttribute('data-last', isLast)
    row.append(mark(row, state), make('span', 'slipstream-verdict__text', words.join(' ')))
    return row
  })
}

/**
 * Gives an element the colour and the name of a state.
 * @param {HTMLElement} element
 * @param {State} state
 * @returns {HTMLElement} The state's symbol.
 */
export function mark(element, state) {
  const symbol = make('span', 'slipstream-verdict__symbol', SYMBOLS[state] ?? '')
  symbol.role = 'img'
  symbol.ariaLabel = localized(STRINGS, state) ?? state
  element.title = symbol.ariaLabel
  element.style.setProperty('--state', COLORS[state] ?? COLORS.off)
  return symbol
}

/** @param {string} tag @param {string} className @param {string} [text] */
export function make(tag, className, text = '') {
  const element = document.createElement(tag)
  element.className = className
  element.textContent = text
  return element
}

/** Gives a node its panel: once, for as long as the node lives. @param {Node} node @returns {Panel} */
function attach(node) {
  const element = make('div', 'slipstream-verdict')
  // Selecting and copying the text is not dragging, copying or wiring the node.
  for (const type of ['pointerdown', 'copy', 'contextmenu'])
    element.addEventListener(type, (event) => event.stopPropagation())
  // The classic canvas is not an ancestor of its DOM widgets.
  element.addEventListener('wheel', (event) => {
    if (!element.closest('[data-node-id]')) app.canvas.processMouseWheel(event)
  })

  const content = make('div', 'slipstream-verdict__content')
  const rows = make('div', 'slipstream-verdict__rows')
  rows.role = 'status'
  content.append(rows)
  element.append(content)

  const savesValues = 'widgets_values' in node.serialize()
  const neededHeight = () => panel.height + 2 * (panel.widget.margin ?? 0)
  // An undo makes each node anew. The Vue renderer goes on showing the old element where the name is the old one.
  const name = `slipstream_verdict_${++widgetCount}`
  const widget = node.addDOMWidget(name, 'slipstream_verdict', element, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true,
    getMinHeight: () => neededHeight(),
    getMaxHeight: () => neededHeight(),
    // The classic renderer grows a node while it draws it, at its former size: once more.
    afterResize: () => node.setDirtyCanvas(true, true)
  })
  widget.serialize = false
  widget.hidden = true

  /** @type {Panel} */
  const panel = {
    node,
    widget,
    content,
    rows,
    detail: null,
    height: 0,
    bareHeight: node.size[1],
    drawn: '',
    record: undefined
  }
  panels.set(node, panel)
  panelOfContent.set(content, panel)
  sizes.observe(content)

  const { onSerialize } = node
  node.onSerialize = function (data) {
    onSerialize?.call(this, data)
    // A node without another widget saves no list of values, if the host makes it so.
    if (node.widgets.length === 1 && !savesValues) {
      delete data.widgets_values
      delete data.widgets_values_named
    }
    if (isGrown(panel)) data.size = [data.size[0], Math.min(data.size[1], panel.bareHeight)]
  }
  return panel
}

/** Whether the node's height is explained by its panel. A node that its user made taller keeps its height. @param {Panel} panel */
function isGrown({ node, widget, bareHeight, height }) {
  const slack = 24 // what the renderers put around a widget, even a hidden one, and above the first one
  const ownHeight = widget.hidden ? 0 : height + 2 * (widget.margin ?? 0)
  return node.size[1] <= bareHeight + ownHeight + slack
}

/** Takes back the height that the panel added. @param {Panel} panel */
function shrink({ node, ...panel }) {
  if (isGrown({ node, ...panel })) node.setSize([node.size[0], panel.bareHeight])
}

/** @param {Panel} panel @param {number} height 0 where it is not laid out: zoomed away, off screen, in a closed subgraph. */
function fit(panel, height) {
  if (!height || height === panel.height) return
  // Either renderer grows a node by as much as its widgets need, but none takes back what is left over.
  if (panel.widget.element.offsetHeight > height + 1) shrink(panel)
  panel.height = height
  panel.node.setDirtyCanvas(true, true)
}

const style = new CSSStyleSheet()
style.replaceSync(STYLE)
document.adoptedStyleSheets.push(style)

api.addEventListener(EVENT, ({ detail }) => {
  keep(detail)
  drawSoon()
})
api.addEventListener('execution_start', () => {
  for (const verdicts of workflows.values()) for (const verdict of verdicts.values()) verdict.isLast = true
  draw()
})
api.addEventListener('execution_cached', ({ detail }) => {
  // The host's cache knows no workflows: what it answers may have run in another one.
  if (detail.nodes?.length) getLast({ client_id: api.clientId, prompt_id: detail.prompt_id })
})
api.addEventListener('reconnected', () => {
  announcedAs = undefined // it may be another server process
})
api.addEventListener('status', announce)

app.registerExtension({
  name: 'slipstream.verdicts',
  async setup() {
    isReady = true
    await announce()
  },
  /** A saved node gets its own size after this. @param {any} node */
  nodeCreated(node) {
    const width = NEW_NODE_WIDTHS[node.comfyClass ?? node.type]
    if (width) node.setSize([Math.max(node.size[0], width), node.size[1]])
  },
  afterConfigureGraph: draw
})
