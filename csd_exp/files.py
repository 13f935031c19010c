"""Files that are there whole or not at all, and shipped files that are as they were shipped."""

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csd_exp.errors import InputError, out_of_memory

ASSETS = Path(__file__).parent / "assets"
SUMS = "SHA256SUMS"

# What a disk or its owner refuses; any other error of the system is a bug.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def unwritable(error: OSError, advice: str = "") -> InputError:
    """A full or protected disk in one sentence, which `advice` ends; raises any other error again."""
    if error.errno not in REFUSALS:
        raise error
    what = f"{str(error.filename).removesuffix('.part')} cannot be written" if error.filename else "The disk"
    return InputError(f"{what} ({error.strerror}); make room, or {advice or 'choose another folder'}.")


def too_large(error: Exception) -> InputError:
    """What does not fit in memory in one sentence; raises any other error again."""
    words = " ".join(str(error).split())
    if not out_of_memory(error):
        raise error
    return InputError(
        f"This run does not fit in memory ({words or 'no more is left'}); make pictures, windows, "
        "modality.batch or prior.row_chunk smaller."
    )


def short(path: Path) -> Path:
    """A path as it is told: from the working folder, where it lies in that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: it becomes `path` at the end of the block, or goes if that fails.

    What lies in its place before, a link that would lead elsewhere above all, goes at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text, as UTF-8, or bytes."""
    with whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256(file: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Renew the checksums of `folder` in SHA256SUMS beside it, as `sha256sum -c` reads them.

    Model cards are left out: correcting a sentence damages nothing.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix != ".md")
    own = {file.relative_to(folder.parent).as_posix(): sha256(file) for file in files}
    others = {name: was for name, was in _sums(folder).items() if not name.startswith(f"{folder.name}/")}
    lines = [f"{wanted}  {name}\n" for name, wanted in sorted((others | own).items())]
    write_whole(folder.parent / SUMS, "".join(lines))


def check_sums(folder: Path) -> None:
    """Verify the files of `folder` against SHA256SUMS beside it.

    Raises InputError, naming the file, where one is missing or damaged, or where there are no sums.
    """
    own = {name: wanted for name, wanted in _sums(folder).items() if name.startswith(f"{folder.name}/")}
    if not own:
        raise InputError(f"{folder.parent / SUMS} has no checksums of {folder.name}; install csd_exp again.")
    for name, wanted in own.items():
        file = folder.parent / name
        if not file.is_file():
            raise InputError(f"{file} is missing; install csd_exp again.")
        if sha256(file) != wanted:
            raise InputError(f"{file} is damaged: its checksum is not that of {SUMS}; install csd_exp again.")


def _sums(folder: Path) -> dict[str, str]:
    """The checksums in SHA256SUMS beside `folder` by file name; none where there is no such file."""
    sums = folder.parent / SUMS
    lines = sums.read_text().splitlines() if sums.is_file() else []
    return {name: wanted for wanted, name in (line.split("  ", 1) for line in lines)}
