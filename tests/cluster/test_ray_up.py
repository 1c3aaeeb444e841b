"""`ray up cluster.yaml` for real, over ssh: runs `tests/ray_up.sh`, which says what it does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import missing

LIMIT_S = 900  # three minutes on idle cores


@pytest.mark.cluster
@pytest.mark.timeout(LIMIT_S + 60)
def test_ray_up_a_study_and_ray_down_over_ssh():
    without = [name for name in ("sshd", "ssh", "ssh-keygen", "rsync") if not shutil.which(name, path=search_path())]
    why = missing() or (f"{', '.join(without)}: not installed; openssh-server and rsync have them" if without else None)
    if why:
        pytest.skip(why)
    done = subprocess.run(
        [Path(__file__).parents[1] / "ray_up.sh"],
        env=os.environ | {"PYTHON": sys.executable, "PATH": search_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    print(done.stdout)
    assert done.returncode == 0
    assert done.stdout.endswith("all well\n")


def search_path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"
