// Explorer: noise and masks on a clip of one's own, decoded by the browser. Nothing leaves the page.
import { change, follow, make, modelSlider, number, open } from "./kit.js";
import { addNoise, maskFrame, picture } from "./pixels.js";
import { maskedFrames } from "./plan.js";

const LOOK = `
.dvr-drop { border: 2px dashed currentColor; border-radius: 8px; padding: .6em .8em; margin: .4em 0; }
.dvr-drop.over { border-color: var(--dvr-a); } .dvr-drop input { font: inherit; max-width: 100%; }
.dvr-grid { display: grid; grid-template-columns: repeat(8, 1fr); gap: 4px; margin: .5em 0; }
.dvr .dvr-grid button { padding: 0; border: 2px solid transparent; border-radius: 4px; min-height: 0; overflow: hidden; }
.dvr .dvr-grid button[aria-pressed=true] { border-color: var(--dvr-a); }
.dvr-grid canvas, .dvr-large canvas { display: block; width: 100%; height: auto; }
.dvr-large { max-width: 100%; margin: .4em 0; }
@container (max-width: 34em) { .dvr-grid { grid-template-columns: repeat(4, 1fr); } }
`;
const LONGEST = 320;  // pixels of the longer side of a frame
const PLAY = 250;  // milliseconds that a frame is shown
const TRAITS = ["clip", "n_frames", "sigma", "masked_share", "enlarged", "max_side"];

/** `pick_evenly` in time: the middle of the first and of the last frame, and places spread evenly between them. */
export function pickTimes(duration, count, fps = 25) {
  const first = 0.5 / fps, last = Math.max(first, duration - 0.5 / fps);
  return Array.from({ length: count }, (_, k) => (count > 1 ? first + ((last - first) * k) / (count - 1) : first));
}

/** Width and height with a longer side of at most `longest`. */
export function fitted(width, height, longest = LONGEST) {
  const scale = Math.min(1, longest / Math.max(width, height));
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

/** Numbers 0 to count - 1 in a random order, the same one for the same seed; one is left out, and never masked. */
export function shuffled(count, seed = 7) {
  let state = seed;
  const order = Array.from({ length: count }, (_, k) => k);
  for (let k = count - 1; k > 0; k--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const other = state % (k + 1);
    [order[k], order[other]] = [order[other], order[k]];
  }
  return order.slice(0, -1);
}

const once = (node, event) => new Promise((done, fail) => {
  node.addEventListener(event, done, { once: true });
  node.addEventListener("error", () => fail(new Error("cannot be decoded")), { once: true });
});

/** Frames of a video, spread evenly in time: a video element draws them into a canvas. */
export async function decode(url, count, longest) {
  const video = make("video", { preload: "auto", playsinline: "" });
  video.muted = true;
  video.src = url;
  await once(video, "loadeddata");
  if (!Number.isFinite(video.duration)) {  // a recording that does not say how long it is
    video.currentTime = 1e7;
    await once(video, "seeked");
  }
  const duration = Number.isFinite(video.duration) ? video.duration : video.currentTime;
  const [width, height] = fitted(video.videoWidth, video.videoHeight, longest);
  const context = make("canvas", { width, height }).getContext("2d", { willReadFrequently: true }), frames = [];
  for (const time of pickTimes(duration, count)) {
    if (Math.abs(video.currentTime - time) > 1e-6) {
      video.currentTime = time;
      await once(video, "seeked");
    }
    context.drawImage(video, 0, 0, width, height);
    frames.push(context.getImageData(0, 0, width, height).data);
  }
  return { frames, width, height, duration };
}

/** A frame as the policy would get it. */
function changed(bytes, k, model, grey) {
  return grey.has(k) ? maskFrame(bytes) : addNoise(bytes, model.get("sigma"), k + 1);
}

function chooseFile(load) {
  const input = make("input", { type: "file", accept: "video/*", "aria-label": "a video of your own" });
  const zone = make("div", { class: "dvr-drop" }, make("label", {}, "A video of your own: choose a file, or drop one here. ", input),
    make("div", {}, "It is opened in this browser and goes nowhere else."));
  input.addEventListener("change", () => input.files[0] && load(input.files[0]));
  zone.addEventListener("dragover", (event) => { event.preventDefault(); zone.classList.add("over"); });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    if (event.dataTransfer.files[0]) load(event.dataTransfer.files[0]);
  });
  return zone;
}

function render({ model, el }) {
  const root = open(el, "Noise and masks on a clip of your own");
  const rows = [modelSlider(model, "sigma", { label: "noise sigma", min: 0, max: 0.4, step: 0.05 }),
    modelSlider(model, "masked_share", { label: "share of masked frames", min: 0, max: 1, step: 0.1 })];
  const grid = make("div", { class: "dvr-grid" }), large = make("div", { class: "dvr-large" });
  const says = make("div", { class: "dvr-says", role: "status" }, "The clip is being opened.");
  const play = make("button", { type: "button" }, "Play");
  const close = make("button", { type: "button", click: () => { stop(); change(model, { enlarged: -1 }); } }, "Close the large frame");
  let clip, name = "", shown = "", timer;
  const stop = () => { clearInterval(timer); timer = undefined; play.textContent = "Play"; };
  const onward = () => change(model, { enlarged: (model.get("enlarged") + 1) % clip.frames.length });
  play.addEventListener("click", () => {
    if (timer || !clip) return stop();
    play.textContent = "Stop";
    timer = setInterval(() => (root.isConnected ? onward() : stop()), PLAY);
    return onward();
  });

  const draw = () => {
    rows.forEach((row) => row.update());
    if (!clip) return;
    const count = clip.frames.length, order = shuffled(count), enlarged = model.get("enlarged");
    const grey = new Set(maskedFrames(order, model.get("masked_share")));
    const label = (k) => `frame ${k + 1} of ${count}${grey.has(k) ? ", masked" : ""}`;
    const drawn = (k) => picture(changed(clip.frames[k], k, model, grey), clip.width, clip.height, label(k));
    const state = [name, model.get("sigma"), grey.size, count].join();
    if (state !== shown) {  // making one larger leaves the others as they are
      shown = state;
      grid.replaceChildren(...clip.frames.map((_, k) => make("button", { type: "button", "aria-label": `enlarge ${label(k)}`,
        click: () => { stop(); change(model, { enlarged: model.get("enlarged") === k ? -1 : k }); } }, drawn(k))));
    }
    [...grid.children].forEach((cell, k) => cell.setAttribute("aria-pressed", String(k === enlarged)));
    large.replaceChildren(...(enlarged >= 0 && enlarged < count ? [drawn(enlarged)] : []));
    close.hidden = enlarged < 0;
    says.textContent = `${name}: ${number(clip.duration, 1)} s, ${count} frames spread evenly, shown at ${clip.width} x ${clip.height}. `
      + `Noise sigma ${number(model.get("sigma"))}, ${grey.size} of ${count} frames grey. Press a frame to enlarge it.`;
  };
  const load = async (url, title) => {
    try {
      clip = await decode(url, model.get("n_frames"), model.get("max_side"));
      name = title;
      draw();
    } catch {
      says.textContent = `${title} cannot be opened here. Most browsers play MP4 (H.264) and WebM files.`;
    }
  };
  const loadFile = async (file) => {
    const url = URL.createObjectURL(file);
    await load(url, file.name);
    URL.revokeObjectURL(url);
  };
  const loadClip = () => (model.get("clip") ? load(model.get("clip"), "the clip of this page") : undefined);
  root.append(make("style", {}, LOOK), chooseFile(loadFile), ...rows,
    make("div", { class: "dvr-buttons" }, play, close), says, grid, large);
  close.hidden = true;
  loadClip();
  model.on("change:clip", loadClip);
  const unfollow = follow(model, TRAITS.slice(2), draw);
  return () => { stop(); unfollow(); model.off("change:clip", loadClip); };
}

export default { render };
