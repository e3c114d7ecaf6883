"""The machine that a process runs on: memory, open files, and temporary faults."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

PASSING = tuple(
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EBUSY", "EDQUOT", "EIO", "EMFILE", "ENFILE", "ENOLCK", "ENOMEM", "ENOSPC", "ESTALE"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET"),
        *("ENETUNREACH", "ENOTCONN", "EPIPE", "EREMOTEIO", "ESHUTDOWN", "ETIMEDOUT"),
    )
    if hasattr(errno, name)
)
"""Operating-system errors that do not depend on the task of the process."""

CONTROL_GROUPS = {
    "": (Path("/sys/fs/cgroup"), ("memory.max", "memory.current")),
    "memory": (Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")),
}
"""Files with the memory limit and use of a control group, for both versions of control groups."""

MANY_FILES = 4096
"""A sufficient limit of open files; higher limits are left alone."""

WORDS = (*map(os.strerror, PASSING), "out of memory", "ALLOC_FAILED", "can't allocate memory", "unable to allocate")
"""Words by which a RuntimeError from a C++ library is recognised as a fault of the machine."""


def is_passing(error: BaseException) -> bool:
    """Whether an error is a temporary fault of the machine, so that the work may succeed later or elsewhere.

    Examples are a full or failing disk, an unreachable network file system, too few file descriptors, no memory on the
    CPU or GPU, a time limit. Errors caused by such a fault count too.
    """
    return any(map(_is_passing, causes(error)))


def _is_passing(error: BaseException) -> bool:
    match error:
        case MemoryError() | TimeoutError() | ConnectionError() | subprocess.TimeoutExpired():
            return True
        case OSError():
            return error.errno in PASSING
        case RuntimeError():  # torch's OutOfMemoryError is one
            text = str(error).lower()
            return any(word.lower() in text for word in WORDS)
    return False


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, including those hidden by `raise ... from None`."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        yield following
        seen.add(id(following))
        following = following.__cause__ or following.__context__


def memory_bytes() -> tuple[float, float]:
    """Memory that this process may use in total, and the part that is free now, in bytes including swap.

    Limits of the process and of its control group count. Both are infinite if the system does not report them.
    """
    host = _numbers(Path("/proc/meminfo"), scale=1024)
    total = [host["MemTotal"] + host.get("SwapTotal", 0)] if "MemTotal" in host else []
    free = [host["MemAvailable"] + host.get("SwapFree", 0)] if "MemAvailable" in host else []
    for limit, used in _limits():
        total.append(limit)
        free.append(limit - used)
    return min(total, default=float("inf")), max(0.0, min(free, default=float("inf")))


def _limits() -> Iterator[tuple[float, float]]:
    """Limits on memory, each with the memory currently counted against it."""
    own = _numbers(Path("/proc/self/status"), scale=1024)
    for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        if (limit := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
            yield float(limit), own.get(name, 0.0)
    for folder, names in _control_groups():
        try:
            limit_text, used_text = ((folder / name).read_text(encoding="ascii").strip() for name in names)
        except OSError:
            continue
        if limit_text.isdecimal():
            # Files that the kernel cached for the group count as used, but can be evicted.
            stat = _numbers(folder / "memory.stat")
            cached = stat.get("total_inactive_file", stat.get("inactive_file", 0.0))
            yield float(limit_text), float(used_text) - cached


def _control_groups() -> Iterator[tuple[Path, tuple[str, str]]]:
    """Folders of this process's control group and its parents, with their files of limit and use."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root, names = CONTROL_GROUPS[controllers]
            folder = root / path.strip("/")
            for each in (folder, *folder.parents):
                if each.is_relative_to(root):
                    yield each, names


def _numbers(path: Path, scale: float = 1.0) -> dict[str, float]:
    """Reads a kernel file with a name and a number on each line; empty if the file is missing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    words = (line.replace(":", " ").split() for line in lines)
    return {each[0]: scale * float(each[1]) for each in words if len(each) > 1 and each[1].isdecimal()}


def ensure_descriptors(needed: int) -> None:
    """Raises the limit of open files as far as allowed; raises an error if it is still too low.

    Args:
        needed: number of files to open in addition to those already open.

    Raises:
        ValueError: fewer can be opened.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    try:
        n_open = len(os.listdir("/dev/fd"))  # noqa: PTH208, a Path would count the same
    except OSError as error:
        if error.errno not in PASSING:  # the system does not report it
            return
        n_open = soft
    if soft != resource.RLIM_INFINITY and soft - n_open < needed:
        raise ValueError(
            f"open files: at least {n_open + needed} must be allowed, got a limit of {soft}; raise it with ulimit -n"
        ) from OSError(errno.EMFILE, os.strerror(errno.EMFILE))
