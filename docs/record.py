"""Finished studies, packed for the notebooks: `python docs/record.py NAME RUN_DIR...` writes `docs/recorded/NAME.jsonl`.

Each run keeps the name of its directory as `study`. In a sweep this name tells the settings apart.
"""
import json
import sys
from pathlib import Path

from deepvideo_r1.toy.effects import pack_runs

if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: python docs/record.py NAME RUN_DIR...")
    runs = [{"study": Path(run_dir).name} | run for run_dir in sys.argv[2:] for run in pack_runs(run_dir)]
    path = Path(__file__).parent / "recorded" / f"{sys.argv[1]}.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    print(f"{path}: {len(runs)} runs, {path.stat().st_size / 1000:.0f} kB")
