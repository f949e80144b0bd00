"""Real pods on this machine without Kubernetes: podman runs a Pod's manifest, this file does what a kubelet would.

Each pod has a network namespace with an address of its own on one bridge, and a root file system that may not be
written. There is no image to be had without a network: an empty one is made here, and the userland, Python and this
checkout are mounted into it, read-only. An eviction is what a kubelet does: run preStop, then SIGTERM, and SIGKILL when
the grace is over. Needs root and Debian's podman, runc and catatonit.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

NEEDED = ("podman", "runc", "catatonit", "ip", "nsenter")
IMAGE = "localhost/diffussm:test"
ROOT = Path(__file__).parents[1]
USER = 1000
MEMORY = Path("/dev/shm")  # noqa: S108
READ_ONLY = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl")
# Without the right to raise limits runc may not set podman's either.
RUNTIME = """#!/usr/bin/python3 -IS
import json, os, sys
given = sys.argv[1:]
for option, key in (("--bundle", "process"), ("--process", None)):
    if option in given:
        path = given[given.index(option) + 1] + ("/config.json" if key else "")
        with open(path) as file:
            whole = json.load(file)
        (whole[key] if key else whole)["rlimits"] = []
        with open(path, "w") as file:
            json.dump(whole, file)
os.execvp("runc", ["runc", *given])
"""


@dataclass
class Pods:
    """A machine for pods."""

    folder: Path
    tag: str
    addresses: dict[str, str] = field(default_factory=dict)
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    volumes: list[str] = field(default_factory=list)

    def podman(self, *words: str, pod: str = "", check: bool = True, given: str = "", seconds: float = 120) -> str:
        """Run podman, in a pod's network if one is named; what it said."""
        place = [f"--{name}={self.folder / name}" for name in ("root", "runroot", "tmpdir")]
        options = ["--storage-driver=vfs", "--cgroup-manager=cgroupfs", f"--runtime={self.folder / 'runtime'}"]
        enter = ["nsenter", f"--net=/run/netns/{self.tag}{pod}"] if pod else []
        done = subprocess.run(
            [*enter, "podman", *place, *options, *words],
            input=given, capture_output=True, text=True, check=False, timeout=seconds,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"podman {shlex.join(words)}: {done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def connect(self, pod: str) -> str:
        """Give a pod its address before it starts."""
        index = len(self.addresses) + 2
        space, cable = f"{self.tag}{pod}", f"v{index}"
        self.addresses[pod] = f"10.78.0.{index}"
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", self.tag, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", self.tag, "link", "set", cable, "master", "bridge", "up")
        _ip("-n", space, "addr", "add", f"{self.addresses[pod]}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "route", "add", "default", "dev", "eth0")
        return self.addresses[pod]

    def secret(self, name: str, values: Mapping[str, str]) -> None:
        """A Secret."""
        import base64

        body = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
        self.podman("secret", "create", name, "-", given=json.dumps(body))

    def claim(self, name: str, folder: Path) -> None:
        """A persistent volume claim that is bound to a folder of this machine."""
        options = ["--opt=type=none", "--opt=o=bind", f"--opt=device={folder}"]
        self.podman("volume", "create", *options, name)

    def start(self, pod: dict[str, Any], *config_maps: dict[str, Any]) -> str:
        """Start a pod that has an address; returns its container's name."""
        name: str = pod["metadata"]["name"]
        made = json.loads(json.dumps(pod))
        (container,) = made["spec"]["containers"]
        container["image"] = IMAGE
        container["resources"]["limits"].pop("cpu")  # a machine for tests has fewer; memory is kept
        container["resources"].pop("requests")
        container.pop("ports", None)  # each pod has an address of its own, nothing is mapped
        made["spec"].pop("serviceAccountName", None)  # there is no API that knows it
        self._mount(made, name)
        self.manifests[name] = made
        # As a kubelet does: a pod's name is its address. The host's name is there too, because podman keeps it here.
        hosts = self.folder / f"{name}.hosts"
        hosts.write_text(f"127.0.0.1 localhost\n{self.addresses[name]} {name} {socket.gethostname()}\n")
        hosts.chmod(0o644)
        made["spec"]["volumes"].append({"name": "hosts", "hostPath": {"path": str(hosts)}})
        container["volumeMounts"].append({"name": "hosts", "mountPath": "/etc/hosts", "readOnly": True})
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(made))
        maps = []
        for each in config_maps:
            file = self.folder / f"{each['metadata']['name']}.configmap.yaml"
            file.write_text(yaml.safe_dump(each))
            maps.append(f"--configmap={file}")
        self.podman("kube", "play", "--network=host", "--no-hosts", *maps, str(path), pod=name)
        return f"{name}-{container['name']}"

    def exec(self, name: str, *command: str, check: bool = True) -> str:
        """Run a command in a pod's container, as its user."""
        return self.podman("exec", self.container(name), *command, check=check, pod=name)

    def container(self, name: str) -> str:
        """Podman's name of a pod's container."""
        (container,) = self.manifests[name]["spec"]["containers"]
        return f"{name}-{container['name']}"

    def logs(self, name: str) -> str:
        """All that a pod's container said."""
        return self.podman("logs", self.container(name), check=False)

    def running(self, name: str) -> bool:
        """Whether a pod's container runs."""
        return "true" in self.podman("inspect", "--format={{.State.Running}}", self.container(name), check=False)

    def exit_code(self, name: str) -> int:
        """Of a pod's container that has ended; 137 after SIGKILL."""
        return int(self.podman("inspect", "--format={{.State.ExitCode}}", self.container(name)))

    def evict(self, name: str) -> float:
        """End a pod as a kubelet does: preStop, SIGTERM, and SIGKILL after the grace; the seconds it took."""
        spec = self.manifests[name]["spec"]
        began, grace_s = time.monotonic(), spec["terminationGracePeriodSeconds"]
        hook = spec["containers"][0].get("lifecycle", {}).get("preStop")
        if hook:
            command = hook["exec"]["command"]
            self.podman("exec", self.container(name), *command, check=False, pod=name, seconds=grace_s)
        left = max(2, round(grace_s - (time.monotonic() - began)))  # a kubelet gives at least 2 s after a hook
        self.podman("stop", f"--time={left}", self.container(name), seconds=grace_s + 60)
        return time.monotonic() - began

    def evict_all(self, names: Sequence[str]) -> None:
        """At the same time, as when their cluster is deleted."""
        threads = [threading.Thread(target=self.evict, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def remove(self, name: str) -> None:
        """Forget a pod; whatever runs of it is killed."""
        self.podman("pod", "rm", "--force", "--time=0", name, check=False)
        self.manifests.pop(name, None)
        shutil.rmtree(self._memory(name), ignore_errors=True)

    def _memory(self, name: str) -> Path:
        """A pod's /dev/shm: podman would put a memory volume on the disk."""
        return MEMORY / self.tag / name

    def _mount(self, made: dict[str, Any], name: str) -> None:
        spec = made["spec"]
        # Podman has one volume of a name for all pods; an emptyDir is one pod's.
        renamed = {each["name"]: f"{name}-{each['name']}" for each in spec["volumes"] if "emptyDir" in each}
        for each in [*spec["volumes"], *spec["containers"][0]["volumeMounts"]]:
            each["name"] = renamed.get(each["name"], each["name"])
        volumes = {each["name"]: each for each in spec["volumes"]}
        for volume, each in volumes.items():
            if each.get("emptyDir", {}).get("medium") == "Memory":
                memory = self._memory(name)
                memory.mkdir(parents=True)
                os.chown(memory, USER, USER)
                volumes[volume] = {"name": volume, "hostPath": {"path": str(memory)}}
        places = dict.fromkeys([*READ_ONLY, str(ROOT), sys.base_prefix, sys.prefix, str(Path(sys.prefix).resolve())])
        inside = [place for place in places if not any(_below(place, other) for other in places)]
        for index, place in enumerate(inside):
            source = str(Path(place).resolve())
            volumes[f"land-{index}"] = {"name": f"land-{index}", "hostPath": {"path": source}}
            spec["containers"][0]["volumeMounts"].append(
                {"name": f"land-{index}", "mountPath": place, "readOnly": True}
            )
        spec["volumes"] = list(volumes.values())


def wait(condition: Callable[[], Any], what: str, seconds: float, told: Callable[[], str] = lambda: "") -> Any:
    """Poll until `condition` is true; its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{told()}"
        time.sleep(0.2)
    return value


def _below(place: str, other: str) -> bool:
    return place != other and Path(place).is_relative_to(other) and not Path(place).is_symlink()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _image(pods: Pods) -> None:
    """Empty folders, and the variables that the image's Dockerfile and installation would leave."""
    tree = pods.folder / "empty"
    for inner in ("proc", "sys", "dev", "run", "var/tmp", "etc", "work", "root"):
        (tree / inner).mkdir(parents=True)
    (tree / "etc" / "passwd").write_text(f"root:x:0:0::/:/bin/sh\nray:x:{USER}:{USER}::/home/ray:/bin/bash\n")
    (tree / "etc" / "group").write_text(f"root:x:0:\nray:x:{USER}:\n")
    (tree / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    (tree / "etc" / "nsswitch.conf").write_text("hosts: files\n")
    tar = pods.folder / "empty.tar"
    subprocess.run(["tar", "--create", f"--file={tar}", f"--directory={tree}", "."], check=True)
    path = f"{Path(sys.prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    variables = {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    changes = [f"--change=ENV {name}={value}" for name, value in variables.items()]
    pods.podman("import", *changes, str(tar), IMAGE)


def _down(pods: Pods) -> None:
    for name in list(pods.manifests):
        pods.remove(name)
    pods.podman("pod", "rm", "--force", "--all", "--time=0", check=False)
    for name in ("", *pods.addresses):
        subprocess.run(["ip", "netns", "del", f"{pods.tag}{name}"], check=False, capture_output=True)
    shutil.rmtree(MEMORY / pods.tag, ignore_errors=True)
    shutil.rmtree(pods.folder)


@pytest.fixture
def pods() -> Iterator[Pods]:
    """A machine for pods; skipped without root or the packages."""
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if os.geteuid() or missing:
        pytest.skip(f"needs root and Debian's podman, runc, catatonit, iproute2 (missing: {missing})")
    machine = Pods(Path(tempfile.mkdtemp(prefix="diffussm-pods-")), f"dp{os.getpid() % 100_000}")
    runtime = machine.folder / "runtime"
    runtime.write_text(RUNTIME)
    runtime.chmod(0o755)
    try:
        _ip("netns", "add", machine.tag)
        _ip("-n", machine.tag, "link", "add", "bridge", "type", "bridge")
        _ip("-n", machine.tag, "link", "set", "bridge", "up")
        _image(machine)
        yield machine
    finally:
        _down(machine)
