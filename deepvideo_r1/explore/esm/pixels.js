// Frames as the browser holds them (RGBA bytes): noise and masks like the library's, and cells that show them.
import { make } from "./kit.js";

/** `count` draws of a normal distribution, the same ones for the same seed (mulberry32 and Box-Muller). */
export function normals(seed, count) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
  const drawn = new Float32Array(count);
  for (let k = 0; k < count; k += 2) {
    const size = Math.sqrt(-2 * Math.log(uniform())), turn = 2 * Math.PI * uniform();
    drawn[k] = size * Math.cos(turn);
    if (k + 1 < count) drawn[k + 1] = size * Math.sin(turn);
  }
  return drawn;
}

/** `add_noise`: normal noise of deviation 255 sigma on red, green and blue; rounded and kept within a byte. */
export function addNoise(bytes, sigma, seed) {
  const noisy = Uint8ClampedArray.from(bytes);
  if (!sigma) return noisy;
  const noise = normals(seed, (bytes.length / 4) * 3);
  for (let pixel = 0, k = 0; pixel < bytes.length; pixel += 4) {
    for (let colour = 0; colour < 3; colour++) noisy[pixel + colour] = bytes[pixel + colour] + 255 * sigma * noise[k++];
  }
  return noisy;
}

/** `mask_frames`, for one frame: uniformly grey. */
export function maskFrame(bytes) {
  return Uint8ClampedArray.from(bytes, (byte, k) => (k % 4 === 3 ? byte : 128));
}

/** A canvas with these bytes, named for those who do not see it. */
export function picture(bytes, width, height, label) {
  const canvas = make("canvas", { width, height, role: "img", "aria-label": label });
  canvas.getContext("2d").putImageData(new ImageData(Uint8ClampedArray.from(bytes), width, height), 0, 0);
  return canvas;
}

/** The bytes of `count` frames that stand side by side in one picture. */
export async function cutStrip(url, count) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const width = image.width / count, canvas = make("canvas", { width: image.width, height: image.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const cut = (k) => context.getImageData(k * width, 0, width, image.height).data;
  return { width, height: image.height, frames: Array.from({ length: count }, (_, k) => cut(k)) };
}
