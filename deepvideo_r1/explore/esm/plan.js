// What the library plans for a difficulty, in JavaScript: strengths, hints, masks, advantages, and groups that agree.

/** To the nearest whole number, halves to the even one, as Python rounds. */
export function roundHalfEven(value) {
  const low = Math.floor(value);
  return value - low === 0.5 ? low + (low % 2) : Math.round(value);
}

/** `change_strength`: side of the difficulty, and the names of scale, cap and fixed strength, for each change. */
const CHANGES = {
  noise: [-1, "noise_scale", "max_sigma", "fixed_sigma"],
  mask: [-1, "mask_scale", "max_mask", "fixed_mask"],
  hint: [1, "hint_scale", "max_hint", "fixed_hint"],
};

export function changeStrength(difficulty, change, config) {
  const [side, ...names] = CHANGES[change], [scale, cap, fixed] = names.map((name) => config[name]);
  if (side * difficulty <= config.dead_zone) return 0;
  return config.schedule === "fixed" ? (scale > 0 ? fixed : 0) : Math.min(scale * side * difficulty, cap);
}

/** `plan_augmentation`: what to change, for an AugmentConfig. */
export function planAugmentation(difficulty, config, step = 0) {
  if (config.redraw_only) return Math.abs(difficulty) > config.dead_zone ? { change: "redraw" } : {};
  const left = config.hint_fade_steps ? Math.max(0, 1 - step / config.hint_fade_steps) : 1;
  const hint = left * changeStrength(difficulty, "hint", config);
  if (hint) return { change: "hint", fraction: hint };
  const amount = changeStrength(difficulty, config.harder, config);
  if (!amount) return {};
  return config.harder === "mask" ? { change: "mask", fraction: amount } : { change: "noise", sigma: amount };
}

/** What the plan says for each of the three sliders. */
export function strengths(plan) {
  return {
    sigma: plan.sigma ?? 0,
    masked_share: plan.change === "mask" ? plan.fraction : 0,
    hint_share: plan.change === "hint" ? plan.fraction : 0,
  };
}

/** Where a trace is cut: between lines, sentences of every script, words. A group holds what stays before the cut. */
const BOUNDARIES = [
  /\n+/gu,
  /\n+|(?<=[.!?])\p{White_Space}+|((?:(?![.!?])\p{Sentence_Terminal})+[\p{Pe}\p{Pf}]*)/gu,
  /\p{White_Space}+|([\uFF0C\u3001\uFF1B\uFF1A\u060C\u061B])/gu,
];
const BLANK_ENDS = /^[\p{White_Space}\x1C-\x1F]+|[\p{White_Space}\x1C-\x1F]+$/gu;  // what Python's `strip` removes

/** `make_hint`, and no hint where there is no trace. */
export function makeHint(trace, fraction) {
  const text = trace.replace(BLANK_ENDS, "");
  for (const boundary of BOUNDARIES) {
    const places = [...text.matchAll(boundary)].map(({ index, 1: kept = "" }) => index + kept.length);
    const cuts = [...new Set(places)].filter((place) => place > 0 && place < text.length);
    const count = Math.min(roundHalfEven(fraction * (cuts.length + 1)), cuts.length);
    if (cuts.length) return count ? text.slice(0, cuts[count - 1]) : "";
  }
  return "";
}

/** Numbers of the frames that `mask_frames` turns grey; `order` leaves out the frame that always stays. */
export function maskedFrames(order, share) {
  return order.slice(0, Math.min(roundHalfEven(share * (order.length + 1)), order.length));
}

/** Place of the noise level nearest to sigma. */
export function nearestLevel(levels, sigma) {
  return levels.reduce((best, level, k) => (Math.abs(level - sigma) < Math.abs(levels[best] - sigma) ? k : best), 0);
}

/** `agreeing_share`: share of all choices of `size` among these rewards in which all are equal. */
export function agreeingShare(rewards, size) {
  const counts = [...new Set(rewards)].map((value) => rewards.filter((other) => other === value).length);
  const chance = (count) => (count < size ? 0
    : Array.from({ length: size }, (_, k) => (count - k) / (rewards.length - k)).reduce((a, b) => a * b, 1));
  return counts.reduce((sum, count) => sum + chance(count), 0);
}
