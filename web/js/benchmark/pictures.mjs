/**
 * The pictures of the Benchmark's panel: the baseline's under another variant's.
 *
 * @typedef {import('./format.mjs').FileReference} FileReference
 * @typedef {import('../benchmark.js').Section} Section
 */
import { make } from '../verdicts.js'
import { urlOf, word } from './format.mjs'

const HOLD_MS = 300

/** The baseline's picture under another variant's. @returns {Section} */
export function imagesSection() {
  const element = make('section', 'slipstream-benchmark__images')
  element.ariaLabel = word('pictures')
  const chips = make('div', 'slipstream-benchmark__chips')
  const frame = make('div', 'slipstream-benchmark__frame')
  const [under, over] = [document.createElement('img'), document.createElement('img')]
  const wipe = createWipe(frame)
  const divider = make('div', 'slipstream-benchmark__divider')
  const flip = createFlip((isOver) => {
    isFlipped = isOver
    show()
  })
  const labels = [0, 1].map(() => make('span', 'slipstream-benchmark__label'))
  frame.append(under, over, wipe, divider, flip, ...labels)
  element.append(chips, frame)

  /** Gone with the host's folder of temporary files. */
  const missing = new Set()
  for (const image of [under, over]) {
    image.draggable = false
    image.onerror = () => {
      missing.add(image.getAttribute('src'))
      show()
    }
  }

  let report
  let chosen = 'candidate'
  let chosenMode = 'wipe'
  let isFlipped = false

  function show() {
    const shown = report.variants.filter(({ image }) => image && !missing.has(urlOf(image)))
    const baseline = shown.find(({ role }) => role === 'baseline')
    const others = shown.filter((variant) => variant !== baseline)
    element.hidden = !baseline || !others.length
    if (element.hidden) return

    const variant = others.find(({ name }) => name === chosen) ?? others[0]
    const { difference } = report
    const hasDifference = variant.role === 'candidate' && difference && !missing.has(urlOf(difference))
    const modes = ['wipe', 'flip', ...(hasDifference ? ['difference'] : [])]
    const mode = modes.includes(chosenMode) ? chosenMode : 'wipe'

    const toMode = (name) => ({ text: word(name), isOn: name === mode, choose: () => choose(chosen, name) })
    const toVariant = (one) => ({ text: one.name, isOn: one === variant, choose: () => choose(one.name, chosenMode) })
    showChips(chips, [modes.map(toMode), others.length > 1 ? others.map(toVariant) : []])
    frame.dataset.mode = mode
    setImage(under, baseline.image, baseline.name)
    const overName = mode === 'difference' ? word('amplified') : variant.name
    setImage(over, mode === 'difference' ? difference : variant.image, overName)
    over.style.visibility = mode === 'flip' && !isFlipped ? 'hidden' : 'visible'
    wipe.hidden = divider.hidden = mode !== 'wipe'
    flip.hidden = mode !== 'flip'
    labels[0].textContent = baseline.name
    labels[0].hidden = mode === 'difference' || (mode === 'flip' && isFlipped)
    labels[1].textContent = overName
    labels[1].hidden = mode === 'flip' && !isFlipped
  }

  function choose(name, mode) {
    chosen = name
    chosenMode = mode
    show()
  }

  return {
    element,
    update(next) {
      report = next
      show()
    }
  }
}

/** @param {HTMLImageElement} image @param {FileReference} file @param {string} name */
function setImage(image, file, name) {
  image.alt = name
  const url = urlOf(file)
  if (image.getAttribute('src') !== url) image.src = url
}

/** A slider as large as the picture: the divider follows it. @param {HTMLElement} frame */
function createWipe(frame) {
  const range = document.createElement('input')
  Object.assign(range, { type: 'range', min: '0', max: '100', step: '0.5', value: '50', ariaLabel: word('wipe') })
  range.oninput = () => frame.style.setProperty('--wipe', `${range.value}%`)
  return range
}

/**
 * A button as large as the picture. A click turns to the other one for good, a longer press until it is let go.
 * @param {(isOver: boolean) => void} turn
 */
function createFlip(turn) {
  const button = document.createElement('button')
  button.className = 'slipstream-benchmark__flip'
  button.title = button.ariaLabel = word('flipHint')
  let isOver = false
  let pressedAt = 0
  const toggle = () => turn((isOver = !isOver))
  button.onpointerdown = ({ button: which }) => {
    if (which !== 0) return
    pressedAt = performance.now()
    toggle()
    const release = () => performance.now() - pressedAt > HOLD_MS && toggle()
    addEventListener('pointerup', release, { once: true, capture: true })
  }
  button.onclick = ({ detail }) => detail === 0 && toggle() // by key
  return button
}

/**
 * Buttons, changed in place: the one in focus stays in focus.
 * @param {HTMLElement} element
 * @param {{ text: string, isOn: boolean, choose: () => void }[][]} groups
 */
function showChips(element, groups) {
  while (element.children.length < groups.length) element.append(document.createElement('div'))
  groups.forEach((chips, index) => {
    const group = element.children[index]
    while (group.children.length > chips.length) group.lastChild.remove()
    chips.forEach(({ text, isOn, choose }, position) => {
      const button = group.children[position] ?? group.appendChild(document.createElement('button'))
      button.textContent = text
      button.ariaPressed = String(isOn)
      button.onclick = choose
    })
  })
}
