"""`python -m tests.startup`: seconds from a command to its help, five rounds over all commands, as a Markdown table."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

from launch import cli

ROUNDS = 5
CODE = "import sys; from launch import cli; sys.argv[0] = 'diffussm'; cli.main()"


def spent() -> float:
    """CPU seconds of all children so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def told(seconds: list[float]) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    """Measure and print."""
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]
    cpu: dict[str, list[float]] = {name: [] for name in ("", *names)}
    wall: dict[str, list[float]] = {name: [] for name in cpu}
    for _ in range(ROUNDS):
        for name in cpu:
            before, began = spent(), time.perf_counter()
            arguments = [*([name] if name else []), "--help"]
            subprocess.run([sys.executable, "-c", CODE, *arguments], stdout=subprocess.DEVNULL, check=True)
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(spent() - before)
    print("| command | CPU seconds, median (lowest to highest) | seconds |\n|---|---|---|")
    for name in cpu:
        print(f"| `{' '.join(filter(None, ('diffussm', name, '--help')))}` | {told(cpu[name])} | {told(wall[name])} |")


if __name__ == "__main__":
    main()
