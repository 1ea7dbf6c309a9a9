"""Write a run's report.html anew, from what lies in its directory.

    dino report runs/mine

A page that a killed run has left stops renewing itself, and results measured since then are on it.
"""

import argparse
from pathlib import Path

from dino.errors import UserError
from dino.report.run import write_report
from dino.run import RunDirectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of a pre-training")
    directory = RunDirectory(parser.parse_args().run)
    if not directory.config.is_file():
        raise UserError(f"{directory.path} holds no run: name the run.dir of a pre-training")
    write_report(directory)
    print(directory.report)
