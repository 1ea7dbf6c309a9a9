"""List the runs below a folder: how far each is, how healthy, and its best figure.

    dino runs path/to/runs

The best figure is that of the first of neighbours' accuracy, neighbours' agreement and effective rank that a run has.
"""

from pathlib import Path

from dino.commands.common import Parser, path_of, print_table
from dino.errors import UserError
from dino.report.comparison import COLUMNS, row, standing


def main() -> None:
    """Print a table of the runs below a folder; those that cannot be read are named below it.

    Raises:
        UserError: there is none.
    """
    parser = Parser(__doc__)
    parser.add_argument("folder", type=path_of, nargs="?", default=Path("runs"), metavar="DIR", help="default: runs")
    folder = parser.parse_args().folder
    paths = [file.parent for file in sorted(folder.rglob("metrics.jsonl")) if (file.parent / "config.yaml").is_file()]
    if not paths:
        raise UserError(f"there is no run below {folder}: name a folder that holds run directories")
    rows, unread = [], []
    for path in paths:
        try:
            rows.append(row(standing(path, path.relative_to(folder).as_posix())))
        except (UserError, ValueError, KeyError) as error:
            unread.append(f"{path} cannot be read: {error}")
    print_table([list(COLUMNS), *rows])
    print(*unread, sep="\n")
