"""A file or a folder is written whole or stays as it was."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from attnopt.base.atomic_files import MARKER, atomic_folder, atomic_write
from attnopt.errors import ArchiveError


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _saved(folder: Path, text: str = "old") -> Path:
    folder.mkdir()
    (folder / MARKER).write_text(text)
    return folder


def test_a_file_is_made(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert _names(tmp_path) == {"a.txt"}


def test_a_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_block_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert _names(tmp_path) == {"a.txt"}


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    monkeypatch.setattr(os, function, _full_disk)
    with (
        pytest.raises(ArchiveError, match=r"cannot write .*a\.txt: No space left on device"),
        atomic_write(target) as t,
    ):
        t.write_text("new")
    assert target.read_text() == "old"
    assert _names(tmp_path) == {"a.txt"}


def test_a_full_disk_while_writing(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="No space left"), atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("half")
        _full_disk()
    assert _names(tmp_path) == set()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist"), atomic_write(tmp_path / "no" / "a") as temporary:
        temporary.write_text("x")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="it is a folder"), atomic_write(tmp_path):
        pytest.fail("not reached")


def test_a_folder_is_made(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("new")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "sub" / "a").read_text() == "new"
    assert _names(tmp_path) == {"model"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_text("new")
    assert _names(tmp_path / "model") == {"a"}


def test_a_saved_folder_is_replaced(tmp_path: Path) -> None:
    target = _saved(tmp_path / "model")
    (target / "left-over").write_text("x")
    with atomic_folder(target) as temporary:
        (temporary / MARKER).write_text("new")
    assert _names(target) == {MARKER}
    assert (target / MARKER).read_text() == "new"
    assert _names(tmp_path) == {"model"}


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter1.tex").write_text("years of work")
    with pytest.raises(ArchiveError, match="it was not overwritten"), atomic_folder(target):
        pytest.fail("not reached")
    assert _names(target) == {"chapter1.tex"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(ArchiveError, match="it is a file"), atomic_folder(tmp_path / "a"):
        pytest.fail("not reached")


def _second_rename_fails() -> Callable[[Path, Path], None]:
    rename, calls = os.rename, [0]

    def failing(source: Path, target: Path) -> None:
        calls[0] += 1
        if calls[0] == 2:
            _full_disk()
        rename(source, target)

    return failing


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    target = _saved(tmp_path / "model")
    monkeypatch.setattr(os, function, _full_disk if function == "fsync" else _second_rename_fails())
    monkeypatch.setattr("attnopt.base.atomic_files._exchanged", lambda *_: False)  # as on a system that takes two steps
    with pytest.raises(ArchiveError, match="No space left"), atomic_folder(target) as temporary:
        (temporary / MARKER).write_text("new")
    assert (target / MARKER).read_text() == "old"
    assert _names(tmp_path) == {"model"}
