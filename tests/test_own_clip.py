"""The clip explorer: its pixels have the distribution of the library's, its frames are spread like the library's."""
import re

import numpy as np
import pytest
import torch
from test_explorers import run_js  # noqa: F401, a fixture

from deepvideo_r1.augment import add_noise, mask_frames
from deepvideo_r1.core import make_generator
from deepvideo_r1.data.frames import pick_evenly
from deepvideo_r1.explore.explorers import read_module
from deepvideo_r1.explore.own_clip import OwnClipExplorer, scene_file, scene_frames, video_url


def as_rgba(frame: torch.Tensor) -> list[int]:
    "(3, H, W) as the bytes of a canvas."
    opaque = torch.full_like(frame[:1], 255)
    return torch.cat([frame, opaque]).permute(1, 2, 0).flatten().tolist()


def from_rgba(found: dict[str, int], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(list(found.values())).view(*shape[1:], 4).permute(2, 0, 1)


def test_noise_and_masks_have_the_distribution_of_the_librarys(run_js):  # noqa: F811
    frame = scene_frames(2)[1, :, ::2, ::2].contiguous()
    levels = (0.0, 0.05, 0.15, 0.4, 1.0)
    found = run_js("own_clip", [("addNoise", as_rgba(frame), sigma, 3) for sigma in levels])
    for sigma, pixels in zip(levels, found):
        pixels = from_rgba(pixels, frame.shape)
        expected = add_noise(frame[None], sigma, generator=make_generator("test"))[0]
        assert (pixels[3] == 255).all()
        if not sigma:
            assert pixels[:3].equal(frame.long())
        change, wanted = (x.float() - frame.float() for x in (pixels[:3], expected))
        # One and a half standard errors of 21,600 x 2 values, and the same for every colour.
        for of_js, of_python in zip((change, *change), (wanted, *wanted)):
            assert float(of_js.mean()) == pytest.approx(float(of_python.mean()), abs=0.03 * 255 * sigma + 1e-6)
            assert float(of_js.std()) == pytest.approx(float(of_python.std()), rel=0.03, abs=1e-6)
        assert float(pixels[:3].float().mean()) == pytest.approx(float(expected.float().mean()), rel=0.02)
        assert float(pixels[:3].float().std()) == pytest.approx(float(expected.float().std()), rel=0.02)
    grey, = run_js("own_clip", [("maskFrame", as_rgba(frame))])
    expected = mask_frames(torch.stack([frame, frame]), 0.5, generator=make_generator("test"))
    assert from_rgba(grey, frame.shape)[:3].equal(expected[expected[:, 0, 0, 0] == 128][0].long())


def test_noise_is_normal_and_repeatable(run_js):  # noqa: F811
    first, again, other = run_js("own_clip", [("normals", seed, 20001) for seed in (1, 1, 2)])
    draws = np.array(list(first.values()))
    assert first == again != other
    assert abs(draws.mean()) < 0.03 and draws.std() == pytest.approx(1, abs=0.02)
    for bound, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (abs(draws) < bound).mean() == pytest.approx(share, abs=0.01)
    colours = draws[:19998].reshape(-1, 3)
    assert abs(np.corrcoef(colours.T)[np.triu_indices(3, 1)]).max() < 0.03


def test_frames_are_spread_like_the_librarys(run_js):  # noqa: F811
    for n_frames, count in ((48, 16), (48, 1), (100, 7), (30, 30)):
        times, = run_js("own_clip", [("pickTimes", n_frames / 25, count)])
        assert [int(time * 25) for time in times] == pytest.approx(pick_evenly(n_frames, count).tolist(), abs=1)
        assert all(0 < time < n_frames / 25 for time in times)
    sizes = run_js("own_clip", [("fitted", *size) for size in ((1920, 1080), (100, 50), (1, 4000))])
    assert sizes == [[320, 180], [100, 50], [1, 320]]


@pytest.mark.parametrize("count", [1, 2, 16])
def test_as_many_frames_turn_grey_as_in_the_library(run_js, count):  # noqa: F811
    order, = run_js("own_clip", [("shuffled", count)])
    assert len(set(order)) == count - 1 and set(order) <= set(range(count))
    shares = [k / 10 for k in range(11)]
    grey = run_js("own_clip", [("maskedFrames", order, share) for share in shares])
    for share, masked in zip(shares, grey):
        if count > 1:
            frames = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
            expected = mask_frames(frames, share, generator=make_generator("test"))
            assert len(masked) == int((expected[:, 0, 0, 0] == 128).sum())


def test_the_clip_of_the_package():
    content, frames = scene_file(), scene_frames()
    assert len(content) < 100_000 and frames.shape == (16, 3, 180, 320)
    motion = (frames[1:].float() - frames[:-1].float()).abs().mean((1, 2, 3))
    assert (motion > 2).all() and frames.float().std() > 30
    assert video_url(content).startswith("data:video/mp4;base64,")


def test_the_module_stands_alone_and_knows_the_widgets_names():
    text, widget = read_module("own_clip"), OwnClipExplorer(sigma=0.1)
    assert not re.search(r"^\s*import\b|\bimport\(", text, re.M) and len(text) < 26_000
    assert not re.search(r"\b(fetch|eval|XMLHttpRequest|localStorage|innerHTML)\b", text)
    own = {key for key in widget.keys if key[0] != "_" and key not in ("layout", "tabbable", "tooltip")}
    assert own <= set(re.findall(r'"([a-z]+(?:_[a-z]+)?)"', text))
    assert len(widget.picture()) < 60_000
