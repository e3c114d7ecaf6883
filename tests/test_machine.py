"""Faults of the machine: which are temporary."""

from __future__ import annotations

import errno
import subprocess
from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest
import torch

from explore.machine import is_passing


def turned(error: Exception) -> ValueError:
    """An error raised from another, whose cause is suppressed."""
    try:
        try:
            raise error
        except Exception:
            raise ValueError("x.json: cannot be read") from None
    except ValueError as ours:
        return ours


@pytest.mark.parametrize(
    "error",
    [
        *[OSError(number, "message") for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.ENOSPC)],
        ConnectionResetError(),
        TimeoutError(),
        FutureTimeoutError(),
        subprocess.TimeoutExpired("git", 10),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
        turned(OSError(errno.EMFILE, "Too many open files")),
    ],
    ids=repr,
)
def test_a_fault_of_the_machine_is_temporary(error: Exception) -> None:
    assert is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        *[OSError(number, "message") for number in (errno.ENOENT, errno.EACCES, errno.EISDIR)],
        ValueError("model.d_model: must be at least 1, got 0"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        KeyError("out of memory"),
        turned(OSError(errno.ENOENT, "No such file or directory")),
    ],
    ids=repr,
)
def test_a_fault_of_the_work_is_permanent(error: Exception) -> None:
    assert not is_passing(error)


def test_a_failed_allocation_on_a_cpu_is_a_temporary_fault() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_passing(caught.value)
