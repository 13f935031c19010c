"""One, two and four processes: the same seed gives the same result, after fifty steps.

python tests/parity.py [STEPS] [PROCESSES ...]

Images, a panorama, a video, clips of it and a scene, in float64 to 1e-9 of what they moved and in float32 to
1e-5, by gloo. The cases are those of tests/ddp_worker.py; that media and metrics are written once is seen by
tests/test_launch.py.
"""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import ddp_worker
import torch
from PIL import Image
from scenes import write_scene

CASES = ("four_views", "panorama_batch", "video", "clips", "scene", "scene_field")
TOLERANCES = {"float64": 1e-9, "float32": 1e-5}


def prepared(folder: Path) -> None:
    """The pictures, the film and the scene that the cases read, as tests/test_ddp.py has them, and larger."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"0": (4, 5), "1": (4, 5), "2": (4, 5), "3": (4, 5), "wide": (9, 24)}
    sizes |= {f"film/{i:02d}": (6, 8) for i in range(6)}
    (folder / "film").mkdir()
    for name, size in sizes.items():
        pixels = torch.randint(0, 256, (*size, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
    write_scene(folder / "scene", 5, 2, 8)
    particles = ddp_worker.rounds(folder, "float64").scene
    particles.reconstructed(torch.device("cpu"), particles.album())


def results(folder: Path, processes: int, names: list[str]) -> list[dict[str, torch.Tensor]]:
    """What each process ended with; all cases in one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(processes), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    said = folder / "said.txt"
    with said.open("w") as log:
        workers = [
            subprocess.Popen(
                [sys.executable, ddp_worker.__file__, folder, *names],
                env=os.environ | shared | {"LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in range(processes)
        ]
        try:
            codes = [worker.wait() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    assert codes == [0] * processes, said.read_text()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


def main(steps: int, sizes: list[int]) -> None:
    os.environ["CSD_TEST_STEPS"] = str(steps)
    names = [f"{case}:{dtype}" for case in CASES for dtype in TOLERANCES]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepared(folder)
        (one,) = results(folder, 1, names)
        for processes in sizes:
            ranks = results(folder, processes, names)
            for name in names:
                assert all(torch.equal(ranks[0][name], rank[name]) for rank in ranks), name
                moved = (one[name] - one[f"{name}:start"]).norm()
                apart = float((ranks[0][name] - one[name]).norm() / moved)
                assert moved > 0.01 * one[f"{name}:start"].norm(), name
                assert apart < TOLERANCES[name.split(":")[1]], (name, apart)
                print(f"{processes} processes, {steps} steps, {name}: {apart:.1e} of what moved", flush=True)
    print("all processes have come to the same")


if __name__ == "__main__":
    words = [int(word) for word in sys.argv[1:]] or [50, 2, 4]
    main(words[0], words[1:] or [2, 4])
