"""A script is replaced whole or not at all, with a backup, and can be given back."""

from __future__ import annotations

import errno
import os
import resource
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest

from lorapatch.errors import Refused
from lorapatch.shell import files
from lorapatch.shell.files import read_bytes, replace_with_backup, restore, write_new

OLD, NEW = b"#!/bin/bash\necho old\n", b"#!/bin/bash\necho new\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.sh"
    path.write_bytes(OLD)
    path.chmod(0o750)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_backup_stands_beside_the_script_and_mode_and_owner_stay(script: Path) -> None:
    os.chown(script, os.getuid(), os.getgid())
    assert replace_with_backup(script, OLD, NEW) == script.with_name("train_backup.sh")
    assert script.read_bytes() == NEW
    assert script.with_name("train_backup.sh").read_bytes() == OLD
    assert stat.S_IMODE(script.stat().st_mode) == 0o750
    assert names(script.parent) == [".train.sh.lorapatch.json", "train.sh", "train_backup.sh"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_another_owner_stays(script: Path) -> None:
    os.chown(script, 1234, 5678)
    replace_with_backup(script, OLD, NEW)
    assert (script.stat().st_uid, script.stat().st_gid) == (1234, 5678)


def test_a_backup_is_never_overwritten(script: Path) -> None:
    mine = script.with_name("train_backup.sh")
    mine.write_bytes(b"mine")
    assert replace_with_backup(script, OLD, NEW).name == "train_backup.1.sh"
    assert mine.read_bytes() == b"mine"
    restore(script)
    assert names(script.parent) == ["train.sh", "train_backup.sh"]


def test_a_backup_made_by_hand_is_used_and_not_removed(script: Path) -> None:
    script.with_name("train_backup.sh").write_bytes(OLD)
    assert replace_with_backup(script, OLD, NEW).name == "train_backup.sh"
    restore(script)
    assert names(script.parent) == ["train.sh", "train_backup.sh"]


def test_restore_gives_the_first_original_back_after_two_patches(script: Path) -> None:
    replace_with_backup(script, OLD, NEW)
    replace_with_backup(script, NEW, NEW + b"# more\n")
    assert restore(script) is None
    assert script.read_bytes() == OLD
    assert names(script.parent) == ["train.sh"]


def test_restore_refuses_a_script_that_was_edited_and_force_keeps_it(script: Path) -> None:
    replace_with_backup(script, OLD, NEW)
    script.write_bytes(NEW + b"echo by hand\n")
    with pytest.raises(Refused, match="was edited since it was patched"):
        restore(script)
    kept = restore(script, force=True)
    assert kept is not None and kept.read_bytes() == NEW + b"echo by hand\n"
    assert script.read_bytes() == OLD
    assert names(script.parent) == ["train.sh", "train_backup.1.sh"]


def test_restore_of_a_script_that_was_never_patched_is_refused(script: Path) -> None:
    with pytest.raises(Refused, match="was not patched"):
        restore(script)


@pytest.mark.parametrize("damage", ["unlink", "change"])
def test_restore_without_a_good_backup_is_refused(script: Path, damage: str) -> None:
    backup = replace_with_backup(script, OLD, NEW)
    backup.unlink() if damage == "unlink" else backup.write_bytes(b"other")
    with pytest.raises(Refused, match="cannot be given back"):
        restore(script)
    assert script.read_bytes() == NEW


def test_a_damaged_receipt_is_no_receipt(script: Path) -> None:
    replace_with_backup(script, OLD, NEW)
    script.with_name(".train.sh.lorapatch.json").write_text('{"schema": 1, "backup": "../../etc/passwd"}')
    with pytest.raises(Refused, match="was not patched"):
        restore(script)


def test_the_target_of_a_link_is_patched_and_the_link_stays(script: Path, tmp_path: Path) -> None:
    link = tmp_path / "sub" / "link.sh"
    link.parent.mkdir()
    link.symlink_to("../train.sh")
    replace_with_backup(link, OLD, NEW)
    assert link.is_symlink() and script.read_bytes() == NEW
    assert (tmp_path / "train_backup.sh").exists()
    restore(link)
    assert link.is_symlink() and script.read_bytes() == OLD


def test_a_script_with_several_hard_links_is_refused(script: Path, tmp_path: Path) -> None:
    os.link(script, tmp_path / "other.sh")
    with pytest.raises(Refused, match="2 hard links"):
        replace_with_backup(script, OLD, NEW)
    assert script.read_bytes() == OLD and names(tmp_path) == ["other.sh", "train.sh"]


def test_a_script_that_changed_meanwhile_is_refused(script: Path) -> None:
    script.write_bytes(b"echo somebody else\n")
    with pytest.raises(Refused, match="changed by someone else"):
        replace_with_backup(script, OLD, NEW)
    assert script.read_bytes() == b"echo somebody else\n"
    assert names(script.parent) == ["train.sh"]


def test_a_full_disk_changes_nothing_and_leaves_nothing(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) >= 3:  # backup and receipt are down, the script itself is not
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refused, match="the disk is full; nothing was changed"):
        replace_with_backup(script, OLD, NEW)
    assert script.read_bytes() == OLD
    assert names(script.parent) == ["train.sh"]


def test_a_write_that_the_system_stops_leaves_no_half_file(script: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(Refused, match="cannot be written"):
            replace_with_backup(script, OLD, NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert script.read_bytes() == OLD and names(script.parent) == ["train.sh"]


def said_by_an_ordinary_user(path: Path) -> str:
    """What patching ``path`` says to somebody who is not root: in a forked process, since root may write anywhere."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            replace_with_backup(path, path.read_bytes(), NEW)
        except Refused as refusal:
            os.write(writer, str(refusal).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as answer:
        return answer.read()


def test_no_permission_to_write_is_one_sentence() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "train.sh"
        path.write_bytes(OLD)
        path.chmod(0o644)
        folder.chmod(0o555)
        assert "cannot be written: no permission to write" in said_by_an_ordinary_user(path)
        assert path.read_bytes() == OLD and names(folder) == ["train.sh"]
        folder.chmod(0o755)


def test_two_runs_are_kept_apart(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LOCK_TIMEOUT", 0.2)
    with files._locked(script.parent):
        with pytest.raises(Refused, match="another lorapatch is at work"):
            replace_with_backup(script, OLD, NEW)
    replace_with_backup(script, OLD, NEW)


def test_a_run_waits_for_another(script: Path) -> None:
    def work() -> None:
        with files._locked(script.parent):
            time.sleep(0.2)

    other = threading.Thread(target=work)
    other.start()
    time.sleep(0.05)
    replace_with_backup(script, OLD, NEW)
    other.join()
    assert script.read_bytes() == NEW


def test_writing_elsewhere_takes_the_mode_along(script: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.sh"
    write_new(out, NEW, like=script)
    assert out.read_bytes() == NEW and stat.S_IMODE(out.stat().st_mode) == 0o750
    with pytest.raises(Refused, match="does not exist"):
        write_new(tmp_path / "no" / "out.sh", NEW)
    with pytest.raises(Refused, match="is a directory"):
        write_new(tmp_path, NEW)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"\x7fELF\0\0", "NUL bytes"),
        (b"\xef\xbb\xbfecho\n", "line 1: begins with a byte order mark"),
        (b"echo\necho a\r\n", "line 2: has Windows line ends"),
        (b"echo\recho a\r", "old Macintoshes"),
    ],
)
def test_what_is_not_a_script_to_edit_is_refused(tmp_path: Path, data: bytes, sentence: str) -> None:
    path = tmp_path / "x.sh"
    path.write_bytes(data)
    with pytest.raises(Refused, match=sentence):
        read_bytes(path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such file"):
        read_bytes(tmp_path / "x.sh")
    with pytest.raises(Refused, match="is a directory"):
        read_bytes(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="not a regular file"):
        read_bytes(tmp_path / "pipe")
    loop = tmp_path / "loop.sh"
    loop.symlink_to(loop)
    with pytest.raises(Refused):
        read_bytes(loop)


def test_a_link_that_leads_nowhere_is_told_from_a_missing_file(tmp_path: Path) -> None:
    for target in ("nowhere.sh", "link.sh"):
        link = tmp_path / "link.sh"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        for work in (read_bytes, restore):
            with pytest.raises(Refused, match=f"is a link to {target}, which cannot be followed"):
                work(link)


@pytest.mark.parametrize("now", [b"", NEW.replace(b"\n", b"\r\n"), b"\0"])
def test_force_restores_whatever_has_become_of_the_script(script: Path, now: bytes) -> None:
    replace_with_backup(script, OLD, NEW)
    script.write_bytes(now)
    with pytest.raises(Refused, match="was edited since"):
        restore(script)
    kept = restore(script, force=True)
    assert script.read_bytes() == OLD and kept is not None and kept.read_bytes() == now


def test_nothing_but_a_file_is_written_over(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(Refused, match="is not a regular file"):
        write_new(pipe, NEW)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and names(tmp_path) == ["pipe"]


def test_a_protected_script_and_a_protected_folder_are_named(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> int:
        raise OSError(errno.EPERM, "Operation not permitted", str(script.parent / "x"))

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(Refused, match="this user may not write it"):
            replace_with_backup(script, OLD, NEW)
        script.chmod(0o444)
        with pytest.raises(Refused, match="write-protected; chmod \\+w train.sh"):
            replace_with_backup(script, OLD, NEW)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *a, real=os.open: forbidden() if a[1] & os.O_CREAT else real(*a))
        with pytest.raises(Refused, match="may not be changed \\(see lsattr -d\\)"):
            replace_with_backup(script, OLD, NEW)
    assert script.read_bytes() == OLD and names(script.parent) == ["train.sh"]
