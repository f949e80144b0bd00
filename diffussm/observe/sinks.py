"""The only door to Weights & Biases. A sink that is down or slow never stops a step."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any, Literal

from diffussm.config.schema import WandbMode
from diffussm.naming import wandb_id

_LOG = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]


def wandb_mode(asked: WandbMode) -> Mode:
    """`online`, `offline` or `disabled`: what was asked, or with `auto` what the user's environment says.

    The environment says online when WANDB_MODE is online, or when it is unset and WANDB_API_KEY is set.
    """
    said = os.environ.get("WANDB_MODE", "").lower() if asked is WandbMode.auto else asked.value
    match said:
        case "online" | "offline" | "disabled":
            return said
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


class WandbSink:
    """Curves over images, in one W&B run for each run name, however often it is started again.

    The connection is made on a thread, because it may take seconds and may fail; records that come before it stands
    are kept and sent then.
    """

    def __init__(self, name: str, project: str, mode: Mode, config: dict[str, Any], folder: Path) -> None:
        self._waiting: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._run: Any = None
        self._closed = mode == "disabled"
        self._thread = threading.Thread(
            target=self._connect, args=(name, project, mode, config, folder), name="wandb", daemon=True
        )
        if not self._closed:
            self._thread.start()

    def _connect(self, name: str, project: str, mode: Mode, config: dict[str, Any], folder: Path) -> None:
        try:
            import wandb

            folder.mkdir(parents=True, exist_ok=True)
            run = wandb.init(
                id=wandb_id(name),
                name=name,
                project=project,
                mode=mode,
                resume="allow",
                config=config,
                dir=str(folder),
                settings=wandb.Settings(silent=True, console="off", init_timeout=60),
            )
            run.define_metric("*", step_metric="images")
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, training goes on without it
            _LOG.warning("W&B is not available and is left out of this attempt: %s", error)
            self._closed = True
            return
        with self._lock:
            self._run = run
            for record in self._waiting:
                run.log(record)
            self._waiting.clear()

    def write(self, record: dict[str, Any]) -> None:
        """Log one record with `images` as its x-axis. Returns at once."""
        if self._closed:
            return
        with self._lock:
            if self._run is None:
                self._waiting.append(record)
            else:
                self._run.log(record)

    def close(self, timeout_s: float = 15.0) -> None:
        """Finish the W&B run, waiting at most `timeout_s` for it."""
        if self._closed:
            return
        self._thread.join(timeout_s)
        if self._run is not None:
            finisher = threading.Thread(target=self._run.finish, name="wandb finish", daemon=True)
            finisher.start()
            finisher.join(timeout_s)
            if finisher.is_alive():
                _LOG.warning("W&B did not finish within %.0f s; `wandb sync` can send the rest later", timeout_s)
