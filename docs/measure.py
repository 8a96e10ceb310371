"""Time, memory and disk of a command: `python docs/measure.py NAME FOLDER COMMAND...` adds them to `docs/recorded/commands.json`.

Memory is the largest sum over the command and all processes that it starts, read five times a second. A page that several
processes share counts once (PSS). Disk is what FOLDER holds at the end.
"""
import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import psutil
import torch

RECORD = Path(__file__).parent / "recorded" / "commands.json"


def held(process: psutil.Process) -> int:
    "Bytes of memory of a process now; 0 when it has ended."
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def run(command: list[str]) -> tuple[float, int]:
    "Seconds and peak bytes of a command; raises `SystemExit` where it fails."
    started, peak = time.perf_counter(), 0
    child = subprocess.Popen(command)
    root = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            processes = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        peak = max(peak, sum(map(held, processes)))
        time.sleep(0.2)
    if child.wait():
        raise SystemExit(f"{command[0]} ended with exit code {child.returncode}")
    return time.perf_counter() - started, peak


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit("usage: python docs/measure.py NAME FOLDER COMMAND...")
    name, folder, *command = sys.argv[1:]
    seconds, peak = run(command)
    disk = int(subprocess.run(["du", "-s", "--block-size=1", folder], capture_output=True, text=True, check=True).stdout.split()[0])
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[name] = {"date": date.today().isoformat(), "command": " ".join(command), "cores": psutil.cpu_count(),
                    "python": platform.python_version(), "torch": torch.__version__, "seconds": round(seconds),
                    "peak_mb": round(peak / 1e6), "folder": folder, "disk_mb": round(disk / 1e6)}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(record[name])
