"""Reading a script and putting a changed one in its place: backup, lock, atomic replace, undo. Nothing else writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lorapatch.errors import Refused

__all__ = ["Receipt", "read_bytes", "replace_with_backup", "restore", "write_new"]

_LOCK_TIMEOUT = 10.0  # seconds


class Receipt(NamedTuple):
    """What was done to a script, kept beside it as ``.NAME.lorapatch.json`` so that it can be undone."""

    schema: int
    original_sha256: str
    patched_sha256: str
    backup: str  # the backup's name, in the script's folder
    backup_made: bool  # False: a file with the original's bytes was there already


def read_bytes(path: Path) -> bytes:
    """The bytes of a script. Raises Refused, with what to do, for anything that is not a script that can be edited."""
    try:
        if path.is_dir():
            raise Refused(f"{path}: is a directory; name a script in it")
        if not path.exists():
            raise Refused(f"{path}: {_why_missing(path)}")
        if not path.is_file():
            raise Refused(f"{path}: is not a regular file; name a script")
        source = path.read_bytes()
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from error
    if not source:
        raise Refused(f"{path}: is empty")
    if b"\0" in source:
        raise Refused(f"{path}: is not a text file (it has NUL bytes)")
    if source.startswith(b"\xef\xbb\xbf"):
        raise Refused(
            f"{path}: line 1: begins with a byte order mark, which bash takes for part of the first command; remove it:"
            f" sed -i '1s/^\\xef\\xbb\\xbf//' {shlex.quote(str(path))}"
        )
    if b"\r" in source and b"\n" not in source:
        raise Refused(
            f"{path}: line 1: its lines end as on old Macintoshes (CR), so to bash all of it is one line; convert it:"
            f" tr '\\r' '\\n' < {shlex.quote(str(path))} > new.sh"
        )
    if b"\r\n" in source:
        line = source[: source.index(b"\r\n")].count(b"\n") + 1
        raise Refused(
            f"{path}: line {line}: has Windows line ends (CRLF), which bash takes for part of the words; convert it:"
            f" sed -i 's/\\r$//' {shlex.quote(str(path))}"
        )
    return source


def _why_missing(path: Path) -> str:
    return f"is a link to {os.readlink(path)}, which cannot be followed" if path.is_symlink() else "no such file"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def replace_with_backup(path: Path, old: bytes, new: bytes) -> Path:
    """Put ``new`` in the place of the script at ``path``, which must still hold ``old``; return the backup's path.

    The backup is ``NAME_backup.sh`` beside the script (``NAME_backup.1.sh`` … if that holds other bytes); it is never
    overwritten. A symbolic link stays, its target is changed. Mode, owner and extended attributes stay.

    Raises Refused; then the script is as it was.
    """
    target = _target(path)
    with _locked(target.parent):
        _check_unchanged(target, old)
        earlier = _read_receipt(target)
        if earlier is not None and earlier.patched_sha256 == sha256(old):
            receipt = Receipt(1, earlier.original_sha256, sha256(new), earlier.backup, earlier.backup_made)
            backup = target.parent / earlier.backup
        else:
            backup, made = _backup(target, old)
            receipt = Receipt(1, sha256(old), sha256(new), backup.name, made)
        # The receipt first: if the machine stops between the two, `restore` finds the script as it was.
        before = _receipt_path(target).read_bytes() if earlier is not None else None
        try:
            _write_atomically(_receipt_path(target), json.dumps(receipt._asdict(), indent=1).encode() + b"\n", None)
            _check_unchanged(target, old)
            _write_atomically(target, new, target)
            _sync_folder(target.parent)  # of all three
        except Refused:
            _take_back(target, before, backup if receipt.backup_made and earlier is None else None)
            raise
    return backup


def _take_back(target: Path, receipt: bytes | None, backup: Path | None) -> None:
    """After a failed write: leave no trace of it."""
    with contextlib.suppress(OSError, Refused):
        if receipt is None:
            _receipt_path(target).unlink(missing_ok=True)
        else:
            _write_atomically(_receipt_path(target), receipt, None)
        if backup is not None:
            backup.unlink(missing_ok=True)


def write_new(path: Path, data: bytes, like: Path | None = None) -> None:
    """Write ``data`` to ``path`` at once or not at all, with the mode of ``like``. Raises Refused."""
    if path.is_dir():
        raise Refused(f"{path}: is a directory; name a file")
    target = _target(path) if path.exists() else path
    if not target.parent.is_dir():
        raise Refused(f"{path}: the folder {target.parent} does not exist")
    _write_atomically(target, data, target if target.exists() else None, mode_of=like)
    _sync_folder(target.parent)


def restore(path: str | os.PathLike[str], *, force: bool = False) -> Path | None:
    """Give the script at ``path`` its original bytes back, and remove the backup and the receipt that patching made.

    With ``force`` a script that was edited since it was patched is backed up first; the path of that backup is
    returned. Raises Refused if there is nothing to undo, or the script was edited.
    """
    path = Path(os.fspath(path))
    target = _target(path)
    with _locked(target.parent):
        current = _bytes_of(target)  # whatever has become of it
        receipt = _read_receipt(target)
        if receipt is None:
            raise Refused(f"{path}: was not patched by lorapatch, or its receipt {_receipt_path(target).name} is gone")
        backup = target.parent / receipt.backup
        kept = None
        if sha256(current) != receipt.original_sha256:
            original = _original(path, backup, receipt)
            if sha256(current) != receipt.patched_sha256:
                if not force:
                    raise Refused(f"{path}: was edited since it was patched; restore --force keeps that as a backup")
                kept, _ = _backup(target, current)
            _write_atomically(target, original, target)
        if receipt.backup_made and backup.is_file() and sha256(backup.read_bytes()) == receipt.original_sha256:
            backup.unlink()
        _receipt_path(target).unlink()
        _sync_folder(target.parent)
    return kept


def _original(path: Path, backup: Path, receipt: Receipt) -> bytes:
    if not backup.is_file():
        raise Refused(f"{path}: the backup {backup.name} is gone, so the original cannot be given back")
    original = backup.read_bytes()
    if sha256(original) != receipt.original_sha256:
        raise Refused(f"{path}: the backup {backup.name} was changed, so the original cannot be given back")
    return original


def _target(path: Path) -> Path:
    """The file itself, behind symbolic links."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a link to itself is the one or the other, by the version of Python
        raise Refused(f"{path}: {_why_missing(path)}") from error


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from error


def _receipt_path(target: Path) -> Path:
    return target.parent / f".{target.name}.lorapatch.json"


def _read_receipt(target: Path) -> Receipt | None:
    try:
        data = json.loads(_receipt_path(target).read_text())
        return Receipt(**data) if data.get("schema") == 1 and Path(data["backup"]).name == data["backup"] else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _check_unchanged(target: Path, old: bytes) -> None:
    if target.read_bytes() != old:
        raise Refused(f"{target}: was changed by someone else meanwhile; nothing was written, run the command again")


def _backup(target: Path, data: bytes) -> tuple[Path, bool]:
    """A file beside ``target`` that holds ``data``, and whether it was made now."""
    stem, suffix = target.stem, target.suffix
    number = 0
    while True:
        path = target.with_name(f"{stem}_backup{f'.{number}' if number else ''}{suffix}")
        if not path.exists() and not path.is_symlink():
            _write_atomically(path, data, None, mode_of=target, exclusive=True)
            return path, True
        if path.is_file() and path.read_bytes() == data:
            return path, False
        number += 1


def _write_atomically(
    path: Path, data: bytes, replaced: Path | None, *, mode_of: Path | None = None, exclusive: bool = False
) -> None:
    """Write through a temporary file in the same folder; keep mode, owner and attributes of ``replaced``."""
    temporary: str | None = None
    try:
        status = os.stat(replaced) if replaced is not None else None
        if status is not None and not stat.S_ISREG(status.st_mode):
            raise Refused(f"{path}: is not a regular file; name a file")
        if status is not None and status.st_nlink > 1:
            raise Refused(f"{path}: has {status.st_nlink} hard links, which a safe replace would part; copy it first")
        if status is not None and not os.access(path, os.W_OK):
            raise Refused(f"{path}: {_why_protected(path, status)}")
        name = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        temporary = str(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            _copy_metadata(file.fileno(), replaced, mode_of, status)
            os.fsync(file.fileno())
        if exclusive:
            os.link(temporary, path)
            os.unlink(temporary)
        else:
            os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise Refused(f"{path}: cannot be written: {_reason(error)}; nothing was changed") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _copy_metadata(handle: int, replaced: Path | None, mode_of: Path | None, status: os.stat_result | None) -> None:
    if replaced is not None and status is not None:
        own = os.fstat(handle)
        if (own.st_uid, own.st_gid) != (status.st_uid, status.st_gid):
            os.fchown(handle, status.st_uid, status.st_gid)
        os.fchmod(handle, stat.S_IMODE(status.st_mode))
        with contextlib.suppress(OSError):  # a file system without attributes, or one that only root may set
            for name in os.listxattr(replaced):
                os.setxattr(handle, name, os.getxattr(replaced, name))
    elif mode_of is not None:
        os.fchmod(handle, stat.S_IMODE(os.stat(mode_of).st_mode))
    else:
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(handle, 0o666 & ~mask)


def _reason(error: OSError) -> str:
    folder = Path(str(error.filename or ".")).parent
    known = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: f"no permission to write in {folder}",
        errno.EPERM: f"{folder} may not be changed (see lsattr -d)"
        if error.filename
        else "its owner or mode cannot be kept (run as its owner)",
    }
    return known.get(error.errno or 0, error.strerror or str(error))


def _why_protected(path: Path, status: os.stat_result) -> str:
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return "cannot be written: the file system is read-only"
    if not status.st_mode & 0o222:
        return f"is write-protected; chmod +w {path.name} first"
    return "this user may not write it (see its owner, and lsattr)"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other lorapatch processes out of ``folder`` while a script in it is replaced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise Refused(f"{folder}: cannot be opened: {error.strerror}") from error
    try:
        _wait_for_lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _wait_for_lock(handle: int, folder: Path) -> None:
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Refused(f"{folder}: another lorapatch is at work in this folder; try again") from None
            time.sleep(0.02)
        except OSError:  # a file system without locks
            return
