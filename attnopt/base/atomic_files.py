"""Writing files and folders whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from attnopt.errors import ArchiveError

MARKER = "attnopt.json"  # the file by which a saved model's folder is known


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path in the same folder to write to; it replaces ``path`` when the block succeeds.

    Otherwise ``path`` is unchanged, without leftovers.  An OSError becomes an ArchiveError that names ``path``.
    """
    target = Path(path).resolve()
    temporary = _beside(target, "tmp")
    with _reported(target), _removed(temporary):
        _refuse_folder(target)
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)


@contextlib.contextmanager
def folder_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder for what is needed on the way to the file ``path``, on the same disk; it is removed at the end."""
    target = Path(path).resolve()
    temporary = _beside(target, "work")
    with _reported(target), _removed(temporary):
        _refuse_folder(target)
        temporary.mkdir()
        yield temporary


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, marker: str = MARKER) -> Iterator[Path]:
    """Yields an empty folder to fill; it replaces ``path`` when the block succeeds.

    An existing ``path`` is replaced only if it is empty or contains a file named ``marker``; on failure it is unchanged.
    """
    target = Path(path).resolve()
    temporary, old = _beside(target, "tmp"), _beside(target, "old")
    with _reported(target), _removed(temporary):
        _refuse_foreign(target, marker)
        temporary.mkdir()
        yield temporary
        for written in temporary.rglob("*"):
            _flush(written)
        _flush(temporary)
        _swap(temporary, target, old)
        _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _swap(new: Path, target: Path, old: Path) -> None:
    if not target.exists():
        os.rename(new, target)
        return
    if _exchanged(new, target):
        return
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise


_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h


def _exchanged(new: Path, target: Path) -> bool:
    """Exchanges the two atomically, so a kill leaves one or the other at ``target``.

    False if the system or file system does not support it (Linux's renameat2).
    """
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_HERE, os.fsencode(new), _HERE, os.fsencode(target), _EXCHANGE) == 0


def _refuse_folder(target: Path) -> None:
    if target.is_dir():
        raise ArchiveError(f"cannot write {target}: it is a folder", hint="give the path of a file")


def _refuse_foreign(target: Path, marker: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ArchiveError(f"cannot write {target}: it is a file", hint="give the path of a folder")
    if any(target.iterdir()) and not (target / marker).is_file():
        raise ArchiveError(
            f"{target} is not empty and contains no saved attnopt model; it was not overwritten",
            hint="choose a new folder, or remove this one first",
        )


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reported(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        hint = None if target.parent.is_dir() else f"the folder {target.parent} does not exist"
        raise ArchiveError(f"cannot write {target}: {reason}", hint=hint) from error


@contextlib.contextmanager
def _removed(temporary: Path) -> Iterator[None]:
    """Always removes ``temporary``."""
    try:
        yield
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """The cache folder: $ATTNOPT_CACHE, or "attnopt" in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("ATTNOPT_CACHE") or Path(base) / "attnopt")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
