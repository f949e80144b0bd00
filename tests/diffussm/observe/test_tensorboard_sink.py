from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from diffussm.checkpoint.store import open_store
from diffussm.errors import StorageError
from diffussm.observe import tensorboard_sink
from diffussm.observe.mirror import Mirror
from diffussm.observe.tensorboard_sink import TensorBoard


def events(folder: Path) -> list[Any]:
    """What TensorBoard would read: TFRecords (length, checksum, event, checksum) of all files in order."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def test_curves_pictures_and_faults_have_images_as_their_step(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), "red").save(buffer, "PNG")
    service = TensorBoard(Mirror(open_store(str(tmp_path)), "tensorboard", tmp_path))
    service.take({"kind": "progress", "images": 8, "loss": 1.5, "grad_norm": None})
    service.take({"kind": "telemetry", "images": 8, "grad_norm": {"head": 0.5}})
    service.take({"kind": "picture", "images": 8, "name": "samples", "png": buffer.getvalue()})
    service.take({"kind": "event", "event": "hang", "images": 8, "reason": "rank 3"})
    service.take({"kind": "event", "event": "resumed", "images": 4})
    service.take({"kind": "progress", "images": 12, "loss": 1.25})
    service.close()
    found = events(tmp_path / "tensorboard")
    scalars = {
        (value.tag, event.step): value.simple_value
        for event in found
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    }
    assert scalars == {("loss", 8): 1.5, ("grad_norm_of/head", 8): 0.5, ("loss", 12): 1.25}
    pictures = [v.image for e in found for v in e.summary.value if v.WhichOneof("value") == "image"]
    assert [(picture.height, picture.width) for picture in pictures] == [(4, 8)]
    assert any("hang" in value.tag for event in found for value in event.summary.value)
    assert [event.step for event in found if event.session_log.status] == [5]  # replayed steps are hidden


def test_an_outage_of_the_bucket_refuses_no_record_and_is_met_at_its_pace(tmp_path: Path, monkeypatch: Any) -> None:
    pushes: list[float] = []

    class Away(Mirror):
        def push(self) -> None:
            pushes.append(now[0])
            raise StorageError("store away")

    now = [0.0]
    monkeypatch.setattr(tensorboard_sink.time, "monotonic", lambda: now[0])
    service = TensorBoard(Away(open_store(str(tmp_path)), "tensorboard", tmp_path))
    for second in range(0, 200, 10):
        now[0] = float(second)
        service.take({"kind": "progress", "images": second, "loss": 1.5})  # raises nothing
    assert pushes == [70.0, 140.0]
    service.close()
    assert len(events(tmp_path / "tensorboard")) > 20
