/**
 * The commands, on a graph. Each looks first, and changes the graph only if it can do what it is for: else it throws a
 * `Refusal`. What it did is told as facts, which words.mjs puts into a sentence.
 *
 * @typedef {import('./walk.mjs').Graph} Graph
 * @typedef {import('./walk.mjs').Node} Node
 * @typedef {import('./walk.mjs').Point} Point
 * @typedef {import('./walk.mjs').End} End
 * @typedef {import('./call.mjs').Given} Given
 * @typedef {[string, ...any]} Fact A key of words.mjs, and what it is about.
 * @typedef {object} Done
 * @property {Fact[]} facts
 * @property {Node[]} nodes Those that are new.
 * @typedef {(type: string) => Node} Create Makes a node that is in no graph yet.
 *
 * @typedef {{ point: Point } | { copy: Node, slot: number, inputs: Map<number, Plain> }} Plain A model without us: a
 *   point that has it, or the copy of a node that is to be made.
 */
import { Refusal, callOf, decodingVae, runOf, runs } from './call.mjs'
import { place, slotPlace } from './place.mjs'
import {
  BENCHMARK, COPY, HOSTS_OWN, MODEL, RECIPE, TUNE, Walk, common, isOn, isOurs, kindOf, nameOf, passedInput, passes,
  switchNode
} from './walk.mjs'

export { Refusal }

// Speed up

/**
 * Puts one Recipe before the samplers of each model, or goes on with what suggests there already.
 * @param {Graph} root
 * @param {string} goal
 * @param {Create} create
 * @returns {Done}
 */
export function speedUp(root, goal, create) {
  const walk = new Walk(root)
  const ends = walk.ends()
  if (!ends.length) throw noSampler(walk)
  const facts = ends.filter(({ chain }) => !chain.length).map(({ node }) => ['noModel', nameOf(node)])
  const served = ends.filter(({ chain }) => chain.length)
  if (!served.length) throw new Refusal(...facts[0])

  const there = new Set(served.map((end) => walk.suggesting(end)).filter(Boolean))
  const groups = grouped(served.filter((end) => !walk.suggesting(end))).flatMap((ends) =>
    // Other packs' wires that are none can't be cut for several at once.
    wiresTo(walk, ends).every((wires) => wires.length) ? [ends] : ends.map((end) => [end])
  )
  for (const node of there) facts.push(goOn(node, goal))
  const nodes = groups.map((ends) => insert(walk, ends, goal, create))
  nodes.forEach((node, index) => {
    const samplers = [...new Set(groups[index].map((end) => nameOf(end.node)))]
    facts.push(['put', nameOf(node), samplers, placeOf(walk, node.graph)])
  })
  return { facts, nodes }
}

/** What a subgraph is called where it is used; nothing for the root. @param {Walk} walk @param {Graph} graph */
function placeOf(walk, graph) {
  return [...new Set((walk.instances.get(graph) ?? []).map(({ title }) => title))]
}

/** @param {Walk} walk */
function noSampler(walk) {
  return new Refusal(walk.nodes.some((node) => node.inputs?.some(({ type }) => type === MODEL)) ? 'noRun' : 'noSampler')
}

/** @param {Node} node Recipe or CPU @param {string} goal @returns {Fact} */
function goOn(node, goal) {
  if (node.type !== RECIPE) return ['suggests', nameOf(node)]
  node.mode = 0
  setWidget(node, 'goal', goal)
  return ['goesOnWith', nameOf(node)]
}

/** Those whose models come through one point are one group. @param {End[]} ends @returns {End[][]} */
function grouped(ends) {
  /** @type {{ ends: End[], chain: Point[] }[]} */
  const groups = []
  for (const end of ends) {
    const group = groups.find(({ chain }) => common([chain, end.chain]).length)
    if (!group) groups.push({ ends: [end], chain: end.chain })
    else {
      group.ends.push(end)
      group.chain = common([group.chain, end.chain])
    }
  }
  return groups.map(({ ends }) => ends)
}

/** Where the model passes last on its way to all of these. @param {End[]} ends */
function meeting(ends) {
  return common(ends.map(({ chain }) => chain))[0]
}

/** The wires from there that lead to each of them. @param {Walk} walk @param {End[]} ends */
function wiresTo(walk, ends) {
  const point = meeting(ends)
  return ends.map((end) => walk.wires(point).filter((link) => leadsTo(walk, point.graph, link, end)))
}

/** Puts a Recipe where the model passes last on its way to all of these. @param {Walk} walk @param {End[]} ends */
function insert(walk, ends, goal, create) {
  const point = meeting(ends)
  const wires = [...new Set(wiresTo(walk, ends).flat())]
  const recipe = addTo(point.graph, create(RECIPE))
  setWidget(recipe, 'goal', goal)
  const after = wires.every(({ parentId }) => parentId === wires[0].parentId) ? wires[0].parentId : undefined
  const targets = wires.map((link) => walk.target(point.graph, link))
  wire(point, recipe, inputNamed(recipe, 'model'), after)
  for (const { node, index } of targets) wireOn(walk.point(point.graph, recipe, 0), node, index)
  place(recipe, around(recipe))
  return recipe
}

/** Whether a wire is part of a model's way to an end. @param {Walk} walk @param {Graph} graph @param {any} link @param {End} end */
function leadsTo(walk, graph, link, end) {
  const { node, index } = walk.target(graph, link)
  if (node === end.node && index === end.index) return true
  const passes = (point) => {
    // As the walk goes up: a point whose earlier ones come over this wire.
    if (!node) return (walk.instances.get(graph) ?? []).some((one) => one === point.node && index === point.slot)
    if (node.subgraph) return point.node === null && point.graph === node.subgraph && point.slot === index
    return point.node === node
  }
  return [...walk.ancestors(end.chain[0], MODEL)].some(passes)
}

// Benchmark and Tune

/**
 * Puts a Benchmark beside a sampler, wired from its own inputs and values: the model without us against as it is.
 * @param {Graph} root
 * @param {Create} create
 * @param {Node} [chosen] A sampler, or its guider; else the first that can be measured.
 * @returns {Done}
 */
export function benchmark(root, create, chosen) {
  return measure(root, create, chosen, BENCHMARK, (walk, call) => {
    const origin = walk.origin(call.taker, call.model)
    const on = [...walk.ancestors(origin, MODEL)].filter(({ node }) => node && isOurs(node) && isOn(node))
    if (!on.length) throw new Refusal('nothingOn', nameOf(call.sampler))
    const baseline = plain(walk, origin, MODEL)
    return { baseline, candidate: { node: call.taker, index: call.model }, ...vaes(walk, call.sampler) }
  })
}

/**
 * Puts a Tune beside a sampler, wired from its own inputs and values, on the model without us.
 * @param {Graph} root
 * @param {Create} create
 * @param {Node} [chosen] A sampler, or its guider; else the first that can be measured.
 * @returns {Done}
 */
export function tune(root, create, chosen) {
  return measure(root, create, chosen, TUNE, (walk, call) => {
    const { sampler } = call
    const vae = decodingVae(walk, sampler)
    if (!vae) throw new Refusal('noPicture', nameOf(sampler))
    if (vae.graph !== sampler.graph) throw new Refusal('pictureOutside', nameOf(sampler))
    return { model: plain(walk, walk.origin(call.taker, call.model), MODEL), vae: { point: vae } }
  })
}

/**
 * Puts a node that measures beside a sampler, wired from its own inputs and values, as far as it has inputs for them.
 * @param {Graph} root
 * @param {Create} create
 * @param {Node | undefined} chosen
 * @param {string} type
 * @param {(walk: Walk, call: import('./call.mjs').Call) => Record<string, Given | Plain>} models What it gets besides.
 * @returns {Done}
 */
function measure(root, create, chosen, type, models) {
  const walk = new Walk(root)
  const samplers = chosen ? [runOf(walk, chosen)] : runs(walk)
  if (!samplers.length) throw noSampler(walk)
  const [sampler, inputs] = firstThatCan(samplers, (sampler) => {
    if (measured(walk, sampler, type)) throw new Refusal('measured', nameOf(sampler))
    const call = callOf(walk, sampler)
    const origin = walk.origin(call.taker, call.model)
    if (!origin || !walk.isMade(origin)) throw new Refusal('noModel', nameOf(call.taker))
    return [sampler, { ...models(walk, call), ...call.inputs }]
  })

  const node = addTo(sampler.graph, create(type))
  const facts = [['measures', nameOf(node), nameOf(sampler), placeOf(walk, node.graph)]]
  const copies = []
  for (const [name, given] of Object.entries(inputs)) {
    const target = inputNamed(node, name)
    if (target < 0) continue
    if ('index' in given || 'value' in given) {
      if (!give(walk, given, node, name)) facts.push(['notWired', name])
    } else wire(make(walk, given, copies), node, target)
  }
  setWidget(node, 'control_after_generate', 'fixed')
  place(node, around(node))
  for (const copy of copies) place(copy, around(copy))
  if (copies.length) facts.push(['copied', copies.map((copy) => copy.title)])
  return { facts, nodes: [node, ...copies] }
}

/** What the first of some that can gives; if none can, its first one's reason. */
function firstThatCan(samplers, attempt) {
  let reason
  for (const sampler of samplers)
    try {
      return attempt(sampler)
    } catch (error) {
      if (!(error instanceof Refusal)) throw error
      // That something is missing is no news where another one has it.
      if (!reason || reason.key === 'goesOn') reason = error
    }
  throw reason
}

/** Whether a node of a type measures a sampler already: from the same model and latent. @param {Walk} walk @param {Node} sampler */
function measured(walk, sampler, type) {
  const latent = walk.origin(sampler, inputNamed(sampler, 'latent_image'))
  return sampler.graph.nodes.some(
    (node) => node.type === type && walk.origin(node, inputNamed(node, 'latent_image')) === latent
  )
}

/** The VAE of the pictures that are compared; the candidate's own one, if we are on it. @param {Walk} walk @param {Node} sampler */
function vaes(walk, sampler) {
  const vae = decodingVae(walk, sampler)
  if (!vae || vae.graph !== sampler.graph) return {}
  const without = plain(walk, vae, 'VAE')
  return 'point' in without && without.point === vae ? { vae: without } : { vae: without, candidate_vae: { point: vae } }
}

/**
 * A model, or VAE, as it would be without us.
 * @param {Walk} walk
 * @param {Point} point
 * @param {string} type
 * @returns {Plain}
 */
function plain(walk, point, type) {
  const { graph, node } = point
  const hasOurs = [...walk.ancestors(point, type)].some((one) => one.node && passes(one.node))
  if (!hasOurs) return { point }
  if (!node) throw new Refusal('outside', graph.name)
  if (passes(node)) return plainInput(walk, node, passedInput(node), type)
  if (node.subgraph && isOn(node)) {
    const through = oursThrough(walk, point)
    if (through === null) throw new Refusal('inside', nameOf(node))
    return plainInput(walk, node, through, type)
  }
  const before = walk.before(point)
  if (before) {
    if (before.length !== 1 || before[0].graph !== graph) throw new Refusal('around', nameOf(node))
    return plain(walk, before[0], type)
  }
  const inputs = walk.inputsOf(node, type).filter((index) => walk.origin(node, index))
  return { copy: node, slot: point.slot, inputs: new Map(inputs.map((i) => [i, plainInput(walk, node, i, type)])) }
}

/** @param {Walk} walk @param {Node} node @param {number} index @param {string} type */
function plainInput(walk, node, index, type) {
  const origin = walk.origin(node, index)
  if (!origin) throw new Refusal('noModel', nameOf(node))
  return plain(walk, origin, type)
}

/** Which input a subgraph node returns at an output by way of our nodes alone; null if it does more. @param {Walk} walk @param {Point} point */
function oursThrough(walk, { node, graph, slot }) {
  let [inner] = walk.before(walk.point(graph, node, slot)) ?? []
  while (inner?.node && passes(inner.node)) inner = walk.origin(inner.node, passedInput(inner.node))
  return inner && !inner.node && inner.graph === node.subgraph ? inner.slot : null
}

/** Makes the copies that a plain model needs. @param {Walk} walk @param {Plain} plain @param {Node[]} copies @returns {Point} */
function make(walk, plain, copies) {
  if ('point' in plain) return plain.point
  const { copy: original, slot, inputs } = plain
  // Of one node that leads to the same model by two ways one copy is enough.
  const known = copies.find((copy) => String(copy.properties[COPY]) === String(original.id))
  if (known) return walk.point(original.graph, known, slot)
  const clone = original.clone()
  clone.id = -1 // what the host takes for none: it would keep that of a clone, whatever it is
  const copy = addTo(original.graph, clone)
  copy.properties[COPY] = original.id
  copies.push(copy)
  for (const index of original.inputs.keys()) {
    const origin = inputs.has(index) ? make(walk, inputs.get(index), copies) : walk.origin(original, index)
    if (origin) wire(origin, copy, index)
  }
  return walk.point(original.graph, copy, slot)
}

/** Gives an input of a node what another one gets. @param {Walk} walk @param {Given} given @param {Node} node @param {string} name */
function give(walk, given, node, name) {
  if ('value' in given) return setWidget(node, name, given.value)
  const origin = walk.origin(given.node, given.index)
  const source = given.node.widgets?.find((widget) => widget.name === given.node.inputs[given.index].name)
  // Also where a wire says it: the widget shows it where the wire is cut.
  if (source) setWidget(node, name, source.value)
  return !origin || Boolean(wire(origin, node, inputNamed(node, name)))
}

// On or off, and remove

/** All nodes of ours. @param {Graph} root */
export function oursIn(root) {
  return new Walk(root).nodes.filter(isOurs)
}

const OFF = 'slipstream_off'

/**
 * Switches off what can be left out, if any of it is on; else switches on again what this switched off.
 * @param {Graph} root
 * @returns {Done}
 */
export function toggle(root) {
  const ours = oursIn(root)
  if (!ours.length) throw new Refusal('nothing')
  const can = ours.filter((node) => ['pass', 'measure'].includes(kindOf(node)))
  const stay = ours.filter((node) => !can.includes(node)).map(nameOf)
  const facts = stay.length ? [['stay', stay]] : []
  if (!can.length) throw new Refusal('onlyStay', stay)

  const on = can.filter(isOn)
  const marked = can.filter((node) => node.properties[OFF])
  const those = on.length ? on : marked.length ? marked : can
  for (const node of those) {
    switchNode(node, !on.length)
    if (on.length) node.properties[OFF] = true
    else delete node.properties[OFF]
  }
  return { facts: [[on.length ? 'off' : 'on', those.length], ...facts], nodes: [] }
}

/**
 * Takes our nodes out and joins the wires again.
 * @param {Graph} root
 * @param {Create} create
 * @returns {Done}
 */
export function remove(root, create) {
  const walk = new Walk(root)
  const ours = walk.nodes.filter(isOurs)
  if (!ours.length) throw new Refusal('nothing')
  const stay = ours.filter((node) => kindOf(node) === 'stay')
  if (stay.length === ours.length) throw new Refusal('onlyStay', stay.map(nameOf))
  const facts = [['removed', ours.length - stay.length]]

  const cut = ours.filter((node) => ['pass', 'measure'].includes(kindOf(node))).flatMap((node) => consumers(walk, node))
  for (const node of ours.filter((node) => kindOf(node) === 'measure' && !passes(node))) node.graph.remove(node)
  for (const node of walk.nodes.filter((node) => COPY in node.properties)) node.graph.remove(node)
  const replaced = ours.filter((node) => kindOf(node) === 'replace').map((node) => replace(walk, node, create))
  const shells = walk.graphs.filter((graph) => graph !== root && graph.nodes.every(passes))
  for (const graph of shells.filter((graph) => graph.nodes.length)) removeShell(walk, graph)
  for (const node of ours.filter(passes))
    if (!shells.includes(node.graph)) takeOut(walk, node, passedInput(node), 0, create)

  if (replaced.length) facts.push(['replaced', replaced.map(nameOf)])
  const bare = [...new Set(cut)].filter((node) => node.graph && !isOurs(node)).map(nameOf)
  if (bare.length) facts.push(['cut', bare])
  if (stay.length) facts.push(['stay', stay.map(nameOf)])
  return { facts, nodes: replaced }
}

/** The nodes that a node's own outputs go to, not what it passes. @param {Walk} walk @param {Node} node @returns {Node[]} */
function consumers(walk, node) {
  const own = [...(node.outputs ?? []).keys()].slice(passes(node) ? 1 : 0)
  const links = own.flatMap((slot) => walk.wires(walk.point(node.graph, node, slot)))
  return links.map((link) => walk.target(node.graph, link).node).filter(Boolean)
}

/** Removes a node, and wires what came in at an input to what an output went to. @param {Walk} walk @param {Node} node */
function takeOut(walk, node, input, output, create) {
  const { graph } = node
  const link = graph.getLink(node.inputs[input].link)
  const origin = walk.origin(node, input)
  const targets = walk.wires(walk.point(graph, node, output)).map((wire) => [walk.target(graph, wire), wire.parentId])
  let from = origin
  if (origin && !origin.node && targets.some(([target]) => !target.node)) {
    // A subgraph's input can't be wired straight to its output.
    const reroute = addTo(graph, create('Reroute'))
    reroute.pos = [...node.pos]
    wire(origin, reroute, 0, link?.parentId)
    from = walk.point(graph, reroute, 0)
  }
  if (from) for (const [target, after] of targets) wireOn(from, target.node, target.index, after ?? link?.parentId)
  graph.remove(node)
}

/** Removes the subgraph nodes of a definition that has our nodes alone. @param {Walk} walk @param {Graph} shell */
function removeShell(walk, shell) {
  for (const instance of walk.instances.get(shell) ?? []) {
    const { graph } = instance
    for (const slot of instance.outputs.keys()) {
      const through = oursThrough(walk, walk.point(graph, instance, slot))
      const origin = through === null ? null : walk.origin(instance, through)
      if (!origin) continue
      const after = graph.getLink(instance.inputs[through].link)?.parentId
      for (const link of walk.wires(walk.point(graph, instance, slot))) {
        const target = walk.target(graph, link)
        wireOn(origin, target.node, target.index, link.parentId ?? after)
      }
    }
    graph.remove(instance)
  }
}

/** Puts the host's own node in the place of one of ours, with all wires and values that it can have. @param {Walk} walk @param {Node} node */
function replace(walk, node, create) {
  const { graph } = node
  const other = addTo(graph, create(HOSTS_OWN[node.type]))
  other.pos = [...node.pos]
  other.mode = node.mode
  for (const { name, value } of node.widgets ?? []) {
    const { min = -Infinity, max = Infinity } = other.widgets.find((widget) => widget.name === name)?.options ?? {}
    // Ours takes a 0 to choose by itself.
    if (value >= min && value <= max) setWidget(other, name, value)
  }
  for (const [index, input] of node.inputs.entries()) {
    const origin = walk.origin(node, index)
    const target = inputNamed(other, input.name)
    if (origin && target >= 0) wire(origin, other, target, graph.getLink(input.link).parentId)
  }
  for (const link of walk.wires(walk.point(graph, node, 0))) {
    const { node: target, index } = walk.target(graph, link)
    wireOn(walk.point(graph, other, 0), target, index, link.parentId)
  }
  graph.remove(node)
  return other
}

// The graph

/** @param {Graph} graph @param {Node} node */
function addTo(graph, node) {
  graph.add(node)
  return node
}

/** @param {Node} node @param {string} name */
function inputNamed(node, name) {
  return node.inputs.findIndex((input) => input.name === name)
}

/** @param {Node} node @param {string} name @param {any} value */
function setWidget(node, name, value) {
  const widget = node.widgets?.find((widget) => widget.name === name)
  if (widget) widget.value = value
  return Boolean(widget)
}

/** @param {Point} point @param {Node} node @param {number} index @param {any} [after] The reroute on the wire that comes last. */
function wire({ graph, node: source, slot }, node, index, after) {
  if (source) return source.connect(slot, node, index, after)
  const input = graph.inputNode.slots[slot]
  const widget = node.getWidgetFromSlot?.(node.inputs[index])
  // The host warns of it.
  if (widget && input.matchesWidget && !input.matchesWidget(widget)) return null
  return input.connect(node.inputs[index], node, after)
}

/** Also to a subgraph's output, where there is no node. @param {Point} point @param {Node | null} node @param {number} index @param {any} [after] */
function wireOn(point, node, index, after) {
  if (node) return wire(point, node, index, after)
  const { graph, node: source, slot } = point
  return graph.outputNode.slots[index].connect(source.outputs[slot], source, after)
}

/** Where a node's wires begin and end. @param {Node} node @returns {import('./place.mjs').Wires} */
function around(node) {
  const walk = new Walk(node.graph)
  const from = [...node.inputs.keys()].flatMap((index) => {
    const origin = walk.origin(node, index)
    return origin ? [ioPlace(origin)] : []
  })
  const to = [...node.outputs.keys()].flatMap((slot) =>
    walk.wires(walk.point(node.graph, node, slot)).map((link) => {
      const { node: target, index } = walk.target(node.graph, link)
      return target ? slotPlace(target, index, true) : [...node.graph.outputNode.pos]
    })
  )
  return { from, to }
}

/** @param {Point} point */
function ioPlace({ graph, node, slot }) {
  if (node) return slotPlace(node, slot, false)
  const [x, y] = graph.inputNode.pos
  return [x + (graph.inputNode.size?.[0] ?? 0), y]
}
