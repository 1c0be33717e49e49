/**
 * The charts of the Benchmark's panel: the time of each run, and of each step.
 *
 * @typedef {import('../benchmark.js').Report} Report
 * @typedef {import('../benchmark.js').Section} Section
 */
import { make } from '../verdicts.js'
import { FONT, colorOf, duration, rangeOf, tick, word } from './format.mjs'

const LANE_HEIGHT = 22
const AXIS_HEIGHT = 28
const CHART_HEIGHT = 150

/** @type {Promise<any> | undefined} */
let library

/**
 * A chart lives while it is seen: where its place has no size (zoomed away, other tab, node removed) it is disposed of.
 * @param {string} title
 * @param {(report: Report) => { height: number, option: any } | null} optionOf Null where there is nothing to draw.
 * @param {Record<string, (event: any) => void>} [events] What to do when something in it is pointed at or clicked.
 * @returns {Section}
 */
export function chartSection(title, optionOf, events = {}) {
  const element = make('figure', 'slipstream-benchmark__chart')
  const place = make('div', '')
  element.append(make('small', '', word(title)), place)
  element.hidden = true
  let chart, option

  async function fit(width) {
    if (!width) {
      chart?.dispose()
      chart = undefined
    } else if (chart) {
      chart.resize()
    } else {
      const echarts = await loadLibrary()
      if (!echarts) place.replaceWith(make('small', '', word('noCharts')))
      else if (!chart && place.clientWidth) {
        chart = echarts.init(place, null, { renderer: 'svg' })
        chart.setOption(option)
        for (const [name, act] of Object.entries(events)) chart.on(name, act)
      }
    }
  }

  // The host's transforms are none of its business: it sees the size in graph units.
  new ResizeObserver(([{ contentRect }]) => fit(contentRect.width)).observe(place)
  return {
    element,
    update(report) {
      const drawing = optionOf(report)
      element.hidden = !drawing
      if (!drawing) return
      place.style.height = `${drawing.height}px`
      option = { ...drawing.option, animation: false, textStyle: { fontFamily: FONT, color: 'currentColor' } }
      chart?.setOption(option, { notMerge: true })
    }
  }
}

/** @returns {Promise<any>} ECharts; null if it could not be loaded. */
function loadLibrary() {
  library ??= import('../../vendor/echarts/echarts.esm.min.mjs').catch((error) => {
    console.warn('Slipstream: the chart library could not be loaded', error)
    return null
  })
  return library
}

/** In the colours of the node, whatever the theme: an SVG knows `currentColor`. @param {object} [own] */
export function axis(own = {}) {
  const line = { lineStyle: { color: 'currentColor', opacity: 0.16 } }
  return {
    axisLine: { show: false },
    axisTick: { show: false },
    splitLine: line,
    ...own,
    axisLabel: { color: 'currentColor', opacity: 0.8, fontSize: 10, hideOverlap: true, ...own.axisLabel }
  }
}

/** @param {object} own */
export function tooltip(own) {
  return {
    confine: true,
    transitionDuration: 0,
    padding: [4, 8],
    backgroundColor: 'var(--comfy-menu-bg)',
    borderColor: 'var(--border-color)',
    textStyle: { color: 'var(--input-text)', fontSize: 11, fontFamily: FONT },
    ...own
  }
}

/** @param {Variant[]} variants Charts side by side are equally high. */
function heightOf(variants) {
  return Math.max(CHART_HEIGHT, variants.length * LANE_HEIGHT + AXIS_HEIGHT)
}

/**
 * A lane for each variant: a dot for each run, a bar from the least to the most, a mark at the median.
 * @param {Report} report
 */
export function timesOption({ variants }) {
  const all = variants.map((variant, index) => ({ variant, color: colorOf(index) }))
  const lanes = all.filter(({ variant }) => variant.runs.length)
  if (!lanes.length) return null
  const longest = Math.max(...lanes.map(({ variant }) => variant.time_s.maximum))
  const tip = (text) => make('span', 'slipstream-benchmark__tip', text)

  const ranges = {
    type: 'custom',
    encode: { x: [1, 2, 3], y: 0 },
    data: lanes.map(({ variant: { time_s } }, lane) => [lane, time_s.minimum, time_s.median, time_s.maximum]),
    tooltip: {
      formatter({ dataIndex }) {
        const { name, time_s } = lanes[dataIndex].variant
        return tip(`${name}: ${word('median')} ${duration(time_s.median)} (${rangeOf(time_s)})`)
      }
    },
    renderItem(_, item) {
      const [low, y] = item.coord([item.value(1), item.value(0)])
      const [[median], [high]] = [2, 3].map((dimension) => item.coord([item.value(dimension), item.value(0)]))
      const { color } = lanes[item.value(0)]
      const bar = { x1: low, y1: y, x2: high, y2: y }
      const mark = { x1: median, y1: y - 7, x2: median, y2: y + 7 }
      return {
        type: 'group',
        children: [
          { type: 'line', shape: bar, style: { stroke: color, lineWidth: 8, opacity: 0.3, lineCap: 'round' } },
          { type: 'line', shape: mark, style: { stroke: color, lineWidth: 2 } }
        ]
      }
    }
  }
  const dots = {
    type: 'scatter',
    symbolSize: 6,
    emphasis: { disabled: true },
    data: lanes.flatMap(({ variant, color }, lane) =>
      variant.runs.map(({ seconds }, round) => ({
        value: [seconds, lane],
        name: `${variant.name}, ${word('round')} ${round + 1}: ${duration(seconds)}`,
        itemStyle: { color, opacity: 0.75 }
      }))
    ),
    tooltip: { formatter: ({ name }) => tip(name) }
  }
  return {
    height: heightOf(variants),
    option: {
      grid: { left: 2, right: 14, top: 2, bottom: 2, outerBoundsMode: 'same', outerBoundsContain: 'axisLabel' },
      tooltip: tooltip({ trigger: 'item' }),
      xAxis: axis({
        type: 'value',
        scale: true,
        splitNumber: 4,
        axisLabel: { formatter: (value) => tick(value, longest) }
      }),
      yAxis: axis({
        type: 'category',
        inverse: true,
        data: lanes.map(({ variant }) => variant.name),
        axisLabel: { width: 112, overflow: 'truncate', fontSize: 11, opacity: 1, interval: 0 }
      }),
      series: [ranges, dots]
    }
  }
}

/** A line for each variant: the median over its runs of each step's time. @param {Report} report */
export function stepsOption({ variants }) {
  const lines = variants.map(({ name, runs }, index) => ({ name, color: colorOf(index), medians: stepMedians(runs) }))
  const drawn = lines.filter(({ medians }) => medians.length)
  if (!drawn.length) return null
  const longest = Math.max(...drawn.flatMap(({ medians }) => medians))
  const count = Math.max(...drawn.map(({ medians }) => medians.length))
  return {
    height: heightOf(variants),
    option: {
      grid: { left: 2, right: 8, top: 8, bottom: 2, outerBoundsMode: 'same', outerBoundsContain: 'axisLabel' },
      tooltip: tooltip({
        trigger: 'axis',
        axisPointer: { lineStyle: { color: 'currentColor', opacity: 0.5 } },
        valueFormatter: (value) => duration(value, longest),
        // With many variants it is large: beside the pointer's half, not over it.
        position: ([x], _data, _tip, _box, { viewSize }) => ({ top: 0, [x * 2 < viewSize[0] ? 'right' : 'left']: 0 })
      }),
      xAxis: axis({
        type: 'category',
        boundaryGap: false,
        splitLine: { show: false },
        data: Array.from({ length: count }, (_, index) => `${word('step')} ${index + 1}`),
        axisLabel: { formatter: (_, index) => String(index + 1) }
      }),
      yAxis: axis({ type: 'value', splitNumber: 4, axisLabel: { formatter: (value) => tick(value, longest) } }),
      series: drawn.map(({ name, color, medians }) => ({
        type: 'line',
        name,
        data: medians,
        color,
        lineStyle: { width: 1.5 },
        symbolSize: 4,
        showSymbol: count === 1,
        emphasis: { disabled: true }
      }))
    }
  }
}

/** @param {{ step_s: number[] }[]} runs */
function stepMedians(runs) {
  const count = Math.max(0, ...runs.map(({ step_s }) => step_s.length))
  return Array.from({ length: count }, (_, step) => {
    const sorted = runs.flatMap(({ step_s }) => step_s[step] ?? []).sort((a, b) => a - b)
    const middle = sorted.length / 2
    return (sorted[Math.ceil(middle) - 1] + sorted[Math.floor(middle)]) / 2
  })
}
