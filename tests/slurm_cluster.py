"""A private Slurm of one node on loopback: own ports, own key, own folder; all of it is gone at the end.

Partition `low` gives way to `high`. Slurm's accounting needs a database, so `sacct` is a
stand-in that answers from the controller; submitit would wait for ever without one.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

NUM_CPUS = 2
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
_SEARCH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
_STARTS_WITHIN_S = 30.0
_ENDS_WITHIN_S = 20.0

# CPUs and memory are what the tests assume, whatever the machine has (config_overrides). cred_expire is also how long a
# job that went back into the queue waits: 120 s by default.
_CONF = """ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/node
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
{signal_at_preemption}PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=3600
ReturnToService=2
MpiDefault=none
PlugStackConfig=/dev/null
NodeName={host} NodeAddr=127.0.0.1 CPUs={num_cpus} RealMemory=8000 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=15 State=UP
PartitionName=high Nodes={host} DefaultTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""

_SACCT = """#!{python}
import re, subprocess, sys
print("JobID|State|NodeList")
for job in [sys.argv[i + 1] for i, a in enumerate(sys.argv) if a == "-j"]:
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True).stdout
    for line in shown.splitlines():
        said = dict(re.findall(r"(\\w+)=(\\S*)", line))
        if "JobId" in said:
            task = said.get("ArrayTaskId")
            number = said["JobId"] if task is None else said["ArrayJobId"] + (
                "_" + task if task.isdigit() else "_[" + task + "]")
            print(number, said["JobState"], said.get("NodeList", ""), sep="|")
"""


@dataclass(frozen=True)
class Cluster:
    """A running Slurm; `environment` makes its commands talk to it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """What a command printed; one that fails raises with what it complained of."""
        made = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {made.returncode}: {made.stderr[-2000:]}")
        return made.stdout

    def submit(self, *options: str, cwd: Path) -> str:
        """Number of a job given to sbatch, which writes what it prints into the folder."""
        return self.run("sbatch", "--parsable", *options, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller says of one job: JobState, Restarts, ExitCode…"""
        said = self.run("scontrol", "show", "job", "-o", number)
        return dict(field.split("=", 1) for field in said.split() if "=" in field)

    def numbers(self) -> list[str]:
        """Jobs that are pending, running or ending, array tasks one by one."""
        return self.run("squeue", "--noheader", "--array", "--format=%i").split()

    def log(self) -> str:
        """The end of what controller and node wrote down."""
        logs = (self.folder / name for name in ("slurmctld.log", "slurmd.log"))
        return "\n".join(log.read_text()[-3000:] for log in logs if log.exists())


def missing() -> str | None:
    """Why no Slurm can be started here, or None."""
    absent = [p for p in _PROGRAMS if shutil.which(p, path=_SEARCH) is None]
    if absent:
        return f"no Slurm on this machine ({', '.join(absent)} missing): apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "a private Slurm starts as root only"


@contextmanager
def running(*, signal_at_preemption: bool = True) -> Iterator[Cluster]:
    """A Slurm that is up; jobs and daemons end with the context.

    Args:
        signal_at_preemption: a job that has to give way gets the signal it asked for (sbatch --signal); otherwise
            SIGTERM, as on clusters without preempt_send_user_signal.
    """
    with ExitStack() as stack:
        # A short path: the length of a socket's name is limited.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True)))
        cluster = _prepared(folder, signal_at_preemption=signal_at_preemption)
        conf = cluster.environment["SLURM_CONF"]
        files = {"key-file": "key", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
        munge = [f"--{option}={folder}/private/{name}" for option, name in files.items()]
        for command in (
            ["munged", "--foreground", f"--socket={folder}/munge.sock", *munge],
            ["slurmctld", "-D", "-f", conf],
            ["slurmd", "-D", "-f", conf, "-N", _host()],
        ):
            stack.enter_context(_daemon(command, cluster))
            if command[0] == "munged":
                _until((folder / "munge.sock").exists, "munged did not start", cluster)
        _until(lambda: _idle(cluster), "Slurm did not start", cluster)
        stack.callback(_end_jobs, cluster)
        yield cluster


def _prepared(folder: Path, *, signal_at_preemption: bool) -> Cluster:
    folder.chmod(0o755)
    for name in ("controller", "node", "bin"):
        (folder / name).mkdir()
    (folder / "private").mkdir(mode=0o700)
    key = folder / "private" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    controller_port, node_port = _free_ports(2)
    (folder / "slurm.conf").write_text(
        _CONF.format(
            host=_host(),
            controller_port=controller_port,
            node_port=node_port,
            folder=folder,
            num_cpus=NUM_CPUS,
            signal_at_preemption="SlurmctldParameters=preempt_send_user_signal\n" if signal_at_preemption else "",
        )
    )
    sacct = folder / "bin" / "sacct"
    sacct.write_text(_SACCT.format(python=sys.executable))
    sacct.chmod(0o755)
    # Not the Slurm that the tests themselves may run under.
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SUBMITIT"))}
    path = f"{folder / 'bin'}{os.pathsep}{_SEARCH}"
    return Cluster(folder, {**own, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path})


@contextmanager
def _daemon(command: Sequence[str], cluster: Cluster) -> Iterator[None]:
    with (cluster.folder / f"{command[0]}.out").open("wb") as said:
        program = shutil.which(command[0], path=cluster.environment["PATH"]) or command[0]
        process = subprocess.Popen(
            [program, *command[1:]], env=cluster.environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_jobs(cluster: Cluster) -> None:
    # Before the daemons: a job's processes would outlive them.
    cluster.run("scancel", "--user=root")
    time.sleep(0.1)
    if cluster.numbers():
        cluster.run("scancel", "--user=root", "--signal=KILL", "--full")
    _until(lambda: not cluster.numbers(), "jobs did not end", cluster)


def _idle(cluster: Cluster) -> bool:
    made = subprocess.run(["sinfo", "-h", "-o", "%T"], env=cluster.environment, capture_output=True, text=True)
    return made.returncode == 0 and "idle" in made.stdout


def _until(true: Callable[[], bool], otherwise: str, cluster: Cluster) -> None:
    end = time.monotonic() + _STARTS_WITHIN_S
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(f"{otherwise}\n{cluster.log()}")
        time.sleep(0.1)


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports
