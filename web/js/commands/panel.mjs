/**
 * The sidebar tab: each node of ours with its last verdict, what the run took and what was left out altogether, and the
 * commands as buttons.
 *
 * @typedef {{ label: string, tip: string, run: () => void }} Button
 */
import { duration } from '../benchmark/format.mjs'
import { currentVerdicts, make, mark, textOf } from '../verdicts.js'
import { isOn, isOurs } from './walk.mjs'

/** How long the prompts took, by their ids. @type {Map<string, number>} */
export const tookMs = new Map()

/**
 * Draws the tab anew.
 * @param {HTMLElement} element
 * @param {any} root
 * @param {Record<string, any>} words
 * @param {Button[]} buttons
 * @param {(node: any) => void} goTo
 */
export function drawPanel(element, root, words, buttons, goTo) {
  const found = oursWithIds(root)
  const title = make('h2', 'slipstream-panel__title', 'Slipstream')
  const commands = make('div', 'slipstream-panel__commands')
  for (const { label, tip, run } of buttons) {
    const button = make('button', '', label)
    button.title = tip
    button.onclick = run
    commands.append(button)
  }
  const parts = [title, commands]
  if (!found.length) parts.push(make('p', 'slipstream-panel__empty', words.empty))
  else {
    const said = summary(found, words)
    if (said) parts.push(make('p', 'slipstream-panel__summary', said))
    const list = make('ul', 'slipstream-panel__list')
    list.append(...found.map((one) => item(one, words, goTo)))
    parts.push(list)
  }
  element.classList.add('slipstream-panel')
  const drawn = parts.map(({ outerHTML }) => outerHTML).join('')
  // Equal ones stay, with what is in focus and where it was scrolled to.
  if (element.dataset.drawn === drawn && element.childElementCount) return
  element.dataset.drawn = drawn
  element.replaceChildren(...parts)
}

/**
 * Each node by each way to it: one in a subgraph that is used twice runs twice.
 * @param {any} graph
 * @returns {{ node: any, id: string, isOff: boolean, within: string[] }[]}
 */
function oursWithIds(graph, prefix = '', isOff = false, within = []) {
  return [...graph.nodes].sort((one, other) => one.order - other.order).flatMap((node) => {
    const [id, off] = [`${prefix}${node.id}`, isOff || !isOn(node)]
    if (node.subgraph) return oursWithIds(node.subgraph, `${id}:`, off, [...within, node.title])
    return isOurs(node) ? [{ node, id, isOff: off, within }] : []
  })
}

/** @param {ReturnType<typeof oursWithIds>[0]} one @param {Record<string, any>} words @param {(node: any) => void} goTo */
function item({ node, id, isOff, within }, words, goTo) {
  const verdict = currentVerdicts().get(id)
  const entry = make('li', '')
  const button = make('button', 'slipstream-panel__node')
  button.dataset.node = id
  button.onclick = () => goTo(node)
  button.append(make('b', '', node.title))
  if (within.length) button.append(make('small', '', within.join(' › ')))
  const lines = isOff || verdict?.node_type !== node.type ? [] : verdict.lines
  if (!lines.length) button.append(make('span', 'slipstream-panel__none', isOff ? words.isOff : words.noVerdict))
  for (const line of lines) {
    const row = make('span', 'slipstream-panel__line')
    row.dataset.state = line.state
    row.toggleAttribute('data-last', Boolean(verdict.isLast))
    row.append(mark(row, line.state), make('span', '', textOf(verdict, line)))
    button.append(row)
  }
  entry.append(button)
  return entry
}

/** What the last run took, and left out. @param {ReturnType<typeof oursWithIds>} found @param {Record<string, any>} words */
function summary(found, words) {
  const verdicts = found.map(({ id }) => currentVerdicts().get(id)).filter((verdict) => verdict?.prompt_id)
  const last = verdicts.at(-1)?.prompt_id
  const parts = []
  if (tookMs.has(last)) parts.push(words.took(duration(tookMs.get(last) / 1000)))
  // Nodes on one model tell of the same runs.
  const totals = verdicts.filter(({ prompt_id, totals }) => prompt_id === last && totals?.evaluations)
  const distinct = new Map(totals.map(({ totals }) => [JSON.stringify(totals), totals]))
  const sum = (name) => [...distinct.values()].reduce((total, one) => total + one[name], 0)
  if (distinct.size) {
    parts.push(words.sampled(duration(sum('elapsed_s'))))
    const [all, made, reused] = [sum('full_predictions'), sum('predictions'), sum('reused')]
    if (all > made) parts.push(words.left(all - made, all))
    if (reused) parts.push(words.reused(reused, sum('evaluations')))
    if (all <= made && !reused) parts.push(words.nothingLeft)
  }
  return parts.join(' · ')
}
