/**
 * The walk over a workflow's graph that serves all commands: which nodes sample, where their models come from, which
 * nodes are ours. It changes nothing, and needs of a graph only what LiteGraph's have: no page.
 *
 * @typedef {any} Graph A LiteGraph graph, the root or a subgraph's definition.
 * @typedef {any} Node A LiteGraph node.
 * @typedef {any} Link
 * @typedef {object} Point Where wires begin: an output of a node, or where a subgraph's input comes in. Equal ones are
 *   the same object.
 * @property {Graph} graph
 * @property {Node | null} node Null for a subgraph's input.
 * @property {number} slot
 * @typedef {object} End A model's way into a sampling run.
 * @property {Node} node
 * @property {number} index The input.
 * @property {Point[]} chain What every way of the model there passes, nearest first; empty if none comes there.
 */

const MUTED = 2
const BYPASSED = 4
const SUBGRAPH_INPUT = -10
const SUBGRAPH_OUTPUT = -20

export const MODEL = 'MODEL'
export const RECIPE = 'SlipstreamRecipe'
export const BENCHMARK = 'SlipstreamBenchmark'
export const TUNE = 'SlipstreamTune'

/** Nodes that only measure. They sample, or look at samplers, beside the workflow. */
const MEASURES = new Set([BENCHMARK, TUNE, 'SlipstreamReport'])

/** What of the host's does the same, if less well. */
export const HOSTS_OWN = { SlipstreamVAEDecodeTiled: 'VAEDecodeTiled', SlipstreamVAEEncodeTiled: 'VAEEncodeTiled' }

/** Two of these on one model would have to agree on all. */
const SUGGESTS = new Set([RECIPE, 'SlipstreamCPU', TUNE, 'SlipstreamLoadPlan'])

/** The property of a copy of a node that a model without us needed. */
export const COPY = 'slipstream_baseline'

/** @param {Node} node */
export function isOurs(node) {
  return kindOf(node) !== null
}

/**
 * What a node is to the commands. `pass`: it returns what came in, so without it the workflow is whole. `measure`: it
 * only measures. `replace`: the host has a node for it. `stay`: the workflow needs it.
 * @param {Node} node
 * @returns {'pass' | 'measure' | 'replace' | 'stay' | null} Null if it is not ours.
 */
export function kindOf(node) {
  if (!String(node.type).startsWith('Slipstream')) return null
  if (MEASURES.has(node.type)) return 'measure'
  if (node.type in HOSTS_OWN) return 'replace'
  return passedInput(node) >= 0 ? 'pass' : 'stay'
}

/** What of ours may come out as it came in. */
const PASSED = new Set([MODEL, 'VAE'])

/** Which input a node of ours returns as its first output; -1 if it makes something of its own. @param {Node} node */
export function passedInput(node) {
  const { type, name } = node.outputs[0]
  return node.inputs.findIndex((input) => (PASSED.has(type) && input.type === type) || (input.name === name && name === 'value'))
}

/** Whether a node is of ours and returns what came in, so that wires can go past it. @param {Node} node */
export function passes(node) {
  return ['pass', 'measure'].includes(kindOf(node)) && passedInput(node) >= 0
}

/** @param {Node} node */
export function isOn(node) {
  return node.mode !== MUTED && node.mode !== BYPASSED
}

/** @param {Node} node @param {boolean} on */
export function switchNode(node, on) {
  node.mode = on ? 0 : passes(node) ? BYPASSED : MUTED
}

/** As the verdicts name a node: "KSampler 3". @param {Node} node */
export function nameOf(node) {
  return `${node.title || node.type} ${node.id}`
}

/** @param {Graph} graph @param {any} id @returns {Link | undefined} */
function linkOf(graph, id) {
  return id == null ? undefined : graph.getLink(id)
}

export class Walk {
  /** @type {Map<any, Map<number, Point>>} By node, or by graph for what comes in. */
  #points = new Map()
  /** @type {Map<Point, Point[]>} */
  #chains = new Map()

  /** @param {Graph} root */
  constructor(root) {
    this.root = root
    /** Each definition once, however often it is used. @type {Graph[]} */
    this.graphs = []
    /** The subgraph nodes of each definition. @type {Map<Graph, Node[]>} */
    this.instances = new Map()
    this.#visit(root)
  }

  /** @param {Graph} graph */
  #visit(graph) {
    if (this.graphs.includes(graph)) return
    this.graphs.push(graph)
    for (const node of graph.nodes) {
      if (!node.subgraph) continue
      this.instances.set(node.subgraph, [...(this.instances.get(node.subgraph) ?? []), node])
      this.#visit(node.subgraph)
    }
  }

  /** All nodes, those of a graph in the order they run. */
  get nodes() {
    return this.graphs.flatMap((graph) => [...graph.nodes].sort((one, other) => one.order - other.order))
  }

  /** Whether a node runs when the workflow does. @param {Node} node */
  isLive(node) {
    return isOn(node) && this.isLiveGraph(node.graph)
  }

  /** @param {Graph} graph */
  isLiveGraph(graph) {
    return graph === this.root || (this.instances.get(graph) ?? []).some((instance) => this.isLive(instance))
  }

  // Wires

  /** @param {Graph} graph @param {Node | null} node @param {number} slot @returns {Point} */
  point(graph, node, slot) {
    const key = node ?? graph
    if (!this.#points.has(key)) this.#points.set(key, new Map())
    const points = this.#points.get(key)
    if (!points.has(slot)) points.set(slot, { graph, node, slot })
    return points.get(slot)
  }

  /** Where the wire to an input begins. @param {Node} node @param {number} index @returns {Point | null} */
  origin(node, index) {
    return this.#originOf(node.graph, linkOf(node.graph, node.inputs?.[index]?.link))
  }

  /** @param {Graph} graph @param {Link | undefined} link */
  #originOf(graph, link) {
    if (!link) return null
    if (Number(link.origin_id) === SUBGRAPH_INPUT) return this.point(graph, null, link.origin_slot)
    const node = graph.getNodeById(link.origin_id)
    return node && this.point(graph, node, link.origin_slot)
  }

  /** The wires that begin at a point. @param {Point} point @returns {Link[]} */
  wires({ graph, node, slot }) {
    const ids = node ? node.outputs[slot]?.links : graph.inputNode.slots[slot]?.linkIds
    return [...(ids ?? [])].map((id) => linkOf(graph, id)).filter(Boolean)
  }

  /** What a wire leads to: a node's input, or how a subgraph's output goes on. @param {Graph} graph @param {Link} link */
  target(graph, link) {
    const isOutput = Number(link.target_id) === SUBGRAPH_OUTPUT
    return { node: isOutput ? null : graph.getNodeById(link.target_id), index: link.target_slot }
  }

  /** Where what comes out at a point came from, if it only passes: null where a node makes it. @param {Point} point @returns {Point[] | null} */
  before(point) {
    const { graph, node, slot } = point
    if (!node) return this.#outside(graph, slot)
    if (node.mode === MUTED) return []
    if (node.mode === BYPASSED) return this.#some(this.origin(node, bypassedInput(node, slot)))
    if (node.subgraph) {
      const inside = node.subgraph.outputNode.slots[slot]
      return this.#some(this.#originOf(node.subgraph, linkOf(node.subgraph, inside?.linkIds?.[0])))
    }
    if (!node.isVirtualNode || node.type === 'PrimitiveNode') return null
    // Reroutes, and other packs' pairs of nodes with no wire between.
    const virtual = node.resolveVirtualOutput?.(slot)
    if (virtual) return [this.point(virtual.node.graph, virtual.node, virtual.slot)]
    return this.#some(this.#originOf(graph, node.getInputLink?.(slot)))
  }

  /** @param {Point | null} point */
  #some(point) {
    return point ? [point] : []
  }

  /** What the subgraph nodes of a definition get at an input. @param {Graph} graph @param {number} slot */
  #outside(graph, slot) {
    const instances = this.instances.get(graph) ?? []
    const live = instances.filter((instance) => this.isLive(instance))
    return (live.length ? live : instances).flatMap((instance) => this.#some(this.origin(instance, slot)))
  }

  /** The points that make what comes out at a point: mostly one. @param {Point} point @returns {Point[]} */
  makers(point, seen = new Set()) {
    if (seen.has(point)) return []
    seen.add(point)
    const before = this.before(point)
    return before ? before.flatMap((earlier) => this.makers(earlier, seen)) : [point]
  }

  /** The one node that makes what is wired to an input. @param {Node} node @param {number} index @returns {Point | null} */
  maker(node, index) {
    const origin = this.origin(node, index)
    const makers = origin ? this.makers(origin) : []
    return makers.length === 1 ? makers[0] : null
  }

  /** The inputs of a node that a value of a type comes in by. @param {Node} node @param {string} type @returns {number[]} */
  inputsOf(node, type) {
    const isOf = (input) => input.type === type || linkOf(node.graph, input.link)?.type === type
    return [...(node.inputs ?? []).keys()].filter((index) => isOf(node.inputs[index]))
  }

  /** What a value of a type at a point was made of, one node or passage back. @param {Point} point @param {string} type @returns {Point[]} */
  earlier(point, type) {
    const passed = this.before(point)
    if (passed) return passed
    return this.inputsOf(point.node, type).flatMap((index) => this.#some(this.origin(point.node, index)))
  }

  /** Every point that a value of a type at a point comes by, itself too. @param {Point} point @param {string} type @returns {Set<Point>} */
  ancestors(point, type, found = new Set()) {
    if (found.has(point)) return found
    found.add(point)
    for (const earlier of this.earlier(point, type)) this.ancestors(earlier, type, found)
    return found
  }

  /** Whether any node makes the model at a point: a muted one makes nothing. @param {Point} point */
  isMade(point) {
    return [...this.ancestors(point, MODEL)].some((one) => this.before(one) === null)
  }

  /** What every way of a model to a point passes, nearest first. @param {Point} point @returns {Point[]} */
  chain(point) {
    if (!this.#chains.has(point)) {
      this.#chains.set(point, [point]) // for a loop
      const chains = this.earlier(point, MODEL).map((earlier) => this.chain(earlier))
      this.#chains.set(point, [point, ...common(chains)])
    }
    return this.#chains.get(point)
  }

  // Samplers

  /** The ways of models into sampling runs, of nodes that run. @returns {End[]} */
  ends() {
    const samplers = this.nodes.filter((node) => this.isLive(node) && isSampler(node))
    return samplers.flatMap((node) =>
      this.inputsOf(node, MODEL).map((index) => {
        const origin = this.origin(node, index)
        return { node, index, chain: origin && this.isMade(origin) ? this.chain(origin) : [] }
      })
    )
  }

  /** The nodes of ours that a model at an end has passed. @param {End} end @returns {Node[]} */
  onModel({ chain }) {
    if (!chain.length) return []
    const passed = [...this.ancestors(chain[0], MODEL)].map(({ node }) => node)
    return [...new Set(passed)].filter((node) => node && isOurs(node))
  }

  /** The node that suggests methods to a model, if one does, or could if it were on. @param {End} end */
  suggesting(end) {
    return this.onModel(end).find((node) => node.type === RECIPE || (SUGGESTS.has(node.type) && isOn(node)))
  }
}

/** Samples with a MODEL by itself, or makes a guider of it. @param {Node} node */
export function isSampler(node) {
  if (MEASURES.has(node.type) || node.subgraph) return false
  const inputs = node.inputs ?? []
  if (!inputs.some(({ type }) => type === MODEL)) return false
  const samples = ({ name, type }) => type === 'SAMPLER' || name === 'sampler_name'
  return (
    (node.outputs ?? []).some(({ type }) => type === 'GUIDER') ||
    inputs.some(samples) ||
    (node.widgets ?? []).some(samples)
  )
}

/** What all chains have, in the order of the first. @param {Point[][]} chains */
export function common([first, ...others]) {
  return (first ?? []).filter((point) => others.every((other) => other.includes(point)))
}

/** Which input a bypassed node passes on at an output, as the host has it. @param {Node} node @param {number} slot */
function bypassedInput(node, slot) {
  const inputs = node.inputs ?? []
  const { type } = node.outputs[slot]
  if (type === '*' || type === '') return inputs.length > slot ? slot : 0
  if (inputs[slot]?.type === type) return slot
  const exact = inputs.findIndex((input) => input.type === type)
  return exact >= 0 ? exact : inputs.findIndex((input) => input.type === '*' || String(input.type).split(',').includes(type))
}
