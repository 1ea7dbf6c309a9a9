"""Images that cannot be read: which they are, and when they are too many."""

import logging

from dino.data import Pool, read_or_reason
from dino.errors import UserError
from dino.files import shown
from dino.run import RunDirectory

logger = logging.getLogger(__name__)


class Skipped:
    """The unreadable images of a run, by name; all processes note theirs in RUN/skipped.jsonl.

    Args:
        limit: fraction of the images that may be unreadable.
        directory: None: they are listed nowhere.
    """

    def __init__(self, images: Pool, limit: float, directory: RunDirectory | None, is_main_process: bool):
        self.images, self.limit, self.directory = images, limit, directory
        listed = {} if directory is None else directory.read_skipped()
        self.reasons = self._still_unreadable(listed)
        if directory is not None and is_main_process and self.reasons != listed:
            directory.write_skipped(self.reasons)

    def note(self, entries: list[tuple[int, str]]) -> None:
        """Take note of unreadable images, (index, reason)."""
        new = {}
        for index, reason in entries:
            name = self.images.names[index]
            if name not in self.reasons:
                new[name] = reason
        self.reasons |= new
        if new and self.directory is not None:
            try:
                self.directory.add_skipped(new)
            except UserError as error:  # the list is for the user; the run itself goes on
                logger.warning("unreadable images are not listed: %s", error)

    def are_too_many(self) -> bool:
        """Whether more than the limit of all images turned out unreadable, in any process."""
        if self.directory is not None:
            self.reasons |= self.directory.read_skipped()
        return len(self.reasons) > self.limit * len(self.images.names)

    def error(self) -> UserError:
        """What to tell the user then."""
        name, reason = next(iter(self.reasons.items()), ("one", "see skipped.jsonl"))
        count, total = len(self.reasons), len(self.images.names)
        listing = f"; all are listed in {self.directory.skipped}" if self.directory else ""
        return UserError(
            f"{count} of {total:,} images ({count / total:.1%}) cannot be read, more than "
            f"data.max_unreadable={self.limit:g} allows, for example {shown(name)}: {reason}{listing}. "
            "Mend or remove them, or raise data.max_unreadable"
        )

    def _still_unreadable(self, listed: dict[str, str]) -> dict[str, str]:
        """Without images that were mended since an earlier start."""
        reasons = {}
        for index, name in enumerate(self.images.names if listed else ()):
            if name in listed:
                _, reason = read_or_reason(self.images, index)
                if reason:
                    reasons[name] = reason
        return reasons
