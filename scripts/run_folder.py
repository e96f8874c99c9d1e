"""The folder of a run: one process at a time trains there, and nothing already written is lost."""

import fcntl
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import IO

from callbacks.requeue import job_id
from scripts.checkpoints import set_aside
from scripts.errors import UserError


def lock_run(folder: Path) -> IO[str]:
    """Takes the lock of a run, which ends with the process or when the file is closed.

    It lies beside the folder, which may be renamed or deleted: `.<name>.lock`. The kernel keeps it (flock), so a killed
    process leaves none behind.

    Raises:
        UserError: another process trains there, or the file cannot be written.
    """
    path = folder.with_name(f".{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"--runs: cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{folder} is in use by {holder}; wait for its end, or stop it") from error
    except OSError as error:
        print(f"warning: {path} cannot be locked here ({error.strerror}); start this run once only", file=sys.stderr)
    file.truncate(0)
    job = f"job {job_id()}, " if job_id() else ""
    print(f"{job}process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file


def claim_folder(folder: Path, ckpt_path: str | None, resume: bool, overwrite: bool) -> None:
    """Decides between a new run and a resume, and makes the folder.

    Args:
        folder: the run's.
        ckpt_path: checkpoint that training continues, None for a new start.
        resume, overwrite: the options of these names.

    Raises:
        UserError: it holds this run already and no option says what to do, or it cannot be written.
    """
    written = any((folder / "checkpoints").glob("*.ckpt"))
    if resume:
        if ckpt_path is None and (written or (folder / "record.json").exists()):
            set_aside(folder)
    elif overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    elif written and ckpt_path is None:
        raise UserError(f"{folder} holds this run already; --resume true continues it, --overwrite true starts anew")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs: cannot write {folder}: {error}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--runs: cannot write {folder}: permission denied")


def has_finished(folder: Path) -> bool:
    """Whether the record in a run's folder says that it came to its end."""
    try:
        return json.loads((folder / "record.json").read_text())["status"] == "finished"
    except (OSError, ValueError, KeyError):
        return False
