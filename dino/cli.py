"""What every entry point does around its work: user errors become one message and exit code 2."""

import logging
import os
import sys
from collections.abc import Callable

from dino.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Call `main`; print a `UserError` as `error: …` (once, on the first process) and exit with code 2."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted before the run had begun: nothing was written", file=sys.stderr)
        sys.exit(130)
