"""Write a run's report.html anew from what lies in its directory, or lay several runs side by side.

    dino report runs/mine
    dino report runs/mine runs/other --out comparison.html

A page that a killed run has left stops renewing itself, and results measured since then are on it. Of several runs the
page shows how they stand, the settings that differ, readouts, and curves over one another.
"""

from dino.commands.common import Parser, output_file, path_of
from dino.errors import UserError
from dino.report import comparison
from dino.report.run import write_report
from dino.run import RunDirectory


def main() -> None:
    """Write one run's page anew, or a page of several runs, and print where it is.

    Raises:
        UserError: a directory holds no run, or a file cannot be written to.
    """
    parser = Parser(__doc__)
    parser.add_argument("run", type=path_of, nargs="+", metavar="RUN", help="run directory of a pre-training")
    parser.add_argument(
        "--out",
        type=path_of,
        metavar="FILE",
        help="page of several runs; default: comparison.html in their folder",
    )
    arguments = parser.parse_args()
    runs = [RunDirectory(folder.absolute()) for folder in dict.fromkeys(arguments.run)]
    for directory in runs:
        if not directory.config.is_file():
            raise UserError(f"{directory.path} holds no run: name the run.dir of a pre-training")
    if len(runs) == 1:
        if arguments.out is not None:
            raise UserError(f"--out is for several runs; the page of one is {runs[0].report}")
        write_report(runs[0])
        print(runs[0].report)
        return
    folder = comparison.folder_of([directory.path for directory in runs])
    page = arguments.out or folder / "comparison.html"
    output_file(page)
    paths = [directory.path for directory in runs]
    comparison.write(page, [comparison.standing(path, path.relative_to(folder).as_posix()) for path in paths])
    print(page)
