// Explorer: what a change does to the answers of a policy, from answers that a cold start really gave.
import { groupAdvantages } from "./group.js";
import { change, chart, follow, make, number, open, slider } from "./kit.js";
import { addNoise, cutStrip, maskFrame, picture } from "./pixels.js";
import { agreeingShare, makeHint, maskedFrames, nearestLevel, planAugmentation, strengths } from "./plan.js";

const GROUP = 8;
const LOOK = `
.dvr-cells { display: grid; grid-template-columns: repeat(12, 1fr); gap: 3px; margin: .4em 0; }
.dvr-cells canvas { display: block; width: 100%; image-rendering: pixelated; }
.dvr-stages { display: flex; flex-wrap: wrap; gap: .2em .9em; margin: .3em 0; padding: 0; list-style: none; }
.dvr-stages li { margin: 0; padding: 0 .2em; border-bottom: 3px solid transparent; }
.dvr-stages li[aria-current] { border-color: var(--dvr-a); font-weight: 600; }
.dvr-groups { display: grid; grid-template-columns: 1fr 1fr; gap: .8em 1.4em; margin: .5em 0; }
.dvr-group { min-width: 0; } .dvr-group p { margin: .1em 0; min-height: 1.4em; } .dvr-group b { font-weight: 600; }
.dvr-answers { display: grid; grid-template-columns: repeat(8, 1fr); gap: 2px; margin: .3em 0; }
.dvr-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.dvr .dvr-answers button { position: relative; display: grid; justify-items: center; gap: 2px; min-width: 0;
  padding: .2em 0; border-color: transparent; }
.dvr .dvr-answers button[aria-pressed=true] { border-color: currentColor; }
.dvr-circle { display: grid; place-items: center; width: 28px; height: 28px; border-radius: 50%;
  border: 2px solid currentColor; }
.dvr-circle.r2 { background: var(--dvr-a-strong); border-color: var(--dvr-a-strong); color: white; }
.dvr-circle.r1 { border-color: var(--dvr-b); } .dvr-circle.r0 { border-style: dashed; }
.dvr-bar { position: relative; width: 100%; height: 40px; }
.dvr-bar::before { content: ""; position: absolute; inset: 20px 0 auto; border-top: 1px solid currentColor; opacity: .4; }
.dvr-bar i { position: absolute; left: 30%; width: 40%; background: var(--dvr-a); }
.dvr-bar i.down { background: var(--dvr-b); }
.dvr-answers span { font-size: 12px; font-variant-numeric: tabular-nums; }
.dvr-text { margin: .3em 0; padding: .3em .6em; border: 1px solid currentColor; border-radius: 6px; background: none; color: inherit;
  font: 13px/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.dvr-text .hint { font-weight: 600; text-decoration: underline 2px var(--dvr-b); }
.dvr label { display: block; } .dvr select { max-width: 100%; }
@container (max-width: 34em) { .dvr-groups { grid-template-columns: 1fr; } .dvr-cells { grid-template-columns: repeat(6, 1fr); } }
`;
const STAGES = ["sample", "score", "difficulty", "change", "sample again"];
const SEEN_ALL = STAGES.length - 1;
const KNOBS = { noise: ["sigma", "noise sigma"], mask: ["masked_share", "share of masked frames"],
  hint: ["hint_share", "share of the trace as hint"] };
const TRAITS = ["recorded", "question", "sigma", "masked_share", "hint_share", "group", "stage", "response", "harder", "config"];

/** The change that is made now: its name and the place of its level; the first level is no change. */
export function changeNow(values, levels) {
  const name = Object.keys(KNOBS).find((knob) => values[KNOBS[knob][0]] > 0) ?? "noise";
  return { name, level: nearestLevel(levels[name], values[KNOBS[name][0]]) };
}

/** `text_of`: a recorded response. */
export function textOf(question, number) {
  return question.texts[number].map((line) => question.lines[line]).join("\n");
}

/** Rewards and texts of all recorded responses to a question after a change. */
export function responses(question, name, level) {
  const numbers = question[name][level];
  return { texts: numbers.map((k) => textOf(question, k)), rewards: numbers.map((k) => question.rewards[k]) };
}

/** What stands between the answer tags. */
export function answerOf(text) {
  return (text.match(/<answer>([^<]*)<\/answer>/)?.[1] ?? "").trim() || "\u2013";
}

/** Number of recorded answers, accuracy and share of vanishing groups at a level. */
export function effect(question, name, level) {
  const rewards = question.counts[name][level].flatMap(([reward, count]) => Array(count).fill(reward));
  const right = rewards.filter((reward) => reward === 2).length;
  return { count: rewards.length, accuracy: right / rewards.length, vanishing: agreeingShare(rewards, GROUP) };
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const percent = (value) => `${number(100 * value, 0)} %`;

const parsed = new Map();

/** The record, which a notebook stores as text. */
function recordOf(model) {
  const text = model.get("recorded");
  if (!parsed.has(text)) parsed.set(text, JSON.parse(text));
  return parsed.get(text);
}

/** Everything that the picture shows, from the model's values. */
function look(model) {
  const values = Object.fromEntries(TRAITS.map((name) => [name, model.get(name)]));
  const recorded = values.recorded = recordOf(model), question = recorded.questions[values.question % recorded.questions.length];
  const now = changeNow(values, recorded.levels);
  const eight = ({ texts, rewards }) => {
    const first = GROUP * (values.group % Math.floor(rewards.length / GROUP));
    return { texts: texts.slice(first, first + GROUP), rewards: rewards.slice(first, first + GROUP) };
  };
  const before = eight(responses(question, now.name, 0)), after = eight(responses(question, now.name, now.level));
  const difficulty = recorded.buffer_mean - mean(before.rewards);
  const amount = recorded.levels[now.name][now.level], config = { ...values.config, harder: values.harder };
  return { ...values, item: question, now, before, after, difficulty, amount, plan: planAugmentation(difficulty, config) };
}

function drawFrames(seen, strip) {
  if (!strip) return [];
  const grey = new Set(maskedFrames(seen.item.mask_order, seen.now.name === "mask" ? seen.amount : 0));
  const sigma = seen.now.name === "noise" ? seen.amount : 0;
  return strip.frames.map((bytes, k) => picture(grey.has(k) ? maskFrame(bytes) : addNoise(bytes, sigma, k + 1),
    strip.width, strip.height, `frame ${k + 1} of ${strip.frames.length}${grey.has(k) ? ", masked" : ""}`));
}

function drawAnswers(model, side, group, shows) {
  const advantages = groupAdvantages(group.rewards), chosen = model.get("response");
  const column = (reward, k) => {
    const place = (side === "before" ? 0 : GROUP) + k, answer = answerOf(group.texts[k]);
    const size = Math.min(Math.abs(advantages[k]), 2.7) * 7.4, isDown = advantages[k] < 0;
    const bar = make("i", { class: isDown ? "down" : "", style: `height:${size}px;${isDown ? "top:20px" : "bottom:20px"}` });
    const hidden = (words) => make("span", { class: "dvr-hidden" }, words), part = (is, words, look, ...inside) =>
      (is ? [hidden(words), make("span", { class: look }, ...inside)] : [make("span", { class: look })]);
    return make("button", { type: "button", "aria-pressed": String(chosen === place),
      click: () => change(model, { response: chosen === place ? -1 : place }) },
    hidden(`response ${k + 1} ${side}: `), ...part(shows.answer, "answer ", "", answer),
    ...part(shows.reward, ", reward ", `dvr-circle ${shows.reward ? `r${reward}` : ""}`, String(reward)),
    make("span", { class: "dvr-bar" }, ...(shows.advantage ? [bar] : [])),
    ...part(shows.advantage, ", advantage ", "", number(advantages[k], 1)));
  };
  return make("div", { class: "dvr-answers" }, ...group.rewards.map(column));
}

function drawGroup(model, seen, side) {
  const isAfter = side === "after", { name, level } = seen.now, stage = seen.stage;
  const shows = isAfter ? { answer: stage >= 4, reward: stage >= 4, advantage: stage >= 4 }
    : { answer: true, reward: stage >= 1, advantage: stage >= 4 };
  const found = effect(seen.item, name, isAfter ? level : 0);
  const title = isAfter ? (level ? `After: ${KNOBS[name][1]} ${number(seen.amount)}` : "After: nothing was changed")
    : "Before: the question as it is";
  const heading = isAfter && stage < 4 ? "After: not sampled yet" : title;
  const lines = shows.advantage ? [
    make("p", {}, "accuracy ", make("b", {}, percent(found.accuracy)), ` (of ${found.count} recorded answers)`),
    make("p", {}, `a group of ${GROUP} vanishes: `, make("b", {}, percent(found.vanishing))),
  ] : [make("p"), make("p")];
  return make("div", { class: "dvr-group", role: "group", "aria-label": heading }, make("b", {}, heading),
    drawAnswers(model, side, isAfter ? seen.after : seen.before, shows), ...lines);
}

function drawCurves(seen) {
  const { name, level } = seen.now, levels = seen.recorded.levels[name];
  const found = levels.map((_, place) => effect(seen.item, name, place));
  const axes = chart({
    x: [0, levels.at(-1)], y: [0, 1], xLabel: KNOBS[name][1], yLabel: "accuracy (solid), vanishing (dashed)", height: 190,
    label: `At ${KNOBS[name][1]} ${number(seen.amount)}: accuracy ${number(found[level].accuracy)}, `
      + `share of vanishing groups ${number(found[level].vanishing)}`,
  });
  axes.line(levels.map((value, k) => [value, found[k].accuracy]), "a");
  axes.line(levels.map((value, k) => [value, found[k].vanishing]), "b");
  axes.here(seen.amount);
  axes.dot(seen.amount, found[level].accuracy, "dot-a");
  axes.dot(seen.amount, found[level].vanishing, "dot-b");
  return make("div", { class: "dvr-chart" }, axes.svg);
}

function drawText(seen) {
  if (seen.response < 0) return [];
  const isAfter = seen.response >= GROUP, group = isAfter ? seen.after : seen.before, text = group.texts[seen.response % GROUP];
  const hint = isAfter && seen.now.name === "hint" ? `<think>\n${makeHint(seen.item.trace, seen.amount)}` : "";
  const given = hint && text.startsWith(hint) ? hint : "";
  return [make("pre", { class: "dvr-text" }, make("span", { class: "hint" }, given), text.slice(given.length))];
}

function say(seen) {
  const side = Math.abs(seen.difficulty) <= seen.config.dead_zone ? "as hard as the others"
    : seen.difficulty > 0 ? "harder than the others: it gets a hint" : "easier than the others: it gets harder";
  const dR = `dR = ${number(seen.recorded.buffer_mean)} \u2212 ${number(mean(seen.before.rewards))} = ${number(seen.difficulty)}`;
  const { sigma, masked_share: share, hint_share: hint } = strengths(seen.plan);
  const planned = sigma ? `noise sigma ${number(sigma)}` : share ? `${number(share)} of the frames masked`
    : hint ? `${number(hint)} of the trace as a hint` : "no change";
  const now = effect(seen.item, seen.now.name, 0), then = effect(seen.item, seen.now.name, seen.now.level);
  return [
    `Eight answers to one question. The right one is ${seen.item.answer}.`,
    "A reward of 2 is a right answer in the right form, 1 only the form, 0 neither.",
    `The mean reward of past groups less that of these eight: ${dR}. The question is ${side}.`,
    `For this difficulty the schedule asks for ${planned}; the frames and the hint show the nearest recorded level.`,
    `Accuracy ${percent(now.accuracy)} \u2192 ${percent(then.accuracy)}, chance to vanish `
      + `${percent(now.vanishing)} \u2192 ${percent(then.vanishing)}. Difficulty before: ${dR}. Press an answer to read it.`,
  ][seen.stage];
}

const still = { sigma: 0, masked_share: 0, hint_share: 0 };

/** The values after the next stage of a training step. */
function nextStage(model) {
  const seen = look(model), stage = seen.stage < SEEN_ALL ? seen.stage + 1 : 0;
  if (!stage) {
    const count = seen.recorded.questions.length, isLast = seen.question === count - 1;
    return { ...still, stage, response: -1, question: (seen.question + 1) % count, group: seen.group + Number(isLast) };
  }
  if (stage === 1) return { ...still, stage };
  if (stage !== 3) return { stage };
  const found = strengths(seen.plan), levels = seen.recorded.levels;
  const nearest = (knob) => levels[knob][nearestLevel(levels[knob], found[KNOBS[knob][0]])];
  return { stage, ...Object.fromEntries(Object.keys(KNOBS).map((knob) => [KNOBS[knob][0], nearest(knob)])) };
}

function chooser(label, options, read, write) {
  const select = make("select", { "aria-label": label },
    ...options.map(([value, text]) => make("option", { value }, text)));
  select.addEventListener("change", () => write(select.value));
  const row = make("label", {}, `${label}: `, select);
  row.update = () => { select.value = read(); };
  return row;
}

function controls(model) {
  const { questions, levels } = recordOf(model);
  const names = questions.map(({ name, question, answer }, k) => [k, `${name}: ${question.replace(" ?", "?")} (answer ${answer})`]);
  const choices = [
    chooser("question", names, () => model.get("question"),
      (value) => change(model, { question: Number(value), stage: SEEN_ALL, response: -1 })),
    chooser("a step makes it harder by", [["noise", "noise"], ["mask", "masked frames"]], () => model.get("harder"),
      (value) => change(model, { harder: value })),
  ];
  const knobs = Object.entries(KNOBS).map(([knob, [trait, label]]) => {  // a slider stops where answers were recorded
    const row = slider({ label, min: 0, max: levels[knob].length - 1, step: 1,
      read: () => nearestLevel(levels[knob], model.get(trait)),
      write: (place) => change(model, { ...still, [trait]: levels[knob][place], stage: SEEN_ALL }) });
    const [, input, value] = row.children, update = row.update;
    row.update = () => {
      update();
      value.textContent = number(model.get(trait));
      input.setAttribute("aria-valuetext", value.textContent);
    };
    return row;
  });
  return [...choices, ...knobs];
}

function render({ model, el }) {
  const root = open(el, "What augmentation does to a group");
  const rows = controls(model), step = () => change(model, nextStage(model));
  const next = make("button", { type: "button", click: step });
  const play = make("button", { type: "button" }, "Play");
  const other = () => change(model, { group: model.get("group") + 1 });
  const again = make("button", { type: "button", click: other }, "Eight other answers");
  let timer;
  const stop = () => { clearInterval(timer); timer = undefined; play.textContent = "Play"; };
  play.addEventListener("click", () => {
    if (timer) return stop();
    play.textContent = "Stop";
    timer = setInterval(() => (root.isConnected ? step() : stop()), 1800);
    return step();
  });
  const [cells, text, groups, charts] = ["cells", "read", "groups", "charts"].map((name) => make("div", { class: `dvr-${name}` }));
  const stages = make("ol", { class: "dvr-stages", "aria-label": "stages of a training step" });
  const says = make("div", { class: "dvr-says", role: "status" });
  root.append(make("style", {}, LOOK), rows[0], cells, ...rows.slice(2), stages,
    make("div", { class: "dvr-buttons" }, next, play, again, rows[1]), says, groups, text, charts);
  const strips = new Map();
  const draw = () => {
    const seen = look(model), url = seen.item.frames;
    if (!strips.has(url)) {
      strips.set(url, null);
      cutStrip(url, seen.item.mask_order.length + 1).then((strip) => { strips.set(url, strip); draw(); });
    }
    const following = STAGES[(seen.stage + 1) % STAGES.length];
    rows.forEach((row) => row.update());
    next.textContent = seen.stage < SEEN_ALL ? `Next: ${following}` : "Step: next question";
    stages.replaceChildren(...STAGES.map((name, k) =>
      make("li", k === seen.stage ? { "aria-current": "step" } : {}, `${k + 1} ${name}`)));
    cells.replaceChildren(...drawFrames(seen, strips.get(url)));
    says.textContent = say(seen);
    const focused = [...groups.querySelectorAll("button")].indexOf(root.getRootNode().activeElement);
    groups.replaceChildren(drawGroup(model, seen, "before"), drawGroup(model, seen, "after"));
    if (focused >= 0) groups.querySelectorAll("button")[focused].focus();
    text.replaceChildren(...drawText(seen));
    charts.replaceChildren(drawCurves(seen));
  };
  const unfollow = follow(model, TRAITS, draw);
  return () => { stop(); unfollow(); };
}

export default { render };
