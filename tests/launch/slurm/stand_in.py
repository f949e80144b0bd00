"""A stand-in for Python on the nodes: it plays Ray and the driver so that Slurm's part is tested alone, in seconds.

A fake, and only of what runs inside the job: Slurm's daemons and the batch script are real. Called as the script calls
Python (`-P -m MODULE ...`). The driver writes down each start in `starts.jsonl` of the run's storage and then does what
the line of `acts` for that start says: `exit N`, or `wait`, which saves on SIGUSR1 or SIGTERM and leaves with 75.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path


def ray(arguments: list[str]) -> None:
    given = dict(each.removeprefix("--").split("=", 1) for each in arguments if "=" in each)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if "--head" in arguments:
        server = socket.create_server((given["node-ip-address"], int(given["port"])))
        while True:
            server.accept()[0].close()
    signal.pause()


def driver(arguments: list[str]) -> int:
    import yaml

    config = yaml.safe_load(Path(arguments[0]).read_text())
    config = config.pop("base") | config  # the recipe that it began from, then what differs
    storage = Path(config["storage"])
    started = storage / "starts.jsonl"
    number = len(started.read_text().splitlines()) if started.exists() else 0
    # Before the start is written down: who reads of it may send the signal at once.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
    watched = {name: os.environ.get(name) for name in ("ODD", "SLURM_RESTART_COUNT", "SLURM_JOB_ID")}
    record = {"config": config, "overrides": arguments[1:], "token": os.environ["RAY_AUTH_TOKEN"]} | watched
    with started.open("a") as file:
        file.write(json.dumps(record) + "\n")
    act = (storage / "acts").read_text().splitlines()[number].split()
    if act[0] == "exit":
        return int(act[1])
    got = signal.sigwait([signal.SIGUSR1, signal.SIGTERM])
    (storage / f"saved-{number}").write_text(signal.Signals(got).name)
    return 75


if __name__ == "__main__":
    if sys.argv[1:3] == ["-P", "-c"]:  # whether this Python has what is needed
        sys.exit(0)
    assert sys.argv[1:3] == ["-P", "-m"], sys.argv
    module, rest = sys.argv[3], sys.argv[4:]
    if module == "ray.scripts.scripts":
        ray(rest)
    sys.exit(driver(rest) if module == "cluster.driver" else 0)
