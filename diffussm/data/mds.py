"""The door to mosaicml-streaming: the names of it that we use.

Its package imports transformers and torchvision for data sets of text and pictures, which takes longer than all other
imports of a worker together, and a worker is started again after each fault. We read neither, so stand-ins take their
place while streaming is imported; whoever imports those modules afterwards gets the real ones.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType

_STAND_INS: dict[str, tuple[str, ...]] = {
    "streaming.multimodal": (),
    "streaming.text": (),
    "streaming.vision": (),
    "transformers": (),
    "transformers.feature_extraction_utils": ("BatchFeature",),
    "transformers.tokenization_utils_base": ("BatchEncoding",),
}
"""Module -> classes that streaming 0.13 takes from it when it is imported, and that its data sets do not need."""


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Stand-ins while streaming is imported; none if it, or transformers, is there already."""
    if {"transformers", "streaming"} & sys.modules.keys():
        yield
        return
    for name, classes in _STAND_INS.items():
        module = ModuleType(name)
        module.__path__ = []
        for each in classes:
            setattr(module, each, type(each, (), {}))
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in _STAND_INS:
            del sys.modules[name]


with _alone():
    import streaming.base.dataset as dataset_module
    import streaming.base.shared.prefix as prefix_module
    from streaming import MDSWriter, Stream, StreamingDataset
    from streaming.base.batching import generate_work
    from streaming.base.format import reader_from_json
    from streaming.base.format.mds.reader import MDSReader
    from streaming.base.hashing import get_hash
    from streaming.base.storage import CloudDownloader

__all__ = [
    "CloudDownloader",
    "MDSReader",
    "MDSWriter",
    "Stream",
    "StreamingDataset",
    "dataset_module",
    "generate_work",
    "get_hash",
    "prefix_module",
    "reader_from_json",
]
