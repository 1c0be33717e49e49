/**
 * Shows, on the nodes of a workflow that ComfyUI-Distributed spreads over workers, what each worker says of its own run.
 *
 * A worker is a whole ComfyUI, which keeps the verdicts of its runs by workflow and node, and both are the same there as
 * here. Nothing of them comes with the pictures that it sends: this page asks it, as Distributed's own page asks whether
 * it is there. The servers ask each other nothing.
 *
 * @typedef {import('./verdicts.js').Verdict} Verdict
 * @typedef {import('./verdicts.js').State} State
 * @typedef {{ id: string, name: string, host?: string, port?: number, type?: string, enabled?: boolean }} Configured
 * @typedef {object} Worker
 * @property {string} name
 * @property {string} address
 * @property {boolean | undefined} hasPack Asked once for each run; undefined as long as it has not answered in it.
 * @property {Map<string, Verdict>} verdicts By workflow and node.
 * @property {Set<string>} before The prompts that it was done with, or busy with, when the last one was queued here.
 * @property {{ state: State, text: string } | null} trouble
 */
import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'
import { drawSoon, elsewhere, localized, version } from './verdicts.js'

const ROUTE = '/slipstream/verdicts'
const OURS = 'Slipstream'
/** One of ours, of which a worker is asked whether it has it: a route that it lacks answers no other server's page. */
const ONE_OF_OURS = 'SlipstreamFreeU'
/** Distributed sends a workflow to its workers if it has one of these. */
const SPREADING = ['DistributedCollector', 'UltimateSDUpscaleDistributed']

const MUTED = 2
const BYPASSED = 4

/** Between two times that the workers are asked. */
const PAUSE_MS = 1000
/** How long a worker may take to answer: one that computes answers late. */
const PATIENCE_MS = 10_000
const TOAST_MS = 20_000

const STRINGS = {
  en: {
    missing:
      'Slipstream is not installed there, so Distributed cannot run this workflow on it: install it there, or switch this worker off',
    other: 'runs Slipstream {}, but this server {}: pictures may differ until both have the same version',
    unknown: 'of another version',
    silent: 'does not answer and takes no part: it is off, or runs without --enable-cors-header',
    lost: 'stopped answering in the middle: pictures that it had not sent are lost'
  },
  zh: {
    missing: '该机器未安装 Slipstream，Distributed 无法在其上运行此工作流：请在该机器上安装，或停用此工作机',
    other: '该机器的 Slipstream 版本为 {}，而本服务器为 {}：在两者版本一致之前，图像可能不同',
    unknown: '其他版本',
    silent: '没有应答，不参与本次运行：它已关闭，或启动时未加 --enable-cors-header',
    lost: '中途停止应答：尚未送回的图像已丢失'
  }
}

/** Those that are switched on, by id. @type {Map<string, Worker>} */
const workers = new Map()

/** Prompts of this page that run here. @type {Set<string>} */
const running = new Set()
let isWatching = false
let wake = () => {}
/** Whether this page says when a prompt is queued, and not only when it runs. */
let saysQueueing = false
let hasOpened = false

/** Whether the open workflow has a node for which Distributed asks its workers. @param {any} graph @returns {boolean} */
function isSpread(graph) {
  return graph.nodes.some(
    (node) =>
      node.mode !== MUTED &&
      node.mode !== BYPASSED &&
      (SPREADING.includes(node.comfyClass ?? node.type) || (node.subgraph && isSpread(node.subgraph)))
  )
}

const rootGraph = () => app.rootGraph ?? app.graph

/** @param {string} workflow @param {string} node */
const keyOf = (workflow, node) => `${workflow} ${node}`

/** Where this page reaches a worker. @param {Configured} worker */
function addressOf({ host, port, type }) {
  const given = (host || location.hostname).trim().replace(/\/+$/, '')
  if (/^https?:/i.test(given)) return given
  const isSecure = type === 'cloud' || port === 443 || given.endsWith('.proxy.runpod.net')
  const isWhole = given.includes(':') || given.endsWith('.proxy.runpod.net')
  return `${isSecure ? 'https' : 'http'}://${isWhole ? given : `${given}:${port || 8188}`}`
}

/** Reads which workers are switched on; what is known of them stays. */
async function readWorkers() {
  const response = await api.fetchApi('/distributed/config')
  if (!response.ok) return
  /** @type {Configured[]} */
  const found = ((await response.json()).workers ?? []).filter(({ enabled }) => enabled)
  const ids = new Set(found.map(({ id }) => String(id)))
  for (const id of workers.keys()) if (!ids.has(id)) workers.delete(id)
  for (const worker of found) {
    const { verdicts, before } = workers.get(String(worker.id)) ?? { verdicts: new Map(), before: new Set() }
    const name = String(worker.name || worker.id)
    const address = addressOf(worker)
    workers.set(String(worker.id), { name, address, verdicts, before, hasPack: undefined, trouble: null })
  }
}

/** @param {Worker} worker @param {string} path */
async function get({ address }, path) {
  const response = await fetch(address + path, { cache: 'no-store', signal: AbortSignal.timeout(PATIENCE_MS) })
  if (!response.ok) throw new Error(`${response.status}`)
  return await response.json()
}

/** Asks a worker. @param {Worker} worker */
async function look(worker) {
  try {
    worker.hasPack ??= ONE_OF_OURS in (await get(worker, `/object_info/${ONE_OF_OURS}`))
    if (!worker.hasPack) {
      worker.verdicts.clear()
      worker.trouble = { state: 'failed', text: localized(STRINGS, 'missing') }
      return
    }
    const answer = await get(worker, ROUTE)
    const isSame = answer.version === version
    const versions = [answer.version ?? localized(STRINGS, 'unknown'), version]
    const other = () => versions.reduce((text, one) => text.replace('{}', one), localized(STRINGS, 'other'))
    worker.trouble = isSame ? null : { state: 'inert', text: other() }
    worker.verdicts = new Map(answer.verdicts.map((one) => [keyOf(one.workflow_id, one.node_id), one]))
  } catch {
    // A page is not told whether there is no answer, or none for it.
    const wasThere = worker.hasPack !== undefined
    worker.trouble = {
      state: wasThere ? 'failed' : 'inert',
      text: localized(STRINGS, wasThere ? 'lost' : 'silent')
    }
    for (const [key, verdict] of worker.verdicts) if (isRunning(verdict)) worker.verdicts.delete(key)
  }
}

/** @param {Verdict} verdict */
const isRunning = (verdict) => verdict.lines.some(({ state }) => state === 'running')

/** Whether a worker was last heard to run a prompt of the open workflow. @param {Worker} worker */
const isBusy = ({ verdicts }) =>
  [...verdicts.values()].some((verdict) => verdict.workflow_id === rootGraph().id && isRunning(verdict))

/** Asks all workers. */
async function lookAtAll() {
  await Promise.all([...workers.values()].map(look))
  drawSoon()
}

/** All that a worker has told of so far is from before what is queued now. @param {Worker} worker */
function close(worker) {
  worker.before = new Set([...worker.verdicts.values()].map(({ prompt_id }) => prompt_id))
}

/** Gets what the workers said last, for the first workflow that is opened and wants them. */
async function open() {
  if (hasOpened || !isSpread(rootGraph())) return
  hasOpened = true
  await readWorkers()
  await lookAtAll()
  for (const worker of workers.values()) {
    close(worker)
    // That one is off matters when it is wanted.
    worker.trouble = null
  }
  drawSoon()
  if ([...workers.values()].some(isBusy)) watch()
}

/** A prompt is queued: before Distributed sends it to them, it is said which workers it can't do with. */
async function begin() {
  if (!isSpread(rootGraph())) return
  hasOpened = true
  for (const worker of workers.values()) close(worker)
  await readWorkers()
  await lookAtAll()
  for (const { name, hasPack, trouble } of workers.values())
    // The prompt will be refused, with a dialog of the host over the nodes.
    if (hasPack === false)
      app.extensionManager.toast.add({ severity: 'error', summary: OURS, detail: `${name}: ${trouble.text}`, life: TOAST_MS })
}

/** Asks the workers again and again, for as long as the prompt runs here or on one of them, and once more. */
async function watch() {
  if (isWatching) return
  isWatching = true
  try {
    for (let isOver = false; !isOver; ) {
      const isOverHere = !running.size
      await lookAtAll()
      isOver = isOverHere && ![...workers.values()].some(isBusy)
      if (!isOver)
        await new Promise((resolve) => {
          wake = () => resolve(undefined)
          setTimeout(wake, PAUSE_MS)
        })
    }
  } finally {
    isWatching = false
  }
}

elsewhere.add((root) => {
  const isShown = workers.size > 0 && isSpread(root)
  return (id, type) => {
    if (!isShown || !type?.startsWith(OURS)) return []
    return [...workers.values()].flatMap(({ name, verdicts, before, trouble }) => {
      const told = []
      const verdict = verdicts.get(keyOf(root.id, id))
      if (verdict?.node_type === type)
        told.push({
          whose: name,
          verdict: { ...verdict, isLast: before.has(verdict.prompt_id) && !isRunning(verdict) }
        })
      if (trouble) told.push({ whose: name, verdict: { lines: [{ sampler: '', times: 1, ...trouble }] } })
      return told
    })
  }
})

/** @param {() => Promise<void>} act */
const tried = (act) => () => act().catch((error) => console.error('Slipstream: the workers could not be asked', error))

api.addEventListener('promptQueueing', () => {
  saysQueueing = true
  tried(begin)()
})
api.addEventListener('execution_start', async ({ detail }) => {
  if (!isSpread(rootGraph())) return
  running.add(detail.prompt_id)
  if (!saysQueueing) await tried(begin)()
  tried(watch)()
})
for (const end of ['execution_success', 'execution_error', 'execution_interrupted'])
  api.addEventListener(end, ({ detail }) => {
    running.delete(detail.prompt_id)
    wake()
  })

app.registerExtension({
  name: 'slipstream.workers',
  afterConfigureGraph: tried(open)
})
