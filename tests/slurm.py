"""A real Slurm cluster on this machine: munged, slurmctld and one slurmd for each node, from Debian's packages.

Each node is a set of Linux namespaces with its own network address, processes, host name and /tmp, so that it can be
killed whole and two of them run the same ports. Two partitions: `high` preempts `low`, which is warned and given grace.
Needs root. Everything is ended by the process numbers it was started with.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "nsenter", "unshare", "ip")
READY_S = 60
GRACE_S = 20
ROOT = Path(__file__).parents[1]


@dataclass
class SlurmCluster:
    """A running cluster; commands run on its controller."""

    folder: Path
    nodes: list[str]
    tag: str
    shared: list[Path]
    pids: dict[str, int] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """For whoever speaks to the controller."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}

    def inside(self, command: Sequence[str], node: str = "ctl") -> list[str]:
        """`command` in the controller's or a node's network, with the cluster's host names."""
        hosts = f'mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{self.tag}{node}", "unshare", "--mount", "bash", "-c", hosts, "-"]
        return [*enter, *command]

    def run(self, *command: str, check: bool = True, given: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the controller."""
        done = subprocess.run(
            self.inside(command),
            input=given,
            capture_output=True,
            text=True,
            check=False,
            env=self.environment | env,
            timeout=120,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}\n{self.logs()}"
        return done

    def diffussm(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """The command line, as a user of the login node has it."""
        code = "import sys; from launch import cli; sys.argv[0] = 'diffussm'; cli.main()"
        return self.run(sys.executable, "-c", code, *arguments, check=check)

    def state(self, job: str) -> str:
        """Slurm's word for a job."""
        words = self.run("scontrol", "-o", "show", "job", job).stdout.split()
        return next(word.partition("=")[2] for word in words if word.startswith("JobState="))

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
        """Poll until `condition` is true; its value."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{self.queue()}\n{self.logs()}"
            time.sleep(0.2)
        return value

    def queue(self) -> str:
        return self.run("squeue", "--states=all", check=False).stdout

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-600:]}" for path in sorted(self.folder.glob("*.log")))

    def start_node(self, node: str) -> None:
        """Start a node; bash is its process 1 and reaps what Ray leaves."""
        tmp = self.folder / "tmp" / node
        tmp.mkdir(parents=True, exist_ok=True)
        tmp.chmod(0o1777)
        shares = ""
        for place in self.shared:
            inner = tmp / place.relative_to("/tmp")  # noqa: S108 - the node's own /tmp
            inner.mkdir(parents=True, exist_ok=True)
            shares += f"mount --bind {place} {inner}\n"
        script = f"""
            hostname {node}
            mount --bind {self.folder}/hosts /etc/hosts
            {shares}
            mount --rbind {tmp} /tmp
            cd / ; slurmd -D -N {node} & wait
        """
        space = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / f"{node}.out.log").open("ab") as log:
            process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.tag}{node}", *space, "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        self.pids[node] = process.pid

    def kill_node(self, node: str) -> None:
        """As when its power fails: all its processes at once."""
        pid = self.pids.pop(node, None)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def idle(self, count: int) -> bool:
        """Whether so many nodes wait for work."""
        listed = self.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N", check=False).stdout
        return len(listed.split()) == count


def conf(cluster: SlurmCluster) -> str:
    folder = cluster.folder
    by_cgroup = Path("/sys/fs/cgroup/freezer").is_dir()
    addresses = {node: f"10.77.0.{index}" for index, node in enumerate(cluster.nodes, start=11)}
    lines = [
        "ClusterName=box",
        "SlurmctldHost=ctl(10.77.0.1)",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge/sock,cred_expire=5",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        f"ProctrackType=proctrack/{'cgroup' if by_cgroup else 'linuxproc'}",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "ReturnToService=2",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SlurmdParameters=config_overrides",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SlurmctldParameters=preempt_send_user_signal",
        "SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0",
        "KillWait=5",
        "MinJobAge=3600",
        "SlurmdTimeout=6",
        "InactiveLimit=0",
        "MaxArraySize=1001",
        *(f"NodeName={node} NodeAddr={addresses[node]} CPUs=8 RealMemory=8000 State=UNKNOWN" for node in cluster.nodes),
        f"PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_S}",
        "PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF",
    ]
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n10.77.0.1 ctl\n" + "".join(f"{at} {node}\n" for node, at in addresses.items())
    )
    if by_cgroup:
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    return "\n".join(lines) + "\n"


def _network(cluster: SlurmCluster) -> None:
    """A bridge in the controller's namespace, a cable to each node's."""

    def ip(*words: str, space: str = "") -> None:
        inside = ["nsenter", f"--net=/run/netns/{cluster.tag}{space}"] if space else []
        subprocess.run([*inside, "ip", *words], check=True, capture_output=True)

    for place in ("ctl", *cluster.nodes):
        ip("netns", "add", f"{cluster.tag}{place}")
        ip("link", "set", "lo", "up", space=place)
    ip("link", "add", "br0", "type", "bridge", space="ctl")
    ip("addr", "add", "10.77.0.1/24", "dev", "br0", space="ctl")
    ip("link", "set", "br0", "up", space="ctl")
    for index, node in enumerate(cluster.nodes, start=11):
        cable = f"v{index}"
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", f"{cluster.tag}{node}", space="ctl")
        ip("link", "set", cable, "master", "br0", "up", space="ctl")
        ip("addr", "add", f"10.77.0.{index}/24", "dev", "eth0", space=node)
        ip("link", "set", "eth0", "up", space=node)


def _daemons(cluster: SlurmCluster) -> None:
    munge = cluster.folder / "munge"
    munge.mkdir()
    key = munge / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for path in (munge, key):
        shutil.chown(path, "munge", "munge")
    options = {"key-file": key, "socket": munge / "sock", "pid-file": munge / "pid", "log-file": munge / "log"}
    options["seed-file"] = munge / "seed"
    words = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run(["runuser", "-u", "munge", "--", "munged", *words], check=True, capture_output=True)
    cluster.pids["munged"] = int((munge / "pid").read_text())
    (cluster.folder / "state").mkdir()
    script = f"hostname ctl; mount --bind {cluster.folder}/hosts /etc/hosts; exec slurmctld -D -c"
    with (cluster.folder / "controller.log").open("ab") as log:
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{cluster.tag}ctl", "unshare", "--uts", "--mount", "bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=cluster.environment,
            start_new_session=True,
        )
    cluster.pids["slurmctld"] = process.pid
    for node in cluster.nodes:
        cluster.start_node(node)


def _down(cluster: SlurmCluster) -> None:
    for node in cluster.nodes:
        cluster.kill_node(node)
    for name in ("slurmctld", "munged"):
        pid = cluster.pids.get(name)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            if name == "slurmctld":
                os.waitpid(pid, 0)
    for place in ("ctl", *cluster.nodes):
        subprocess.run(["ip", "netns", "del", f"{cluster.tag}{place}"], check=False, capture_output=True)
    for group in Path("/sys/fs/cgroup").glob(f"*/slurm_{cluster.tag}*"):
        for inner in sorted((p for p in group.rglob("*") if p.is_dir()), reverse=True):
            _remove(inner)
        _remove(group)
    shutil.rmtree(cluster.folder, ignore_errors=True)


def _remove(group: Path) -> None:
    try:
        group.rmdir()
    except OSError as error:
        print(f"{group} stays: {error}")


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two nodes of eight cores; skipped without root or the packages."""
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if os.geteuid() or missing:
        pytest.skip(f"needs root and Debian's slurmctld, slurmd, slurm-client, munge (missing: {missing})")
    tag = f"dsm{os.getpid() % 100_000}"
    folder = Path(tempfile.mkdtemp(prefix="diffussm-slurm-", dir="/var/tmp"))  # munge must get in
    folder.chmod(0o755)
    places = [tmp_path_factory.getbasetemp().resolve(), ROOT, Path(sys.prefix)]
    shared = [place for place in places if place.is_relative_to("/tmp")]  # noqa: S108
    cluster = SlurmCluster(folder, [f"{tag}n1", f"{tag}n2"], tag, shared)
    (folder / "slurm.conf").write_text(conf(cluster))
    try:
        _network(cluster)
        _daemons(cluster)
        cluster.wait(lambda: cluster.idle(2), "two idle nodes", READY_S)
        yield cluster
    finally:
        _down(cluster)
