// Explorer: how often all rewards of a group are equal, and one group at a time.
import { groupAdvantages } from "./group.js";
import { change, chart, follow, make, modelSlider, number, open, range } from "./kit.js";

/** P(all G rewards equal) when each response is right with probability `accuracy`, independently. */
export function vanishingProbability(accuracy, groupSize) {
  return accuracy ** groupSize + (1 - accuracy) ** groupSize;
}

/** Numbers in [0, 1), the same ones for the same seed (mulberry32). */
export function uniforms(seed, count) {
  let state = seed >>> 0;
  return Array.from({ length: count }, () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  });
}

/** The rewards (0 or 1) of the group with this number. */
export function sampleGroup(accuracy, groupSize, seed) {
  return uniforms(seed, groupSize).map((draw) => (draw < accuracy ? 1 : 0));
}

function drawCurve(accuracy, groupSize) {
  const share = vanishingProbability(accuracy, groupSize);
  const axes = chart({
    x: [0, 1], y: [0, 1], xLabel: "probability p that one response is right", yLabel: "share of vanishing groups",
    label: `For groups of ${groupSize} and p = ${number(accuracy)} the share of vanishing groups is ${number(share)}`,
  });
  const curve = (size) => range(0, 1, 120).map((p) => [p, vanishingProbability(p, size)]);
  for (const other of [2, 4, 8, 16]) axes.line(curve(other), "faint");
  axes.line(curve(groupSize), "a");
  axes.here(accuracy);
  axes.dot(accuracy, share, "dot-a");
  return axes.svg;
}

function drawGroup(rewards) {
  const columns = 8, cell = 40, rows = Math.ceil(rewards.length / columns), right = rewards.filter(Boolean).length;
  const label = `A group of ${rewards.length}: ${right} right, ${rewards.length - right} wrong`;
  const svg = make("svg", { viewBox: `0 0 340 ${rows * cell + 24}`, role: "img", "aria-label": label });
  svg.append(make("text", { x: 2, y: 12 }, "one group of responses"));
  rewards.forEach((reward, k) => {
    const x = 22 + (k % columns) * cell, y = 42 + Math.floor(k / columns) * cell;
    svg.append(
      make("circle", { class: reward ? "a" : "b solid", cx: x, cy: y, r: 14 }),
      make("text", { x, y: y + 4, "text-anchor": "middle" }, reward ? "1" : "0"),
    );
  });
  return svg;
}

function say(rewards, tally, share) {
  const advantages = groupAdvantages(rewards), value = (reward) => advantages[rewards.indexOf(reward)];
  const now = rewards.includes(0) && rewards.includes(1)
    ? `Advantages: ${number(value(1))} for each right response, ${number(value(0))} for each wrong one.`
    : `All ${rewards.length} rewards are ${rewards[0]}: every advantage is 0, and this group teaches nothing.`;
  return `${now} Vanished so far: ${tally.vanished} of ${tally.groups} groups; expected ${number(100 * share, 1)} %.`;
}

function render({ model, el }) {
  const root = open(el, "The vanishing advantage");
  const sliders = [
    modelSlider(model, "accuracy", { label: "p, one response is right", min: 0, max: 1, step: 0.01 }),
    modelSlider(model, "group_size", { label: "G, responses in a group", min: 2, max: 16, step: 1, digits: 0 }),
  ];
  const charts = make("div", { class: "dvr-charts" }), says = make("div", { class: "dvr-says", role: "status" });
  let tally, question;
  const vanishes = (seed) => new Set(sampleGroup(model.get("accuracy"), model.get("group_size"), seed)).size === 1;
  const sample = (count) => () => {
    const last = model.get("seed");
    for (let seed = last + 1; seed <= last + count; seed++) tally.vanished += vanishes(seed);
    tally.groups += count;
    change(model, { seed: last + count });
  };
  root.append(...sliders, make("div", { class: "dvr-buttons" },
    make("button", { type: "button", click: sample(1) }, "Sample a group"),
    make("button", { type: "button", click: sample(100) }, "Sample 100 groups")), charts, says);
  return follow(model, ["accuracy", "group_size", "seed"], () => {
    const accuracy = model.get("accuracy"), groupSize = model.get("group_size"), seed = model.get("seed");
    if (question !== `${accuracy} ${groupSize}`) tally = { groups: 1, vanished: Number(vanishes(seed)) };  // count anew
    question = `${accuracy} ${groupSize}`;
    const rewards = sampleGroup(accuracy, groupSize, seed);
    sliders.forEach((row) => row.update());
    charts.replaceChildren(make("div", { class: "dvr-chart" }, drawCurve(accuracy, groupSize)),
      make("div", { class: "dvr-chart" }, drawGroup(rewards)));
    says.textContent = say(rewards, tally, vanishingProbability(accuracy, groupSize));
  });
}

export default { render };
