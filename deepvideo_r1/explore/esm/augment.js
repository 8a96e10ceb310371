// Explorer: what difficulty-aware augmentation shows to the policy, and how often a group of that difficulty vanishes.
import { change, chart, follow, make, modelSlider, number, open, range, slider } from "./kit.js";
import { makeHint, maskedFrames, nearestLevel, planAugmentation, strengths } from "./plan.js";

const LOOK = `
.dvr-strip { display: flex; flex-wrap: wrap; gap: 4px; margin: .4em 0; }
.dvr-strip > * { flex: 1 1 44px; min-width: 0; max-width: 112px; }
.dvr-strip img { width: 100%; height: auto; image-rendering: pixelated; }
.dvr-grey { background: rgb(128, 128, 128); min-height: 40px; }
.dvr-choices { display: flex; flex-wrap: wrap; gap: .4em 1.2em; margin: .4em 0; }
.dvr-turn { display: grid; grid-template-columns: 6em 1fr; gap: 0 .6em; margin: .3em 0; }
.dvr-turn pre { margin: 0; padding: .3em .6em; border: 1px solid currentColor; border-radius: 6px; background: none;
  color: inherit; font: 13px/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.dvr-turn .hint { font-weight: 600; text-decoration: underline 2px var(--dvr-b); }
.dvr-turn .aside { opacity: .75; }
@container (max-width: 30em) { .dvr-turn { grid-template-columns: 1fr; } }
`;
const SPAN = 1;  // units of reward shown to each side

/** Where the hint stands: `slot` opens the user's turn, `prefix` the assistant's. */
export function placeHint(hint, hintAs) {
  const isPrefix = hintAs === "prefix";
  return { slot: hint && !isPrefix ? `Hint: ${hint}\n` : "", prefix: hint && isPrefix ? `<think>\n${hint}` : "" };
}

/** Share of right responses that gives this difficulty when every response has the right format (reward 1). */
export function inferAccuracy(difficulty, bufferMean) {
  return Math.min(Math.max(bufferMean - 1 - difficulty, 0), 1);
}

export function vanishingShare(accuracy, groupSize) {
  return accuracy ** groupSize + (1 - accuracy) ** groupSize;
}

const STRENGTHS = ["sigma", "masked_share", "hint_share"];
const FRAMES = ["frames", "frames_at", "levels", "noisy", "mask_order"];
const OTHERS = ["difficulty", "schedule", "harder", "hint_as", "group_size", "buffer_mean", "configs", "question",
  "trace", "hint"];

/** The kernel's frames once it has drawn these strengths; before, and without a kernel, the nearest drawn ahead. */
function drawStrip(model) {
  const [frames, at, levels, noisy, order] = FRAMES.map((name) => model.get(name));
  const sigma = model.get("sigma"), share = model.get("masked_share");
  const grey = new Set(maskedFrames(order, share)), level = nearestLevel(levels, sigma);
  const isExact = at[0] === sigma && at[1] === share;
  const shown = isExact ? frames : noisy[level].map((url, k) => (grey.has(k) ? "" : url));
  const strip = make("div", { class: "dvr-strip" }, ...shown.map((src, k) => {
    const label = `frame ${k + 1} of ${shown.length}${grey.has(k) ? ", masked" : ""}`;
    if (src) return make("img", { src, alt: label });
    return make("div", { class: "dvr-grey", role: "img", "aria-label": label });
  }));
  return { strip, sigma: isExact ? sigma : levels[level], masked: grey.size };
}

function turn(who, ...words) {
  return make("div", { class: "dvr-turn" }, make("span", {}, who), make("pre", {}, ...words));
}

function drawTurns(model) {
  const { slot, prefix } = placeHint(model.get("hint"), model.get("hint_as"));
  const part = (name, text) => (text ? [make("span", { class: name }, text)] : []);
  const rest = prefix ? " \u2026 continues here" : "\u2026 starts here";
  return [
    turn("user", ...part("hint", slot), ...part("aside", "[the frames above]\n"), model.get("question")),
    turn("assistant", ...part("hint", prefix), ...part("aside", rest)),
  ];
}

const configNow = (model) => ({ ...model.get("configs")[model.get("schedule")], harder: model.get("harder") });
const planned = (model) => strengths(planAugmentation(model.get("difficulty"), configNow(model)));

function drawSchedule(model) {
  const at = model.get("difficulty"), config = configNow(model);
  const name = config.harder === "mask" ? "masked_share" : "sigma";
  const axes = chart({
    x: [-SPAN, SPAN], y: [0, 1], xLabel: "difficulty dR (units of reward)",
    yLabel: `${name === "sigma" ? "noise sigma" : "masked share"} (solid), hint share (dashed)`,
    label: `At dR ${number(at)}: noise sigma ${number(model.get("sigma"))}, masked share `
      + `${number(model.get("masked_share"))}, hint share ${number(model.get("hint_share"))}`,
  });
  const curve = (key) => range(-SPAN, SPAN, 200).map((d) => [d, strengths(planAugmentation(d, config))[key]]);
  axes.line(curve(name), "a");
  axes.line(curve("hint_share"), "b");
  axes.here(at);
  axes.dot(at, model.get(name), "dot-a");
  axes.dot(at, model.get("hint_share"), "dot-b");
  return make("div", { class: "dvr-chart" }, axes.svg);
}

function drawVanishing(model) {
  const [at, mean, size] = ["difficulty", "buffer_mean", "group_size"].map((name) => model.get(name));
  const share = (d) => vanishingShare(inferAccuracy(d, mean), size);
  const axes = chart({
    x: [-SPAN, SPAN], y: [0, 1], xLabel: "difficulty dR (units of reward)", yLabel: "share of vanishing groups",
    label: `At dR ${number(at)} the share of vanishing groups of ${size} is ${number(share(at))}`,
  });
  axes.line(range(-SPAN, SPAN, 200).map((d) => [d, share(d)]), "a");
  axes.here(at);
  axes.dot(at, share(at), "dot-a");
  return make("div", { class: "dvr-chart" }, axes.svg);
}

function say(model, drawn) {
  const [at, mean, size, sigma] = ["difficulty", "buffer_mean", "group_size", "sigma"].map((name) => model.get(name));
  const raw = mean - 1 - at, accuracy = inferAccuracy(at, mean), plan = planned(model);
  const side = at > 0 ? "harder than the buffer" : at < 0 ? "easier than the buffer" : "as hard as the buffer";
  const differ = (a, b) => Math.abs(a - b) > 1e-9;
  const away = STRENGTHS.some((name) => differ(plan[name], model.get(name))) ? " Moved away from the schedule." : "";
  const near = differ(drawn.sigma, sigma) ? ` Shown at sigma ${number(drawn.sigma)}, the nearest at hand.` : "";
  const clipped = differ(raw, accuracy) ? " (clipped: accuracy alone cannot explain this dR)" : "";
  return `The question is ${side}. ${drawn.masked} of ${model.get("noisy")[0].length} frames are grey.${away}${near} `
    + `As it is, ${number(100 * accuracy, 0)} % of its responses are right${clipped}, `
    + `and a group of ${size} vanishes with probability ${number(vanishingShare(accuracy, size), 3)}.`;
}

function choice(model, label, name, words, write) {
  const options = Object.entries(words).map(([value, text]) => make("option", { value }, text));
  const select = make("select", { "aria-label": label }, ...options);
  select.addEventListener("change", () => write({ [name]: select.value }));
  const row = make("label", {}, `${label}: `, select);
  row.update = () => { select.value = model.get(name); };
  return row;
}

function render({ model, el }) {
  const root = open(el, "What does the policy get to see?");
  const hintAt = (share) => ({ hint_share: share, hint: makeHint(model.get("trace"), share) });
  const move = (values) => {  // a new difficulty or schedule takes the three strengths along
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    const found = planned(model);
    change(model, { ...found, ...hintAt(found.hint_share) });
  };
  const read = (name) => () => model.get(name);
  const difficulty = slider({ label: "difficulty dR", min: -SPAN, max: SPAN, step: 0.1, digits: 1,
    read: read("difficulty"), write: (value) => move({ difficulty: value }) });
  const amounts = [
    modelSlider(model, "sigma", { label: "noise sigma", min: 0, max: 0.4, step: 0.05 }),
    modelSlider(model, "masked_share", { label: "share of masked frames", min: 0, max: 1, step: 0.1 }),
    slider({ label: "share of the trace as hint", min: 0, max: 1, step: 0.04,
      read: read("hint_share"), write: (value) => change(model, hintAt(value)) }),
  ];
  const group = [
    modelSlider(model, "group_size", { label: "G, responses in a group", min: 2, max: 16, step: 1, digits: 0 }),
    modelSlider(model, "buffer_mean", { label: "buffer's mean reward", min: 1, max: 2, step: 0.05 }),
  ];
  const choices = [
    choice(model, "strength", "schedule", { adaptive: "adaptive", fixed: "fixed" }, move),
    choice(model, "harder by", "harder", { noise: "noise", mask: "masked frames" }, move),
    choice(model, "hint", "hint_as", { prompt: "in the prompt", prefix: "starts the answer" },
      (values) => change(model, values)),
  ];
  const [strip, turns, charts] = ["dvr-frames", "dvr-turns", "dvr-charts"].map((name) => make("div", { class: name }));
  const says = make("div", { class: "dvr-says", role: "status" });
  root.append(make("style", {}, LOOK), difficulty, make("div", { class: "dvr-choices" }, ...choices), ...amounts,
    strip, turns, ...group, charts, says);  // what grows stands below the slider that makes it grow
  return follow(model, [...STRENGTHS, ...FRAMES, ...OTHERS], () => {
    const drawn = drawStrip(model);
    for (const row of [difficulty, ...amounts, ...group, ...choices]) row.update();
    strip.replaceChildren(drawn.strip);
    turns.replaceChildren(...drawTurns(model));
    charts.replaceChildren(drawSchedule(model), drawVanishing(model));
    says.textContent = say(model, drawn);
  });
}

export default { render };
