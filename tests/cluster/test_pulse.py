"""A rank's heart with a hub beside it and no Ray: it goes on beating whatever fails beside it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.hub import Hub
from cluster.pulse import Pulse
from cluster.standby import Standby
from diffussm.config.schema import ClusterConfig
from diffussm.train.control import Control, Level, Wish
from tests.near import Near, without_ray


def test_a_heart_beats_though_the_notice_file_cannot_be_looked_for_and_no_thread_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without_ray(monkeypatch)
    looks, often = 0, threading.Event()

    def look(self: Any, *args: Any) -> None:
        nonlocal looks
        looks += 1
        if looks > 6:
            often.set()
        raise OSError(errno.ESTALE, "stale")

    monkeypatch.setattr("cluster.notice.Notice.look", look)
    monkeypatch.setattr("cluster.standby.Standby.look", look)
    hub, control = Hub(), Control()
    hub.begin(1)
    pulse = Pulse(
        Near(hub), 0, control, ClusterConfig(heartbeat_interval_s=0.01), tmp_path / "stacks", Standby(wanted=True)
    )
    pulse.start()
    try:
        assert often.wait(20)
        wish = Wish(Level.LEAVE, 2e9, "SIGTERM to the driver")
        assert hub.wish(wish, 0)
        control.phases.completed(8)
    finally:
        pulse.stop()
    place = hub.group().places[0]
    assert (place.pid, place.process.lives) == (os.getpid(), True)
    assert hub.group().beats[0].images == 8
    assert control.wish == wish
    warned = [record.getMessage() for record in caplog.records]
    assert sorted(message.split(":")[0] for message in warned) == [
        "rank 0 cannot keep standby processes", "rank 0 cannot look for the notice file",
    ]  # fmt: skip
