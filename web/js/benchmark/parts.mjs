/**
 * Parts that the panels of what measures have in common: how far it is, cells of a table, and the foot.
 *
 * @typedef {import('./format.mjs').FileReference} FileReference
 * @typedef {import('../benchmark.js').Section} Section
 */
import { make } from '../verdicts.js'
import { urlOf, word } from './format.mjs'

const COPIED_MS = 1500

/** @returns {Section} */
export function progressSection() {
  const element = document.createElement('progress')
  return {
    element,
    update({ status, done, total }) {
      element.hidden = status !== 'running'
      element.max = total
      element.value = done
    }
  }
}

/**
 * @param {'th' | 'td'} tag
 * @param {[any, any?]} texts The second one is small beneath the first.
 * @param {string} [tip]
 */
export function cell(tag, [text, small], tip = '') {
  const element = make(tag, '', String(text))
  if (small || small === 0) element.append(make('small', '', String(small)))
  element.title = tip ?? ''
  return element
}

/** @param {{ value: number, low: number | null, is_difference: boolean }} speedup */
export function trendOf({ value, low, is_difference }) {
  if (!is_difference) return low === null ? 'unknown' : 'none'
  return value >= 1 ? 'faster' : 'slower'
}

/** @returns {Section} */
export function footSection() {
  const element = make('footer', 'slipstream-benchmark__foot')
  const copy = make('button', 'slipstream-benchmark__copy', word('copy'))
  const saved = make('span', 'slipstream-benchmark__saved')
  const notes = make('ul', '')
  const machine = make('small', '')
  element.append(notes, copy, saved, machine)
  return {
    element,
    update(report) {
      copy.hidden = !report.markdown
      copy.onclick = () => copyText(report.markdown, copy)
      saved.replaceChildren(...Object.values(report.saved ?? {}).map(fileLink))
      notes.replaceChildren(...report.notes.map((note) => make('li', '', note)))
      notes.hidden = !report.notes.length
      machine.textContent = machineLine(report.machine)
    }
  }
}

/** @param {FileReference} file */
function fileLink(file) {
  const link = make('a', '', file.filename)
  return Object.assign(link, { href: urlOf(file), download: file.filename })
}

/** @param {Record<string, any>} machine */
function machineLine(machine) {
  const parts = Object.entries(machine).filter(([, value]) => value)
  const told = ([name, value]) => (name.endsWith('_mib') ? [name.slice(0, -4), `${value} MiB`] : [name, value])
  return parts.map(told).map(([name, value]) => `${name.replaceAll('_', ' ')} ${value}`).join(', ')
}

/** @param {string} text @param {HTMLElement} button Says how it went. */
async function copyText(text, button) {
  const isCopied = await writeClipboard(text, button).catch(() => false)
  button.textContent = word(isCopied ? 'copied' : 'notCopied')
  setTimeout(() => (button.textContent = word('copy')), COPIED_MS)
}

/** @param {string} text @param {HTMLElement} button @returns {Promise<boolean>} */
async function writeClipboard(text, button) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text)
    return true
  }
  // A page over plain http has no clipboard but the selection's.
  const area = document.createElement('textarea')
  area.value = text
  button.after(area)
  area.select()
  const isCopied = document.execCommand('copy')
  area.remove()
  button.focus()
  return isCopied
}
