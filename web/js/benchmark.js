/**
 * The panel of the Benchmark node: its report as a table, charts and pictures, beneath its verdict.
 *
 * The engine sends the whole report anew after each run. Every section redraws itself from it and keeps what its user
 * chose. Sizes, reloads, tabs and both of the host's renderers are the verdict's business: see verdicts.js.
 *
 * @typedef {any} Report What `Report.as_dict` of nodes/measuring/report.py makes, with `markdown`, the same as text.
 * @typedef {any} Variant One of the report's variants.
 * @typedef {import('./benchmark/format.mjs').Summary} Summary
 * @typedef {{ element: HTMLElement, update: (report: Report) => void }} Section
 */
import { chartSection, stepsOption, timesOption } from './benchmark/charts.mjs'
import { ACCENT, colorOf, duration, rangeOf, word } from './benchmark/format.mjs'
import { cell, footSection, progressSection, trendOf } from './benchmark/parts.mjs'
import { imagesSection } from './benchmark/pictures.mjs'
import { details, make, mark } from './verdicts.js'

const TYPE = 'SlipstreamBenchmark'
/** Of the reports that this panel understands: a page that is open over an update gets newer ones. */
const SCHEMA = 1

const STYLE = `
.slipstream-benchmark {
  --muted: color-mix(in srgb, currentcolor 72%, transparent);
  --line: color-mix(in srgb, currentcolor 16%, transparent);
  container-type: inline-size;
  display: flex;
  flex-direction: column;
  gap: 10px;
  margin-top: 1px;
  padding: 8px;
  border-radius: 4px;
  background: var(--component-node-widget-background, var(--comfy-input-bg));
  color: var(--component-node-foreground, var(--input-text));
  font-variant-numeric: tabular-nums;
}
.slipstream-benchmark [hidden] { display: none !important; }
.slipstream-benchmark :is(p, figure, ul) { margin: 0; padding: 0; }
.slipstream-benchmark small { display: block; font-size: 11px; font-weight: 400; color: var(--muted); }
.slipstream-benchmark progress {
  appearance: none; display: block; width: 100%; height: 3px; border: 0; border-radius: 2px; overflow: hidden;
  background: var(--line);
}
.slipstream-benchmark progress::-webkit-progress-bar { background: var(--line); }
.slipstream-benchmark progress::-webkit-progress-value { background: ${ACCENT}; }
.slipstream-benchmark progress::-moz-progress-bar { background: ${ACCENT}; }
.slipstream-benchmark__title { font-weight: 600; }

.slipstream-benchmark__table { width: 100%; border-collapse: collapse; line-height: 1.3; }
.slipstream-benchmark__table :is(th, td) {
  padding: 4px 0 3px 12px; text-align: right; vertical-align: top; font-weight: 400;
}
.slipstream-benchmark__table :is(th, td):first-child { padding-left: 14px; text-align: left; overflow-wrap: anywhere; }
.slipstream-benchmark__table thead th { padding-top: 0; }
.slipstream-benchmark__table tbody { border-top: 1px solid var(--line); }
.slipstream-benchmark__table tbody th { font-weight: 600; }
.slipstream-benchmark__table td:not([data-trend]) small { white-space: nowrap; }
.slipstream-benchmark__table [data-trend] small { color: inherit; }
.slipstream-benchmark__table [data-trend='none'] { color: var(--muted); }
.slipstream-benchmark__table [data-trend='faster'] { --trend: #22a557; }
.slipstream-benchmark__table [data-trend='slower'] { --trend: #e5484d; }
.slipstream-benchmark__table :is([data-trend='faster'], [data-trend='slower']) {
  color: color-mix(in srgb, var(--trend) 65%, currentcolor); font-weight: 600;
}
.slipstream-benchmark__swatch {
  float: left; width: 8px; height: 8px; margin: 4px 0 0 -14px; border-radius: 50%; background: var(--color);
}
.slipstream-benchmark__table .slipstream-benchmark__told { padding: 0 0 4px 14px; font-size: 11px; }
.slipstream-benchmark__told div { display: flex; gap: 5px; }
.slipstream-benchmark__told span:last-child { min-width: 0; overflow-wrap: anywhere; }
.slipstream-benchmark__problem { color: color-mix(in srgb, #e5484d 70%, currentcolor); font-weight: 600; }

.slipstream-benchmark__charts { display: grid; gap: 10px 16px; }
.slipstream-benchmark__chart { min-width: 0; }
.slipstream-benchmark__tip { white-space: nowrap; }

.slipstream-benchmark__chips { display: flex; flex-wrap: wrap; gap: 4px; margin-bottom: 6px; }
.slipstream-benchmark__chips > :last-child { margin-left: auto; }
.slipstream-benchmark__chips > div { display: flex; flex-wrap: wrap; gap: 4px; }
.slipstream-benchmark button:not(.slipstream-benchmark__flip) {
  padding: 2px 8px; border: 1px solid color-mix(in srgb, currentcolor 30%, transparent); border-radius: 4px;
  background: none; color: inherit; font: inherit; font-size: 11px; cursor: pointer;
}
.slipstream-benchmark button:not(.slipstream-benchmark__flip):hover { background: var(--line); }
.slipstream-benchmark button[aria-pressed='true'] { border-color: ${ACCENT}; box-shadow: inset 0 0 0 1px ${ACCENT}; }
.slipstream-benchmark :is(button, a):focus-visible { outline: 2px solid ${ACCENT}; outline-offset: 1px; }
.slipstream-benchmark__frame {
  --wipe: 50%;
  position: relative; width: fit-content; max-width: 100%; margin: 0 auto; overflow: hidden; border-radius: 3px;
  user-select: none;
}
.slipstream-benchmark__frame img { display: block; max-width: 100%; max-height: 480px; }
.slipstream-benchmark__frame img + img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.slipstream-benchmark__frame[data-mode='wipe'] img + img { clip-path: inset(0 0 0 var(--wipe)); }
.slipstream-benchmark__frame :is(input, button) {
  position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; border: 0; opacity: 0;
}
.slipstream-benchmark__frame input { cursor: ew-resize; }
.slipstream-benchmark__frame button { cursor: pointer; }
.slipstream-benchmark__divider {
  position: absolute; inset: 0 auto 0 var(--wipe); width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 0 1px #0008; pointer-events: none;
}
.slipstream-benchmark__divider::after {
  content: ''; position: absolute; inset: 50% auto auto 50%; width: 14px; height: 14px; translate: -50% -50%;
  border: 2px solid #fff; border-radius: 50%; background: #000a; box-shadow: 0 0 0 1px #0008;
}
.slipstream-benchmark__frame :focus-visible + .slipstream-benchmark__divider { background: ${ACCENT}; }
.slipstream-benchmark__frame:has(button:focus-visible) { outline: 2px solid ${ACCENT}; }
.slipstream-benchmark__label {
  position: absolute; bottom: 6px; padding: 1px 6px; border-radius: 3px; background: #000b; color: #fff;
  font-size: 11px; pointer-events: none;
}
.slipstream-benchmark__label:first-of-type { left: 6px; }
.slipstream-benchmark__label:last-of-type { right: 6px; }

.slipstream-benchmark__foot { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 12px; }
.slipstream-benchmark__foot > :is(ul, small) { flex-basis: 100%; }
.slipstream-benchmark__foot ul { list-style: none; }
.slipstream-benchmark__saved { display: contents; }
.slipstream-benchmark__saved a { color: inherit; text-decoration: underline; }

@container (min-width: 560px) {
  .slipstream-benchmark__charts { grid-template-columns: 1fr 1fr; }
  .slipstream-benchmark__table th:first-child { min-width: 116px; }
}
@container (max-width: 559px) {
  .slipstream-benchmark__table { font-size: 11px; }
  .slipstream-benchmark__table small { font-size: 10px; }
  .slipstream-benchmark__table :is(thead, tbody, th, td) { display: block; }
  .slipstream-benchmark__table tr { display: flex; flex-wrap: wrap; }
  .slipstream-benchmark__table :is(th, td) { flex: 1 1 0; min-width: 0; padding-left: 6px; }
  .slipstream-benchmark__table :is(th, td):nth-child(3) { flex-grow: 1.4; }
  .slipstream-benchmark__table :is(tbody th, .slipstream-benchmark__told) { flex-basis: 100%; }
  .slipstream-benchmark__table thead th:first-child { display: none; }
  .slipstream-benchmark__table td:not([data-trend]) small { white-space: normal; }
}
`

/** How to bring a panel in line with a report. @type {WeakMap<HTMLElement, (report: Report) => void>} */
const updates = new WeakMap()

details.set(TYPE, (report, previous) => {
  if (report.schema !== SCHEMA || !report.variants?.length) return null
  const element = previous ?? createPanel()
  updates.get(element)(report)
  return element
})

function createPanel() {
  const charts = make('div', 'slipstream-benchmark__charts')
  const times = chartSection('runTimes', timesOption)
  const steps = chartSection('stepTimes', stepsOption)
  charts.append(times.element, steps.element)

  const above = [progressSection(), titleSection(), tableSection()]
  const below = [imagesSection(), footSection()]
  const elements = (sections) => sections.map((section) => section.element)
  const element = make('div', 'slipstream-benchmark')
  element.append(...elements(above), charts, ...elements(below))
  updates.set(element, (report) => {
    for (const section of [...above, times, steps, ...below]) section.update(report)
    charts.hidden = times.element.hidden
  })
  return element
}

/** @returns {Section} */
function titleSection() {
  const element = make('p', 'slipstream-benchmark__title')
  return {
    element,
    update({ title, settings }) {
      const more = settings.seeds > 1 ? ` + ${settings.seeds - 1}` : ''
      const about = [`${word('seed')} ${settings.seed}${more}`, `${word('rounds')} ${settings.runs}`]
      element.replaceChildren(title, make('small', '', about.join(', ')))
    }
  }
}

// The table

/** @returns {Section} */
function tableSection() {
  const element = make('table', 'slipstream-benchmark__table')
  return {
    element,
    update(report) {
      const columns = columnsOf(report)
      const head = make('tr', '')
      head.append(...columns.map(({ head, tip }) => cell('th', head, tip)))
      const top = make('thead', '')
      top.append(head)
      element.replaceChildren(top, ...report.variants.map((variant, index) => variantRows(variant, index, columns)))
    }
  }
}

/**
 * @typedef {[string, string?, string?]} Cell Its figure, what is small beneath it, its tooltip.
 * @param {Report} report
 * @returns {{ head: [string, string?], tip?: string, of: (variant: Variant) => Cell }[]}
 */
function columnsOf(report) {
  const hasPictures = report.variants.some(({ fidelity }) => fidelity && fidelity.ssim !== null)
  const hasWorst = report.variants.some(({ worst }) => worst)
  const hasDecode = report.variants.some(({ decode_s }) => decode_s)
  return [
    { head: [word('variant')], of: nameCell },
    { head: [word('time'), word('range')], of: timeCell },
    { head: [word('speed'), word('interval')], of: speedCell },
    ...(hasDecode ? [{ head: [word('decode'), word('range')], of: ({ decode_s }) => summaryCell(decode_s) }] : []),
    { head: [word('memory'), 'MiB'], tip: report.memory_is, of: memoryCell },
    { head: [word('evaluations'), word('rows')], of: ({ evaluations, rows }) => [evaluations ?? '–', rows ?? ''] },
    hasPictures
      ? { head: ['SSIM', hasWorst ? word('worst') : 'PSNR'], of: pictureCell }
      : { head: [word('latentError'), hasWorst ? word('worst') : ''], of: latentCell }
  ]
}

/** @param {Variant} variant @returns {Cell} */
function nameCell({ name, methods, role }) {
  const settings = methods.map((method) => {
    const values = Object.entries(method.settings).map(([key, value]) => `${key} ${value}`)
    return `${method.title}: ${values.join(', ')}`
  })
  const none = word(role === 'rival' ? 'rival' : 'noMethods')
  return [name, methods.map(({ title }) => title).join(', ') || none, settings.join('\n')]
}

/** @param {Variant} variant @returns {Cell} */
function timeCell({ time_s, warm_up }) {
  if (!warm_up) return summaryCell(time_s)
  const [first, loaded] = [warm_up.seconds, warm_up.loading_s].map((seconds) => duration(seconds))
  return summaryCell(time_s, `${word('firstRun')} ${first}, ${word('loaded')} ${loaded}`)
}

/** @param {Summary | null} summary @param {string} [tip] @returns {Cell} */
function summaryCell(summary, tip) {
  if (!summary) return ['–', '', tip]
  return [duration(summary.median), summary.minimum < summary.maximum ? rangeOf(summary) : '', tip]
}

/** @param {Variant} variant @returns {Cell} */
function speedCell({ speedup }) {
  if (!speedup) return ['–']
  const [, main, interval] = speedup.text.match(/^(.*?)(?: \((.*)\))?$/)
  return [main, interval]
}

/** @param {Variant} variant @returns {Cell} */
function memoryCell({ memory_mib }) {
  if (!memory_mib) return ['–']
  const [median, minimum, maximum] = [memory_mib.median, memory_mib.minimum, memory_mib.maximum].map((value) =>
    Math.round(value).toLocaleString('en')
  )
  return [median, '', `${minimum} – ${maximum} MiB`]
}

/** @param {Variant} variant @returns {Cell} */
function pictureCell(variant) {
  const { fidelity, role, worst } = variant
  if (role === 'baseline' || !fidelity || fidelity.ssim === null) return ['–']
  const psnr = fidelity.psnr_db === null ? '∞ dB' : `${fidelity.psnr_db.toFixed(1)} dB`
  const small = isSame(variant) ? word('identical') : worst ? worst.ssim.toFixed(4) : psnr
  return [fidelity.ssim.toFixed(4), small, `PSNR ${psnr}\n${word('latentError')} ${latentError(variant)}`]
}

/** @param {Variant} variant @returns {Cell} */
function latentCell(variant) {
  const { worst } = variant
  const small = worst ? worst.latent_error.toPrecision(3) : ''
  return [latentError(variant), isSame(variant) ? word('identical') : small]
}

/** @param {Variant} variant */
function latentError(variant) {
  if (variant.role === 'baseline' || !variant.fidelity) return '–'
  return isSame(variant) ? '0' : variant.fidelity.latent_error.toPrecision(3)
}

/** @param {Variant} variant */
function isSame({ fidelity, role }) {
  return role !== 'baseline' && Boolean(fidelity?.is_identical)
}

/** @param {Variant} variant @param {number} index @param {ReturnType<typeof columnsOf>} columns */
function variantRows(variant, index, columns) {
  const rows = make('tbody', '')
  rows.dataset.variant = variant.name

  const figures = make('tr', '')
  figures.append(
    ...columns.map(({ of }, position) => {
      const [text, small, tip] = of(variant)
      return cell(position ? 'td' : 'th', [text, small], tip)
    })
  )
  const swatch = make('span', 'slipstream-benchmark__swatch')
  swatch.style.setProperty('--color', colorOf(index))
  figures.cells[0].prepend(swatch)
  if (variant.speedup) figures.cells[2].dataset.trend = trendOf(variant.speedup)
  rows.append(figures)

  const told = toldLines(variant)
  if (told.length) {
    const line = make('td', 'slipstream-benchmark__told')
    line.colSpan = columns.length
    line.append(...told)
    rows.insertRow().append(line)
  }
  return rows
}

/** What a reader must know besides the figures. @param {Variant} variant @returns {HTMLElement[]} */
function toldLines({ verdicts, problems, warm_up, recompiles }) {
  const verdictLines = verdicts.map(({ title, state, text }) => {
    const line = make('div', '')
    line.append(mark(line, state), make('span', '', `${title}: ${text}`))
    return line
  })
  const compiled = []
  if (warm_up?.graphs) compiled.push(`${word('compiled')} ${warm_up.graphs} (${duration(warm_up.compile_s)})`)
  if (recompiles) compiled.push(`${word('recompiled')} ${recompiles}`)
  return [
    ...problems.map((problem) => make('div', 'slipstream-benchmark__problem', problem)),
    ...verdictLines,
    ...(compiled.length ? [make('small', '', compiled.join(', '))] : [])
  ]
}

const style = new CSSStyleSheet()
style.replaceSync(STYLE)
document.adoptedStyleSheets.push(style)
