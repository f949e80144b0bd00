"""The same network under plain Ray Train with DeepSpeed's own checkpoints: what a killed rank costs without our part.

`python -m cluster.chaos.plain CONFIG FOLDER [key=value ...]` trains; every start goes on from the last checkpoint in
FOLDER. Samples are random and stay in memory: no reader, no averages, no policy of ours, all of Ray's settings as they
come. Steps are logged to FOLDER/metrics.jsonl, processes of the ranks to FOLDER/ranks-ATTEMPT.json, as a run does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffussm.config import check, load
from diffussm.config.schema import Config


def loop(job: dict[str, Any]) -> None:
    """Train on this rank. Collective: Ray starts it on every rank."""
    import torch
    import torch.distributed as dist

    from diffussm.diffusion.process import Process
    from diffussm.model import build_model
    from diffussm.train.engine import Engine
    from diffussm.train.step import Inputs, loss
    from diffussm.train.world import current

    cfg: Config = job["cfg"]
    folder, world = Path(job["folder"]), current(torch.device("cpu"))
    torch.set_num_threads(cfg.cluster.threads_per_worker)
    latent = job["latent"]
    count = cfg.train.global_batch // world.size
    engine = Engine(build_model(cfg.model, latent), cfg.train, 1, world)
    path, state = engine.engine.load_checkpoint(str(folder / "checkpoints"))
    done = state["images"] if path else 0
    attempt = len(list(folder.glob("ranks-*.json"))) + 1
    pids: list[Any] = [None] * world.size
    dist.all_gather_object(pids, os.getpid())
    process = Process(cfg.diffusion)
    while done < cfg.train.images:
        draw = torch.Generator().manual_seed(done * world.size + world.rank)
        shape = (count, latent.channels, latent.height, latent.width)
        inputs = Inputs(
            torch.randn(shape, generator=draw), torch.randint(0, 1000, (count,), generator=draw),
            torch.randn(shape, generator=draw), torch.zeros(count, dtype=torch.int64), torch.arange(count),
        )  # fmt: skip
        engine.step([partial(loss, process=process, inputs=inputs)], cfg.train.lr)
        done += cfg.train.global_batch
        if world.leads:
            if not (folder / f"ranks-{attempt}.json").exists():
                (folder / f"ranks-{attempt}.json").write_text(
                    json.dumps({rank: {"pid": pid} for rank, pid in enumerate(pids)})
                )
            with (folder / "metrics.jsonl").open("a") as log:
                log.write(json.dumps({"images": done, "attempt": attempt, "time": time.time()}) + "\n")
        if done % cfg.checkpoint.every_images == 0:
            engine.engine.save_checkpoint(str(folder / "checkpoints"), client_state={"images": done})


def main(arguments: Sequence[str] | None = None) -> int:
    """Train until the last image; returns the exit code."""
    config, folder, *overrides = sys.argv[1:] if arguments is None else arguments
    cfg = load(config, overrides)
    check(cfg)
    os.environ |= {"RAY_TRAIN_V2_ENABLED": "1", "OMP_NUM_THREADS": str(cfg.cluster.threads_per_worker)}
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from diffussm.data.place import passport

    Path(folder).mkdir(parents=True, exist_ok=True)
    workers = cfg.cluster.workers
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, workers + 1), log_to_driver=False)
    TorchTrainer(
        loop,
        train_loop_config={
            "cfg": cfg,
            "folder": str(Path(folder).resolve()),
            "latent": passport(cfg.data.latents).latent,
        },
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            name="plain", storage_path=str(Path(folder, "ray").resolve()), failure_config=FailureConfig(max_failures=-1)
        ),
    ).fit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
