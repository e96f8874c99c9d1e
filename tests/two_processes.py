"""Runs a test file as two gloo processes, as torchrun would."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]


def run_two(file: str, *words: object, seconds: float = 120) -> None:
    """Runs `python FILE WORDS` as ranks 0 and 1; fails with both ranks' last messages if one of them does.

    The meeting point is a store of this process: its port is bound before anyone is told of it, so that no other
    program can take it in between (`torchrun` looks for a free port and binds it later).
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, file, *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}" for rank in range(2)]
        ranks = []
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                ranks.append(subprocess.Popen(command, env=_environment(rank, store.port), stdout=out, stderr=out))
        codes = _wait(ranks, time.monotonic() + seconds)
        said = "\n".join(f"rank {n}, exit code {codes[n]}:\n{log.read_text()[-3000:]}" for n, log in enumerate(logs))
    assert codes == [0, 0], said


def _environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells its workers, and one thread each."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _wait(ranks: list[subprocess.Popen], deadline: float) -> list[int | None]:
    """Exit codes; where one rank fails or time is up, the other would wait for ever and is ended."""
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            time.sleep(1)  # the other one's own message may be on its way
            break
        time.sleep(0.05)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    return [rank.wait() for rank in ranks]
