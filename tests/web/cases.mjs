/**
 * What the commands make of small graphs, each with one thing that workflows have: node cases.mjs JOB, where JOB is a
 * file of { infos }. Writes each case's name and its failure, or null, as JSON.
 */
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'

import { Refusal, benchmark, remove, speedUp, toggle, tune } from '../../web/js/commands/edit.mjs'
import { WORDS, sentence } from '../../web/js/commands/words.mjs'
import { Walk, isOurs } from '../../web/js/commands/walk.mjs'
import { Graph, Node, Passage, creator, promptOf } from './graph.mjs'

const { infos } = JSON.parse(readFileSync(process.argv[2], 'utf-8'))
const create = creator(infos)

/** A workflow from a loader to a saved picture, to be changed by a case. */
class Flow {
  constructor(root = new Graph(), within = root) {
    Object.assign(this, { root, within })
  }

  add(type, inputs = {}, values = {}) {
    const node = create(type)
    this.within.add(node)
    for (const [name, [source, slot = 0]] of Object.entries(inputs)) this.wire(source, slot, node, name)
    for (const [name, value] of Object.entries(values)) widget(node, name).value = value
    return node
  }

  wire(source, slot, node, name) {
    const index = node.inputs.findIndex((input) => input.name === name)
    assert.ok(index >= 0 && source.connect(slot, node, index), `${source.type} to ${node.type}.${name}`)
  }

  /** Loader, prompts, latent, sampler, decoder, saver. */
  static basic({ sampler = 'KSampler', model = (flow, loader) => [loader] } = {}) {
    const flow = new Flow()
    flow.loader = flow.add('CheckpointLoaderSimple')
    flow.positive = flow.add('CLIPTextEncode', { clip: [flow.loader, 1] })
    flow.negative = flow.add('CLIPTextEncode', { clip: [flow.loader, 1] })
    flow.latent = flow.add('EmptyLatentImage')
    flow.sampler = flow.sample(model(flow, flow.loader), sampler)
    flow.decode = flow.add('VAEDecode', { samples: [flow.sampler], vae: [flow.loader, 2] })
    flow.save = flow.add('SaveImage', { images: [flow.decode] })
    return flow
  }

  sample(model, type = 'KSampler', latent = [this.latent]) {
    const prompts = { positive: [this.positive], negative: [this.negative], latent_image: latent }
    return this.add(type, { model, ...prompts }, { [type === 'KSampler' ? 'seed' : 'noise_seed']: 7, steps: 12 })
  }

  /** Makes a subgraph node of a definition that `fill` fills, with inputs and outputs of some types. */
  subgraph(inputs, outputs, fill) {
    const definition = Object.assign(new Graph(this.root), { id: `sub-${this.root.subgraphs.size}`, name: 'Inner' })
    definition.inputNode = { pos: [-300, 0], size: [120, 60], slots: [] }
    definition.outputNode = { pos: [3000, 0], size: [120, 60], slots: [] }
    for (const [list, node] of [[inputs, definition.inputNode], [outputs, definition.outputNode]])
      node.slots.push(...list.map((type) => new Passage(definition, { type, name: type })))
    this.root.subgraphs.set(definition.id, definition)
    fill(new Flow(this.root, definition), definition)
    return definition
  }

  use(definition, inputs) {
    const node = new Node(definition.id, 'Inner')
    node.subgraph = definition
    node.isVirtualNode = true
    node.inputs = definition.inputNode.slots.map(({ name, type }) => ({ name, type, link: null }))
    node.outputs = definition.outputNode.slots.map(({ name, type }) => ({ name, type, links: [] }))
    this.within.add(node)
    for (const [name, [source, slot = 0]] of Object.entries(inputs)) this.wire(source, slot, node, name)
    return node
  }
}

const widget = (node, name) => node.widgets.find((widget) => widget.name === name)
const ours = (root) => new Walk(root).nodes.filter(isOurs)
const ofType = (root, type) => new Walk(root).nodes.filter((node) => node.type === type)
const from = (node, name) => {
  const link = node.graph.getLink(node.inputs.find((input) => input.name === name).link)
  return link && (node.graph.getNodeById(link.origin_id) ?? link.origin_id)
}
const refuses = (key, command) => assert.throws(command, (error) => error instanceof Refusal && error.key === key, key)

/** Runs a command, and checks that Remove then gives what was before. */
function undone(root, command) {
  const before = promptOf(root)
  const done = command()
  remove(root, create)
  assert.deepEqual(promptOf(root), before)
  return done
}

const CASES = {
  'Speed up puts a Recipe before the sampler, and is taken back'() {
    const { root, loader, sampler } = Flow.basic()
    const before = promptOf(root)
    const { nodes, facts } = speedUp(root, 'fastest', create)
    assert.equal(from(sampler, 'model'), nodes[0])
    assert.equal(from(nodes[0], 'model'), loader)
    assert.equal(widget(nodes[0], 'goal').value, 'fastest')
    assert.deepEqual(facts.map(([key]) => key), ['put'])
    remove(root, create)
    assert.deepEqual(promptOf(root), before)
    refuses('nothing', () => remove(root, create))
  },

  'The second time it sets the goal of the Recipe that is there, also of one that was bypassed'() {
    const { root } = Flow.basic()
    const [recipe] = speedUp(root, 'fastest', create).nodes
    recipe.mode = 4
    const { nodes, facts } = speedUp(root, 'balanced', create)
    assert.deepEqual([nodes, facts[0][0], recipe.mode, widget(recipe, 'goal').value], [[], 'goesOnWith', 0, 'balanced'])
    assert.equal(ours(root).length, 1)
  },

  'CPU suggests too: no Recipe beside it'() {
    const { root } = Flow.basic({ model: (flow, loader) => [flow.add('SlipstreamCPU', { model: [loader] })] })
    assert.deepEqual(speedUp(root, 'fastest', create).facts.map(([key]) => key), ['suggests'])
    assert.equal(ours(root).length, 1)
    // Bypassed, it suggests nothing.
    ours(root)[0].mode = 4
    assert.deepEqual(speedUp(root, 'fastest', create).facts.map(([key]) => key), ['put'])
    assert.equal(ofType(root, 'SlipstreamCPU')[0].mode, 4)
  },

  'A method of ours that is there stays, and a Recipe comes after it'() {
    const { root, sampler } = Flow.basic({ model: (flow, loader) => [flow.add('SlipstreamDeepCache', { model: [loader] })] })
    const [recipe] = speedUp(root, 'balanced', create).nodes
    assert.equal(from(sampler, 'model'), recipe)
    assert.equal(from(recipe, 'model').type, 'SlipstreamDeepCache')
  },

  'One Recipe for two samplers of one model, after what both pass and before what one passes'() {
    const flow = Flow.basic({ model: (flow, loader) => [(flow.shared = flow.add('LoraLoaderModelOnly', { model: [loader] }))] })
    const own = flow.add('LoraLoaderModelOnly', { model: [flow.shared] })
    const second = flow.sample([own], 'KSampler', [flow.sampler])
    const { nodes, facts } = speedUp(flow.root, 'balanced', create)
    assert.equal(nodes.length, 1)
    assert.equal(from(nodes[0], 'model'), flow.shared)
    assert.deepEqual([from(flow.sampler, 'model'), from(own, 'model'), from(second, 'model')], [nodes[0], nodes[0], own])
    assert.equal(facts[0][2].length, 2)
  },

  'Two Recipes for two models; a scheduler that looks at a model keeps its wire'() {
    const flow = Flow.basic()
    const other = flow.add('UNETLoader')
    flow.sample([other])
    const scheduler = flow.add('BasicScheduler', { model: [other] })
    const { nodes } = undone(flow.root, () => {
      const done = speedUp(flow.root, 'balanced', create)
      assert.equal(from(scheduler, 'model'), other)
      return done
    })
    assert.equal(nodes.length, 2)
  },

  'Reroutes and bypassed nodes are passed; what is muted or bypassed itself is no sampler'() {
    const flow = Flow.basic({
      model: (flow, loader) => {
        const lora = flow.add('LoraLoaderModelOnly', { model: [loader] })
        lora.mode = 4
        const reroute = flow.add('Reroute')
        lora.connect(0, reroute, 0)
        return [reroute]
      }
    })
    const second = flow.sample([flow.loader])
    const { nodes } = undone(flow.root, () => speedUp(flow.root, 'balanced', create))
    assert.equal(nodes.length, 1)
    second.mode = 4
    flow.sampler.mode = 2
    refuses('noRun', () => speedUp(flow.root, 'balanced', create))
  },

  'A bypassed merge passes its first model alone, so that the sampler shares it'() {
    const flow = Flow.basic()
    const merge = flow.add('ModelMergeSimple', { model1: [flow.loader], model2: [flow.add('UNETLoader')] })
    const second = flow.sample([merge])
    assert.equal(undone(flow.root, () => speedUp(flow.root, 'balanced', create)).nodes.length, 2)
    merge.mode = 4
    assert.equal(undone(flow.root, () => speedUp(flow.root, 'balanced', create)).nodes.length, 1)
    assert.equal(from(second, 'model'), merge)
  },

  'Other packs\' wires that are none are passed, and each sampler behind them has its own Recipe'() {
    const flow = Flow.basic()
    const virtual = (type, slots) => {
      const node = Object.assign(new Node(type, type), { isVirtualNode: true, ...slots })
      flow.root.add(node)
      return node
    }
    const slot = { name: 'MODEL', type: 'MODEL', link: null }
    const setter = virtual('SetNode', { inputs: [{ ...slot }], outputs: [{ ...slot, links: [] }] })
    flow.loader.connect(0, setter, 0)
    const getter = () => {
      const node = virtual('GetNode', { outputs: [{ ...slot, links: [] }] })
      return Object.assign(node, { getInputLink: () => setter.getInputLink(0) })
    }
    const getters = [getter(), getter()]
    flow.wire(getters[0], 0, flow.sampler, 'model')
    const second = flow.sample([getters[1]])
    const before = [flow.sampler, second].map((node) => from(node, 'model'))
    const { nodes } = speedUp(flow.root, 'balanced', create)
    assert.deepEqual([flow.sampler, second].map((node) => from(node, 'model')), nodes)
    assert.deepEqual(nodes.map((node) => from(node, 'model')), getters)
    remove(flow.root, create)
    assert.deepEqual([flow.sampler, second].map((node) => from(node, 'model')), before)
  },

  'A model that a muted node stops is none'() {
    const flow = Flow.basic({ model: (flow, loader) => [(flow.lora = flow.add('LoraLoaderModelOnly', { model: [loader] }))] })
    flow.lora.mode = 2
    refuses('noModel', () => speedUp(flow.root, 'balanced', create))
    const second = flow.sample([flow.loader])
    const { nodes, facts } = speedUp(flow.root, 'balanced', create)
    assert.deepEqual([from(second, 'model'), facts.map(([key]) => key)], [nodes[0], ['noModel', 'put']])
  },

  'Nothing to do is said, and changes nothing'() {
    const flow = new Flow()
    refuses('noSampler', () => speedUp(flow.root, 'balanced', create))
    refuses('noSampler', () => benchmark(flow.root, create))
    refuses('nothing', () => toggle(flow.root))
    flow.add('KSampler')
    refuses('noModel', () => speedUp(flow.root, 'balanced', create))
    assert.equal(ours(flow.root).length, 0)
    refuses('nothingOn', () => benchmark(Flow.basic().root, create))
  },

  'In a subgraph that is used once, the Recipe is beside the sampler; the model comes from outside'() {
    const flow = Flow.basic()
    flow.root.remove(flow.sampler)
    let inner
    const definition = flow.subgraph(['MODEL', 'CONDITIONING', 'LATENT'], ['LATENT'], (within, graph) => {
      inner = within.add('KSampler')
      for (const [slot, names] of [[0, ['model']], [1, ['positive', 'negative']], [2, ['latent_image']]])
        for (const name of names) graph.inputNode.slots[slot].connect(inner.inputs.find((input) => input.name === name), inner)
      graph.outputNode.slots[0].connect(inner.outputs[0], inner)
    })
    const used = flow.use(definition, { MODEL: [flow.loader], CONDITIONING: [flow.positive], LATENT: [flow.latent] })
    flow.wire(used, 0, flow.decode, 'samples')
    const before = promptOf(flow.root)
    const { nodes, facts } = speedUp(flow.root, 'balanced', create)
    assert.deepEqual([nodes[0].graph, from(inner, 'model'), facts[0][3]], [definition, nodes[0], ['Inner']])
    const measured = benchmark(flow.root, create).nodes[0]
    assert.deepEqual([measured.graph, from(measured, 'candidate')], [definition, nodes[0]])
    assert.equal(from(measured, 'baseline'), -10)
    remove(flow.root, create)
    assert.deepEqual(promptOf(flow.root), before)

    // Used twice, with one model: one Recipe inside still serves both.
    flow.use(definition, { MODEL: [flow.loader], CONDITIONING: [flow.positive], LATENT: [flow.latent] })
    assert.equal(undone(flow.root, () => speedUp(flow.root, 'balanced', create)).nodes.length, 1)

    // And with a sampler outside on the same model, one Recipe outside.
    flow.sample([flow.loader])
    const shared = speedUp(flow.root, 'balanced', create)
    assert.deepEqual([shared.nodes.length, shared.nodes[0].graph], [1, flow.root])
    refuses('outside', () => benchmark(flow.root, create, inner))
    remove(flow.root, create)

    // Bypassed, the subgraph has no sampler that runs.
    for (const node of flow.root.nodes) if (node.subgraph || node.type === 'KSampler') node.mode = 4
    refuses('noRun', () => speedUp(flow.root, 'balanced', create))
  },

  'A subgraph of our nodes alone goes as a whole, one with others keeps those'() {
    const flow = Flow.basic()
    const shell = flow.subgraph(['MODEL'], ['MODEL'], (within, graph) => {
      const node = within.add('SlipstreamDeepCache')
      graph.inputNode.slots[0].connect(node.inputs[0], node)
      graph.outputNode.slots[0].connect(node.outputs[0], node)
    })
    const mixed = flow.subgraph(['MODEL', 'MODEL'], ['MODEL', 'MODEL'], (within, graph) => {
      const node = within.add('SlipstreamFreeU')
      const lora = within.add('LoraLoaderModelOnly')
      for (const [slot, one] of [node, lora].entries()) {
        graph.inputNode.slots[slot].connect(one.inputs[0], one)
        graph.outputNode.slots[slot].connect(one.outputs[0], one)
      }
    })
    const before = promptOf(flow.root)
    const first = flow.use(shell, { MODEL: [flow.loader] })
    const second = flow.use(mixed, { MODEL: [first] })
    flow.wire(second, 0, flow.sampler, 'model')
    const measured = benchmark(flow.root, create).nodes[0]
    assert.equal(from(measured, 'baseline'), flow.loader)
    remove(flow.root, create)
    assert.ok(!flow.root.nodes.includes(first) && flow.root.nodes.includes(second))
    const after = promptOf(flow.root)
    assert.deepEqual(after[flow.sampler.id], before[flow.sampler.id])
  },

  'Benchmark has the sampler\'s inputs and values, and the model without us'() {
    const flow = Flow.basic({ model: (flow, loader) => [flow.add('LoraLoaderModelOnly', { model: [loader] })] })
    const lora = from(flow.sampler, 'model')
    const seed = flow.add('PrimitiveInt')
    flow.wire(seed, 0, flow.sampler, 'seed')
    const before = promptOf(flow.root)
    const [recipe] = speedUp(flow.root, 'balanced', create).nodes
    const [node] = benchmark(flow.root, create).nodes
    const wires = Object.fromEntries(node.inputs.filter(({ link }) => link != null).map(({ name }) => [name, from(node, name)]))
    assert.deepEqual(Object.keys(wires).sort(), ['baseline', 'candidate', 'latent_image', 'negative', 'positive', 'seed', 'vae'])
    assert.deepEqual([wires.baseline, wires.candidate, wires.seed, wires.vae], [lora, recipe, seed, flow.loader])
    assert.deepEqual(['steps', 'control_after_generate'].map((name) => widget(node, name).value), [12, 'fixed'])
    refuses('measured', () => benchmark(flow.root, create))
    remove(flow.root, create)
    assert.deepEqual(promptOf(flow.root), before)
  },

  'Tune has the sampler\'s inputs and values, the model without us, and the VAE of its pictures'() {
    const flow = Flow.basic({ model: (flow, loader) => [flow.add('LoraLoaderModelOnly', { model: [loader] })] })
    const lora = from(flow.sampler, 'model')
    const { nodes: [node], facts } = undone(flow.root, () => {
      const [recipe] = speedUp(flow.root, 'balanced', create).nodes
      const fixed = flow.add('SlipstreamFP16FixVAE', { vae: [flow.loader, 2] })
      flow.wire(fixed, 0, flow.decode, 'vae')
      const done = tune(flow.root, create)
      const [node] = done.nodes
      const wires = Object.fromEntries(node.inputs.filter(({ link }) => link != null).map(({ name }) => [name, from(node, name)]))
      assert.deepEqual(wires, {
        model: lora, vae: fixed, positive: flow.positive, negative: flow.negative, latent_image: flow.latent
      })
      assert.equal(from(flow.sampler, 'model'), recipe)
      assert.deepEqual(['seed', 'steps', 'control_after_generate'].map((name) => widget(node, name).value), [7, 12, 'fixed'])
      refuses('measured', () => tune(flow.root, create))
      return done
    })
    assert.deepEqual(facts.map(([key]) => key), ['measures'])
    assert.equal(tune(flow.root, create, flow.sampler).nodes[0].type, node.type)
  },

  'Tune wants pictures'() {
    const flow = Flow.basic()
    flow.root.remove(flow.decode)
    refuses('noPicture', () => tune(flow.root, create))
    assert.equal(ours(flow.root).length, 0)
  },

  'A Tune whose model is sampled is passed: by Off, by Benchmark\'s baseline, and when it goes'() {
    const flow = Flow.basic()
    const before = promptOf(flow.root)
    const [node] = tune(flow.root, create).nodes
    flow.wire(node, 0, flow.sampler, 'model')
    const preview = flow.add('PreviewImage', { images: [node, 1] })
    assert.deepEqual(speedUp(flow.root, 'balanced', create).facts.map(([key]) => key), ['suggests'])
    const [measured] = benchmark(flow.root, create).nodes
    assert.deepEqual([from(measured, 'baseline'), from(measured, 'candidate')], [flow.loader, node])
    toggle(flow.root)
    assert.deepEqual([node.mode, measured.mode], [4, 2])
    assert.deepEqual(promptOf(flow.root)[flow.sampler.id], before[flow.sampler.id])
    toggle(flow.root)
    assert.deepEqual(Object.fromEntries(remove(flow.root, create).facts).cut, [`${preview.title} ${preview.id}`])
    flow.root.remove(preview)
    assert.deepEqual(promptOf(flow.root), before)
  },

  'Save Plan is passed, and Load Plan suggests'() {
    const flow = Flow.basic()
    const before = promptOf(flow.root)
    const loaded = flow.add('SlipstreamLoadPlan', { model: [flow.loader] })
    const saved = flow.add('SlipstreamSavePlan', { model: [loaded] })
    flow.wire(saved, 0, flow.sampler, 'model')
    assert.deepEqual(speedUp(flow.root, 'balanced', create).facts.map(([key]) => key), ['suggests'])
    remove(flow.root, create)
    assert.deepEqual(promptOf(flow.root), before)
  },

  'What stands after our nodes is copied for the model without us; Remove takes the copy too'() {
    const flow = Flow.basic({
      model: (flow, loader) => {
        const ours = flow.add('SlipstreamDeepCache', { model: [loader] })
        flow.lora = flow.add('LoraLoaderModelOnly', { model: [ours] }, { strength_model: 0.5 })
        return [flow.add('SlipstreamCFGCutoff', { model: [flow.lora] })]
      }
    })
    const { nodes: [node, copy], facts } = benchmark(flow.root, create)
    assert.equal(from(node, 'baseline'), copy)
    assert.deepEqual([copy.type, from(copy, 'model'), widget(copy, 'strength_model').value], ['LoraLoaderModelOnly', flow.loader, 0.5])
    assert.deepEqual(facts.map(([key]) => key), ['measures', 'copied'])
    remove(flow.root, create)
    assert.deepEqual(ofType(flow.root, 'LoraLoaderModelOnly'), [flow.lora])
    assert.equal(from(flow.sampler, 'model'), flow.lora)
  },

  'A VAE that we are on is the candidate\'s alone'() {
    const flow = Flow.basic({ model: (flow, loader) => [flow.add('SlipstreamDeepCache', { model: [loader] })] })
    const fixed = flow.add('SlipstreamFP16FixVAE', { vae: [flow.loader, 2] })
    flow.wire(fixed, 0, flow.decode, 'vae')
    const [node] = benchmark(flow.root, create).nodes
    assert.deepEqual([from(node, 'vae'), from(node, 'candidate_vae')], [flow.loader, fixed])
  },

  'Custom sampling: guider, noise, sampler and scheduler are read'() {
    const flow = Flow.basic()
    const guider = flow.add('CFGGuider', { model: [flow.loader], positive: [flow.positive], negative: [flow.negative] }, { cfg: 3 })
    const parts = {
      noise: [flow.add('RandomNoise', {}, { noise_seed: 5 })], guider: [guider],
      sampler: [flow.add('KSamplerSelect', {}, { sampler_name: 'heun' })],
      sigmas: [flow.add('BasicScheduler', { model: [flow.loader] }, { steps: 9, denoise: 0.5, scheduler: 'karras' })],
      latent_image: [flow.latent]
    }
    const custom = flow.add('SamplerCustomAdvanced', parts)
    speedUp(flow.root, 'balanced', create)
    const [node] = benchmark(flow.root, create, custom).nodes
    const names = ['seed', 'steps', 'cfg', 'sampler_name', 'scheduler', 'denoise']
    assert.deepEqual(names.map((name) => widget(node, name).value), [5, 9, 3, 'heun', 'karras', 0.5])
    assert.equal(from(node, 'candidate').type, 'SlipstreamRecipe')
    flow.root.remove(node)
    assert.equal(benchmark(flow.root, create, guider).facts[0][2], `${custom.title} ${custom.id}`)
  },

  'A sampler that goes on, or stops early, is not measured'() {
    const flow = Flow.basic({ sampler: 'KSamplerAdvanced' })
    speedUp(flow.root, 'balanced', create)
    widget(flow.sampler, 'end_at_step').value = 6
    refuses('stopsEarly', () => benchmark(flow.root, create))
    Object.assign(widget(flow.sampler, 'end_at_step'), { value: 10000 })
    widget(flow.sampler, 'start_at_step').value = 6
    refuses('goesOn', () => benchmark(flow.root, create))
    widget(flow.sampler, 'start_at_step').value = 0
    const [node] = benchmark(flow.root, create).nodes
    assert.deepEqual([widget(node, 'seed').value, widget(node, 'denoise').value], [7, 1])
  },

  'Off bypasses and mutes, on brings back what it switched off'() {
    const flow = Flow.basic({ model: (flow, loader) => [flow.add('SlipstreamDeepCache', { model: [loader] })] })
    const before = promptOf(flow.root)
    const [recipe] = speedUp(flow.root, 'balanced', create).nodes
    const [node] = benchmark(flow.root, create).nodes
    const deepcache = from(recipe, 'model')
    deepcache.mode = 4 // by its user
    const on = promptOf(flow.root)
    toggle(flow.root)
    assert.deepEqual([recipe.mode, node.mode, deepcache.mode], [4, 2, 4])
    const off = promptOf(flow.root)
    assert.deepEqual(off[flow.sampler.id].inputs.model, [String(flow.loader.id), 0])
    assert.deepEqual(Object.keys(off).length, Object.keys(before).length - 1)
    toggle(flow.root)
    assert.deepEqual(promptOf(flow.root), on)
    assert.equal(deepcache.mode, 4)
    // By hand all are off: on is all of them.
    for (const one of ours(flow.root)) one.mode = 4
    toggle(flow.root)
    assert.ok(ours(flow.root).every(({ mode }) => mode === 0))
  },

  'Remove puts the host\'s tiled nodes in the place of ours, and names what stays'() {
    const flow = Flow.basic()
    flow.root.remove(flow.decode)
    const tiled = flow.add('SlipstreamVAEDecodeTiled', { samples: [flow.sampler], vae: [flow.loader, 2] }, { tile_size: 256 })
    flow.wire(tiled, 0, flow.save, 'images')
    const demo = flow.add('SlipstreamDemoModel')
    const facts = Object.fromEntries(remove(flow.root, create).facts)
    const [host] = ofType(flow.root, 'VAEDecodeTiled')
    assert.deepEqual([from(flow.save, 'images'), from(host, 'samples'), from(host, 'vae')], [host, flow.sampler, flow.loader])
    assert.equal(widget(host, 'tile_size').value, 256)
    assert.deepEqual([facts.removed, facts.stay], [1, [`${demo.title} ${demo.id}`]])
    refuses('onlyStay', () => remove(flow.root, create))
    refuses('onlyStay', () => toggle(flow.root))

    // Ours has a tile size of 0, for one that it chooses, and the host's has not.
    const other = Flow.basic()
    other.add('SlipstreamVAEDecodeTiled', { samples: [other.sampler], vae: [other.loader, 2] }, { tile_size: 0 })
    remove(other.root, create)
    assert.equal(widget(ofType(other.root, 'VAEDecodeTiled')[0], 'tile_size').value, 512)
  },

  'What shows the Benchmark\'s pictures is named when it goes'() {
    const flow = Flow.basic({ model: (flow, loader) => [flow.add('SlipstreamDeepCache', { model: [loader] })] })
    const [node] = benchmark(flow.root, create).nodes
    const preview = flow.add('PreviewImage', { images: [node] })
    assert.deepEqual(Object.fromEntries(remove(flow.root, create).facts).cut, [`${preview.title} ${preview.id}`])
  },

  'Each sentence is there in both languages'() {
    assert.deepEqual(Object.keys(WORDS.zh).sort(), Object.keys(WORDS.en).sort())
    assert.equal(sentence([['put', 'Recipe 2', ['KSampler 1'], []]], 'en'), 'Recipe 2 is on the model of KSampler 1.')
    assert.match(sentence([['put', 'Recipe 2', ['KSampler 1'], []]], 'zh-CN'), /模型上。$/)
    assert.equal(sentence([['nothing']], 'fr'), sentence([['nothing']], 'en'))
  }
}

const results = {}
for (const [name, check] of Object.entries(CASES))
  try {
    check()
    results[name] = null
  } catch (error) {
    results[name] = error.stack
  }
process.stdout.write(JSON.stringify(results))
