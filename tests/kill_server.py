"""Runs a command many times, each time killed before or in the middle of another file operation.

Reads one request a line from stdin and writes one answer a line to stdout. A request names the command, the folder whose
files count, and the number of the operation at which the process dies (0: at none). The answer is its exit code and
how many operations it did. Each run is a fork, so that the libraries are imported once.
"""
import builtins
import io
import json
import os
import sys
import traceback
from pathlib import Path

import av
import safetensors.torch
import torch

import deepvideo_r1.toy.study  # noqa: F401, with all that commands import when they run
from deepvideo_r1.cli import main
from deepvideo_r1.data.guarded import ReaderProcess
from deepvideo_r1.toy import cold_start as cold_start_module
from deepvideo_r1.toy.config import ColdStartConfig, ToyConfig, WorldConfig

KILLED = 99  # exit code of a process that died as it was told to


class Operations:
    "Counts the file operations below a folder, and ends the process at one of them."

    def __init__(self, root: str, kill_at: int):
        self.root, self.kill_at, self.count, self.log = os.path.realpath(root) + os.sep, kill_at, 0, []

    def is_watched(self, path) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(self.root)

    def next(self, name: str, path, half=lambda: None) -> None:
        "One more operation; where it is the one to die at, only half of it is done."
        self.count += 1
        self.log.append(f"{name} {os.path.basename(str(path))}")
        if self.count == self.kill_at:
            half()
            os._exit(KILLED)


class CountedFile:
    "A file whose writes are operations of their own; a process that dies in one leaves half of the text."

    def __init__(self, file, path, operations: Operations):
        self._file, self._path, self._operations = file, path, operations

    def write(self, content):
        def half() -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        self._operations.next("write", self._path, half)
        written = self._file.write(content)
        self._file.flush()
        return written

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __iter__(self):
        return iter(self._file)


def watch_opens(operations: Operations) -> None:
    "Files that are opened for writing, by Python or by the system's call."
    plain_open, plain_os_open = builtins.open, os.open

    def counted_open(file, mode="r", *args, **more):
        if not set(mode) & set("wax+") or isinstance(file, int) or not operations.is_watched(file):
            return plain_open(file, mode, *args, **more)
        operations.next("open", file)
        return CountedFile(plain_open(file, mode, *args, **more), file, operations)

    def counted_os_open(path, flags, *args, **more):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and "dir_fd" not in more and operations.is_watched(path):
            operations.next("os.open", path)
        return plain_os_open(path, flags, *args, **more)

    builtins.open = io.open = counted_open
    os.open = counted_os_open


def watch_calls(operations: Operations) -> None:
    "Calls of the system that change a folder or force a file to the disk."
    for name in ("replace", "rename", "fsync", "unlink", "remove", "rmdir", "mkdir", "truncate"):
        def counted(path, *args, _name=name, _call=getattr(os, name), **more):
            if more.get("dir_fd") is not None or operations.is_watched(path):
                operations.next(_name, path)
            return _call(path, *args, **more)

        setattr(os, name, counted)


def watch_libraries(operations: Operations) -> None:
    "Files that are written by compiled code: each is one operation, and half a file where the process dies in it."
    def counted(call, place: int):
        def write(*args, **more):
            path = args[place]
            if isinstance(path, (str, os.PathLike)) and operations.is_watched(path):
                def half() -> None:
                    call(*args, **more)
                    os.truncate(path, os.path.getsize(path) // 2)

                operations.next("library", path, half)
            return call(*args, **more)

        return write

    torch.save = counted(torch.save, 1)
    safetensors.torch.serialize_file = counted(safetensors.torch.serialize_file, 1)
    plain_av_open = av.open

    def counted_av_open(file, mode="r", *args, **more):
        if mode == "w" and operations.is_watched(file):
            operations.next("library", file, lambda: Path(file).write_bytes(b"half a video"))
        return plain_av_open(file, mode, *args, **more)

    av.open = counted_av_open


def read_in_this_process() -> None:
    "A process that reads clips takes seconds to start; what is killed here are the files."
    ReaderProcess.start = lambda self: None
    ReaderProcess.read = lambda self, path, *, timeout, read, **settings: read(path, **settings)


def do(command: list[str], root: str) -> int:
    "What a run does: a command of the program, or the cold start in a cache."
    if command != ["cold start"]:
        sys.argv = ["deepvideo-r1", *command]
        return main(command)
    cold_start_module.SAVE_EVERY = 1
    world = WorldConfig(sft_videos=2, rl_videos=1, eval_videos=1)
    schedule = ColdStartConfig(1, 2, 2, 2, hidden_size=48, n_layers=1)
    cold_start_module.cold_start(ToyConfig(world=world, cold_start=schedule), root)
    return 0


def child(command: list[str], root: str, kill_at: int, output: str) -> None:
    "Never returns: the run, with its words in a file, and its number of operations in another."
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    read_in_this_process()
    operations = Operations(root, kill_at)
    for watch in (watch_opens, watch_calls, watch_libraries):
        watch(operations)
    try:
        code = do(command, root)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    Path(f"{output}.operations").write_text(json.dumps(operations.log))
    os._exit(code)


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(**request)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps(code), flush=True)


if __name__ == "__main__":
    serve()
