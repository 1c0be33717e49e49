/**
 * Finds room for a new node: over no other node, with what it shows once it has run, and where its wires are short.
 *
 * @typedef {{ x: number, y: number, width: number, height: number }} Box
 * @typedef {{ from: number[][], to: number[][] }} Wires Where its wires begin that lead to it, and end that lead away.
 */

const GAP = 40
const TITLE = 30
const GRID = 10
/** Down from a node's top to its first wire. */
const SLOT = 20

/** What nodes of ours grow to where they show what they did. @type {Record<string, number>} */
const GROWN = { SlipstreamRecipe: 660, SlipstreamBenchmark: 1300, SlipstreamTune: 2000 }

/** What a node of ours may be narrowed to, and how high it then grows, where there is more room for it. @type {Record<string, [number, number]>} */
const NARROW = { SlipstreamRecipe: [340, 860] }

/** In wire lengths: a wire that runs back is harder to read, and so is a node on the edge of a group. */
const BACKWARDS = 2
const ON_EDGE = 400

/**
 * Moves a node to the best room there is in its graph.
 * @param {any} node
 * @param {Wires} wires
 */
export function place(node, wires) {
  const sizes = [[node.size[0], Math.max(node.size[1], GROWN[node.type] ?? 0)], NARROW[node.type]].filter(Boolean)
  const taken = obstacles(node.graph, node)
  const groups = (node.graph.groups ?? []).map(boxOf)
  const ends = [...wires.from, ...wires.to]
  let best = { cost: Infinity, x: 0, y: 0, width: 0 }
  for (const [width, height] of sizes) {
    const size = { width, height: height + TITLE }
    for (const x of candidates(taken, ends, 'x', 'width', size.width))
      for (const y of candidates(taken, ends, 'y', 'height', size.height)) {
        const box = { x, y, ...size }
        const cost = costOf(box, wires, groups, best.cost)
        if (cost < best.cost && !taken.some((other) => overlaps(box, other))) best = { cost, x, y, width }
      }
  }
  node.pos = [snap(best.x), snap(best.y + TITLE)]
  if (best.width !== node.size[0]) node.setSize([best.width, node.size[1]])
}

/** Where wires begin or end at a node's slot: near enough. @param {any} node @param {number} index @param {boolean} isInput */
export function slotPlace(node, index, isInput) {
  if (node.getConnectionPos) return [...node.getConnectionPos(isInput, index)]
  return [node.pos[0] + (isInput ? 0 : node.size[0]), node.pos[1] + SLOT * (index + 0.7)]
}

/** @param {number} value */
function snap(value) {
  return Math.round(value / GRID) * GRID
}

/** @param {any} graph @param {any} except @returns {Box[]} */
function obstacles(graph, except) {
  const nodes = graph.nodes.filter((node) => node !== except).map((node) => {
    const height = Math.max(node.size[1], GROWN[node.type] ?? 0)
    return { x: node.pos[0], y: node.pos[1] - TITLE, width: node.size[0], height: height + TITLE }
  })
  return [...nodes, ...[graph.inputNode, graph.outputNode].filter(Boolean).map(boxOf)]
}

/** @param {any} thing A group, or where a subgraph's wires come in or go out. @returns {Box} */
function boxOf({ boundingRect, bounding, pos, size }) {
  const [x, y, width, height] = boundingRect ?? bounding ?? [...pos, ...size]
  return { x, y, width, height }
}

/** Beside each obstacle, and in line with each end of a wire. @param {Box[]} taken @param {number[][]} ends */
function candidates(taken, ends, start, length, size) {
  const axis = start === 'x' ? 0 : 1
  const beside = taken.flatMap((box) => [box[start], box[start] + box[length] + GAP, box[start] - size - GAP])
  const inLine = ends.flatMap((end) => [end[axis] + GAP, end[axis] - size - GAP, end[axis] - SLOT - TITLE])
  return new Set([...beside, ...inLine].map(snap))
}

/** @param {Box} one @param {Box} other */
function overlaps(one, other) {
  return (
    one.x < other.x + other.width + GAP - GRID &&
    other.x < one.x + one.width + GAP - GRID &&
    one.y < other.y + other.height + GAP - GRID &&
    other.y < one.y + one.height + GAP - GRID
  )
}

/** @param {Box} box @param {Wires} wires @param {Box[]} groups @param {number} enough Above it the rest need not be added. */
function costOf(box, wires, groups, enough) {
  const y = box.y + TITLE + SLOT
  let cost = 0
  for (const [fromX, fromY] of wires.from) cost += length(fromX, fromY, box.x, y)
  for (const [toX, toY] of wires.to) cost += length(box.x + box.width, y, toX, toY)
  if (cost > enough) return cost
  for (const group of groups) if (isOnEdge(box, group)) cost += ON_EDGE
  return cost
}

/** Of a wire. @param {number} fromX @param {number} fromY @param {number} toX @param {number} toY */
function length(fromX, fromY, toX, toY) {
  const across = toX - fromX
  return Math.hypot(across, toY - fromY) + (across < 0 ? -across * BACKWARDS : 0)
}

/** @param {Box} box @param {Box} group */
function isOnEdge(box, group) {
  const isApart =
    box.x >= group.x + group.width || group.x >= box.x + box.width ||
    box.y >= group.y + group.height || group.y >= box.y + box.height
  const isInside =
    box.x >= group.x && box.x + box.width <= group.x + group.width &&
    box.y >= group.y && box.y + box.height <= group.y + group.height
  return !isApart && !isInside
}
