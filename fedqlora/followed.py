"""A folder that is followed: what was read last and found good is used until something better.

Whoever needs the content asks for it, and a change on the disk is noticed then, by names, sizes
and times of the files. A bad change keeps what was good before. `keep_following` asks by itself,
for a process that may go for hours without a need, so that a bad change is named when it happens.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from fedqlora.errors import ConfigError
from fedqlora.tls import resolve_current

logger = logging.getLogger("fedqlora")

Content = TypeVar("Content")


class Followed(Generic[Content]):
    """The newest content of a folder, or of the folder behind its `current`, that was good."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        load: Callable[[Path], Content],
        describe: Callable[[Content], str],
        pause_seconds: float = 0.0,
    ) -> None:
        """Loads the first content.

        Args:
            folder: what is followed.
            names: its files that matter.
            load: reads and checks them; raises ConfigError.
            describe: names a content in the log.
            pause_seconds: shortest time between two looks at the disk.

        Raises:
            ConfigError: the first content is not good.
        """
        self.problem: str | None = None
        """Why the newest files are not used; None when they are."""
        self.failures = 0
        """How often new files were found bad since the start."""
        self._folder = folder
        self._names = names
        self._load = load
        self._describe = describe
        self._pause_seconds = pause_seconds
        self._heirs: list[Callable[[Content], None]] = []
        self._lock = threading.Lock()
        # The stamp is older than the content: files that change in between are read again.
        self._seen = self._stamp()
        self._good = load(folder)
        self._next_look = time.monotonic() + pause_seconds

    def follow(self, *, at_once: bool = False) -> Content:
        """Returns the newest content that passed the checks; cheap when no file has changed.

        A bad one is logged once, and again only after its files have changed.

        Args:
            at_once: look at the disk even if the last look was a moment ago.
        """
        now = time.monotonic()
        if now < self._next_look and not at_once:
            return self._good
        with self._lock:
            self._next_look = now + self._pause_seconds
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                self._reload()
            return self._good

    def on_change(self, use: Callable[[Content], None]) -> None:
        """Has every new good content handed to `use`, in order, before `follow` returns it."""
        self._heirs.append(use)

    def keep_following(self, pause_seconds: float) -> None:
        """Looks again and again in a thread of its own, until the process ends."""

        def look() -> None:
            while True:
                time.sleep(pause_seconds)
                self.follow()

        threading.Thread(target=look, name="followed", daemon=True).start()

    def _reload(self) -> None:
        try:
            self._good = self._load(self._folder)
            self.problem = None
            for use in self._heirs:
                use(self._good)
            logger.info("Now using %s.", self._describe(self._good))
        except ConfigError as error:
            self.problem = str(error)
            self.failures += 1
            logger.error(
                "Keeping %s, the new one is bad: %s", self._describe(self._good), self.problem
            )

    def _stamp(self) -> tuple[object, ...]:
        """What changes when any of the files does; missing files count as a state."""
        source = resolve_current(self._folder)
        stamp: list[object] = [source]
        for name in self._names:
            try:
                status = (source / name).stat()
                stamp.append((status.st_ino, status.st_mtime_ns, status.st_size))
            except OSError:
                stamp.append(None)
        return tuple(stamp)
