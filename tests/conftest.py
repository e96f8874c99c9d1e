"""Fixtures that several tests share."""

import errno
import functools
import os
from collections.abc import Callable
from typing import Any

import fsspec.implementations.local
import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    """Small nets; more threads only wait for each other."""
    torch.set_num_threads(2)


def fill_disk(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """From now on writing a file of this suffix through fsspec meets a full disk half-way."""
    opener = fsspec.implementations.local.LocalFileOpener
    write = opener.write

    def partly(self: Any, data: Any) -> int:
        if str(self.path).endswith(suffix):
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(opener, "write", partly)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`full_disk(".ckpt")` is `fill_disk` until the test's end."""
    return functools.partial(fill_disk, monkeypatch)
