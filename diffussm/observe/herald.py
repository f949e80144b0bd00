"""The driver's voice: what ranks, overseer and stages tell goes to a person, to journals and to services of curves."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffussm.checkpoint.store import Store
from diffussm.config.schema import Config
from diffussm.naming import RunPaths
from diffussm.observe.events import DRIVER, Journal, Lines, count_lines, read_journal
from diffussm.observe.log import Narrator
from diffussm.observe.mirror import Mirror
from diffussm.observe.sinks import Sink
from diffussm.observe.tensorboard_sink import TensorBoard
from diffussm.observe.wandb_sink import Wandb, abandon, step_after, wandb_mode

LOG = "log.txt"
"""What a person was told, in plain lines with their dates, of all starts."""
KEEPING = 0.3
"""Part of the time to close that is kept from the services, for the files that they leave and for the journals."""
JOURNALS = ("metrics.jsonl", "telemetry.jsonl", "evaluations.jsonl", DRIVER)
"""Those with at least a line for each W&B step."""


class Herald:
    """Hears records of one start of a run and passes them on. Any thread may call it; nothing in it waits.

    Args:
        cfg: a checked config.
        store: of the run.
        narrator: who tells a person.
        about: what W&B is to know beside the curves: config, code, data set.
        wandb_name: of the W&B run, if it is not the run's own.
    """

    def __init__(
        self, cfg: Config, store: Store, narrator: Narrator, about: Mapping[str, Any], wandb_name: str = ""
    ) -> None:  # fmt: skip
        self._narrator = narrator
        self._lock = threading.Lock()
        self._attempt = 0
        self._scratch = tempfile.TemporaryDirectory(prefix="diffussm-sinks-", ignore_cleanup_errors=True)
        scratch = Path(self._scratch.name)
        self._sinks: list[Sink] = []
        self._mirror = Mirror(store, "wandb", scratch)
        mode = wandb_mode(cfg.observe.wandb)
        if mode != "disabled":
            starts = sum(key.endswith("/start.json") for key in store.keys("attempts/"))
            step = step_after(sum(count_lines(store, key) for key in JOURNALS), starts)
            root = RunPaths(cfg.storage, cfg.name).root
            name, project = wandb_name or cfg.name, cfg.observe.project
            make = partial(Wandb, name, project, root, mode, about, self._mirror, step)
            self._sinks.append(Sink("W&B", make, narrator.say, abandon))
        if cfg.observe.tensorboard:
            make_board = partial(TensorBoard, Mirror(store, "tensorboard", scratch))
            self._sinks.append(Sink("TensorBoard", make_board, narrator.say))
        narrator.recall(read_journal(store, DRIVER))
        self._journal = Journal(store, DRIVER)
        self._log = Lines(store, LOG)
        narrator.log = self._log.append

    def hear(self, record: dict[str, Any]) -> None:
        """Pass on a record of kind `progress`, `telemetry`, `event`, `evaluation` or `picture`. Returns at once."""
        with self._lock:
            self._attempt = max(self._attempt, record.get("attempt", 0))
            if not record.get("stored"):
                self._keep(record)
            for sink in self._sinks:
                sink.write(record)
            self._narrator.hear(record)

    def wait_until_open(self, timeout_s: float = 120.0) -> None:
        """Wait until the services are connected or have failed to be. Nothing needs this but a measurement."""
        for sink in self._sinks:
            sink.open.wait(timeout_s)

    def close(self, timeout_s: float = 30.0) -> None:
        """Finish journals and services, all of them within `timeout_s`; what does not answer is left alone then."""
        end = time.monotonic() + timeout_s

        def left(part: float = 0.0) -> float:
            """Seconds until the end, or until `part` of the whole before it."""
            return max(0.0, end - part * timeout_s - time.monotonic())

        for sink in self._sinks:  # all at once: none may use up the time of the others
            sink.end()
        self._journal.end()
        for sink in self._sinks:
            sink.close(left(KEEPING))
        pushing = threading.Thread(target=self._mirror.try_push, name="last push", daemon=True)
        pushing.start()  # also what a service that was left alone had written
        pushing.join(left(KEEPING / 2))
        if pushing.is_alive():
            self._narrator.say("W&B's last files did not reach the bucket in time")
        self._narrator.log = None
        self._log.end()
        self._journal.close(left())
        self._log.close(left())
        self._scratch.cleanup()

    def _keep(self, record: dict[str, Any]) -> None:
        """Into driver.jsonl, unless rank 0 or an evaluation writes it itself; pictures have files of their own."""
        if record["kind"] in ("event", "picture"):
            kept = {key: value for key, value in record.items() if key not in ("kind", "png")}
            self._journal.write({"event": record["kind"], "attempt": self._attempt} | kept)
