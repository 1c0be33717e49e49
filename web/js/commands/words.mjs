/**
 * What the commands are called and say, in English and Chinese.
 *
 * @typedef {import('./edit.mjs').Fact} Fact
 */

/** @type {Record<string, Record<string, string | ((...about: any[]) => string)>>} */
export const WORDS = {
  en: {
    speedUp: 'Speed up this workflow',
    benchmark: 'Benchmark this workflow',
    tune: 'Tune this workflow',
    toggle: 'Slipstream on or off',
    remove: 'Remove Slipstream from this workflow',
    benchmarkThis: 'Benchmark this sampler',
    tuneThis: 'Tune this sampler',
    speedUpTip: 'Puts one Recipe before the samplers of each model.',
    benchmarkTip: 'Puts a Benchmark beside a sampler: without Slipstream against as it is.',
    tuneTip: 'Puts a Tune beside a sampler: finds the fastest settings that keep its pictures.',
    toggleTip: 'Bypasses what can be left out, for a look at both, or brings it back.',
    removeTip: 'Takes the nodes out and joins the wires again.',

    goal: 'For which goal?',
    cancel: 'Cancel',
    goals: (goal) => ({
      'best quality': 'the same picture up to rounding',
      balanced: 'faster, and very near to it',
      fastest: 'with less fine detail',
      'under 8 GB': 'GPU memory for sampling',
      'under 6 GB': 'GPU memory for sampling',
      'under 4 GB': 'GPU memory for sampling'
    })[goal],

    empty:
      'No Slipstream node in this workflow yet. Speed up this workflow puts one where it belongs, and after a run each ' +
      'node says here what it did.',
    noVerdict: 'not run yet',
    isOff: 'off',
    took: (seconds) => `The last run took ${seconds}`,
    sampled: (seconds) => `sampling ${seconds}`,
    left: (left, all) => `${left} of ${all} predictions of the model left out`,
    reused: (some, all) => `${some} of ${all} evaluations with part of the model reused`,
    nothingLeft: 'nothing of the model left out',

    put: (recipe, samplers, where) => `${recipe} is on the model of ${list(samplers)}${within(where)}.`,
    goesOnWith: (recipe) => `${recipe} was there already, and has the goal now.`,
    suggests: (node) => `${node} was there already, and chooses the methods.`,
    measures: (node, sampler, where) => `${node} measures ${sampler}${within(where)}: run the workflow.`,
    copied: (nodes) => `${list(nodes)} copied for the model without Slipstream.`,
    notWired: (name) => `${name} has the value of now: it can't be wired to two nodes here.`,
    off: (count) => `Slipstream is off: ${nodes(count)}.`,
    on: (count) => `Slipstream is on: ${nodes(count)}.`,
    stay: (names) => `${list(names)} left as they are: the workflow needs them.`,
    removed: (count) => `Removed: ${nodes(count)}.`,
    replaced: (names) => `In their place: ${list(names)}.`,
    cut: (names) => `No longer wired: ${list(names)}.`,

    noSampler: () => 'No sampler here takes a MODEL.',
    noRun: () => 'Every sampler here is muted or bypassed.',
    noModel: (sampler) => `No model is wired to ${sampler}.`,
    nothing: () => 'No Slipstream node is in this workflow.',
    onlyStay: (names) => `${list(names)}: the workflow needs them. Nothing else of Slipstream is here.`,
    nothingOn: (sampler) => `No Slipstream node is on the model of ${sampler}. First: Speed up this workflow.`,
    measured: (sampler) => `A node measures ${sampler} already.`,
    unknownSampler: (sampler) => `${sampler} samples in a way of its own, which can't be repeated.`,
    unknownGuider: (guider) => `${guider} guides in a way of its own, which can't be repeated.`,
    unknownSigmas: (sampler, node) => `${sampler} takes its steps from ${node}; only those of ComfyUI's schedulers can be repeated.`,
    unknownPart: (sampler, node) => `${sampler} uses ${node}, which can't be repeated.`,
    otherModel: (node, other) => `${node} takes its steps from another model than ${other} samples.`,
    goesOn: (sampler) => `${sampler} goes on where another sampler stopped; what measures begins with noise.`,
    stopsEarly: (sampler) => `${sampler} leaves its last steps to another sampler; what measures makes them all.`,
    nested: (sampler) => `${sampler} samples several latents in one, as for video with sound, which can't be compared.`,
    noPicture: (sampler) => `Nothing decodes what ${sampler} makes, and Tune compares pictures.`,
    pictureOutside: (sampler) => `What ${sampler} makes is decoded outside of its subgraph, and Tune compares pictures.`,
    noInput: (node, name) => `${node} has no ${name}.`,
    noPart: (sampler, name) => `Nothing is wired to ${name} of ${sampler}, or not one thing alone.`,
    partOutside: (sampler, node) => `${sampler} uses ${node} from outside its subgraph.`,
    outside: (name) => `The Slipstream nodes are outside of the subgraph ${name}, and the sampler is inside.`,
    inside: (node) => `The Slipstream nodes are inside ${node}, together with others.`,
    around: (node) => `The model comes by more than one way through ${node}.`
  },
  zh: {
    speedUp: '加速此工作流',
    benchmark: '对此工作流做基准测试',
    tune: '对此工作流自动调优',
    toggle: '开启或关闭 Slipstream',
    remove: '从此工作流移除 Slipstream',
    benchmarkThis: '对此采样器做基准测试',
    tuneThis: '对此采样器自动调优',
    speedUpTip: '在每个模型的采样器之前放置一个“优化方案”节点。',
    benchmarkTip: '在采样器旁放置一个“基准测试”节点：比较没有 Slipstream 与现状。',
    tuneTip: '在采样器旁放置一个“自动调优”节点：找出图像不变差的最快设置。',
    toggleTip: '绕过可以省去的节点，便于对比；再次执行即可恢复。',
    removeTip: '取出节点，并重新接好连线。',

    goal: '目标是什么？',
    cancel: '取消',
    goals: (goal) => ({
      'best quality': '最佳质量：除舍入外图像相同',
      balanced: '均衡：更快，且非常接近',
      fastest: '最快：细节较少',
      'under 8 GB': '采样显存低于 8 GB',
      'under 6 GB': '采样显存低于 6 GB',
      'under 4 GB': '采样显存低于 4 GB'
    })[goal],

    empty: '此工作流中还没有 Slipstream 节点。“加速此工作流”会把它放到合适的位置；运行之后，每个节点都会在这里说明它做了什么。',
    noVerdict: '尚未运行',
    isOff: '已关闭',
    took: (seconds) => `上次运行耗时 ${seconds}`,
    sampled: (seconds) => `采样 ${seconds}`,
    left: (left, all) => `省去 ${all} 次模型预测中的 ${left} 次`,
    reused: (some, all) => `${all} 次评估中有 ${some} 次复用了部分模型`,
    nothingLeft: '模型计算没有省去',

    put: (recipe, samplers, where) => `${recipe} 已接到${withinZh(where)} ${list(samplers, '、')} 的模型上。`,
    goesOnWith: (recipe) => `${recipe} 原已存在，现已设为该目标。`,
    suggests: (node) => `${node} 原已存在，由它选择方法。`,
    measures: (node, sampler, where) => `${node} 将测量${withinZh(where)} ${sampler}：请运行工作流。`,
    copied: (nodes) => `为没有 Slipstream 的模型复制了 ${list(nodes, '、')}。`,
    notWired: (name) => `${name} 取当前值：此处无法同时接到两个节点。`,
    off: (count) => `Slipstream 已关闭：${count} 个节点。`,
    on: (count) => `Slipstream 已开启：${count} 个节点。`,
    stay: (names) => `${list(names, '、')} 保持不变：工作流需要它们。`,
    removed: (count) => `已移除 ${count} 个节点。`,
    replaced: (names) => `已换成 ${list(names, '、')}。`,
    cut: (names) => `不再有连线：${list(names, '、')}。`,

    noSampler: () => '此处没有接收 MODEL 的采样器。',
    noRun: () => '此处的采样器都已静音或绕过。',
    noModel: (sampler) => `${sampler} 没有接模型。`,
    nothing: () => '此工作流中没有 Slipstream 节点。',
    onlyStay: (names) => `${list(names, '、')}：工作流需要它们；此外没有 Slipstream 节点。`,
    nothingOn: (sampler) => `${sampler} 的模型上没有 Slipstream 节点。请先执行“加速此工作流”。`,
    measured: (sampler) => `已有节点在测量 ${sampler}。`,
    unknownSampler: (sampler) => `${sampler} 以自己的方式采样，无法重复。`,
    unknownGuider: (guider) => `${guider} 以自己的方式引导，无法重复。`,
    unknownSigmas: (sampler, node) => `${sampler} 的步由 ${node} 给出；只有 ComfyUI 的调度器可以重复。`,
    unknownPart: (sampler, node) => `${sampler} 使用 ${node}，无法重复。`,
    otherModel: (node, other) => `${node} 的步取自另一个模型，而不是 ${other} 所采样的模型。`,
    goesOn: (sampler) => `${sampler} 接着另一个采样器继续；测量从噪声开始。`,
    stopsEarly: (sampler) => `${sampler} 把最后几步留给另一个采样器；测量会做完所有步。`,
    nested: (sampler) => `${sampler} 同时采样多个潜变量（如带声音的视频），无法比较。`,
    noPicture: (sampler) => `${sampler} 的结果没有被解码，而自动调优要比较图像。`,
    pictureOutside: (sampler) => `${sampler} 的结果在其子图之外解码，而自动调优要比较图像。`,
    noInput: (node, name) => `${node} 没有 ${name}。`,
    noPart: (sampler, name) => `${sampler} 的 ${name} 没有接线，或来源不止一个。`,
    partOutside: (sampler, node) => `${sampler} 使用其子图之外的 ${node}。`,
    outside: (name) => `Slipstream 节点在子图 ${name} 之外，而采样器在其中。`,
    inside: (node) => `Slipstream 节点与其他节点一起在 ${node} 之内。`,
    around: (node) => `模型经由 ${node} 的路径不止一条。`
  }
}

/** @param {string[]} names */
function list(names, comma = ', ') {
  return names.join(comma)
}

/** @param {string[]} subgraphs */
function within(subgraphs) {
  return subgraphs.length ? `, in ${list(subgraphs)}` : ''
}

/** @param {string[]} subgraphs */
function withinZh(subgraphs) {
  return subgraphs.length ? ` ${list(subgraphs, '、')} 中的` : ''
}

/** @param {number} count */
function nodes(count) {
  return count === 1 ? '1 node' : `${count} nodes`
}

/** @param {string} language */
export function wordsOf(language) {
  return WORDS[String(language).split('-')[0]] ?? WORDS.en
}

/** What was done, in one line. @param {Fact[]} facts @param {string} language */
export function sentence(facts, language) {
  const words = wordsOf(language)
  return facts.map(([key, ...about]) => words[key](...about)).join(words === WORDS.zh ? '' : ' ')
}
