"""The stages of a job in their order: prepare, train, sample, evaluate, and the summary that marks the end."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster import env, readiness
from cluster.preempt import Warnings
from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.save import code_of_this_run
from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.config import dump
from diffussm.config.places import absolutely
from diffussm.config.schema import Config
from diffussm.config.sets import each_set
from diffussm.model.presets import check_fit
from diffussm.naming import RunPaths, grid_key
from diffussm.observe.herald import Herald
from diffussm.observe.log import Narrator
from diffussm.observe.words import duration
from diffussm.train.control import Level

if TYPE_CHECKING:
    from diffussm.data.encode import Work
    from diffussm.data.encoder import Progress
    from diffussm.data.passport import Passport
    from diffussm.sample import Painter

CLOSE_S = 30.0
"""Longest wait for a service of curves at the end of a job."""
LEAVING_S = 3.0
"""The same for a job that was asked to leave."""


@dataclass
class Stages:
    """One start of a run."""

    cfg: Config
    paths: RunPaths
    store: Store
    narrator: Narrator
    warnings: Warnings
    attempt: int = 0
    """Number of this start among the run's, once its workers have said so."""
    recipe: tuple[str, Config] | None = None
    """The file that the config began from, and what it says alone."""
    herald: Herald | None = None
    """Who tells what happens, from `begin` to `end`."""

    @staticmethod
    def of(
        cfg: Config, warnings: Warnings | None = None, recipe: tuple[str, Config] | None = None
    ) -> Stages:  # fmt: skip
        """Make local places absolute, because workers start in folders of their own."""
        for each in (cfg, recipe[1]) if recipe else (cfg,):
            absolutely(each)
        paths = RunPaths(cfg.storage, cfg.name)
        return Stages(
            cfg,
            paths,
            open_store(paths.root),
            Narrator(name=cfg.name),
            warnings or Warnings(cfg.cluster.grace_s),
            recipe=recipe,
        )

    def all(self) -> None:
        """The whole road. Nothing is done twice: what exists and fits is used."""
        began = time.monotonic()
        if self._finished():
            return
        self.begin()
        try:
            self.train()
            self.warnings.check()  # one that came after the last step
            grid = self.sample([], "", None)
            score = self.evaluate(None) if self.cfg.evaluate.enabled else None
            self._finish(grid, score, time.monotonic() - began)
        finally:
            self.end()

    def begin(self) -> None:
        """Whatever comes before the training: checks, latents, and the config that is the run's from now on."""
        readiness.check_start(self.cfg, self.store)
        passport = self.prepare()
        check_fit(self.cfg.model, passport.latent)
        readiness.check_guidance(self.cfg, passport)
        self.store.write("config.yaml", dump(self.cfg).encode())
        if self.recipe is not None:
            file, began = self.recipe
            self.store.write(
                "preset.yaml", yaml.safe_dump({"file": file, "config": yaml.safe_load(dump(began))}).encode()
            )
        from diffussm.evaluate.run import code

        about = yaml.safe_load(dump(self.cfg)) | {
            "code": {**code_of_this_run(), **code()},
            "dataset": passport.summary(),
        }
        self.herald = Herald(self.cfg, self.store, self.narrator, about)

    def end(self) -> None:
        """Finish what `begin` opened."""
        if self.herald is not None:
            # A warned job has little time: its own state is saved, curves can be synced later.
            self.herald.close(LEAVING_S if self.warnings.wish.level else CLOSE_S)
            self.herald = None

    def prepare(self) -> Passport:
        """Make the latents unless they are there, of each set; returns the main one's passport.

        An existing set that does not fit the config is refused.
        """
        passports = [self._prepare_set(one) for one in each_set(self.cfg)]
        return passports[0]

    def _prepare_set(self, cfg: Config) -> Passport:
        from diffussm.data.encode import prepare

        on_ray = self.cfg.prepare.workers > 0
        passport = prepare(
            cfg,
            progress=lambda done, total: self._work("encode", done, total, "images"),
            device=("cuda" if self.cfg.prepare.gpus_per_worker else "cpu") if on_ray else "",
            run=self._encode_on_ray if on_ray else None,
        )
        self.narrator.end()
        self.narrator.say(
            f"latents: {passport.number:,} images of {len(passport.classes)} classes in {cfg.data.latents}"
            + (f" ({len(passport.skipped)} skipped: named in its passport.json)" if passport.skipped else "")
        )
        for line in passport.remarks():
            self.narrator.say(f"  {line}")
        return passport

    def _encode_on_ray(self, work: Work, progress: Progress) -> None:
        """Do the units of `work` on Ray; raises as `cluster.prepare.run`."""
        worker_env = env.apply(self.cfg)
        import ray

        from cluster.prepare import run

        self.narrator.say(f"starting {self.cfg.prepare.workers} encoder(s) for {work.job.place}")
        with self.warnings.through_ray():
            self._connect(ray, worker_env)
            try:
                run(work, progress, self.narrator.hear)
            finally:
                ray.shutdown()

    def train(self) -> None:
        """Train through Ray until `train.images`; goes on from the newest checkpoint. Raises what workers raise."""
        worker_env = env.apply(self.cfg)
        import ray

        from cluster.beside import Beside
        from cluster.evaluate import workers
        from cluster.trainer import fit

        with tempfile.TemporaryDirectory(prefix="diffussm-ray-") as scratch, self.warnings.through_ray():
            self.narrator.say(f"starting {self.cfg.cluster.workers} worker(s) for {self.paths.root}")
            beside = workers(self.cfg) if self.cfg.evaluate.every_images else min(1, self.cfg.sample.every_images)
            self._connect(ray, worker_env, self.cfg.cluster.workers + beside)
            evaluations = Beside(self.cfg, self.store, self._hear) if beside else None

            def hear(record: dict[str, Any]) -> None:
                self.attempt = max(self.attempt, record.get("attempt", 0))
                self._hear(record)
                if evaluations is not None:
                    evaluations.hear(record)

            is_done = False
            try:
                fit(self.cfg, scratch, hear, self.warnings)
                is_done = self.warnings.wish.level is Level.NONE  # a warned job does not wait for evaluations
            finally:
                self.narrator.end()
                if evaluations is not None:
                    evaluations.close(finish=is_done)
                ray.shutdown()

    def sample(self, classes: Sequence[str], grid: str, checkpoint: int | None, npz: str = "") -> str:
        """Draw the grid of a checkpoint; returns where it lies. `npz` is a file that takes the pictures, row by row."""
        from diffussm.evaluate.npz import write
        from diffussm.sample import paint_grid

        self._use_all_threads()
        painter = self._painter(checkpoint)
        painter.cast()
        png, pictures = paint_grid(painter, classes, lambda done, total: self._work("sample", done, total, "passes"))
        self.narrator.end()
        if npz:
            write(Path(npz), pictures.shape, [pictures], {}, "")
            self.narrator.say(f"pictures: {npz}")
        self._tell_picture("samples", painter.images, png, painter.passport.credit)
        return self._keep_picture(png, grid_key(painter.images), grid)

    def strip(
        self, kind: str, classes: Sequence[str], values: Sequence[str], grid: str, checkpoint: int | None
    ) -> str:  # fmt: skip
        """Draw a strip (`diffussm.strips`) of a checkpoint; returns where it lies."""
        from diffussm.sample import Painter
        from diffussm.strips import strip

        self._use_all_threads()
        painter = self._painter(checkpoint)

        def load(cfg: Config) -> Painter:
            return Painter.load(cfg, self.store, painter.passport, painter.images, announce=self.narrator.say)

        png = strip(painter, kind, classes, values, load)
        return self._keep_picture(png, f"samples/{painter.images:012d}-{kind}.png", grid)

    def _keep_picture(self, png: bytes, key: str, file: str) -> str:
        """Store a picture in the run, or in a file that was named; returns where it lies."""
        if file:
            place = Path(file).absolute()
            open_store(str(place.parent)).write(place.name, png)
        else:
            self.store.write(key, png)
        where = file or f"{self.paths.root}/{key}"
        self.narrator.say(f"samples: {where}")
        return where

    def evaluate(self, checkpoint: int | None, npz: str = "") -> dict[str, Any]:
        """Score a checkpoint; returns the result as plain data, also stored with the run.

        `npz` is a file that takes the generated pictures.
        """
        from cluster.evaluate import Job, workers

        readiness.check_run(self.cfg, self.store)
        readiness.check_guidance(self.cfg, self._latents())
        count = workers(self.cfg)
        job = Job(
            self.cfg, self.store, checkpoint, npz=npz, say=self._aside,
            progress=lambda done, total: self._work("evaluate", done, total, "pictures"),
        )  # fmt: skip
        if count == 1:
            result = job.here()
        else:
            import ray

            with self.warnings.through_ray():
                self._connect(ray, env.apply(self.cfg), count)
                try:
                    result = job.on_ray(count)
                finally:
                    ray.shutdown()
        self.narrator.end()
        self.narrator.say(result.line())
        record = {"kind": "evaluation"} | result.record()
        if self.herald is not None:
            self.herald.hear(record)
        else:  # alone: the training may be writing to its own W&B run, and two writers lose each other's records
            herald = Herald(self.cfg, self.store, self.narrator, dict(result.settings), f"{self.cfg.name}-scores")
            herald.hear(record)
            herald.close(CLOSE_S)
        return json.loads(result.to_json()) | {"line": result.line()}

    def reference(self, npz: str) -> None:
        """Make the reference of the training set, unless it is there; `npz` is a file to write it to as ADM does."""
        import torch

        from cluster.scoring import checked_passport, training_reference, write_reference
        from diffussm.evaluate.extractors import open_extractor

        self._use_all_threads()
        cfg = self.cfg
        device = "cuda" if torch.cuda.is_available() else "cpu"
        extractor = open_extractor(cfg.evaluate.extractor, device, cfg.evaluate.weights)
        passport = checked_passport(cfg)
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            self._work("reference", done, passport.number, "pictures")

        made = training_reference(cfg, passport, extractor, cfg.evaluate.images, count)
        self.narrator.end()
        if npz:
            write_reference(Path(npz), cfg, passport, extractor, made)
            self.narrator.say(f"reference: {npz}")
        floor = made.floor
        values = floor.values if floor else {}
        said = ", ".join(f"{extractor.metric_names[kind]} {value:.4g}" for kind, value in values.items())
        self.narrator.say(
            f"reference: {made.n:,} real pictures of {cfg.data.latents}, digest {made.digest}"
            + (f"; real against real at n = {floor.n:,}: {said}" if floor else "")
        )

    def _painter(self, checkpoint: int | None) -> Painter:
        """The network of a checkpoint; the config must be the run's and the latents those of the config."""
        from diffussm.sample import Painter

        readiness.check_run(self.cfg, self.store)
        made = self._latents()
        readiness.check_guidance(self.cfg, made)
        return Painter.load(self.cfg, self.store, made, checkpoint, announce=self.narrator.say)

    def _latents(self) -> Passport:
        from cluster.scoring import checked_passport

        return checked_passport(self.cfg)

    def _hear(self, record: dict[str, Any]) -> None:
        """Pass on a record; before `begin` and after `end` to the person alone."""
        if self.herald is not None:
            self.herald.hear(record)
        else:
            self.narrator.hear(record)

    def _tell_picture(self, name: str, images: int, png: bytes, caption: str) -> None:
        """Show a picture in the services of curves, if there are any."""
        if self.herald is not None:
            self.herald.hear({"kind": "picture", "name": name, "images": images, "png": png, "caption": caption})

    def _aside(self, line: str) -> None:
        """Say a line below a bar that is shown."""
        self.narrator.end()
        self.narrator.say(line)

    def _work(self, what: str, done: int, total: int, unit: str) -> None:
        self.narrator.work(what, done, total, unit)

    def _use_all_threads(self) -> None:
        """Outside the training this process works alone and may use the workers' share of the machine."""
        import torch

        torch.set_num_threads(max(torch.get_num_threads(), self.cfg.cluster.threads_per_worker))

    def _connect(self, ray: Any, worker_env: dict[str, str], workers: int = 0) -> None:
        cluster = self.cfg.cluster
        runtime_env = {"env_vars": worker_env, "worker_process_setup_hook": env.WARM}
        if cluster.address:
            ray.init(address=cluster.address, runtime_env=runtime_env, log_to_driver=False, logging_level="warning")
            self.warnings.take_back()
            return
        # Logical CPUs: a laptop with fewer cores than workers trains slowly rather than never.
        needed = max(workers * cluster.cpus_per_worker, self.cfg.prepare.workers * self.cfg.prepare.cpus_per_worker)
        cpus = max(os.cpu_count() or 1, int(needed + 1))
        ray.init(
            address="local",
            num_cpus=cpus,
            runtime_env=runtime_env,
            object_store_memory=100 << 20,  # no data travels through Ray
            log_to_driver=False,
            logging_level="warning",
            include_dashboard=True,  # its agent cleans up placement groups
        )
        self.warnings.take_back()

    def _finished(self) -> bool:
        """Whether the run has its summary for at least the images asked for; if so, say so."""
        try:
            summary = json.loads(self.store.read("summary.json"))
        except NotFound:
            return False
        if summary["images"] < self.cfg.train.images:
            return False
        self.narrator.say(f"run {self.cfg.name} is finished: nothing to do")
        self._tell(summary)
        return True

    def _finish(self, grid: str, score: dict[str, Any] | None, seconds: float) -> None:
        summary = {
            "run": self.paths.root,
            "images": self.cfg.train.images,
            "samples": grid,
            "score": score["line"] if score else "not asked for",
            "latents": self.cfg.data.latents,
            "checkpoints": self.paths.checkpoints,
            "metrics": self.paths.metrics,
            "config": self.paths.config,
            "seconds_of_this_start": round(seconds, 1),
        }
        if self.attempt:
            Fence(self.store, self.attempt).check()
        self.store.write("summary.json", json.dumps(summary, indent=1).encode())
        self._tell(summary)
        self.narrator.say(f"finished in {duration(seconds)}")

    def _tell(self, summary: dict[str, Any]) -> None:
        width = max(map(len, summary))
        for key, value in summary.items():
            shown = f"{value:,}" if isinstance(value, int) else value
            self.narrator.say(f"  {key:<{width}}  {shown}")
