"""A real SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, below one folder."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sacct")
NODES = ("nb1", "nb2")
CONFIG = """ClusterName=noisebench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={delay}
CredType=cred/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait={kill_wait}
MinJobAge=3600
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
SlurmctldDebug=info
SchedulerParameters=sched_interval=2,bf_interval=2,default_queue_depth=100
NodeName={first} NodeAddr=127.0.0.1 NodeHostname={host} Port={port_1} CPUs=4 State=UNKNOWN
NodeName={second} NodeAddr=127.0.0.1 NodeHostname={host} Port={port_2} CPUs=4 State=UNKNOWN
PartitionName=main Nodes={first},{second} Default=YES MaxTime=60 State=UP
"""


def missing_programs() -> list[str]:
    """What of SLURM and munge is not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


@contextmanager
def cluster(folder: Path, delay: int = 5, kill_wait: int = 10) -> Iterator[dict[str, str]]:
    """Starts the daemons and stops them again.

    Args:
        folder: holds configuration, state, logs and the munge socket; short, as a socket's path may have 107 bytes.
        delay: lifetime of a job's credential in seconds, at least 5; SLURM lets a requeued job wait that long.
        kill_wait: seconds between SIGTERM and SIGKILL.

    Yields:
        The environment in which sbatch, squeue, ... talk to this cluster.

    Raises:
        RuntimeError: a node did not become idle in time; the message holds the end of the controller's log.
    """
    environment = _configure(folder, delay, kill_wait)
    started: list[subprocess.Popen[Any]] = []
    try:
        for command in _daemons(folder):
            with (folder / f"{command[0]}-{len(started)}.out").open("w") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(0.5)
        _wait_until_idle(environment, folder)
        yield environment
    finally:
        _cancel_all(environment)
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def _cancel_all(environment: dict[str, str], seconds: float = 20) -> None:
    """Ends what still runs, while there are daemons to report to; else its processes would outlive them."""
    end = time.monotonic() + seconds
    subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
    while time.monotonic() < end:
        if not subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True).stdout.strip():
            return
        time.sleep(0.3)


def _configure(folder: Path, delay: int, kill_wait: int) -> dict[str, str]:
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munged refuses a folder that others can write
    controller, port_1, port_2 = _free_ports(3)
    ports = {"controller": controller, "port_1": port_1, "port_2": port_2, "first": NODES[0], "second": NODES[1]}
    host = socket.gethostname().split(".")[0]
    config = CONFIG.format(folder=folder, host=host, delay=delay, kill_wait=kill_wait, **ports)
    (folder / "slurm.conf").write_text(config)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    return {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}


def _daemons(folder: Path) -> list[list[str]]:
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    config = str(folder / "slurm.conf")
    return [munge, ["slurmctld", "-D", "-f", config], *(["slurmd", "-D", "-N", node, "-f", config] for node in NODES)]


def _wait_until_idle(environment: dict[str, str], folder: Path, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    states = ""
    while time.monotonic() < end:
        found = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True)
        states = found.stdout + found.stderr
        if found.stdout.split() == ["idle"] * len(NODES):
            return
        time.sleep(0.3)
    logs = [f"{path.name}:\n{path.read_text()[-1500:]}" for path in sorted(folder.glob("*.log"))]
    logs += [f"{path.name}:\n{path.read_text()[-1500:]}" for path in sorted(folder.glob("*.out"))]
    raise RuntimeError("\n".join([f"the nodes are not idle: {states}", *logs]))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
