"""What checkpoints and snapshots a run has, whether they verify, and weights taken out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from diffussm.checkpoint import restore, weights
from diffussm.checkpoint.manifest import Manifest
from diffussm.checkpoint.posthoc import FOLDER as SNAPSHOTS
from diffussm.checkpoint.slices import Slices
from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.errors import DataError
from diffussm.naming import weights_kind

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Entry:
    """One checkpoint or snapshot, readable or not."""

    folder: str
    manifest: Manifest | None
    wrong: tuple[str, ...] = field(default=())
    """Why it cannot be used; empty if nothing is known against it."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.manifest.files) if self.manifest else 0


def open_run(place: str) -> Store:
    """The store of a run's folder or s3:// prefix.

    Raises:
        DataError: no run lies there.
        StorageError: it cannot be reached.
    """
    store = open_store(place)
    try:
        store.size("config.yaml")
    except NotFound as error:
        if next(store.keys(f"{CHECKPOINTS}/"), None) is None:
            raise DataError(
                f"{place}: no run lies there (neither config.yaml nor {CHECKPOINTS}/)",
                "name a run's own folder, <storage>/<name>",
            ) from error
    return store


def entries(store: Store, *, verify: bool = False) -> list[Entry]:
    """All checkpoints and then all snapshots of a run, oldest first. Local.

    Args:
        store: the run's store.
        verify: read every byte and hold it against the manifest.
    """
    found = []
    for prefix in (CHECKPOINTS, SNAPSHOTS):
        for folder, manifest in reversed(list(restore.manifests(store, prefix))):
            if not isinstance(manifest, Manifest):
                found.append(Entry(folder, None, (manifest.message,)))
                continue
            wrong = restore.verify(store, folder, manifest) if verify else []
            found.append(Entry(folder, manifest, tuple(wrong)))
    return found


def select(store: Store, images: int | None) -> tuple[str, Manifest]:
    """The checkpoint after exactly `images` images, or the newest whose manifest can be read. Local.

    Raises:
        DataError: there is none; the message lists those there are.
    """
    listed = list(restore.manifests(store, CHECKPOINTS))
    for folder, manifest in listed:
        if isinstance(manifest, Manifest) and images in (None, manifest.counters.images):
            return folder, manifest
        if isinstance(manifest, DataError) and images is not None and folder == f"{CHECKPOINTS}/{images:012d}":
            raise manifest
    have = ", ".join(f"{m.counters.images:,}" for _, m in reversed(listed) if isinstance(m, Manifest)) or "none"
    wanted = "" if images is None else f" after {images:,} images"
    raise DataError(f"{store.url}: has no checkpoint{wanted}; it has: {have}", "choose one of those")


def export(
    store: Store, kind: str, images: int | None, target: str, progress: Callable[[int, int], None] | None = None
) -> tuple[str, str, int]:  # fmt: skip
    """Write one kind of a checkpoint as one safetensors file of whole parameters. Local.

    The checkpoint is verified first. Memory depends on weights.BLOCK, not on the model.

    Args:
        store: the run's store.
        kind: `master`, `exp_avg`, ... as in the manifest, or an average as in `sample.ema`: plain, power-0.050, none.
        images: which checkpoint; None takes the newest that verifies.
        target: a file or an s3:// object.
        progress: told (parameters done, in all).

    Returns: folder of the checkpoint, kind, bytes written.

    Raises:
        DataError: no such checkpoint or kind, or it does not verify.
        StorageError: a file cannot be read or the target not written.
    """
    folder, manifest = restore.choose(store, images)
    if kind not in manifest.kinds:
        kind = weights_kind(kind) if weights_kind(kind) in manifest.kinds else kind
    if kind not in manifest.kinds:
        raise DataError(f"{folder}: holds {', '.join(manifest.kinds)}, not {kind!r}", "choose one of those")
    slices = Slices(store, folder, manifest)
    names = list(manifest.shapes)

    def produce(name: str, start: int, numel: int) -> Tensor:
        if progress is not None and start == 0:
            progress(names.index(name), len(names))
        return slices.read(kind, name, start, numel)

    size = weights.write(
        target, manifest.shapes, produce, manifest.counters.images, {"run": store.url, "kind": kind}
    )  # fmt: skip
    return folder, kind, size
