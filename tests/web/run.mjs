/**
 * The commands on saved workflows: node run.mjs JOB, where JOB is a file of { infos, workflows: { name: path } }. Writes
 * what became of each, and the prompts before and after, as JSON.
 */
import { readFileSync, writeSync } from 'node:fs'

import { benchmark, remove, Refusal, speedUp, toggle, tune } from '../../web/js/commands/edit.mjs'
import { sentence } from '../../web/js/commands/words.mjs'
import { Walk, isOurs, isSampler, kindOf } from '../../web/js/commands/walk.mjs'
import { creator, graphOf, promptOf } from './graph.mjs'

const { infos, workflows, kinds } = JSON.parse(readFileSync(process.argv[2], 'utf-8'))
const create = creator(infos)
const results = {}
for (const [name, path] of Object.entries(workflows)) results[name] = look(JSON.parse(readFileSync(path, 'utf-8')))
if (kinds) results.kinds = Object.fromEntries(kinds.map((type) => [type, kindOf(create(type))]))

const text = Buffer.from(JSON.stringify(results))
for (let written = 0; written < text.length; ) written += writeSync(1, text, written)

function look(workflow) {
  const root = graphOf(workflow, infos)
  const walk = new Walk(root)
  const found = {
    nodes: walk.nodes.length,
    ours: walk.nodes.filter(isOurs).length,
    samplers: walk.nodes.filter(isSampler).map(({ type }) => type),
    shared: [...walk.instances.values()].some((instances) => instances.length > 1),
    steps: {}
  }
  found.before = promptOf(root)
  const broken = problemsOf(root)
  attempt('speedUp', () => speedUp(root, 'balanced', create))
  attempt('again', () => speedUp(root, 'fastest', create))
  attempt('benchmark', () => benchmark(root, create))
  attempt('tune', () => tune(root, create))
  attempt('off', () => toggle(root))
  attempt('on', () => toggle(root))
  attempt('remove', () => remove(root, create))
  return found

  function attempt(step, command) {
    const before = shape(root)
    const began = performance.now()
    try {
      const { facts, nodes } = command()
      found.steps[step] = {
        facts, said: sentence(facts, 'en'), zh: sentence(facts, 'zh'), prompt: promptOf(root),
        // Some workflows were saved with broken wires.
        problems: problemsOf(root).filter((problem) => !broken.includes(problem)),
        overlaps: nodes.flatMap((node) => node.graph.nodes.filter((other) => other !== node && covers(node, other)).map(({ id }) => [node.id, id])),
        added: nodes.map(({ id, type }) => [id, type])
      }
    } catch (error) {
      if (!(error instanceof Refusal)) throw error
      const facts = [[error.key, ...error.about]]
      found.steps[step] = { refused: error.key, said: sentence(facts, 'en'), zh: sentence(facts, 'zh'), unchanged: shape(root) === before }
    }
    found.steps[step].ms = performance.now() - began
  }
}

function problemsOf(root) {
  return new Walk(root).graphs.flatMap((graph) => graph.check())
}

/** All of a graph, to see whether anything changed. */
function shape(root) {
  return JSON.stringify(new Walk(root).graphs.map((graph) => [
    graph.nodes.map(({ id, type, mode, pos, properties, widgets }) => [id, type, mode, pos, properties, widgets]),
    [...graph.links.values()]
  ]))
}

function covers({ pos, size }, other) {
  return (
    pos[0] < other.pos[0] + other.size[0] && other.pos[0] < pos[0] + size[0] &&
    pos[1] - 30 < other.pos[1] + other.size[1] && other.pos[1] - 30 < pos[1] + size[1]
  )
}
