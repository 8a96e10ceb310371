// Explorer: what one response's log-ratio does to the loss, under GRPO's clip and under Reg-GRPO.
import { chart, follow, make, modelSlider, number, open, range } from "./kit.js";

export const GROUP_SIZE = 8;

/** GRPO (Eq. 2, no KL): loss and its derivative when one response of one token has moved and its siblings have not. */
export function grpoTerm(advantage, logRatio, clipEps, groupSize = GROUP_SIZE) {
  const ratio = Math.exp(logRatio), clipped = Math.min(Math.max(ratio, 1 - clipEps), 1 + clipEps);
  const isDead = ratio * advantage > clipped * advantage;
  return {
    loss: -(Math.min(ratio * advantage, clipped * advantage) - advantage) / groupSize,
    gradient: isDead || advantage === 0 ? 0 : (-ratio * advantage) / groupSize,
  };
}

/** Reg-GRPO (Eq. 8, no KL) in the same situation. */
export function regGrpoTerm(advantage, logRatio, sigmaFloor, groupSize = GROUP_SIZE) {
  const rest = (groupSize - 1) / groupSize ** 2;  // the group's variance is rest * logRatio ** 2
  const spread = Math.sqrt(rest * logRatio ** 2 + sigmaFloor ** 2);
  const size = logRatio / spread, slope = sigmaFloor ** 2 / spread ** 3;  // slope of size in logRatio
  return {
    loss: 1 + rest * size ** 2 - (2 * advantage * size) / groupSize,
    gradient: 2 * (rest * size - advantage / groupSize) * slope,
  };
}

const NAMES = ["advantage", "log_ratio", "clip_eps", "sigma_floor"];
const SPAN = 1.5;  // nats shown to each side

function draw(what, model, yLabel) {
  const [advantage, at, clipEps, floor] = NAMES.map((name) => model.get(name));
  const terms = [(x) => grpoTerm(advantage, x, clipEps)[what], (x) => regGrpoTerm(advantage, x, floor)[what]];
  const curves = terms.map((term) => range(-SPAN, SPAN, 300).map((x) => [x, term(x)]));
  const values = curves.flat().map(([, y]) => y).concat(0);
  const low = Math.min(...values), high = Math.max(...values), margin = 0.08 * (high - low || 1);
  const [grpo, reg] = terms.map((term) => number(term(at), 3));
  const axes = chart({
    x: [-SPAN, SPAN], y: [low - margin, high + margin], xLabel: "log-ratio of the response (nats)", yLabel,
    label: `${yLabel} at a log-ratio of ${number(at)}: GRPO ${grpo}, Reg-GRPO ${reg}`,
  });
  if (advantage > 0) axes.zone(Math.log(1 + clipEps), SPAN);
  if (advantage < 0) axes.zone(-SPAN, Math.log(1 - clipEps));
  axes.line(curves[0], "a");
  axes.line(curves[1], "b");
  axes.here(at);
  axes.dot(at, terms[0](at), "dot-a");
  axes.dot(at, terms[1](at), "dot-b");
  return make("div", { class: "dvr-chart" }, axes.svg);
}

function legend() {
  const sample = (name) => make("svg", { viewBox: "0 0 30 8", width: 30, height: 8, "aria-hidden": "true" },
    make("path", { class: name, d: "M0 4H30" }));
  return make("div", { class: "dvr-legend" }, make("span", {}, sample("a"), "GRPO"),
    make("span", {}, sample("b"), "Reg-GRPO"), make("span", {}, "grey: the dead zone of the clip"));
}

function say(model) {
  const [advantage, at, clipEps, floor] = NAMES.map((name) => model.get(name));
  const grpo = grpoTerm(advantage, at, clipEps), reg = regGrpoTerm(advantage, at, floor);
  const word = ({ gradient }) => (gradient === 0 ? "no gradient"
    : `gradient ${number(gradient, 3)}, which ${gradient < 0 ? "pushes it up" : "pushes it down"}`);
  return `The response is ${number(Math.exp(at))} times as probable as when it was sampled. `
    + `GRPO: ${word(grpo)}. Reg-GRPO: ${word(reg)}.`;
}

function render({ model, el }) {
  const root = open(el, `The clip's dead zone: one response of ${GROUP_SIZE} has moved`);
  const sliders = [
    modelSlider(model, "advantage", { label: "advantage", min: -2.6, max: 2.6, step: 0.1, digits: 1 }),
    modelSlider(model, "log_ratio", { label: "log-ratio (nats)", min: -SPAN, max: SPAN, step: 0.01 }),
    modelSlider(model, "clip_eps", { label: "clip_eps (GRPO)", min: 0.05, max: 0.5, step: 0.01 }),
    modelSlider(model, "sigma_floor", { label: "sigma_floor (Reg-GRPO)", min: 0.1, max: 2, step: 0.05 }),
  ];
  const charts = make("div", { class: "dvr-charts" }), says = make("div", { class: "dvr-says", role: "status" });
  root.append(...sliders, legend(), charts, says);
  return follow(model, NAMES, () => {
    sliders.forEach((row) => row.update());
    charts.replaceChildren(draw("loss", model, "loss"), draw("gradient", model, "gradient of the loss"));
    says.textContent = say(model);
  });
}

export default { render };
