/**
 * Words, figures, colours and addresses of the Benchmark's panel.
 *
 * @typedef {{ median: number, minimum: number, maximum: number }} Summary
 * @typedef {{ filename: string, subfolder: string, type: string }} FileReference As the host names files.
 */
import { api } from '../../../../scripts/api.js'
import { localized } from '../verdicts.js'

export const ACCENT = '#3b82f6'
export const FONT = 'Inter, system-ui, sans-serif'

/** Of the variants in their order; on light and on dark alike at least 3:1. */
const COLORS = ['#858585', ACCENT, '#d9730d', '#1f9d55', '#a05fd6', '#d6459a', '#0f93a8', '#97830f', '#d9534f']

const STRINGS = {
  en: {
    seed: 'seed', rounds: 'rounds', variant: 'variant', time: 'time', range: 'min to max', speed: 'speed',
    interval: '95 % interval', decode: 'decode', memory: 'memory', evaluations: 'evaluations', rows: 'rows',
    latentError: 'latent error', identical: 'identical', noMethods: 'no methods', rival: 'without Slipstream', firstRun: 'first run',
    loaded: 'weights loaded in', compiled: 'graphs compiled:', recompiled: 'compiled again in the measured runs:',
    runTimes: 'Time of each run, with median', stepTimes: 'Time of each step, median of the runs', median: 'median',
    round: 'round', step: 'step', noCharts: 'The chart could not be drawn: its library did not load.',
    pictures: 'Comparison of pictures', wipe: 'Wipe', flip: 'Flip', difference: 'Difference',
    amplified: 'difference, amplified', flipHint: 'Click to flip, hold to peek', copy: 'Copy as Markdown',
    copied: 'Copied', notCopied: 'Not copied', frontier: 'Speed against fidelity: click a plan to choose it',
    plan: 'plan', asItIs: 'as it is', floor: 'floor', worst: 'worst', mean: 'mean', onePicture: 'one more picture',
    state: 'result', work: 'work', paysBack: 'pays back after {} pictures', chosen: 'chosen', fewerSteps: 'fewer steps',
    untried: 'not tried', slower: 'not faster', 'below the floor': 'below the floor',
    unlikely: 'would not hold on other pictures', failed: 'failed', unfinished: 'not tried to the end', holds: 'holds',
    'failed the check': 'failed the check', fresh: 'on fresh seeds', allPlans: 'All {} plans', fewerPlans: 'Fewer plans'
  },
  zh: {
    seed: '种子', rounds: '轮数', variant: '方案', time: '耗时', range: '最小至最大', speed: '速度', interval: '95 % 区间',
    decode: '解码', memory: '内存', evaluations: '评估次数', rows: '行数', latentError: '潜变量误差', identical: '完全相同',
    noMethods: '无优化方法', rival: '不用 Slipstream', firstRun: '首次运行', loaded: '权重加载', compiled: '编译图数：', recompiled: '测量期间重新编译：',
    runTimes: '每次运行的耗时与中位数', stepTimes: '每一步的耗时（各次运行的中位数）', median: '中位数', round: '轮次', step: '步',
    noCharts: '无法绘制图表：图表库未能加载。', pictures: '图像对比', wipe: '滑动对比', flip: '切换对比', difference: '差异',
    amplified: '差异（已放大）', flipHint: '点击切换，按住暂看', copy: '复制为 Markdown', copied: '已复制', notCopied: '复制失败',
    frontier: '速度与保真度：点击方案即可选用', plan: '方案', asItIs: '原样', floor: '下限', worst: '最差', mean: '平均',
    onePicture: '下一张图', state: '结果', work: '工作量', paysBack: '{} 张图后抵消', chosen: '已选', fewerSteps: '减少步数',
    untried: '未尝试', slower: '不更快', 'below the floor': '低于下限', unlikely: '在其他图上难以达标', failed: '失败',
    unfinished: '未测完', holds: '达标', 'failed the check': '未通过检验', fresh: '在新种子上', allPlans: '全部 {} 个方案', fewerPlans: '收起'
  }
}

/** @param {string} key */
export function word(key) {
  return localized(STRINGS, key)
}

/** @param {FileReference} file */
export function urlOf({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`)
}

/** Milliseconds below one second. @param {number} seconds @param {number} [like] A duration whose unit to use. */
export function duration(seconds, like = seconds) {
  return like < 1 ? `${digits(seconds * 1000)} ms` : `${digits(seconds)} s`
}

/** A round figure on an axis, in the unit of the longest. @param {number} seconds @param {number} longest */
export function tick(seconds, longest) {
  return longest < 1 ? `${Number((seconds * 1000).toPrecision(3))} ms` : `${Number(seconds.toPrecision(3))} s`
}

/** @param {number} value */
function digits(value) {
  return value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : 2)
}

/** In the unit of the median, which is written before it. @param {Summary} summary */
export function rangeOf({ median, minimum, maximum }) {
  return [minimum, maximum].map((seconds) => duration(seconds, median).split(' ')[0]).join(' – ')
}

/** @param {number} index */
export function colorOf(index) {
  return COLORS[index % COLORS.length]
}
