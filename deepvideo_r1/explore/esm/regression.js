// Explorer: the regression target of Reg-GRPO, and which way its gradient moves the log-ratios of a group.
import { groupAdvantages } from "./group.js";
import { change, chart, follow, make, modelSlider, number, open, slider } from "./kit.js";

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const centre = (values) => { const middle = mean(values); return values.map((value) => value - middle); };
const dot = (a, b) => a.reduce((sum, value, k) => sum + value * b[k], 0);

/** Everything that Reg-GRPO (Eq. 7 and 8, no KL) knows about one group. */
export function regress(rewards, logRatios, sigmaFloor) {
  const size = rewards.length, advantages = groupAdvantages(rewards), centred = centre(logRatios);
  const std = Math.sqrt(dot(centred, centred) / size), spread = Math.sqrt(std ** 2 + sigmaFloor ** 2);
  const predicted = centred.map((value) => value / spread);
  const norms = Math.sqrt(dot(centred, centred) * dot(advantages, advantages));
  const corr = norms > 0 ? dot(centred, advantages) / norms : 0;
  const isVanishing = advantages.every((value) => value === 0);
  const error = isVanishing ? advantages : predicted.map((value, k) => value - advantages[k]);
  const along = dot(error, centred) / (size * spread ** 3), level = mean(error);
  const gradient = error.map((value, k) => (2 / size) * ((value - level) / spread - centred[k] * along));
  return { advantages, predicted, loss: dot(error, error) / size, corr, std, gradient };
}

const STEP = 2;  // size of the gradient step that arrows and button show
const LIMIT = 3;  // nats shown to each side
const bound = (value) => Math.min(Math.max(value, -LIMIT), LIMIT);
const listed = (values) => values.map((value) => number(value)).join(", ");

function drawGroup(found, logRatios) {
  const places = logRatios.map((_, k) => k + 1), next = logRatios.map((value, k) => value - STEP * found.gradient[k]);
  const shared = { x: [0.4, places.length + 0.6], xTicks: places, xLabel: "response" };
  const advantage = chart({
    ...shared, y: [-2.4, 2.4], yLabel: "advantage: target (line), predicted (dot)",
    label: `Targets ${listed(found.advantages)}; predicted ${listed(found.predicted)}`,
  });
  const ratio = chart({
    ...shared, y: [-LIMIT, LIMIT], yLabel: "log-ratio (nats), and where a step takes it",
    label: `Log-ratios ${listed(logRatios)}; a step takes them to ${listed(next)}`,
  });
  places.forEach((place, k) => {
    const target = found.advantages[k];
    advantage.line([[place - 0.3, target], [place + 0.3, target]], "b solid");
    advantage.dot(place, found.predicted[k], "dot-a");
    ratio.line([[place, 0], [place, logRatios[k]]], "faint");
    ratio.dot(place, logRatios[k], "dot-a");
    arrow(ratio, place, logRatios[k], next[k]);
  });
  return [advantage, ratio].map((axes) => make("div", { class: "dvr-chart" }, axes.svg));
}

function arrow(axes, place, from, to) {
  const x = axes.X(place) + 11, start = axes.Y(from), tip = axes.Y(to);  // beside the dot
  const back = tip + 6 * Math.sign(start - tip);
  const head = Math.abs(tip - start) < 4 ? "" : `M${x - 4} ${back}L${x} ${tip}L${x + 4} ${back}`;
  axes.add("path", { class: "b solid", d: `M${x} ${start}V${tip}${head}` });
}

function responseRow(model, k) {
  const replaced = (name, value) => model.get(name).map((old, other) => (other === k ? value : old));
  const write = (name) => (value) => change(model, { [name]: replaced(name, value) });
  const reward = make("select", { "aria-label": `reward of response ${k + 1}` },
    ...[0, 0.5, 1, 1.5, 2].map((value) => make("option", { value }, `reward ${value}`)));
  reward.addEventListener("change", () => write("rewards")(Number(reward.value)));
  const row = slider({
    label: `log-ratio of response ${k + 1}`, min: -LIMIT, max: LIMIT, step: 0.05,
    read: () => model.get("log_ratios")[k], write: write("log_ratios"),
  });
  const update = row.update;
  row.classList.add("short");
  row.firstChild.replaceChildren(`${k + 1}: `, reward);
  row.update = () => { update(); reward.value = model.get("rewards")[k]; };
  return row;
}

function render({ model, el }) {
  const root = open(el, "What Reg-GRPO asks of a group");
  const rows = model.get("rewards").map((_, k) => responseRow(model, k));
  const floor = modelSlider(model, "sigma_floor", { label: "sigma_floor (nats)", min: 0.05, max: 2, step: 0.05 });
  const charts = make("div", { class: "dvr-charts" }), says = make("div", { class: "dvr-says", role: "status" });
  const look = () => regress(model.get("rewards"), model.get("log_ratios"), model.get("sigma_floor"));
  const step = () => {
    const { gradient } = look();
    change(model, { log_ratios: model.get("log_ratios").map((value, k) => bound(value - STEP * gradient[k])) });
  };
  const reset = () => change(model, { log_ratios: model.get("log_ratios").map(() => 0) });
  root.append(charts, says, make("div", { class: "dvr-buttons" },
    make("button", { type: "button", click: step }, "One gradient step"),
    make("button", { type: "button", click: reset }, "All log-ratios to 0")), floor, ...rows);
  return follow(model, ["rewards", "log_ratios", "sigma_floor"], () => {
    const found = look();
    for (const row of [floor, ...rows]) row.update();
    charts.replaceChildren(...drawGroup(found, model.get("log_ratios")));
    const isVanishing = found.advantages.every((value) => value === 0);
    says.textContent = `Loss ${number(found.loss, 3)}, `
      + `correlation of advantage and log-ratio ${number(found.corr, 3)}, `
      + `spread of the log-ratios ${number(found.std)} nats, `
      + `size of the gradient ${number(Math.hypot(...found.gradient), 3)}.`
      + (isVanishing ? " All rewards are equal: the group is masked out." : "");
  });
}

export default { render };
