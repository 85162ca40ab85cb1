"""One Flyball per data folder: a second writer would break every promise about order."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from flyball.core.errors import ConfigError


class FolderLock:
    """Held until released or until the process ends, however it ends: the kernel lets go of it.

    Raises: ConfigError when another process holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as e:
            raise ConfigError(
                f"cannot be written ({e.strerror}); set `data` to a folder that can", where=str(folder)
            ) from e
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = os.read(self._file, 20).decode("ascii", "replace")
            os.close(self._file)
            raise ConfigError(
                f"is in use by the Flyball of process {holder or '?'}; stop that one, or set another `data`",
                where=str(folder),
            ) from e
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
