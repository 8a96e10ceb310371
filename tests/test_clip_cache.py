"""Decoded clips on disk: equal to fresh ones, found only where nothing has changed, within their limit, whole under two processes."""
import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from deepvideo_r1.data import clip_cache
from deepvideo_r1.data.clip_cache import ClipCache, clip_key, clip_loader, file_identity, pack_clip, unpack_clip
from deepvideo_r1.config import PromptConfig
from deepvideo_r1.core import Clip, Sample, make_generator
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.data.visuals import load_visuals
from deepvideo_r1.model.prompt import Processor, load_processor
from deepvideo_r1.data.video import VideoError


def painting(path, number, size=(40, 60)) -> str:
    "An image file of random pixels, all of one length; lossless, so it decodes to the same everywhere."
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="bmp")
    return str(path)


def image_sample(*paths) -> Sample:
    return Sample(id="pictures", images=tuple(paths), question="?", answer="1", kind="number")


def equal(first, second) -> bool:
    return len(first) == len(second) and all(
        kind == also and torch.equal(a.frames, b.frames) and torch.equal(a.timestamps, b.timestamps)
        and (a.frames.dtype, a.timestamps.dtype) == (b.frames.dtype, b.timestamps.dtype)
        for (kind, a), (also, b) in zip(first, second))


def entries(cache) -> list[Path]:
    return sorted(path for path in Path(cache.directory).iterdir() if path.suffix == ".safetensors")


@pytest.fixture
def processor(tiny_model):
    return load_processor(tiny_model)


@pytest.fixture
def mixed(tiny_world, tmp_path):
    "A question about a video and two images."
    video = shutil.copy(load_samples(tiny_world / "rl.jsonl")[0].video, tmp_path / "film.mp4")
    return replace(image_sample(*(painting(tmp_path / f"{i}.bmp", i) for i in range(2))), video=str(video))


# --- equal to what is decoded -------------------------------------------------------------------------------------


def test_a_hit_equals_a_miss_bit_for_bit(mixed, processor, tmp_path):
    cache = ClipCache(tmp_path / "cache")
    for how in ({}, {"max_frames": 3}, {"fps": 1.0, "max_pixels": 28 * 28}, {"timeout": None}):
        direct = load_visuals(mixed, processor, **how)
        assert [kind for kind, _ in direct] == ["video", "image", "image"]
        assert all(equal(cache.load(mixed, processor, **how), direct) for _ in range(3))
    assert (cache.misses, cache.hits) == (3 * 3, 9 * 3)  # a time limit is no other setting
    assert equal(ClipCache(tmp_path / "cache").load(mixed, processor), load_visuals(mixed, processor))
    words = Sample(id="w", question="?", answer="1", kind="number")
    assert cache.load(words, processor) == load_visuals(words, processor) == []


def test_real_videos_come_back_bit_for_bit(shared_dir, processor, tmp_path):
    paths = [path for path in sorted((shared_dir / "videos").rglob("*.mp4")) if path.stat().st_size < 5_000_000][:4]
    if not paths:
        pytest.skip("needs videos in ../shared/videos")
    cache, good = ClipCache(tmp_path), 0
    for path in paths:
        sample = Sample(id=path.name, video=str(path), question="?", answer="1", kind="number")
        try:
            direct = load_visuals(sample, processor, max_frames=4)
        except VideoError:
            continue
        assert all(equal(cache.load(sample, processor, max_frames=4), direct) for _ in range(2))
        good += 1
    assert cache.hits == good > 0


def test_what_is_returned_can_be_changed_without_changing_the_cache(mixed, processor, tmp_path):
    cache, direct = ClipCache(tmp_path / "cache"), load_visuals(mixed, processor)
    for _ in range(3):
        for _, clip in cache.load(mixed, processor):
            clip.frames.zero_()
            clip.timestamps.zero_()
    assert equal(cache.load(mixed, processor), direct)


def test_questions_about_one_video_share_its_entry(mixed, processor, tmp_path):
    cache = ClipCache(tmp_path / "cache")
    for i in range(5):
        cache.load(replace(mixed, id=f"{i}", question=f"{i} ?", images=mixed.images[:1]), processor)
    shutil.copy2(mixed.video, tmp_path / "moved.mp4")
    cache.load(replace(mixed, video=str(tmp_path / "moved.mp4"), images=()), processor)
    assert cache.misses == len(entries(cache)) == 2


# --- what makes a clip another one --------------------------------------------------------------------------------


def test_a_touched_or_changed_file_misses(processor, tmp_path):
    path, cache = tmp_path / "a.bmp", ClipCache(tmp_path / "cache")
    sample = image_sample(painting(path, 0))
    status = path.stat()
    cache.load(sample, processor)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert equal(cache.load(sample, processor), load_visuals(sample, processor)) and cache.misses == 2
    painting(path, 1)  # as long as before, and given the old time
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    assert equal(cache.load(sample, processor), load_visuals(sample, processor)) and cache.misses == 3


@pytest.mark.parametrize("size, seen", [(1000, True), (2**24, True), (2**24 + 2, False)])
def test_the_middle_of_a_file_counts_up_to_16_mib(tmp_path, size, seen):
    path = tmp_path / "f"

    def identity(changed=()):
        content = bytearray(size)
        for place in changed:
            content[place] = 1
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        return file_identity(path)

    assert len({identity(), identity([0]), identity([size - 1])}) == 3 and identity() == identity()
    assert (identity([size // 2]) != identity()) == seen


def test_every_setting_and_every_size_of_the_processor_counts(processor, tmp_path):
    path = painting(tmp_path / "a.bmp", 0)
    key = clip_key(path, "video", processor)
    assert clip_key(path, "video", processor, max_frames=16, fps=2.0, max_pixels=None, timeout=3.0) == key
    changed = [clip_key(path, "video", processor, **how) for how in (
        {"max_frames": 8}, {"fps": 1.0}, {"max_pixels": 784}, {"start": 1.0}, {"start": 1.0, "end": 2.0})]
    changed += [clip_key(path, "image", processor)]
    for item in fields(Processor):
        if isinstance(getattr(processor, item.name), int):
            changed.append(clip_key(path, "video", replace(processor, **{item.name: getattr(processor, item.name) + 1})))
    assert len({key, *changed}) == len(changed) + 1 == 6 + 5 + 1


def test_other_versions_miss(processor, tmp_path, monkeypatch):
    path = painting(tmp_path / "a.bmp", 0)
    keys = [clip_key(path, "image", processor)]
    monkeypatch.setattr(clip_cache, "CACHE_VERSION", 2)
    keys.append(clip_key(path, "image", processor))
    monkeypatch.setattr(clip_cache, "_versions", lambda: ("decord none",))
    keys.append(clip_key(path, "image", processor))
    assert len(set(keys)) == 3


def test_a_folder_of_images_is_one_video(processor, tmp_path):
    folder, cache = tmp_path / "frames", ClipCache(tmp_path / "cache")
    folder.mkdir()
    for i in range(4):
        painting(folder / f"{i}.bmp", i)
    sample = Sample(id="f", video=str(folder), question="?", answer="1", kind="number")
    for expected in ((1, 0), (1, 1)):
        assert equal(cache.load(sample, processor), load_visuals(sample, processor))
        assert (cache.misses, cache.hits) == expected
    painting(folder / "4.bmp", 4)
    assert equal(cache.load(sample, processor), load_visuals(sample, processor)) and cache.misses == 2
    os.utime(folder / "2.bmp", ns=(1, 1))
    assert equal(cache.load(sample, processor), load_visuals(sample, processor)) and cache.misses == 3


def test_a_file_that_changes_while_it_is_read_is_not_kept(processor, tmp_path, monkeypatch):
    path, cache = tmp_path / "a.bmp", ClipCache(tmp_path / "cache")
    sample = image_sample(painting(path, 0))

    def slow(*args, **how):
        visuals = load_visuals(*args, **how)
        painting(path, 1)
        os.utime(path, ns=(1, 1))
        return visuals

    monkeypatch.setattr(clip_cache, "load_visuals", slow)
    cache.load(sample, processor)
    assert entries(cache) == []


def test_a_video_error_is_not_kept(tiny_world, processor, tmp_path):
    cache, path = ClipCache(tmp_path / "cache"), tmp_path / "a.mp4"
    sample = Sample(id="x", video=str(path), question="?", answer="1", kind="number")
    messages = []
    for content in (None, b"", b"no film", b"no film"):
        if content is not None:
            path.write_bytes(content)
        for load in (cache.load, load_visuals):
            with pytest.raises(VideoError) as error:
                load(sample, processor)
            messages.append(str(error.value))
    assert messages[::2] == messages[1::2] and "no such file" in messages[0] and "empty" in messages[2]
    assert not list(cache.directory.iterdir())
    shutil.copy(load_samples(tiny_world / "rl.jsonl")[0].video, path)
    assert equal(cache.load(sample, processor), load_visuals(sample, processor)) and len(entries(cache)) == 1


# --- the limit ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    return [image_sample(painting(tmp_path / f"{i}.bmp", i)) for i in range(12)]


def entry_size(sample, processor) -> int:
    return len(pack_clip("0" * 64, load_visuals(sample, processor)[0][1]))


def held(cache, samples, processor) -> list[int]:
    return [i for i, sample in enumerate(samples)
            if (cache.directory / f"{clip_key(sample.images[0], 'image', processor)}.safetensors").exists()]


def test_the_least_recently_used_goes_first(pictures, processor, tmp_path):
    size = entry_size(pictures[0], processor)
    cache = ClipCache(tmp_path / "cache", max_bytes=int(3.2 * size))
    for i in (0, 1, 2):
        cache.load(pictures[i], processor)
    cache.load(pictures[0], processor)  # used again
    cache.load(pictures[3], processor)
    assert held(cache, pictures, processor) == [0, 2, 3]
    other = ClipCache(cache.directory, max_bytes=int(3.2 * size))  # what was used last is known to the next process
    other.load(pictures[2], processor)
    other.load(pictures[4], processor)
    assert held(cache, pictures, processor) == [2, 3, 4] and other.hits == 1


@settings(max_examples=25, deadline=None)
@given(visits=st.lists(st.integers(0, 11), min_size=1, max_size=40), room=st.floats(0.5, 140))
def test_the_limit_holds_and_the_last_used_stay(processor_and_pictures, visits, room):
    processor, pictures, size, make_folder = processor_and_pictures
    cache = ClipCache(make_folder(), max_bytes=int(room * size))
    for i in visits:
        cache.load(pictures[i], processor)
        assert sum(path.stat().st_size for path in cache.directory.iterdir()) <= cache.max_bytes
    sure = int(room * 63 / 64)  # so many fit for certain
    recent = list(dict.fromkeys(reversed(visits)))
    assert set(recent[:sure]) <= set(held(cache, pictures, processor))
    assert cache.hits + cache.misses == len(visits)


@pytest.fixture(scope="module")
def processor_and_pictures(tiny_model, tmp_path_factory):
    folder, processor = tmp_path_factory.mktemp("pictures"), load_processor(tiny_model)
    pictures = [image_sample(painting(folder / f"{i}.bmp", i)) for i in range(12)]
    return processor, pictures, entry_size(pictures[0], processor), lambda: tmp_path_factory.mktemp("cache")


def test_many_small_entries_are_counted_without_looking_each_time(processor_and_pictures, monkeypatch):
    processor, pictures, size, make_folder = processor_and_pictures
    looks, real = [], Path.iterdir
    cache = ClipCache(make_folder(), max_bytes=640 * size)
    monkeypatch.setattr(Path, "iterdir", lambda path: looks.append(path) or real(path))
    for frames in range(1, 5):
        for picture in pictures:
            cache.load(picture, processor, max_frames=frames)
    assert len(looks) == 5  # at the first, and after every ten: 48 entries


def test_other_files_are_neither_counted_nor_removed(pictures, processor, tmp_path):
    size, folder = entry_size(pictures[0], processor), tmp_path / "cache"
    folder.mkdir()
    own = {"film.mp4": 100 * size, "notes.txt": 10, "model.safetensors": 100 * size, ".hidden": 5}
    for name, length in own.items():
        (folder / name).write_bytes(b"x" * length)
    (folder / ("0" * 64)).mkdir()
    cache = ClipCache(folder, max_bytes=int(2.5 * size))
    for picture in pictures:
        cache.load(picture, processor)
    assert held(cache, pictures, processor) == [10, 11] and (folder / ("0" * 64)).is_dir()
    assert all((folder / name).stat().st_size == length for name, length in own.items())


def test_what_a_killed_process_left_behind_is_cleared_away(pictures, processor, tmp_path):
    size, folder = entry_size(pictures[0], processor), tmp_path / "cache"
    folder.mkdir()
    left = folder / f"clip-{'0' * 32}.aside"
    left.write_bytes(b"x" * size)
    os.utime(left, ns=(1, 1))
    cache = ClipCache(folder, max_bytes=int(2.5 * size))
    for picture in pictures[:2]:
        cache.load(picture, processor)
    assert not left.exists() and held(cache, pictures, processor) == [0, 1]


def test_a_clip_larger_than_the_cache_is_not_kept(pictures, processor, tmp_path):
    cache = ClipCache(tmp_path / "cache", max_bytes=entry_size(pictures[0], processor) - 1)
    assert all(equal(cache.load(pictures[0], processor), load_visuals(pictures[0], processor)) for _ in range(2))
    assert cache.misses == 2 and not list(cache.directory.iterdir())


# --- damage -------------------------------------------------------------------------------------------------------


class Bomb:
    "A pickle that makes a file when it is read."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_damaged_entry_is_made_anew(pictures, processor, tmp_path):
    sample, cache = pictures[0], ClipCache(tmp_path / "cache")
    direct = load_visuals(sample, processor)
    cache.load(sample, processor)
    entry, = entries(cache)
    good = entry.read_bytes()
    numpy_bomb = io.BytesIO()
    bomb = Bomb(tmp_path / "a pickle was read")
    np.save(numpy_bomb, np.array([bomb], dtype=object), allow_pickle=True)
    cache.load(pictures[1], processor)
    other, = set(entries(cache)) - {entry}
    wrong = {"torn": good[: len(good) // 2], "empty": b"", "pickle": pickle.dumps(bomb), "npy": numpy_bomb.getvalue(),
             "zeros": bytes(len(good)), "longer": good + b"x", "of another key": other.read_bytes(),
             "a bit": good[:-50] + bytes([good[-50] ^ 1]) + good[-49:],
             "other arrays": save({"weight": torch.zeros(3)}), "a length only": struct.pack("<Q", 2**40)}
    for name, content in wrong.items():
        entry.write_bytes(content)
        before = cache.misses
        assert equal(cache.load(sample, processor), direct) and cache.misses == before + 1, name
        assert entry.read_bytes() == good, name
        assert equal(cache.load(sample, processor), direct) and cache.misses == before + 1, name
    assert not bomb.path.exists()
    pickle.loads(wrong["pickle"])
    assert bomb.path.exists()  # it would have gone off


@settings(max_examples=400, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), in_header=st.booleans(), bit=st.integers(0, 7), cut=st.booleans())
def test_no_flipped_bit_and_no_cut_passes(place, in_header, bit, cut):
    key = "ab" * 32
    clip = Clip(torch.randint(0, 256, (2, 3, 4, 4), generator=make_generator(0), dtype=torch.uint8), torch.tensor([0.0, 0.5]))
    content = pack_clip(key, clip)
    assert equal([("video", unpack_clip(key, content))], [("video", clip)]) and unpack_clip("ba" * 32, content) is None
    header = 8 + struct.unpack("<Q", content[:8])[0]
    at = int(place * (header if in_header else len(content)))
    broken = content[:at] if cut else content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
    found = unpack_clip(key, broken)
    assert found is None or equal([("video", found)], [("video", clip)])  # a blank in the header may differ
    if cut or not in_header and at >= header:
        assert found is None


def test_entries_are_plain_arrays(mixed, processor, tmp_path):
    cache = ClipCache(tmp_path / "cache")
    direct = cache.load(mixed, processor)
    assert len(entries(cache)) == len(direct) == len(list(cache.directory.iterdir()))
    for path in entries(cache):
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == {"frames", "timestamps", "seal"}
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"U8", "F32"}
    source = Path(clip_cache.__file__).read_text()
    assert not any(word in source for word in ("import pickle", "torch.load", "allow_pickle=True", "np.load"))


def test_a_disk_that_refuses_is_said_once_and_stops_nothing(pictures, processor, tmp_path, monkeypatch):
    cache = ClipCache(tmp_path / "cache")
    cache.load(pictures[0], processor)

    def full(path, content):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="no more clips are cached .No space left"):
        assert equal(cache.load(pictures[1], processor), load_visuals(pictures[1], processor))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(cache.load(pictures[2], processor), load_visuals(pictures[2], processor))
    cache.load(pictures[0], processor)
    assert (cache.hits, cache.misses) == (1, 3) and len(list(cache.directory.iterdir())) == 1


@pytest.mark.parametrize("make", [lambda folder: ClipCache(folder / "file"), lambda folder: ClipCache(folder / "file" / "below"),
                                  lambda folder: ClipCache(folder / "c", max_bytes=0)])
def test_an_unusable_folder_is_refused(tmp_path, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="clip cache"):
        make(tmp_path)


def test_a_loader_with_and_without_a_cache(mixed, processor, tmp_path):
    assert clip_loader(None) is load_visuals
    cache = clip_loader(tmp_path / "cache", 0.5).__self__
    assert isinstance(cache, ClipCache) and cache.max_bytes == 500_000_000
    assert equal(cache.load(mixed, processor), load_visuals(mixed, processor))
    for wrong in ({"cache_dir": ""}, {"cache_gb": 0.0}, {"cache_gb": -1.0}, {"cache_gb": float("inf")}, {"cache_gb": float("nan")}):
        with pytest.raises(ValueError, match="prompt.cache_dir must name a folder|prompt.cache_gb must be"):
            PromptConfig(**wrong)


def test_entries_that_another_process_removes_meanwhile_are_no_error(pictures, processor, tmp_path, monkeypatch):
    size = entry_size(pictures[0], processor)
    cache = ClipCache(tmp_path / "cache", max_bytes=int(2.5 * size))
    listed, removed, read = Path.iterdir, Path.unlink, Path.read_bytes
    ghost = cache.directory / f"{'f' * 64}.safetensors"
    raced = []

    def unlink(path, missing_ok=False):
        raced.append(path.name)
        os.remove(path)  # the other process was faster
        removed(path, missing_ok=missing_ok)

    def read_bytes(path):
        content = read(path)
        if path.suffix == ".safetensors" and "gone after it was read" in raced:
            os.remove(path)
        return content

    monkeypatch.setattr(Path, "iterdir", lambda path: [*listed(path), ghost])
    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for picture in pictures[:5]:
            assert equal(cache.load(picture, processor), load_visuals(picture, processor))
        assert len(raced) == 3 and held(cache, pictures, processor) == [3, 4]
        raced.append("gone after it was read")
        assert equal(cache.load(pictures[4], processor), load_visuals(pictures[4], processor))
        assert cache.hits == 1 and held(cache, pictures, processor) == [3]
        monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(FileNotFoundError(2, "gone")))
        assert equal(cache.load(pictures[5], processor), load_visuals(pictures[5], processor))


# --- two processes ------------------------------------------------------------------------------------------------


def visit(rank, folder, directory, max_bytes, processor, barrier, results):
    "One process: visits the same pictures as the others in an order of its own, and looks at every clip."
    torch.set_num_threads(1)
    pictures = [image_sample(str(path)) for path in sorted(Path(folder).glob("*.bmp"))]
    direct = [load_visuals(picture, processor) for picture in pictures]
    cache = ClipCache(directory, max_bytes=max_bytes)
    order = np.random.default_rng(rank).integers(0, len(pictures), 150)
    barrier.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrong = sum(not equal(cache.load(pictures[i], processor), direct[i]) for i in [0, 1, 2, *order])
    results.put((rank, wrong, cache.hits, cache.misses))


@pytest.mark.parametrize("room", [2.5, 100])
def test_two_processes_share_a_cache(processor_and_pictures, processor, room):
    _, pictures, size, make_folder = processor_and_pictures
    folder, directory, context = Path(pictures[0].images[0]).parent, make_folder(), multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=visit, args=(rank, folder, directory, int(room * size), processor, barrier, results))
                 for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    found = sorted(results.get(timeout=10) for _ in processes)
    assert [(rank, wrong) for rank, wrong, _, _ in found] == [(0, 0), (1, 0)]
    assert all(hits > 0 and misses > 0 for _, _, hits, misses in found)
    cache = ClipCache(directory, max_bytes=int(room * size))
    assert not list(directory.glob("*.aside")) and len(entries(cache)) == len(list(directory.iterdir()))
    keys = {clip_key(picture.images[0], "image", processor): picture for picture in pictures}
    for path in entries(cache):  # what is left is whole
        expected, = load_visuals(keys[path.stem], processor)
        assert equal([("image", unpack_clip(path.stem, path.read_bytes()))], [expected])
    if room == 100:
        assert len(entries(cache)) == len(pictures)
    else:
        assert 1 <= len(entries(cache)) <= 3  # the limit, and one clip more for the second process
