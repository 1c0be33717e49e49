/**
 * The panel of the Tune node: every plan that was tried, as a chart of speed against fidelity, a table, and pictures.
 *
 * As the Benchmark's panel, whose parts it is made of: the engine sends the whole report anew after each run, and every
 * section redraws itself from it.
 *
 * @typedef {any} Report What `Tuning.as_shown` of nodes/engine/tune.py makes.
 * @typedef {any} Plan One of the report's plans.
 * @typedef {import('./benchmark.js').Section} Section
 */
import { axis, chartSection, tooltip } from './benchmark/charts.mjs'
import { ACCENT, duration, word } from './benchmark/format.mjs'
import { cell, footSection, progressSection, trendOf } from './benchmark/parts.mjs'
import { imagesSection } from './benchmark/pictures.mjs'
import { details, make } from './verdicts.js'

const TYPE = 'SlipstreamTune'
/** Of the reports that this panel understands. */
const SCHEMA = 1
const WIDGET = 'chosen'
const HEIGHT = 220
/** How many runs a search takes, more or less. */
const USUAL_RUNS = 40
/** How many times its distance from 1 below the floor the chart shows; what is further down stands at its edge. */
const DEPTH = 2

const GOOD = '#22a557'
const BAD = '#e5484d'
const MUTED = '#858585'

const STYLE = `
.slipstream-benchmark.slipstream-tune .slipstream-benchmark__table td small { white-space: normal; overflow-wrap: anywhere; }
.slipstream-tune tbody tr { cursor: pointer; }
.slipstream-tune tbody tr:hover { background: var(--line); }
.slipstream-tune tbody[data-shown] { box-shadow: inset 3px 0 0 ${ACCENT}; }
.slipstream-tune tbody[data-result='failed'] td, .slipstream-tune tbody[data-result='below the floor'] td { color: var(--muted); }
`

/** How to bring a panel in line with a report. @type {WeakMap<HTMLElement, (report: Report) => void>} */
const updates = new WeakMap()

details.set(TYPE, (report, previous, node) => {
  if (report.schema !== SCHEMA || !report.plans) return null
  const element = previous ?? createPanel(node)
  updates.get(element)(report)
  return element
})

/** @param {any} node Its widget takes the plan that is chosen. */
function createPanel(node) {
  /** @type {Report} */
  let report
  /** The plan whose pictures are shown; the chosen one until another is pointed at. @type {string | null} */
  let shown = null
  /** Whether the table has every plan, or those that matter. */
  let isWhole = false

  const show = (name) => {
    shown = name
    redraw()
  }
  const choose = (name) => {
    const widget = node.widgets?.find((one) => one.name === WIDGET)
    if (!widget) return
    // What is chosen already goes back to the best.
    widget.value = widget.value === name || name === report.best ? '' : name
    widget.callback?.(widget.value)
    node.setDirtyCanvas(true, true)
    show(name)
  }
  /** A plan that can be chosen: fewer steps are none. @param {string} name */
  const isPlan = (name) => report.plans.some((plan) => plan.name === name && plan.name !== report.rival && !plan.problem)

  const pointed = ({ seriesId, name }) => seriesId === 'plans' && show(name)
  const clicked = ({ seriesId, name }) => seriesId === 'plans' && isPlan(name) && choose(name)
  const chart = chartSection('frontier', frontierOption, { mouseover: pointed, click: clicked })
  const progress = progressSection()
  const title = make('p', 'slipstream-benchmark__title')
  const table = make('table', 'slipstream-benchmark__table')
  const more = make('button', '')
  more.onclick = () => {
    isWhole = !isWhole
    redraw()
  }
  const images = imagesSection()
  const foot = footSection()
  const element = make('div', 'slipstream-benchmark slipstream-tune')
  element.append(progress.element, title, chart.element, table, more, images.element, foot.element)

  function redraw() {
    const plan = report.plans.find(({ name }) => name === (shown ?? report.chosen)) ?? report.plans[0]
    const rows = isWhole ? report.plans : notable(report, plan?.name)
    more.hidden = !isWhole && rows.length === report.plans.length
    more.textContent = word(isWhole ? 'fewerPlans' : 'allPlans').replace('{}', report.plans.length)
    fillTable(table, report, rows, plan?.name, { show, choose: (name) => isPlan(name) && choose(name) })
    images.update(pictures(plan))
  }

  updates.set(element, (next) => {
    report = next
    progress.update({ status: report.status, done: report.runs, total: Math.max(USUAL_RUNS, report.runs + 5) })
    title.replaceChildren(report.title, make('small', '', `${word('floor')} ${report.metric} ${report.floor}`))
    chart.update(report)
    redraw()
    foot.update({ ...report, notes: [...report.told, ...report.notes] })
  })
  return element
}

/** What the section of pictures draws: a plan's over the exact one's. @param {Plan | undefined} plan */
function pictures(plan) {
  if (!plan?.image || !plan.exact_image) return { variants: [] }
  return {
    variants: [
      { name: word('asItIs'), role: 'baseline', image: plan.exact_image },
      { name: plan.name, role: 'candidate', image: plan.image }
    ]
  }
}

/** @param {Plan} plan @param {Report} report */
function colorOf(plan, report) {
  if (plan.name === report.chosen) return GOOD
  if (plan.state === 'failed' || plan.state === 'failed the check' || plan.state === 'below the floor') return BAD
  return plan.state === 'holds' || plan.state === 'unfinished' ? ACCENT : MUTED
}

/**
 * Speed to the right, the worst picture's similarity upwards, the floor as a line, and a line through the plans that no
 * other one beats in both.
 * @param {Report} report
 */
export function frontierOption(report) {
  const { plans, metric, floor, chosen, rival } = report
  const drawn = plans.filter(({ speed, worst }) => speed && worst !== null)
  if (!drawn.length) return null
  const bottom = Math.max(Math.min(floor, ...drawn.map(({ worst }) => worst)), floor - DEPTH * (1 - floor))
  const at = ({ speed, worst }) => [speed.value, Math.max(worst, bottom)]
  const tip = (text) => make('span', 'slipstream-benchmark__tip', text)

  const frontier = [[1, 1], ...unbeaten(plans).map(at)]

  return {
    height: HEIGHT,
    option: {
      grid: { left: 2, right: 16, top: 10, bottom: 2, outerBoundsMode: 'same', outerBoundsContain: 'axisLabel' },
      tooltip: tooltip({ trigger: 'item' }),
      xAxis: axis({ type: 'value', scale: true, axisLabel: { formatter: (value) => `${Number(value.toPrecision(3))}×` } }),
      yAxis: axis({
        type: 'value',
        min: bottom,
        max: 1,
        axisLabel: { formatter: (value) => String(Number(value.toFixed(4))) }
      }),
      series: [
        {
          id: 'frontier',
          type: 'line',
          data: frontier,
          symbol: 'none',
          silent: true,
          color: ACCENT,
          lineStyle: { width: 1, opacity: 0.5 },
          markLine: {
            silent: true,
            symbol: 'none',
            data: [{ yAxis: floor }],
            lineStyle: { color: 'currentColor', opacity: 0.6, type: 'dashed' },
            label: {
              formatter: `${word('floor')} ${metric} ${floor}`,
              position: 'insideEndBottom',
              color: 'currentColor',
              fontSize: 10
            }
          }
        },
        {
          id: 'plans',
          type: 'scatter',
          data: [
            { value: [1, 1], name: word('asItIs'), symbol: 'rect', symbolSize: 8, itemStyle: { color: MUTED } },
            ...drawn.map((plan) => ({
              value: at(plan),
              name: plan.name,
              symbol: plan.name === rival ? 'diamond' : 'circle',
              symbolSize: plan.name === chosen ? 14 : 9,
              itemStyle: { color: colorOf(plan, report), opacity: 0.85 }
            }))
          ],
          tooltip: {
            formatter({ name }) {
              const plan = plans.find((one) => one.name === name)
              if (!plan) return tip(name)
              const element = tip(`${name}: ${plan.speed.text}`)
              element.append(make('small', '', `${metric} ${plan.worst.toFixed(4)}, ${stateOf(plan, report)}`))
              return element
            }
          }
        }
      ]
    }
  }
}

/** The plans that no other one, nor the model as it is, beats in speed and fidelity, the slowest first. @param {Plan[]} plans */
function unbeaten(plans) {
  const measured = plans.filter(({ speed, worst }) => speed && worst !== null)
  const found = []
  let fastest = 1
  for (const plan of measured.sort((one, other) => other.worst - one.worst || other.speed.value - one.speed.value)) {
    if (plan.speed.value <= fastest) continue
    found.push(plan)
    fastest = plan.speed.value
  }
  return found
}

/** Of many plans those that a reader looks for. @param {Report} report @param {string | undefined} shown */
function notable({ plans, chosen, best, rival, checks }, shown) {
  const names = new Set([chosen, best, rival, shown, ...checks.map(({ name }) => name)])
  for (const { name } of unbeaten(plans)) names.add(name)
  return plans.filter(({ name }) => names.has(name))
}

/** @param {Plan} plan @param {Report} report */
function stateOf(plan, { chosen, rival }) {
  const parts = [plan.name === chosen && word('chosen'), plan.name === rival && word('fewerSteps'), word(plan.state)]
  return parts.filter(Boolean).join(', ')
}

/**
 * @param {HTMLElement} table @param {Report} report @param {Plan[]} plans @param {string | undefined} shown
 * @param {{ show: (name: string) => void, choose: (name: string) => void }} acts
 */
function fillTable(table, report, plans, shown, { show, choose }) {
  const { metric } = report
  const heads = [
    [word('plan')], [word('speed'), word('interval')], [metric, word('worst')], [metric, word('onePicture')],
    [word('work')], [word('state')]
  ]
  const head = make('tr', '')
  head.append(...heads.map((texts) => cell('th', texts)))
  const top = make('thead', '')
  top.append(head)
  const exact = make('tbody', '')
  const first = make('tr', '')
  const time = report.exact_s ? duration(report.exact_s) : '–'
  first.append(cell('th', [word('asItIs')]), cell('td', [time]), cell('td', ['1']), cell('td', ['–']), cell('td', ['100 %']), cell('td', ['']))
  exact.append(first)

  const rows = plans.map((plan) => {
    const body = make('tbody', '')
    body.dataset.plan = plan.name
    body.dataset.result = plan.state
    body.toggleAttribute('data-shown', plan.name === shown)
    const row = make('tr', '')
    row.append(...cellsOf(plan, report))
    if (plan.speed) row.cells[1].dataset.trend = trendOf(plan.speed)
    row.tabIndex = 0
    row.onpointerenter = () => plan.name !== shown && show(plan.name)
    row.onclick = () => choose(plan.name)
    row.onkeydown = ({ key }) => key === 'Enter' && choose(plan.name)
    body.append(row)
    return body
  })
  table.replaceChildren(top, exact, ...rows)
}

/** @param {Plan} plan @param {Report} report */
function cellsOf(plan, report) {
  const settings = plan.methods.map(({ title, settings }) => {
    const values = Object.entries(settings).map(([key, value]) => `${key} ${value}`)
    return `${title}: ${values.join(', ')}`
  })
  const [, main, interval] = plan.speed?.text.match(/^(.*?)(?: \((.*)\))?$/) ?? [, '–', '']
  const figure = (value) => (value === null ? '–' : value.toFixed(4))
  const paysBack = plan.pays_back && word('paysBack').replace('{}', plan.pays_back)
  const check = report.checks.find(({ name }) => name === plan.name)
  const fresh = check?.worst != null ? `${figure(check.worst)} ${word('fresh')}` : ''
  return [
    cell('th', [plan.name], settings.join('\n')),
    cell('td', [main, interval]),
    cell('td', [figure(plan.worst), fresh]),
    cell('td', [figure(plan.next)]),
    cell('td', [plan.work === null ? '–' : `${Math.round(plan.work * 100)} %`]),
    cell('td', [stateOf(plan, report), plan.problem || paysBack || ''])
  ]
}

const style = new CSSStyleSheet()
style.replaceSync(STYLE)
document.adoptedStyleSheets.push(style)
