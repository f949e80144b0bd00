"""A Ray cluster whose nodes have network namespaces, addresses and links of their own, on this machine. Needs root."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from cluster.processes import kill_tree

ROOT = Path(__file__).parents[2]
NEEDED = ("ip", "nsenter", "unshare")
PORT = 6379


class Spaces:
    """A head without room for workers and one node of one CPU for each worker, joined by a bridge in a namespace."""

    def __init__(self, folder: Path, workers: int, *, hosts: bool = False) -> None:
        """With `hosts` each node's processes see a host name of their own too."""
        self._hosts = hosts
        self._tag, self._folder = f"dc{os.getpid()}", folder
        self._names = ["head", *(f"n{i}" for i in range(workers))]
        self._started: list[subprocess.Popen[bytes]] = []
        self.address = f"{self._address(0)}:{PORT}"
        self.enter = ("nsenter", f"--net=/run/netns/{self._tag}head")

    def __enter__(self) -> Spaces:
        try:
            self._wire()
            common = ["--block", "--object-store-memory", str(80 << 20), "--disable-usage-stats"]
            head = ["--head", "--port", str(PORT), "--num-cpus", "0", "--include-dashboard", "false"]
            for index, name in enumerate(self._names):
                kind = ["--address", self.address, "--num-cpus", "1"] if index else head
                self._start(name, [*kind, "--node-ip-address", self._address(index), *common])
                if not index:
                    self._wait_for_head()
                self._wait_for_nodes(index + 1)  # one by one: on one host they race for names of sockets
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            kill_tree(process.pid)
            process.wait()
        for name in ("sw", *self._names):
            subprocess.run(["ip", "netns", "del", f"{self._tag}{name}"], check=False, capture_output=True)

    def lose_head(self) -> None:
        """SIGKILL to the head: Ray's control service and all that runs on that node, but not the driver."""
        kill_tree(self._started[0].pid)

    def _wire(self) -> None:
        """A bridge in a namespace of its own, and a cable from it to each node."""
        for name in ("sw", *self._names):
            _ip("netns", "add", f"{self._tag}{name}")
            self._ip_in(name, "link", "set", "lo", "up")
        self._ip_in("sw", "link", "add", "bridge", "type", "bridge")
        self._ip_in("sw", "link", "set", "bridge", "up")
        for index, name in enumerate(self._names):
            peer = f"{self._tag}{name}"
            self._ip_in("sw", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", peer)
            self._ip_in("sw", "link", "set", name, "master", "bridge", "up")
            self._ip_in(name, "addr", "add", f"{self._address(index)}/24", "dev", "eth0")
            self._ip_in(name, "link", "set", "eth0", "up")
            self._ip_in(name, "route", "add", "default", "dev", "eth0")

    def _start(self, name: str, arguments: list[str]) -> None:
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name] if self._hosts else []
        command = [
            "nsenter",
            f"--net=/run/netns/{self._tag}{name}",
            *named,
            str(Path(sys.executable).with_name("ray")),
            "start",
        ]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "8",
        }
        with (self._folder / f"ray-{name}.log").open("w") as log:
            process = subprocess.Popen(
                [*command, *arguments], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._started.append(process)

    def _wait_for_head(self) -> None:
        probe = f"import socket; socket.create_connection(('{self._address(0)}', {PORT}), 1)"
        deadline = time.monotonic() + 60
        while subprocess.run([*self.enter, sys.executable, "-c", probe], capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, (self._folder / "ray-head.log").read_text()
            assert self._started[0].poll() is None, (self._folder / "ray-head.log").read_text()
            time.sleep(0.2)

    def _wait_for_nodes(self, count: int) -> None:
        """Until so many nodes have joined."""
        probe = f"""
import sys, time, ray
ray.init(address="{self.address}", log_to_driver=False, logging_level=40)
deadline = time.monotonic() + 120
while sum(node["Alive"] for node in ray.nodes()) != {count}:
    if time.monotonic() > deadline:
        sys.exit(str(ray.nodes()))
    time.sleep(0.2)
"""
        done = subprocess.run(
            [*self.enter, sys.executable, "-c", probe], capture_output=True, text=True, check=False, timeout=240
        )
        logs = "".join(file.read_text()[-2000:] for file in self._folder.glob("ray-*.log"))
        assert done.returncode == 0, f"{done.stderr}\n{logs}"

    def _ip_in(self, name: str, *words: str) -> None:
        _ip("-n", f"{self._tag}{name}", *words)

    @staticmethod
    def _address(index: int) -> str:
        return f"10.79.0.{index + 1}"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
