"""Thousands of damaged files, of every kind that this project reads: how many end in a traceback, or never?

    python benchmarks/soak.py --inputs 20000 --out soak.json
    python benchmarks/soak.py --kinds archives caches --seed 1

Counted are uncaught errors, inputs that take more than five seconds of the processor or a minute of waiting, and the
memory at the peak. The first inputs that did either are kept beside the results, to be looked at.
"""

import argparse
import json
import logging
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fuzz")]

from targets import Target, damaged, targets  # noqa: E402

LONGEST = 5.0  # seconds of the processor, which others may be using too
LONGEST_WAIT = 60.0  # seconds of the clock
PIECES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"9" * 30, b"[" * 60, b"\n", b"&a *a", b"\\u0000")


class Hang(Exception):
    """An input that took too long."""


def stop(signum: int, frame: Any) -> None:
    raise Hang


def edits(chance: random.Random) -> list[tuple[int, float, bytes]]:
    """One to four."""
    pieces = [chance.choice((*PIECES, chance.randbytes(chance.randrange(13)))) for _ in range(chance.randint(1, 4))]
    return [(chance.randrange(6), chance.random(), piece) for piece in pieces]


def soak(name: str, target: Target, inputs: int, seed: int, kept: Path) -> dict[str, Any]:
    """What came of so many inputs of one kind."""
    chance, outcome, faults = random.Random(f"{name} {seed}"), Counter[str](), Counter[str]()
    longest = 0.0
    for _ in range(inputs):
        content = damaged(chance.choice(target.wholes), edits(chance))
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        signal.setitimer(signal.ITIMER_REAL, LONGEST_WAIT)
        try:
            with tempfile.TemporaryDirectory() as folder:
                target.attempt(content, Path(folder))
        except Hang:
            outcome["hangs"] += 1
            (kept / f"hang-{name}-{outcome['hangs']}").write_bytes(content)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:100]}"
            if fault not in faults:
                (kept / f"fault-{name}-{len(faults)}").write_bytes(content)
            faults[fault] += 1
            outcome["uncaught"] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        longest = max(longest, time.process_time() - start)
    return {
        "inputs": inputs,
        "uncaught": 0,
        "hangs": 0,
        **outcome,
        "longest_s": round(longest, 2),
        "faults": dict(faults),
    }


def main() -> None:
    kinds = targets()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--kinds", nargs="+", choices=list(kinds), default=list(kinds), help="all, if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGPROF, stop)
    kept = arguments.out.with_suffix("")
    kept.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results: dict[str, Any] = {}
    for name in arguments.kinds:
        results[name] = soak(name, kinds[name], -(-arguments.inputs // len(arguments.kinds)), arguments.seed, kept)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        results[name]["peak_mb"] = round(peak / 1000)
        print(name, results[name], flush=True)
        summary = {key: sum(result[key] for result in results.values()) for key in ("inputs", "uncaught", "hangs")}
        whole = {"total": {**summary, "peak_mb": round(peak / 1000), "at_start_mb": round(before / 1000)}, **results}
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print("total", whole["total"])


if __name__ == "__main__":
    main()
