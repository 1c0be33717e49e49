/** Asks for a goal. */
import { make } from '../verdicts.js'

/**
 * @param {string[]} goals
 * @param {Record<string, any>} words
 * @returns {Promise<string | null>} Null if the user changed their mind.
 */
export function askGoal(goals, words) {
  if (document.querySelector('.slipstream-goal')) return Promise.resolve(null)
  const dialog = /** @type {HTMLDialogElement} */ (make('dialog', 'slipstream-goal'))
  dialog.append(make('h2', '', words.goal))
  const form = /** @type {HTMLFormElement} */ (make('form', ''))
  form.method = 'dialog'
  for (const goal of goals) form.append(choice(goal, words.goals(goal)))
  form.append(choice('', words.cancel))
  dialog.append(form)
  // The page has a key for nearly each letter.
  for (const type of ['keydown', 'keyup']) dialog.addEventListener(type, (event) => event.stopPropagation())
  dialog.addEventListener('click', ({ target }) => target === dialog && dialog.close())
  document.body.append(dialog)
  dialog.showModal()
  return new Promise((resolve) => {
    dialog.addEventListener('close', () => {
      dialog.remove()
      resolve(dialog.returnValue || null)
    })
  })
}

/** @param {string} value @param {string} [about] */
function choice(value, about = '') {
  const button = /** @type {HTMLButtonElement} */ (make('button', ''))
  button.value = value
  button.append(...(value ? [make('b', '', value), make('span', '', about)] : [make('span', '', about)]))
  return button
}
