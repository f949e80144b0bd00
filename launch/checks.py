"""What is checked of a job before it is handed over, each check with what it found; `submit` refuses on the first
that fails, `submit --dry-run` shows them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from diffussm.config.plan import Batching, layout, size, why_illegal
from diffussm.config.schema import Config
from diffussm.errors import DiffuSSMError
from diffussm.naming import is_remote
from launch import store
from launch.estimate import Estimator
from launch.kubernetes.grace import grace
from launch.kubernetes.places import read_by_job, read_for_latents, unseen, unwritable
from launch.latent import latent
from launch.target import Submission


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    what: str
    ok: bool
    found: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """For people."""
        tail = f"\n        -> {self.remedy}" if self.remedy and not self.ok else ""
        return f"{'ok     ' if self.ok else 'FAILED '} {self.what}: {self.found}{tail}"


def checks(submission: Submission, target: str) -> Iterator[Check]:
    """Look at size, memory, deadline, bucket and index, cheap ones first."""
    cfg = submission.cfg
    for each in submission.swept or (cfg,):
        for found in (legal_size(each), *memory_and_deadline(each, target, submission.measured_save_s)):
            yield replace(found, what=f"{found.what} of {each.name}") if submission.swept else found
    yield places(cfg, target)
    if target != "kubernetes" or is_remote(cfg.storage):
        yield bucket(submission, target)


def legal_size(cfg: Config) -> Check:
    """The global batch is split into whole micro batches, the order of samples kept."""
    try:
        nodes, each = layout(cfg)
    except DiffuSSMError as error:
        return Check("size", False, error.message, error.remedy)
    refused = why_illegal(Batching.of(cfg), nodes, each)
    if refused:
        return Check("size", False, *refused)
    return Check("size", True, str(size(Batching.of(cfg), nodes, each)))


def memory_and_deadline(cfg: Config, target: str, measured_s: float | None = None) -> Iterator[Check]:
    """A rank fits its card, and a save fits between the warning and the kill."""
    known = latent(cfg)
    if known is None:
        yield Check("memory", True, f"not known before {cfg.data.autoencoder} is fetched")
        return
    try:
        planned = Estimator.of(cfg, known)
        asked = planned.estimate(planned.configured())
    except DiffuSSMError as error:
        yield Check("memory", False, error.message, error.remedy)
        return
    gib = 1 << 30
    if planned.card is None:
        yield Check("memory", True, f"{asked.memory.peak / gib:.1f} GiB of each worker on the CPU")
    else:
        best = planned.recommend(cfg.cluster.workers)
        advice = " ".join(best.layout.overrides) if best else "use more workers, or a smaller network"
        there = f"{asked.memory.peak / gib:.1f} GiB of {planned.card.memory_bytes / gib:.0f} GiB on {planned.card.name}"
        yield Check("memory", bool(asked.fits), there, advice)
    yield deadline(asked.save_s if measured_s is None else measured_s, cfg, target, measured_s)


def planned_save_s(cfg: Config) -> float | None:
    """Seconds of a save by the plan; None where the latents' size is not known, or there is no plan for this config."""
    known = latent(cfg)
    if known is None:
        return None
    try:
        planned = Estimator.of(cfg, known)
        return planned.estimate(planned.configured()).save_s
    except DiffuSSMError:  # told by the check of the memory
        return None


def deadline(save_s: float, cfg: Config, target: str, measured_s: float | None = None) -> Check:
    """Twice a save fits into the time between the warning and the kill."""
    key, given = (
        ("slurm.warning_s", cfg.slurm.warning_s) if target == "slurm" else ("cluster.grace_s", cfg.cluster.grace_s)
    )
    if target == "kubernetes":
        key, given = "the pods' grace", grace(measured_s, save_s).drain_s
    said = f"a save takes about {save_s:.0f} s of {given:g} s ({key})"
    return Check("deadline", 2 * save_s <= given, said, f"{key}={max(60, 2 * int(save_s + 1))}, or more nodes")


def places(cfg: Config, target: str) -> Check:
    """All nodes of a job see the run's place and the latents."""
    local = [place for place in read_by_job(cfg).values() if not is_remote(place)]
    if target == "kubernetes":
        hidden = [*unseen(cfg, read_by_job(cfg)), *unwritable(cfg)]
        return Check("places", not hidden, "; ".join(hidden) or "pods see all of them", "name places in a bucket")
    try:
        nodes, _ = layout(cfg)
    except DiffuSSMError:  # told by the check of the size
        nodes = 1
    if local and nodes > 1:
        return Check("places", True, f"{', '.join(local)} must be on a file system that all {nodes} nodes share")
    return Check("places", True, f"{cfg.storage} and {cfg.data.latents}")


def bucket(submission: Submission, target: str) -> Check:
    """The run's place can be written, and the latents are there or will be made."""
    cfg = submission.cfg
    try:
        found = store.ask("check", submission.root, cfg.data.latents)
    except DiffuSSMError as error:
        # The pods have rights of their own, which this machine may lack.
        if target == "kubernetes" and (cfg.kubernetes.env_from_secrets or cfg.kubernetes.service_account):
            return Check("bucket", True, f"cannot be looked at from here: {error.message}")
        return Check("bucket", False, error.message, error.remedy)
    made = found["latents"]
    if made is None and target == "kubernetes":
        hidden = unseen(cfg, read_for_latents(cfg))
        if hidden:
            return Check(
                "bucket", False, f"no latents yet, and their pictures: {'; '.join(hidden)}",
                "make the latents first (diffussm prepare), or name pictures in a bucket",
            )  # fmt: skip
    index = f"{made['number']:,} images in {made['place']}" if made else "no latents yet: the job makes them first"
    return Check("bucket", True, f"{submission.root} can be written; {index}")
