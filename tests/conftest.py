"""What all tests share: one thread for each process, no network sinks, ranks on demand."""

from __future__ import annotations

import os
import secrets

# Before torch is imported anywhere: several test processes with several threads each slow each other down manyfold.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["DS_ACCELERATOR"] = "cpu"
# Ray reads its way of authentication once, when it is first imported, by whichever test that is.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

pytest_plugins = ["tests.browser", "tests.distributed", "tests.s3", "tests.slurm"]
