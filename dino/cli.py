"""What every entry point does around its work: user errors become one message and exit code 2."""

import errno
import io
import logging
import os
import sys
from collections.abc import Callable

from dino.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Call `main`; print a `UserError` as `error: …` (once, on the first process) and exit with code 2."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what the terminal cannot show
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = "make room on the disk and start the same command again; what was saved before is whole"
        print(f"error: {error.filename or 'a file'} cannot be written ({error.strerror}): {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted before the run had begun: nothing was written", file=sys.stderr)
        sys.exit(130)
