"""Kills a training again and again, resumes it, and compares its end with one left in peace.

    python benchmarks/faults.py                      # 100 kills; writes benchmarks/results/
    python benchmarks/faults.py --kills 10 --seed 1

The training is a real one: two worker processes decode a folder of images and crop them at random,
in shuffled order, with dropout and a checkpoint after every step. SIGKILL comes at a random moment
of the start or of the training, or while a checkpoint is being written. Each run is resumed until
it is done; its weights and its curves must then be those of the undisturbed run, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

import torch
import yaml
from PIL import Image

from barlow.checkpoint import load_last
from barlow.run import Run

SETTINGS = {
    "encoder": "dla34",
    "encoder_args": {
        "levels": [0, 0, 1, 1, 1, 1],
        "channels": [4, 4, 8, 8, 8, 16],
        "drop_rate": 0.1,
    },
    "projector": [16, 16],
    "image_size": 96,  # above 64 pixels worker processes crop image by image
    "views": "paper",
    "batch_size": 16,
    "workers": 2,
    "epochs": 8,
    "save_minutes": 0.0,
    "log_every": 1,
    "accelerator": "cpu",
}
MOMENTS = ("at the start", "while training", "while a checkpoint is written")


def make_images(folder: Path, count: int = 128) -> None:
    folder.mkdir()
    random_state = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(0, 256, (112, 104, 3), dtype=torch.uint8, generator=random_state)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03}.png")


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    command = ["pretrain", folder / "images", "--recipe", folder / "recipe.yaml", "--out", out]
    return subprocess.Popen(
        [sys.executable, "-m", "barlow", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_for(moment: str, process: subprocess.Popen[bytes], out: Path, chance: random.Random):
    """Return at that moment, or earlier if the process has ended."""
    if moment == MOMENTS[0]:
        time.sleep(chance.uniform(0, 5))
        return
    curves = Run(out).metrics_file
    before = curves.stat().st_size if curves.exists() else 0
    while process.poll() is None and not (curves.exists() and curves.stat().st_size > before):
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 1))
    if moment == MOMENTS[2]:
        while process.poll() is None and not unfinished(out):
            pass


def unfinished(out: Path) -> list[Path]:
    return list((out / "checkpoints").glob(".*.part"))


def gone(session: int) -> bool:
    """Whether the workers have ended too, within twenty seconds of their parent."""
    for _ in range(200):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def step_of(out: Path) -> int:
    state = load_last(Run(out).last_checkpoint)
    return state["step"] if state else 0


def same(run: Run, whole: Run) -> bool:
    mine, theirs = (load_last(r.last_checkpoint)["model"] for r in (run, whole))
    weights = all(torch.equal(mine[name], theirs[name]) for name in theirs)
    clock = ("seconds", "images_per_second")
    rows = [
        [{k: v for k, v in row.items() if k not in clock} for row in r.metrics()]
        for r in (run, whole)
    ]
    kept = [sorted(p.name for p in r.path.glob("checkpoints/epoch-*")) for r in (run, whole)]
    encoders = [(r.encoder_folder / "model.safetensors").read_bytes() for r in (run, whole)]
    return weights and all(one == other for one, other in (rows, kept, encoders))


def kill_until_done(
    folder: Path, out: Path, kills: int, chance: random.Random, tally: Counter
) -> None:
    """Start a run, kill it up to `kills` times and resume it each time, until it is done."""
    while True:
        process = start(folder, out)
        if kills:
            moment = MOMENTS[(tally["kills"]) % 3]
            wait_for(moment, process, out, chance)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills -= 1
                tally["kills"] += 1
                tally[moment] += 1
                process.wait()
                tally["half a checkpoint lay there"] += bool(unfinished(out))
        error = process.communicate()[1].decode()
        if not gone(process.pid):
            tally["workers left behind"] += 1
        if process.returncode == 0:
            return
        if process.returncode != -signal.SIGKILL:
            tally["failed to resume"] += 1
            print(error, file=sys.stderr)
            return
        logged = Run(out).metrics()
        # Each step is logged and then saved, so at most the one step in between may be lost.
        if logged and step_of(out) < logged[-1]["step"] - 1:
            tally["lost more than the steps since the last checkpoint"] += 1


def measure(kills: int, seed: int) -> Counter:
    tally: Counter = Counter()
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "images")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS))
        whole = Run(folder / "whole")
        process = start(folder, whole.path)
        error = process.communicate()[1].decode()
        if process.returncode:
            sys.exit(error)
        while tally["kills"] < kills:
            run = Run(folder / f"run-{tally['runs']}")
            kill_until_done(folder, run.path, min(10, kills - tally["kills"]), chance, tally)
            tally["runs"] += 1
            tally["runs that end bit-identical"] += same(run, whole)
            print(dict(tally), flush=True)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    tally = measure(options.kills, options.seed)
    for name, count in tally.items():
        print(f"{count:>5}  {name}")
    options.out.mkdir(exist_ok=True)
    result = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/faults.py", *sys.argv[1:]]),
        "tally": tally,
    }
    path = options.out / f"faults-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    bad = (
        "workers left behind",
        "failed to resume",
        "lost more than the steps since the last checkpoint",
    )
    if any(tally[name] for name in bad) or tally["runs that end bit-identical"] != tally["runs"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
