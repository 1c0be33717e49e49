/**
 * What a sampling run is made of, from whichever nodes say it: the prompts, the latent, the seed, the steps, ... as
 * Benchmark takes them. What Benchmark could not measure as it is, is refused with the reason.
 *
 * @typedef {import('./walk.mjs').Point} Point
 * @typedef {import('./walk.mjs').Node} Node
 * @typedef {import('./walk.mjs').Walk} Walk
 * @typedef {{ node: Node, index: number } | { value: any }} Given An input of a node, to be given the same; or a value.
 * @typedef {object} Call
 * @property {Node} sampler What makes the latent.
 * @property {Node} taker What takes the model.
 * @property {number} model Its input.
 * @property {Record<string, Given>} inputs By Benchmark's inputs.
 */
import { MODEL, isSampler, nameOf } from './walk.mjs'

/** Why a command does not do something. Its words stand in words.mjs. */
export class Refusal extends Error {
  /** @param {string} key @param {...any} about */
  constructor(key, ...about) {
    super([key, ...about].join(' '))
    this.key = key
    this.about = about
  }
}

/** @param {Node} node @param {string} name */
function inputNamed(node, name) {
  return (node.inputs ?? []).findIndex((input) => input.name === name)
}

/** The first of some names that a node has an input of, given on. @param {Node} node @param {...string} names @returns {Given} */
function given(node, ...names) {
  for (const name of names) {
    const index = inputNamed(node, name)
    if (index >= 0) return { node, index }
    const widget = node.widgets?.find((widget) => widget.name === name)
    if (widget) return { value: widget.value }
  }
  throw new Refusal('noInput', nameOf(node), names[0])
}

/** What an input is set to, where that is known before the workflow runs. @param {Walk} walk @param {Node} node @param {string} name */
export function constant(walk, node, name) {
  const index = inputNamed(node, name)
  if (index < 0 || node.inputs[index].link == null)
    return node.widgets?.find((widget) => widget.name === name)?.value
  const maker = walk.maker(node, index)?.node
  return maker && String(maker.type).startsWith('Primitive') ? maker.widgets?.[0]?.value : undefined
}

/** The node of the same graph that makes an input. @param {Walk} walk @param {Node} node @param {string} name */
function partOf(walk, node, name) {
  const index = inputNamed(node, name)
  const maker = index < 0 ? null : walk.maker(node, index)
  if (!maker) throw new Refusal('noPart', nameOf(node), name)
  if (maker.graph !== node.graph) throw new Refusal('partOutside', nameOf(node), nameOf(maker.node))
  return maker.node
}

/** All nodes that make a latent of what a model predicts, in the order they run. @param {Walk} walk @returns {Node[]} */
export function runs(walk) {
  const isRun = (node) => isSampler(node) || (node.inputs ?? []).some(({ type }) => type === 'GUIDER')
  const isGuider = (node) => (node.outputs ?? []).some(({ type }) => type === 'GUIDER')
  return walk.nodes.filter((node) => walk.isLive(node) && isRun(node) && !isGuider(node))
}

/** What samples with a guider; a sampler itself. @param {Walk} walk @param {Node} node @returns {Node} */
export function runOf(walk, node) {
  const takes = (run) => walk.maker(run, inputNamed(run, 'guider'))?.node === node
  return runs(walk).find(takes) ?? node
}

/**
 * A sampling run, as Benchmark can make it.
 * @param {Walk} walk
 * @param {Node} sampler
 * @returns {Call}
 */
export function callOf(walk, sampler) {
  const read = READERS[sampler.type]
  if (!read) throw new Refusal('unknownSampler', nameOf(sampler))
  const call = read(walk, sampler)
  refuseNested(walk, sampler)
  return { sampler, ...call }
}

/** @type {Record<string, (walk: Walk, sampler: Node) => Omit<Call, 'sampler'>>} */
const READERS = {
  KSampler: (walk, sampler) => ({
    ...taking(sampler),
    inputs: { ...prompts(sampler), ...settings(sampler), denoise: given(sampler, 'denoise') }
  }),

  KSamplerAdvanced(walk, sampler) {
    const name = nameOf(sampler)
    if (constant(walk, sampler, 'add_noise') !== 'enable') throw new Refusal('goesOn', name)
    if (constant(walk, sampler, 'start_at_step') !== 0) throw new Refusal('goesOn', name)
    const [steps, end] = ['steps', 'end_at_step'].map((input) => constant(walk, sampler, input))
    if (!(end >= (steps ?? 10000))) throw new Refusal('stopsEarly', name)
    return { ...taking(sampler), inputs: { ...prompts(sampler), ...settings(sampler), denoise: { value: 1 } } }
  },

  SamplerCustom(walk, sampler) {
    if (constant(walk, sampler, 'add_noise') !== true) throw new Refusal('goesOn', nameOf(sampler))
    const inputs = { ...prompts(sampler), seed: given(sampler, 'noise_seed'), cfg: given(sampler, 'cfg') }
    return { ...taking(sampler), inputs: { ...inputs, ...schedule(walk, sampler, sampler) } }
  },

  SamplerCustomAdvanced(walk, sampler) {
    const guider = partOf(walk, sampler, 'guider')
    const guided = GUIDERS[guider.type]
    if (!guided) throw new Refusal('unknownGuider', nameOf(guider))
    const noise = partOf(walk, sampler, 'noise')
    if (noise.type === 'DisableNoise') throw new Refusal('goesOn', nameOf(sampler))
    if (noise.type !== 'RandomNoise') throw new Refusal('unknownPart', nameOf(sampler), nameOf(noise))
    const inputs = { ...guided(guider), latent_image: given(sampler, 'latent_image'), seed: given(noise, 'noise_seed') }
    return { ...taking(guider), inputs: { ...inputs, ...schedule(walk, sampler, guider) } }
  }
}

/** @type {Record<string, (guider: Node) => Record<string, Given>>} */
const GUIDERS = {
  CFGGuider: (guider) => ({
    positive: given(guider, 'positive'), negative: given(guider, 'negative'), cfg: given(guider, 'cfg')
  }),
  // At a scale of 1 the host leaves the negative out.
  BasicGuider: (guider) => ({
    positive: given(guider, 'conditioning'), negative: given(guider, 'conditioning'), cfg: { value: 1 }
  })
}

/** @param {Node} taker */
function taking(taker) {
  return { taker, model: taker.inputs.findIndex(({ type }) => type === MODEL) }
}

/** @param {Node} sampler */
function prompts(sampler) {
  const names = ['positive', 'negative', 'latent_image']
  return Object.fromEntries(names.map((name) => [name, given(sampler, name)]))
}

/** @param {Node} sampler */
function settings(sampler) {
  const names = ['steps', 'cfg', 'sampler_name', 'scheduler']
  const same = Object.fromEntries(names.map((name) => [name, given(sampler, name)]))
  return { seed: given(sampler, 'seed', 'noise_seed'), ...same }
}

/** The sampler's algorithm and noise levels, where they are nodes of their own. @param {Walk} walk @param {Node} sampler @param {Node} taker */
function schedule(walk, sampler, taker) {
  const algorithm = partOf(walk, sampler, 'sampler')
  if (algorithm.type !== 'KSamplerSelect') throw new Refusal('unknownPart', nameOf(sampler), nameOf(algorithm))
  const scheduler = partOf(walk, sampler, 'sigmas')
  if (scheduler.type !== 'BasicScheduler') throw new Refusal('unknownSigmas', nameOf(sampler), nameOf(scheduler))
  if (shifts(walk, scheduler) !== shifts(walk, taker)) throw new Refusal('otherModel', nameOf(scheduler), nameOf(taker))
  const names = ['scheduler', 'steps', 'denoise']
  const levels = Object.fromEntries(names.map((name) => [name, given(scheduler, name)]))
  return { ...levels, sampler_name: given(algorithm, 'sampler_name') }
}

/** What on a model decides its noise levels. @param {Walk} walk @param {Node} node */
function shifts(walk, node) {
  const origin = walk.origin(node, node.inputs.findIndex(({ type }) => type === MODEL))
  const nodes = origin ? [...walk.ancestors(origin, MODEL)].map((point) => point.node) : []
  const loads = (one) => one && !walk.inputsOf(one, MODEL).length && !one.subgraph
  const deciding = nodes.filter((one) => one && (String(one.type).startsWith('ModelSampling') || loads(one)))
  return deciding.map(({ id }) => String(id)).sort().join()
}

/** Several latents in one can't be compared. @param {Walk} walk @param {Node} sampler */
function refuseNested(walk, sampler) {
  const origin = walk.origin(sampler, inputNamed(sampler, 'latent_image'))
  if (!origin) return
  for (const { node } of walk.ancestors(origin, 'LATENT'))
    if (node && /ConcatAVLatent$/.test(node.type)) throw new Refusal('nested', nameOf(sampler))
}

/** What decodes a run's latent: the wire to its VAE. @param {Walk} walk @param {Node} sampler @returns {Point | null} */
export function decodingVae(walk, sampler) {
  const seen = new Set()
  const waiting = [sampler]
  for (const node of waiting) {
    if (seen.has(node)) continue
    seen.add(node)
    const vae = node === sampler ? -1 : node.inputs.findIndex(({ type }) => type === 'VAE')
    if (vae >= 0 && node.outputs?.some(({ type }) => type === 'IMAGE')) return walk.origin(node, vae)
    for (const slot of (node.outputs ?? []).keys()) {
      if (!['LATENT', '*'].includes(node.outputs[slot].type)) continue
      const point = walk.point(node.graph, node, slot)
      for (const link of walk.wires(point)) {
        const target = walk.target(node.graph, link).node
        // A later sampler's picture is another one.
        if (target && !isSampler(target) && !target.inputs.some(({ type }) => type === 'GUIDER')) waiting.push(target)
      }
    }
  }
  return null
}
