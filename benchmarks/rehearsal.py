"""Does `--dry-run` tell the memory and the time that a run then takes? Told, and taken, of one run.

    python benchmarks/rehearsal.py --out OUT --config configs/demo.yaml train.steps=200 train.cpu_threads=1

Time is that of the steps, by metrics.jsonl: what reports and checkpoints take is not told. Memory is the most that the
run's main process had, on a CPU.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import kit

from dino import cli

TRAIN = """
import atexit
from dino.cli import main
from dino.training.memory import _peak_of_process
atexit.register(lambda: print("peak", _peak_of_process()))
main("train")
"""  # not what the system says afterwards, as the interpreter's own end takes up to 100 MB more
UNITS = {"MB": 1.0, "GB": 1000.0}


def main() -> None:
    arguments = parse()
    kit.begin(arguments)
    folder = arguments.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-c", TRAIN, *arguments.words, f"run.dir={folder}", "tracking.backends=[]"]
    command.append("train.checkpoint_every=1000000")  # a short run would write one every few steps
    text = subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True).stdout
    estimated = megabytes(r"memory: about ([\d.]+) (MB|GB)", text)
    in_steps = megabytes(r"at most ([\d.]+) (MB|GB)", text)
    (each,) = re.findall(r"([\d.e+-]+) s each", text)  # of a run without phases
    began = time.perf_counter()
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    whole = time.perf_counter() - began
    (peak,) = re.findall(r"^peak (\d+)$", run.stdout, re.MULTILINE)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    settings = (folder / "config.yaml").read_text()
    batch = int(re.findall(r"batch_size: (\d+)", settings)[0])
    steps, seconds = 0, 0.0
    for line in lines:
        seconds += (line["step"] - steps) * batch / line["time/images_per_second"]
        steps = line["step"]
    rows = []
    for what, told, taken in (
        ("memory as estimated, MB", estimated, int(peak) / 1e6),
        ("memory of the steps it took, MB", in_steps, int(peak) / 1e6),
        (f"{steps} steps, s", float(each) * steps, seconds),
    ):
        rows.append([what, kit.number(told), kit.number(taken), f"{told / taken:.2f}"])
    kit.print_table("", ["told", "taken", "told / taken"], rows)
    print(f"the whole process: {whole:.1f} s")


def megabytes(pattern: str, text: str) -> float:
    """The last amount of memory that a text tells."""
    amount, unit = re.findall(pattern, text)[-1]
    return float(amount) * UNITS[unit]


def parse() -> argparse.Namespace:
    parser = kit.parser(__doc__ or "", official=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, which is written anew")
    arguments, arguments.words = parser.parse_known_args()
    return arguments


if __name__ == "__main__":
    cli.run(main)
