"""A Slurm of our own: munged, slurmctld and a slurmd per node, in one folder, on free ports of this host.

Two nodes, since the several slurmd that a host can run are told apart by name and port. Needs root and
the programs in PROGRAMS (Debian, Ubuntu: slurm-wlm and munge). A Slurm that the host is part of is left
alone: nothing of it is read, and no port or folder is shared.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
NODES = ("n1", "n2")
# What a node claims to have, whatever the host has: enough for the scripts' own requests. The GPUs are
# plain files, which Slurm allocates like devices.
GPUS = 4
RESOURCES = f"CPUs=64 RealMemory=64000 Gres=gpu:{GPUS}"
PR_SET_PDEATHSIG = 1

CONFIGURATION = """
ClusterName=mpies
# MPICH's shared memory is named after the job, and stays when a job is killed: other numbers every time.
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how many seconds a requeued job waits before it may start again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=60
KillWait=5
MinJobAge=3600
MpiDefault=none
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=batch Nodes={names} Default=YES DefaultTime=10 State=UP
"""


def missing() -> list[str]:
    """The programs that are not on PATH or in the system's folders."""
    return [program for program in PROGRAMS if not _which(program)]


def why_not() -> str:
    """Why there can be no Slurm here; empty if there can."""
    if os.geteuid():
        return "a Slurm of our own needs root"
    if missing():
        return f"Slurm is not installed ({', '.join(missing())}): apt install slurm-wlm munge"
    if not Path("/sys/fs/cgroup").is_mount():
        return "slurmd does not start without control groups: mount /sys/fs/cgroup"
    return ""


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster that is there for a while. Skips the test where there can be none."""
    if why_not():
        pytest.skip(why_not())
    slurm = Cluster(Path(tempfile.mkdtemp(prefix="mpies-slurm-")))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


class Cluster:
    """Daemons that run between `start` and `stop`; `environment` is for Slurm's commands."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[subprocess.Popen] = []

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, less any other Slurm job's, for this cluster."""
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "PMI"))}
        path = os.pathsep.join([outside["PATH"], "/usr/sbin", "/sbin"])
        return outside | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def start(self, timeout: float = 60) -> None:
        """Start the daemons and wait until all nodes are idle. Raises RuntimeError with the logs."""
        self._configure()
        self._daemon(
            "munged", "--foreground", "--force",
            *(f"--{name}={self.folder}/munge.{name.split('-')[0]}"
              for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")),
        )  # fmt: skip
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged", timeout)
        self._daemon("slurmctld", "-D", "-f", self.folder / "slurm.conf")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node, "-f", self.folder / "slurm.conf")
        self._wait(lambda: self.idle_nodes() == set(NODES), "the nodes", timeout)

    def idle_nodes(self) -> set[str]:
        """Names of the nodes that wait for jobs."""
        return set(self.command("sinfo", "--Node", "--noheader", "--states=idle", "--format=%N").split())

    def stop(self) -> None:
        """End all jobs, then the daemons, then whatever is left of either; remove the folder."""
        if self._daemons and self._daemons[-1].poll() is None:
            with contextlib.suppress(subprocess.SubprocessError):
                self.command("scancel", "--user=root", timeout=10)
            self._until(lambda: not self.command("squeue", "--noheader").strip(), 15)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(5)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """What runs below this cluster: job steps and what they started."""
        mine = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                conf = process.environ().get("SLURM_CONF")
                if conf == str(self.folder / "slurm.conf") and process.pid != os.getpid():
                    mine.append(process)
        return mine

    def command(self, *words: str | Path, timeout: float = 30, **environment: str) -> str:
        """Run one of Slurm's commands; what it prints."""
        done = subprocess.run(
            list(map(str, words)),
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise subprocess.SubprocessError(
                f"{words[0]} ended with {done.returncode}: {done.stderr.strip()}"
            )
        return done.stdout

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        texts = [(log.name, log.read_text(errors="replace")) for log in sorted(self.folder.glob("*.log"))]
        return "\n".join(f"{name}:\n{text[-2000:]}" for name, text in texts)

    def _configure(self) -> None:
        self.folder.chmod(0o755)  # munge's socket is for every user
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {RESOURCES} State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        for node in NODES:
            (self.folder / node).mkdir()
        text = CONFIGURATION.format(
            first_job=1 + secrets.randbelow(10**7),
            host=host,
            ports=ports,
            folder=self.folder,
            nodes="\n".join(nodes),
            names=",".join(NODES),
        )
        (self.folder / "slurm.conf").write_text(text)
        for number in range(GPUS):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")

    def _daemon(self, program: str, *arguments: str | Path) -> None:
        with open(self.folder / f"{program}.out", "ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    [_which(program), *map(str, arguments)],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    preexec_fn=_end_with_parent,
                    start_new_session=True,  # a Ctrl-C is the tests' alone, which then take this down
                )
            )

    def _wait(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        if not self._until(condition, timeout):
            raise RuntimeError(f"{what} did not start within {timeout:g} s\n{self.logs()}")

    def _until(self, condition: Callable[[], bool], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.SubprocessError):
                if condition():
                    return True
            time.sleep(0.2)
        return False


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"]))


def _end_with_parent() -> None:
    """Daemons must not outlive tests that are killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
