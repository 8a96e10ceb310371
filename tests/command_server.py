"""Runs `deepvideo-r1` commands as processes of their own without importing the libraries for each of them.

Reads one request a line from stdin and writes one answer a line to stdout: `{"start": {...}}` forks a process that is
what the installed script would be, `{"wait": pid}` gives its exit code.
"""
import json
import os
import sys
import time
import traceback

import deepvideo_r1.toy.study  # noqa: F401, with all that commands import when they run
from deepvideo_r1.cli import main


def child(args: list[str], folder: str, stdout: str, stderr: str) -> None:
    "Never returns: the command in a process group of its own, with its own files."
    os.setsid()
    os.chdir(folder)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["deepvideo-r1", *args]
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                child(**request["start"])
        else:
            give_up, answer = time.monotonic() + request["timeout"], None
            while answer is None and time.monotonic() < give_up:
                pid, status = os.waitpid(request["wait"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else time.sleep(0.02)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
