/**
 * A graph as LiteGraph has it, of a saved workflow, as far as the commands need one; and the prompt that the page would
 * queue of it. It knows the nodes from the server's object_info; of others what the workflow saved.
 */

const INPUT = -10
const OUTPUT = -20
const MUTED = 2
const BYPASSED = 4
const NO_WIDGET = /^(?!INT$|FLOAT$|STRING$|BOOLEAN$|COMBO$|COMFY_DYNAMICCOMBO_V3$|COLOR$|CURVE$|BOUNDING_BOX$|IMAGECOMPARE$)/

class Link {
  constructor(id, origin_id, origin_slot, target_id, target_slot, type, parentId) {
    Object.assign(this, { id, origin_id, origin_slot, target_id, target_slot, type, parentId })
  }
}

/** Where a subgraph's wires come in, or go out. */
export class Passage {
  constructor(graph, slot) {
    Object.assign(this, { ...slot, graph, linkIds: [] })
  }

  get index() {
    return this.graph.inputNode.slots.indexOf(this)
  }

  /** As SubgraphInput and SubgraphOutput do. */
  connect(slot, node, parentId) {
    const { graph } = this
    const output = node.outputs.indexOf(slot)
    if (output >= 0 && graph.outputNode.slots.includes(this)) {
      for (const id of [...this.linkIds]) graph.cut(id)
      return graph.join(node.id, output, OUTPUT, graph.outputNode.slots.indexOf(this), slot.type, parentId)
    }
    const input = node.inputs.indexOf(slot)
    node.disconnectInput(input)
    return graph.join(INPUT, this.index, node.id, input, slot.type, parentId)
  }
}

export class Graph {
  constructor(root) {
    Object.assign(this, { root: root ?? this, nodes: [], links: new Map(), groups: [] })
    if (!root) Object.assign(this, { ids: { node: 0, link: 0 }, subgraphs: new Map() })
  }

  getLink(id) {
    return this.links.get(Number(id))
  }

  getNodeById(id) {
    return this.nodes.find((node) => String(node.id) === String(id)) ?? null
  }

  add(node) {
    node.id = ++this.root.ids.node
    node.graph = this
    node.order = this.nodes.length
    this.nodes.push(node)
  }

  remove(node) {
    if (!this.nodes.includes(node)) throw new Error(`no node ${node.id} to remove`)
    for (const index of node.inputs.keys()) node.disconnectInput(index)
    for (const { links } of node.outputs) for (const id of [...(links ?? [])]) this.cut(id)
    this.nodes.splice(this.nodes.indexOf(node), 1)
    node.graph = null
  }

  join(origin, slot, target, index, type, parentId) {
    const link = new Link(++this.root.ids.link, origin, slot, target, index, type, parentId)
    this.put(link)
    return link
  }

  put(link) {
    this.links.set(link.id, link)
    if (link.origin_id === INPUT) this.inputNode.slots[link.origin_slot].linkIds.push(link.id)
    else (this.getNodeById(link.origin_id).outputs[link.origin_slot].links ??= []).push(link.id)
    if (link.target_id === OUTPUT) this.outputNode.slots[link.target_slot].linkIds.push(link.id)
    else this.getNodeById(link.target_id).inputs[link.target_slot].link = link.id
  }

  cut(id) {
    const link = this.links.get(id)
    this.links.delete(id)
    const drop = (ids) => ids.splice(ids.indexOf(id), 1)
    if (link.origin_id === INPUT) drop(this.inputNode.slots[link.origin_slot].linkIds)
    else drop(this.getNodeById(link.origin_id).outputs[link.origin_slot].links)
    if (link.target_id === OUTPUT) drop(this.outputNode.slots[link.target_slot].linkIds)
    else this.getNodeById(link.target_id).inputs[link.target_slot].link = null
  }

  /** What must be true of every graph: each wire known at both ends, and of one type. */
  check() {
    const problems = []
    for (const [id, link] of this.links) {
      const from = link.origin_id === INPUT ? this.inputNode.slots[link.origin_slot] : this.getNodeById(link.origin_id)
      const to = link.target_id === OUTPUT ? this.outputNode.slots[link.target_slot] : this.getNodeById(link.target_id)
      const output = link.origin_id === INPUT ? from : from?.outputs[link.origin_slot]
      const input = link.target_id === OUTPUT ? to : to?.inputs[link.target_slot]
      if (!output || !input) problems.push(`wire ${id} leads nowhere`)
      else if (!(output.links ?? output.linkIds).includes(id)) problems.push(`wire ${id} is unknown where it begins`)
      else if (input.link !== id && !input.linkIds?.includes(id)) problems.push(`wire ${id} is unknown where it ends`)
      else if (!fits(output.type, input.type)) problems.push(`wire ${id}: ${output.type} to ${input.type}`)
    }
    return problems
  }
}

function fits(one, other) {
  const free = (type) => !type || type === '*' || String(type).startsWith('COMFY_MATCHTYPE')
  if (free(one) || free(other) || one === other || Array.isArray(one) || Array.isArray(other)) return true
  const types = (type) => String(type).toLowerCase().split(',')
  return types(one).some((type) => types(other).includes(type))
}

export class Node {
  constructor(type, title) {
    Object.assign(this, { type, comfyClass: type, title, mode: 0, order: 0, pos: [0, 0], size: [300, 100] })
    Object.assign(this, { inputs: [], outputs: [], widgets: [], properties: {} })
    this.isVirtualNode = ['Reroute', 'PrimitiveNode', 'Note', 'MarkdownNote'].includes(type)
  }

  connect(slot, target, index, parentId) {
    const output = this.outputs[slot]
    const input = target.inputs[index]
    if (!fits(output.type, input.type)) return null
    target.disconnectInput(index)
    return this.graph.join(this.id, slot, target.id, index, output.type, parentId)
  }

  disconnectInput(index) {
    const { link } = this.inputs[index]
    if (link != null) this.graph.cut(link)
  }

  setSize(size) {
    this.size = [...size]
  }

  getInputLink(index) {
    return this.graph.getLink(this.inputs[index]?.link) ?? null
  }

  clone() {
    const copy = new Node(this.type, this.title)
    const data = JSON.parse(JSON.stringify({ ...this, graph: null, subgraph: null }))
    Object.assign(copy, data, { id: undefined, pos: [...this.pos] })
    for (const input of copy.inputs) input.link = null
    for (const output of copy.outputs) output.links = []
    return copy
  }
}

/** The inputs of a type, as object_info has them: [name, type, options]. */
function inputsOf(info) {
  return ['required', 'optional'].flatMap((group) =>
    Object.entries(info.input?.[group] ?? {}).map(([name, [type, options]]) => [name, Array.isArray(type) ? 'COMBO' : type, options ?? {}, type])
  )
}

/** The names of a type's widgets, in the order that a workflow saves their values in. */
function widgetsOf(info) {
  return inputsOf(info)
    .filter(([, type, options]) => !NO_WIDGET.test(type) && !options.forceInput)
    .flatMap(([name, , options]) => (options.control_after_generate || name === 'seed' || name === 'noise_seed' ? [name, 'control_after_generate'] : [name]))
}

/** As LiteGraph.createNode makes a node. */
export function creator(infos) {
  return (type) => {
    const info = infos[type]
    const node = new Node(type, info?.display_name ?? type)
    if (type === 'Reroute') Object.assign(node, { inputs: [{ name: '', type: '*', link: null }], outputs: [{ name: '', type: '*', links: [] }] })
    if (!info) {
      if (type !== 'Reroute') throw new Error(`no node of type ${type}`)
      return node
    }
    const defaults = Object.fromEntries(inputsOf(info).map(([name, , options, type]) => [name, options.default ?? (Array.isArray(type) ? type[0] : options.options?.[0])]))
    node.inputs = inputsOf(info).map(([name, type, options]) => ({
      name, type, link: null, ...(NO_WIDGET.test(type) || options.forceInput ? {} : { widget: { name } })
    }))
    const options = Object.fromEntries(inputsOf(info).map(([name, , options]) => [name, options]))
    node.widgets = widgetsOf(info).map((name) => ({
      name, value: name === 'control_after_generate' ? 'randomize' : defaults[name], options: options[name] ?? {}
    }))
    node.outputs = info.output.map((type, slot) => ({ name: info.output_name?.[slot] ?? type, type: Array.isArray(type) ? 'COMBO' : type, links: [] }))
    node.size = [300, 30 + 24 * (node.inputs.length + node.widgets.length)]
    return node
  }
}

/** A saved workflow as a graph. */
export function graphOf(workflow, infos) {
  const root = new Graph()
  const definitions = workflow.definitions?.subgraphs ?? []
  for (const definition of definitions) {
    const graph = new Graph(root)
    root.subgraphs.set(definition.id, Object.assign(graph, { id: definition.id, name: definition.name }))
    const passages = (slots) => (slots ?? []).map((slot) => new Passage(graph, slot))
    const io = ({ bounding } = {}, slots) => {
      const [x, y, width, height] = bounding ?? [0, 0, 120, 60]
      return { pos: [x, y], size: [width, height], slots: passages(slots) }
    }
    graph.inputNode = io(definition.inputNode, definition.inputs)
    graph.outputNode = io(definition.outputNode, definition.outputs)
  }
  fill(root, workflow, infos)
  for (const definition of definitions) fill(root.subgraphs.get(definition.id), definition, infos)
  return root
}

function fill(graph, saved, infos) {
  const { ids } = graph.root
  graph.groups = saved.groups ?? []
  for (const data of saved.nodes) {
    const node = new Node(data.type, data.title ?? infos[data.type]?.display_name ?? data.type)
    const size = Array.isArray(data.size) ? data.size : [data.size?.[0] ?? 300, data.size?.[1] ?? 100]
    Object.assign(node, { id: data.id, graph, mode: data.mode ?? 0, order: data.order ?? 0, size: [...size] })
    node.pos = Array.isArray(data.pos) ? [...data.pos] : [data.pos[0], data.pos[1]]
    node.properties = { ...data.properties }
    node.subgraph = graph.root.subgraphs.get(data.type)
    node.inputs = (data.inputs ?? []).map((input) => ({ ...input, saved: input.link, link: null }))
    node.outputs = (data.outputs ?? []).map((output) => ({ ...output, links: [] }))
    node.widgets = savedWidgets(node, data, infos[data.type])
    addMissing(node, infos[data.type])
    if (node.subgraph) node.inputs = instanceInputs(node)
    graph.nodes.push(node)
    ids.node = Math.max(ids.node, data.id)
  }
  for (const data of saved.links ?? []) {
    const link = Array.isArray(data)
      ? new Link(...data)
      : new Link(data.id, data.origin_id, data.origin_slot, data.target_id, data.target_slot, data.type, data.parentId)
    ids.link = Math.max(ids.link, link.id)
    const instance = graph.getNodeById(link.target_id)
    if (instance?.subgraph) link.target_slot = instance.inputs.findIndex(({ saved }) => saved === link.id)
    // Some workflows were saved with wires to nodes that are gone.
    const target = link.target_id === OUTPUT ? graph.outputNode?.slots[link.target_slot] : graph.getNodeById(link.target_id)?.inputs[link.target_slot]
    const origin = link.origin_id === INPUT ? graph.inputNode?.slots[link.origin_slot] : graph.getNodeById(link.origin_id)?.outputs[link.origin_slot]
    if (origin && target) graph.put(link)
  }
}

/** A subgraph node has the inputs of its definition, whatever it was saved with. */
function instanceInputs({ subgraph, inputs }) {
  const left = [...inputs]
  return subgraph.inputNode.slots.map(({ name, type, label }) => {
    const exact = left.findIndex((input) => input.name === name && input.type === type)
    const index = exact >= 0 ? exact : left.findIndex((input) => input.name === name)
    const [found] = index >= 0 ? left.splice(index, 1) : []
    return { name, type, label, ...(found?.widget && { widget: found.widget }), link: null, saved: found?.saved }
  })
}

function savedWidgets(node, { widgets_values: values, widgets_values_named: named }, info) {
  if (named) return Object.entries(named).map(([name, value]) => ({ name, value }))
  if (values && !Array.isArray(values)) return Object.entries(values).map(([name, value]) => ({ name, value }))
  const names = info ? widgetsOf(info) : []
  return (values ?? []).map((value, index) => ({ name: names[index] ?? `value ${index}`, value }))
}

/** A workflow saved by an old page has no input for a widget that nothing is wired to: the page adds it. */
function addMissing(node, info) {
  if (!info) return
  for (const [name, type, options] of inputsOf(info)) {
    if (node.inputs.some((input) => input.name === name)) continue
    const widget = NO_WIDGET.test(type) || options.forceInput ? {} : { widget: { name } }
    node.inputs.push({ name, type, link: null, ...widget })
  }
}

// The prompt

/** What the page would queue: inputs of each node that runs, by execution id. */
export function promptOf(root) {
  const prompt = {}
  visit(root, [])
  for (const { inputs } of Object.values(prompt))
    for (const [name, value] of Object.entries(inputs))
      if (Array.isArray(value) && value.length === 2 && !prompt[value[0]]) delete inputs[name]
  return prompt

  function visit(graph, path) {
    for (const node of graph.nodes) {
      if (node.mode === MUTED || node.mode === BYPASSED || (node.isVirtualNode && !node.subgraph)) continue
      if (node.subgraph) visit(node.subgraph, [...path, node])
      else prompt[idOf(node, path)] = { class_type: node.type, inputs: inputsIn(node, path) }
    }
  }

  function inputsIn(node, path) {
    const inputs = {}
    for (const { name, value } of node.widgets)
      if (name !== 'control_after_generate') inputs[name] = Array.isArray(value) ? { __value__: value } : value
    for (const [index, input] of node.inputs.entries()) {
      const found = resolve(node, index, path)
      if (found) inputs[input.name] = found
    }
    return inputs
  }
}

function idOf(node, path) {
  return [...path, node].map(({ id }) => id).join(':')
}

/** [execution id, slot] that an input comes from; a value of a PrimitiveNode's; null where there is none, or it is the widget's. */
function resolve(node, index, path) {
  const { graph } = node
  const link = graph.getLink(node.inputs[index].link)
  if (!link) return null
  if (link.origin_id === INPUT) return resolve(path.at(-1), link.origin_slot, path.slice(0, -1))
  return comesOut(graph.getNodeById(link.origin_id), link.origin_slot, path, node.inputs[index].type)
}

function comesOut(node, slot, path, type) {
  if (node.mode === MUTED) return null
  if (node.mode === BYPASSED) {
    const same = (input) => fits(input.type, node.outputs[slot].type) && fits(input.type, type)
    const exact = node.inputs.findIndex((input) => input.type === type)
    const index = node.inputs[slot] && same(node.inputs[slot]) ? slot : exact >= 0 ? exact : node.inputs.findIndex(same)
    return index < 0 ? null : resolve(node, index, path)
  }
  if (node.subgraph) {
    const link = node.subgraph.getLink(node.subgraph.outputNode.slots[slot].linkIds[0])
    if (!link) return null
    if (link.origin_id === INPUT) return resolve(node, link.origin_slot, path)
    return comesOut(node.subgraph.getNodeById(link.origin_id), link.origin_slot, [...path, node], type)
  }
  if (node.type === 'Reroute') return resolve(node, 0, path)
  if (node.type === 'PrimitiveNode') return node.widgets[0]?.value
  return node.isVirtualNode ? null : [idOf(node, path), slot]
}
