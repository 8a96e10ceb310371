"""A rendered clip that looks like a filmed one, for readers without a video: `python docs/scene.py`.

A street in the afternoon, seen from a moving camera: ground, houses and balls with textures, shadows, haze and some grain. A red
ball rolls past, a blue one bounces. Every pixel is traced with numpy. Writes `deepvideo_r1/explore/scene.mp4`.
"""
from pathlib import Path

import numpy as np

WIDTH, HEIGHT, FPS, SECONDS = 320, 180, 12, 4
FINE = 2  # rays a side of each pixel, for smooth edges
SUN = np.array([0.55, 0.62, -0.56])
SKY, HAZE = np.array([[0.36, 0.56, 0.86], [0.80, 0.86, 0.92]]), np.array([0.78, 0.82, 0.86])
FAR = 1e9


def value_noise(u: np.ndarray, v: np.ndarray, seed: int) -> np.ndarray:
    "Smooth noise in [0, 1] over a plane, four octaves."
    total, scale = np.zeros_like(u), 1.0
    for octave in range(4):
        table = np.random.default_rng([seed, octave]).random((64, 64))
        a, b = u * 2**octave, v * 2**octave
        i, j = np.floor(a).astype(int), np.floor(b).astype(int)
        s, t = (x * x * (3 - 2 * x) for x in (a - i, b - j))
        corner = lambda di, dj: table[(i + di) % 64, (j + dj) % 64]
        low, high = corner(0, 0) * (1 - s) + corner(1, 0) * s, corner(0, 1) * (1 - s) + corner(1, 1) * s
        scale /= 2
        total += scale * (low * (1 - t) + high * t)
    return total


def ground(points: np.ndarray) -> np.ndarray:
    "Colour of the ground: grass, a pale road and its marks."
    x, z = points[..., 0], points[..., 2]
    grass = np.array([0.24, 0.40, 0.15]) * (0.55 + 0.9 * value_noise(2 * x, 2 * z, 1))[..., None]
    road = np.array([0.44, 0.43, 0.42]) * (0.75 + 0.5 * value_noise(3 * x, 3 * z, 2))[..., None]
    mark = (np.abs(x) < 0.07) & (np.mod(z, 2.4) < 1.3)
    colour = np.where((np.abs(x) < 1.7)[..., None], road, grass)
    return np.where(mark[..., None], 0.9, colour)


def houses(points: np.ndarray, normals: np.ndarray, paint: np.ndarray) -> np.ndarray:
    "Colour of a wall: plaster with dark windows; the roof is red."
    along = np.where(np.abs(normals[..., :1]) > 0.5, points[..., 2:3], points[..., :1])[..., 0]
    up, rough = points[..., 1], value_noise(4 * along, 4 * points[..., 1], 3)
    window = (np.mod(along, 0.9) > 0.45) & (np.mod(up, 0.9) > 0.4) & (np.mod(up, 0.9) < 0.8)
    wall = paint * (0.8 + 0.35 * rough)[..., None]
    wall = np.where(window[..., None], np.array([0.13, 0.17, 0.22]) * (0.7 + rough)[..., None], wall)
    return np.where((normals[..., 1] > 0.5)[..., None], np.array([0.52, 0.22, 0.17]) * (0.7 + 0.6 * rough)[..., None], wall)


def hit_sphere(origin, rays, centre, radius) -> np.ndarray:
    "Distance to a sphere along each ray."
    offset = origin - centre
    b, c = (rays * offset).sum(-1), (offset * offset).sum(-1) - radius**2
    root = b * b - c
    near = -b - np.sqrt(np.maximum(root, 0))
    return np.where((root > 0) & (near > 1e-3), near, FAR)


def hit_box(origin, rays, low, high) -> tuple[np.ndarray, np.ndarray]:
    "Distance to a box along each ray, and the normal there."
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (low - origin) / rays, (high - origin) / rays
    near, far = np.minimum(a, b), np.maximum(a, b)
    enter, leave = near.max(-1), far.min(-1)
    normal = -np.sign(rays) * (near == enter[..., None])
    return np.where((enter < leave) & (enter > 1e-3), enter, FAR), normal


BOXES = [(np.array(low), np.array(high), np.array(paint)) for low, high, paint in (
    ((-5.4, 0, 7), (-2.6, 3.4, 11), (0.82, 0.74, 0.58)), ((2.7, 0, 9), (6.0, 2.6, 13), (0.62, 0.70, 0.74)),
    ((-6.0, 0, 13), (-2.9, 2.5, 17), (0.76, 0.58, 0.48)), ((2.9, 0, 16), (5.2, 4.2, 20), (0.80, 0.78, 0.70)))]


def balls(time: float) -> list[tuple[np.ndarray, float, np.ndarray, float]]:
    "Centre, radius, colour and turn of every ball."
    rolled = -2.0 + 1.15 * time
    height = 0.36 + 1.1 * abs(np.sin(2.2 * time))
    return [(np.array([rolled, 0.45, 5.2]), 0.45, np.array([0.85, 0.16, 0.12]), rolled / 0.45),
            (np.array([0.95, height, 7.4 - 0.5 * time]), 0.36, np.array([0.14, 0.30, 0.82]), time),
            (np.array([-1.35, 0.3, 6.6]), 0.3, np.array([0.93, 0.78, 0.18]), 0.4)]


def stripes(normals: np.ndarray, paint: np.ndarray, turn: float) -> np.ndarray:
    "A ball's skin, with pale stripes that show how it turns."
    angle = np.arctan2(normals[..., 1], normals[..., 0]) + turn
    pale = (np.sin(5 * angle) > 0.75) & (np.abs(normals[..., 2]) < 0.93)
    return np.where(pale[..., None], 0.93, paint) * (0.85 + 0.3 * value_noise(4 * angle, 6 * normals[..., 2], 4))[..., None]


def render(time: float, rng: np.random.Generator) -> np.ndarray:
    "One frame, (HEIGHT, WIDTH, 3) uint8."
    across, along = ((np.arange(FINE * side) + 0.5) / (FINE * side) * 2 - 1 for side in (WIDTH, HEIGHT))
    x, y = np.meshgrid(across, -along)
    origin = np.array([-0.5 + 0.22 * time, 1.35 + 0.03 * np.sin(5 * time), 0.35 * time])
    rays = np.stack([x * 0.78 + 0.05 * np.sin(0.8 * time), y * 0.44 - 0.09, np.ones_like(x)], -1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)

    # What each ray meets first.
    blend = np.clip(rays[..., 1:2] * 3, 0, 1)
    cloud = value_noise(6 * rays[..., 0] / np.maximum(rays[..., 1], 0.03) * 0.3, 2 / np.maximum(rays[..., 1], 0.03) * 0.3, 5)
    colour = SKY[1] * (1 - blend) + SKY[0] * blend
    colour = colour + (np.clip((cloud - 0.5) * 3, 0, 1) * blend[..., 0])[..., None] * (0.97 - colour)
    depth, normal, lit = np.full(x.shape, FAR), np.zeros_like(rays), np.zeros(x.shape, bool)

    def meet(distance, at, skin):
        nonlocal colour, depth, normal, lit
        closer = distance < depth
        depth = np.where(closer, distance, depth)
        normal = np.where(closer[..., None], at, normal)
        colour = np.where(closer[..., None], skin, colour)
        lit = lit | closer

    down = np.where(rays[..., 1] < -1e-4, -origin[1] / np.minimum(rays[..., 1], -1e-4), FAR)
    meet(np.where(down < 60, down, FAR), np.array([0.0, 1.0, 0.0]), ground(origin + rays * np.minimum(down, 60)[..., None]))
    for low, high, paint in BOXES:
        distance, at = hit_box(origin, rays, low, high)
        meet(distance, at, houses(origin + rays * np.minimum(distance, 60)[..., None], at, paint))
    for centre, radius, paint, turn in balls(time):
        distance = hit_sphere(origin, rays, centre, radius)
        at = (origin + rays * np.minimum(distance, 60)[..., None] - centre) / radius
        meet(distance, at, stripes(at, paint, turn))

    # Light, shadow, haze, and the grain of a sensor.
    points, free = origin + rays * np.minimum(depth, 60)[..., None], np.ones(x.shape, bool)
    sun = np.broadcast_to(SUN / np.linalg.norm(SUN), rays.shape)
    for low, high, _ in BOXES:
        free &= hit_box(points + 0.01 * normal, sun, low, high)[0] == FAR
    for centre, radius, *_ in balls(time):
        free &= hit_sphere(points + 0.01 * normal, sun, centre, radius) == FAR
    light = 0.42 + 0.75 * np.where(free, np.clip((normal * sun).sum(-1), 0, 1), 0)
    shaded = colour * light[..., None]
    fog = (1 - np.exp(-depth / 34))[..., None]
    colour = np.where(lit[..., None], shaded * (1 - fog) + HAZE * fog, colour)
    colour = colour.reshape(HEIGHT, FINE, WIDTH, FINE, 3).mean((1, 3))
    return (255 * np.clip(colour ** (1 / 1.15) + rng.normal(0, 0.008, colour.shape), 0, 1)).round().astype(np.uint8)


if __name__ == "__main__":
    import av

    rng, path = np.random.default_rng(0), Path(__file__).resolve().parent.parent / "deepvideo_r1" / "explore" / "scene.mp4"
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "26", "preset": "veryslow"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.thread_count = WIDTH, HEIGHT, "yuv420p", 1
        for number in range(FPS * SECONDS):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(render(number / FPS, rng), format="rgb24")))
        container.mux(stream.encode())
    print(f"{path.stat().st_size} bytes")
