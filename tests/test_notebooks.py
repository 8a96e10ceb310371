"""Every notebook runs from top to bottom, as `nbdev_test` runs it."""
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
SECONDS = {"": 300, "slow": 3600, "slow gpu": 3600}  # time limit, by the flags of the cells that run as well
RUN = "import sys; from nbdev.test import nbdev_test; nbdev_test.__wrapped__(sys.argv[1], sys.argv[2], n_workers=0)"


def cases():
    "One case for each notebook, and one more where it has cells marked `#| slow` or `#| gpu`."
    for path in sorted(NBS.rglob("[!.]*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        yield pytest.param(path, "", id=path.stem)
        for flags in ("slow", "slow gpu"):
            flag = flags.split()[-1]
            if re.search(rf'"#\| *{flag}\b', path.read_text(encoding="utf-8")):
                yield pytest.param(path, flags, id=f"{path.stem}-{flag}", marks=getattr(pytest.mark, flag))


@pytest.mark.parametrize("path, flags", list(cases()))
def test_notebook(path, flags):
    process = subprocess.Popen([sys.executable, "-c", RUN, path, flags], cwd=NBS, start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=SECONDS[flags])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with whatever processes the notebook started
        pytest.fail(f"{path.name} still ran after {SECONDS[flags]} s", pytrace=False)
    assert process.returncode == 0, output
