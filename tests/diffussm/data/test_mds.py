"""The door to streaming imports nothing that a worker does not need, and takes nothing from others."""

from __future__ import annotations

import subprocess
import sys


def said_by(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_a_worker_imports_neither_transformers_nor_torchvision() -> None:
    unwanted = "{'transformers', 'torchvision', 'diffusers'}"
    assert not said_by(f"import sys, diffussm.train.loop\nprint(*{unwanted} & sys.modules.keys())").split()


def test_later_imports_get_the_real_modules() -> None:
    code = (
        "import diffussm.data.mds\n"
        "import transformers, streaming.text, streaming.vision\n"
        "from transformers.tokenization_utils_base import BatchEncoding\n"
        "print(transformers.__file__, streaming.text.StreamingC4, BatchEncoding().data)"
    )
    assert "transformers/__init__.py" in said_by(code)
