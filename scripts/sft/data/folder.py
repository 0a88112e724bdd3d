"""A folder of ours that changes as a whole: written aside, then put in place; files that others laid there move on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sft import files
from sft.errors import DataError


@contextmanager
def replaced(target: Path, ours: set[str], key: str) -> Iterator[Path]:
    """Yields an empty folder to fill, which takes the place of `target` on a clean exit; on an error nothing changes.

    ours: names of files that are not carried over. key: the config key that names another folder. Raises DataError
    when the folder holds folders (it is not ours to replace) or cannot be written.
    """
    target, mend = target.resolve(), f"name a folder of its own: --set {key}=DIR"
    if target.exists() and not target.is_dir():
        raise DataError("the folder to write to is a file", where=str(target), mend=mend)
    others = [path for path in sorted(target.iterdir()) if path.name not in ours] if target.exists() else []
    for path in others:
        if path.is_dir() and not path.is_symlink():
            raise DataError(f"the folder to write to holds another folder, {path.name}", where=str(target), mend=mend)
    try:
        with files.atomic_folder(target) as staged:
            yield staged
            for path in others:
                shutil.copy2(path, staged / path.name, follow_symlinks=False)
    except OSError as error:
        what, where = f"cannot write: {error.strerror or error}", str(error.filename or target)
        raise DataError(what, where=where, mend=f"free space, or {mend}") from None
