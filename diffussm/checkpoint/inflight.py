"""One save under way on a thread, and what follows a good one: superfluous checkpoints go."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from diffussm.checkpoint import retain
from diffussm.checkpoint.manifest import Manifest
from diffussm.checkpoint.save import Order, publish
from diffussm.checkpoint.snapshot import Snapshot
from diffussm.checkpoint.source import Cancelled, within
from diffussm.checkpoint.tier import Tier
from diffussm.errors import DiffuSSMError

Tell = Callable[..., None]
"""Called as (what, **details) on rank 0's thread with what happens."""


class InFlight:
    """Publishes an order on a thread. Every rank must start one for the same order.

    Attributes:
        seconds: from the beginning of the snapshot to the manifest; None until then.
        error: why it failed, once it has.
    """

    def __init__(self, order: Order, snapshot: Snapshot, tier: Tier, stall_s: float, tell: Tell) -> None:
        self.order, self.tier = order, tier
        self.error: Exception | None = None
        self.seconds: float | None = None
        self._snapshot, self._stall_s, self._tell = snapshot, stall_s, tell
        self._began = time.monotonic() - stall_s
        self._thread = threading.Thread(target=self._run, name="save", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def wait(self, seconds: float | None) -> None:
        """Wait for the end, or for so many seconds."""
        self._thread.join(seconds)

    def cancel(self) -> None:
        """Let this rank's upload fail now, and with it the save on all ranks, even while the store hangs.

        A save that is through stays; its reading back and the deletions after it are left out or left.
        """
        self.order.source.cancel()

    def _run(self) -> None:
        leads = dist.get_rank() == 0
        images, folder = self.order.draft.counters.images, self.order.folder
        try:
            manifest, verified = publish(self.order, self._snapshot, self._stamp)
        except Exception as error:  # noqa: BLE001 - the thread's edge: the step that collects it decides
            self.error = error
            if leads:
                said = error.message if isinstance(error, DiffuSSMError) else f"{type(error).__name__}: {error}"
                self._tell("save failed", images=images, checkpoint=folder, tier=self.tier.name, reason=said)
            return
        if leads:
            self._tell(
                "saved", images=images, checkpoint=folder, tier=self.tier.name, permanent=manifest.permanent,
                bytes=sum(file.size for file in manifest.files), stall_ms=round(1000 * self._stall_s, 2),
                seconds=round(self.seconds or 0.0, 3),
            )  # fmt: skip
            if verified:
                with contextlib.suppress(Cancelled):  # what it does not come to goes after the next save
                    within(math.inf, self._tidy, self.order.source, folder)

    def _stamp(self, manifest: Manifest) -> None:
        self.seconds = time.monotonic() - self._began

    def _tidy(self) -> None:
        """Delete what the new, verified checkpoint makes superfluous. What fails is tried again after the next save,
        so it stays if this was the last one.
        """
        saved = self.order.folder
        try:
            self.order.fence.check()
            retain.tidy(self.order.store, saved, self.order.draft.attempt, self.tier.keep)
        except DiffuSSMError as error:
            self._tell("delete failed", checkpoint=saved, reason=error.message)
