"""What the benchmarks share: ways taken in turn, a table of their times, and what a reader needs to repeat it."""

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from dino.config.auto import PoolFacts, resolve
from dino.config.schema import Config
from dino.data import decoded, open_images, samples_per_epoch
from dino.distributed import rank_and_size
from dino.errors import UserError
from dino.run import RunDirectory
from dino.training import launch
from dino.training.settings import load
from dino.training.trainer import Trainer

Ways = Mapping[str, Callable[[], object]]


def parser(description: str, rounds: int = 7, official: bool = True) -> argparse.ArgumentParser:
    """A parser with what every benchmark understands; `official`: whether it has the official code beside it."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="how often each way is timed, in turn")
    made.add_argument("--threads", type=int, default=1, help="of the CPU; with 1, its own CPU time is what counts")
    made.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    if official:
        made.add_argument("--official", metavar="DIR", help="your clone of facebookresearch/dino, to be timed beside")
    return made


def begin(arguments: argparse.Namespace) -> torch.device:
    """Set the threads, say what is measured where, and give the device."""
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    script = Path(sys.argv[0])
    threads = "one thread" if arguments.threads == 1 else f"{arguments.threads} threads"
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {threads}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"`python benchmarks/{script.name} {shlex.join(sys.argv[1:])}`")
    print(f"{time.strftime('%Y-%m-%d')}; {where}; {versions}\n")
    return device


def processor() -> str:
    """The CPU's name."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def alternate(ways: Ways, rounds: int, device: torch.device, warm_up: int = 1) -> dict[str, np.ndarray]:
    """Seconds of each way in each round, the ways taken in turn, so that a machine's moods meet all of them.

    Args:
        warm_up: rounds before, which do not count.

    Returns:
        By way, (rounds,): CPU time of this process where it has one thread, else the time on the clock.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, way in ways.items():
            wait(device)
            began = clock()
            way()
            wait(device)
            if number >= warm_up:
                seconds[name].append(clock() - began)
    return {name: np.array(taken) for name, taken in seconds.items()}


def wait(device: torch.device) -> None:
    """For what a GPU has still to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def show(title: str, seconds: Mapping[str, np.ndarray], items: int | None = None) -> None:
    """Print the table of what `alternate` measured; the first way is what others are compared with.

    Args:
        items: images, or whatever is counted, of one round: their number a second is then shown instead of times.
    """
    first = next(iter(seconds))
    unit = "a second" if items else "ms"
    rows = []
    for name, taken in seconds.items():
        values = np.sort(items / taken if items else 1000 * taken)
        cells = [number(value) for value in (np.median(values), values[0], values[-1])]
        ratios = seconds[first] / taken
        beside = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        rows.append([name, *cells, len(taken), beside])
    print_table(f"{title}, {unit}", ["median", "least", "most", "n", f"× as fast as {first}"], rows)


def number(value: float) -> str:
    """With three digits that say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A table in Markdown, as the ledger has it."""
    header = [title, *columns]
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print(flush=True)


def official(directory: str, module: str) -> ModuleType:
    """A module of the user's own clone of facebookresearch/dino or dinov2.

    Raises:
        UserError: it is not there.
    """
    root = Path(directory).expanduser()
    if not (root / f"{module.replace('.', '/')}.py").is_file():
        raise UserError(f"{root} has no {module}.py: name a clone of github.com/facebookresearch/{root.name}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return import_module(module)


def same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
    """Refuse to time two things that do not give the same."""
    ours, theirs = ours.detach(), theirs.detach()
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
    if difference > tolerance:
        raise UserError(f"{what} differs from the official code's by {difference:.1e}: nothing to compare")
    print(f"{what}: equal to the official code's to {difference:.1e}\n")


def build_trainer(settings: Mapping[str, object], images: object = None, recipe: str | None = None) -> Trainer:
    """A run's parts as `dino.train` puts them together, to take steps with; it writes nothing.

    Args:
        settings: by key; values may be text.
        images: a data set of one's own instead of `data.root`.
    """
    values = {"run.dir": "runs/benchmark", "tracking.backends": []} | dict(settings)
    config = load(recipe, [f"{key}={value}" for key, value in values.items()])
    accelerator = launch.start(config)
    config.train.precision = launch.precision_of(accelerator)
    pool = open_images(images or config.data.root, config.data.kind, config.data.channels)
    facts = PoolFacts(samples_per_epoch(pool), pool.channels, pool.kind, *decoded(pool))
    config, _ = resolve(config, facts)
    launch.set_process_state(config.train)
    return Trainer(config, accelerator, RunDirectory(config.run.dir), pool)


class Noise:
    """A data set of random pictures, (C, side, side) uint8."""

    def __init__(self, count: int, side: int, channels: int = 3):
        self.pixels = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pixels[index]


def random_crops(config: Config, device: torch.device) -> list[list[torch.Tensor]]:
    """One step's micro-batches of this process, of noise."""
    views, share = config.views, config.train.batch_size // config.train.accumulation // rank_and_size()[1]
    shapes = [(2 * share, config.data.channels, views.global_size, views.global_size)]
    if views.local_crops:
        shapes.append((views.local_crops * share, config.data.channels, views.local_size, views.local_size))
    return [
        [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for shape in shapes]
        for _ in range(config.train.accumulation)
    ]
