"""What a command does not need, it does not import."""

import subprocess
import sys

import pytest

ROOMS = ("metrics", "callbacks", "loggers", "evaluate", "report")
HEAVY = {"cv2", "diffusers", "onnxruntime", "open_clip", "timm", "tokenizers", "wandb"}


@pytest.mark.soak
def test_the_rooms_of_a_run_leave_heavy_packages_to_what_uses_them():
    rooms = "\n".join(f"import csd_exp.{room}" for room in ROOMS)
    # Lightning has a say of its own in what is loaded.
    code = f"import sys, lightning\nbefore = set(sys.modules)\n{rooms}\nprint(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = set(done.stdout.split())
    assert {f"csd_exp.{room}" for room in ROOMS} <= added
    assert not HEAVY & added
