"""The command `diffussm`. Each command checks the config here, in well under a second, and then becomes its job."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import typer

from diffussm import __version__
from diffussm.errors import ConfigError, DiffuSSMError, ExitCode, UsageError
from launch import local
from launch import options as o

app = typer.Typer(
    name="diffussm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug's traceback is shown as Python shows it
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def diffussm(version: o.Version = False) -> None:
    """Train DiffuSSM, the attention-free latent diffusion model. The same command, started again, resumes."""
    if version:
        typer.echo(f"diffussm {__version__}")
        raise typer.Exit


@app.command()
def prepare(config: o.Config, overrides: o.Overrides = o.NO_OVERRIDES) -> None:
    """Turn images into latent shards, unless there."""
    local.run(local.driver(local.read(config, overrides), "prepare"))


@app.command()
def data(what: o.Latents, verify: o.Hashes = False, grid: o.DataGrid = "", pictures: o.Pictures = None) -> None:
    """Look at latents: numbers, classes, a grid.

    Prints count, histogram of the classes and passport, and draws decoded latents beside their sources; or, with
    --verify, holds every file against its digest and ends with 65 if one differs.
    """
    local.run(local.data(what, verify, {"grid": grid, "pictures": pictures}))


@app.command()
def train(config: o.Config, overrides: o.Overrides = o.NO_OVERRIDES, dry_run: o.DryRun = False) -> None:
    """Prepare, train, sample and score; or resume.

    Goes on from the newest checkpoint of the run, and does nothing when the run is finished.
    """
    job = local.read(config, overrides)
    command = local.driver(job)
    if dry_run:
        from launch import plan, show

        typer.echo(f"{show.marked(job.cfg)}\n{plan.text(job.cfg)}\n\n{local.shown(command)}")
        return
    local.run(command)


@app.command()
def sample(
    config: o.Config,
    overrides: o.Overrides = o.NO_OVERRIDES,
    classes: o.Classes = "",
    per_class: o.PerClass = None,
    guidance: o.Guidance = None,
    sampler: o.Sampler = None,
    steps: o.Steps = None,
    seed: o.Seed = None,
    weights: o.Weights = None,
    grid: o.Grid = "",
    npz: o.Npz = "",
    strip: o.Strip = "",
    values: o.Values = "",
    checkpoint: o.Checkpoint = None,
) -> None:
    """Draw a grid of pictures, one row a class, or a strip.

    Strips: trajectory (along the reverse steps), interpolation (between two noises), guidance and ema (rows are the
    --values, or the usual ones). They lie beside the grids, where `diffussm report` shows them.
    """
    if strip and npz:
        raise UsageError("--npz: found together with --strip", "--npz takes the pictures of a grid")
    if values and not strip:
        raise UsageError("--values: found without --strip", "add --strip guidance or --strip ema")
    named = {"per_class": per_class, "guidance": guidance, "sampler": sampler, "steps": steps, "seed": seed}
    named["weights"] = weights
    job = local.read(config, overrides, {f"sample.{name}": value for name, value in named.items()})
    flags = {"classes": classes, "grid": grid, "npz": npz, "strip": strip, "values": values, "checkpoint": checkpoint}
    local.run(local.driver(job, "sample", flags))


@app.command()
def evaluate(
    run: o.RunOrCheckpoint,
    overrides: o.Overrides = o.NO_OVERRIDES,
    images: o.Images = None,
    weights: o.Weights = None,
    checkpoint: o.Checkpoint = None,
    npz: o.Npz = "",
) -> None:
    """Score a checkpoint against real pictures.

    The blocks of a killed evaluation are kept: the same command goes on.
    """
    folder, named = local.run_of(run)
    job = local.read(folder, overrides, {"evaluate.images": images, "sample.weights": weights})
    local.run(local.driver(job, "evaluate", {"checkpoint": named if checkpoint is None else checkpoint, "npz": npz}))


reference = typer.Typer(help="Real pictures that scores are measured against.", no_args_is_help=True)
app.add_typer(reference, name="reference")


@reference.command()
def build(config: o.Config, overrides: o.Overrides = o.NO_OVERRIDES, npz: o.Npz = "") -> None:
    """Make the reference of a training set: moments of all, features of 10,000.

    It is kept beside the latents; --npz also writes it as ADM publishes its references.
    """
    local.run(local.driver(local.read(config, overrides), "reference", {"npz": npz}))


@app.command()
def export(
    config: o.Config,
    to: o.To,
    overrides: o.Overrides = o.NO_OVERRIDES,
    checkpoint: o.Checkpoint = None,
    licence: o.Licence = "",
    push: o.Push = "",
    public: o.Public = False,
) -> None:
    """Write a run as a folder that diffusers loads.

    Weights in safetensors, scheduler, autoencoder and a model card: `DiffuSSMPipeline.from_pretrained(DIR)`.
    """
    flags = {"to": to, "checkpoint": checkpoint, "licence": licence, "push": push, "public": public}
    local.run(local.export(local.read(config, overrides), flags))


@app.command()
def checkpoints(
    run: o.Run,
    verify: o.Verify = False,
    show: o.Show = None,
    export: o.Export = "",
    to: o.ToFile = "",
    at: o.At = None,
    json: o.Json = False,
) -> None:
    """List, verify, show or export checkpoints.

    Without options: what is there. Exit code 65 if something does not verify. --export writes one kind of the newest
    checkpoint, or of the one --at IMAGES, to the file --to.
    """
    if export and (show is not None or verify or json):
        raise UsageError("--export: found together with --show, --verify or --json", "give one of them at a time")
    if to and not export:
        raise UsageError("--to: found without --export", "add --export KIND, for example --export plain")
    if export:
        local.run(local.checkpoint("export", run, {"kind": export, "to": to, "at": at}))
    elif show is not None:
        local.run(local.checkpoint("show", run, {"at": show, "json": json}))
    else:
        local.run(local.checkpoint("list", run, {"verify": verify, "json": json}))


@app.command()
def ema(run: o.Run, length: o.Length, at: o.At = None, to: o.ToFile = "", dry_run: o.NoWrite = False) -> None:
    """Make an average of any length afterwards.

    From the snapshots that train.power_ema leaves behind, by least squares; for `diffussm sample --weights`.
    """
    local.run(local.checkpoint("ema", run, {"length": length, "at": at, "to": to, "dry-run": dry_run}))


@app.command()
def report(config: o.Config, overrides: o.Overrides = o.NO_OVERRIDES, to: o.Page = "") -> None:
    """Write one HTML page that tells the run's story.

    Curves, samples, scores, where the time went, faults, config: in one file that opens anywhere, also while it runs.
    """
    local.run(local.report(local.read(config, overrides), {"to": to}))


@app.command()
def config(config: o.Config = "", overrides: o.Overrides = o.NO_OVERRIDES) -> None:
    """Explain all keys, or show one config.

    With CONFIG: every value as a job would see it, and the default beside each one that differs.
    """
    from launch import show

    if "=" in config:
        raise UsageError(f"found {config!r} where a config file is expected", "write diffussm config FILE key=value")
    if config:
        typer.echo(show.marked(local.read(config, overrides).cfg), nl=False)
    else:
        show.keys(sys.stdout)


@app.command()
def plan(
    config: o.Config, overrides: o.Overrides = o.NO_OVERRIDES, workers: o.Workers = "", as_json: o.Json = False
) -> None:
    """Say what a run needs and costs.

    Memory, bytes, time and money by arithmetic alone, and the settings that cost least on a given number of workers.
    """
    from launch import plan as planning

    cfg, sizes = local.read(config, overrides).cfg, o.numbers("--workers", workers)
    typer.echo(planning.as_json(cfg, sizes) if as_json else planning.report(cfg, sizes))
    refused = planning.refused(cfg, sizes)
    if refused:
        raise ConfigError(f"--workers: found {refused}", "the plan above names the legal numbers")


@app.command()
def submit(
    config: o.Config,
    overrides: o.Overrides = o.NO_OVERRIDES,
    to: o.Target = "slurm",
    dry_run: o.DryRun = False,
    sweep: o.Sweep = o.NO_OVERRIDES,
    interactive: o.Interactive = False,
) -> None:
    """Hand a run over to a scheduler.

    It trains, is put into the queue again when it is preempted, and resumes by itself. With --dry-run the whole job
    and every check are shown, and nothing is started. With --interactive the cluster starts and nothing in it.
    """
    from launch import runs
    from launch import submit as submitting

    if interactive and to != "kubernetes":
        raise UsageError(f"--interactive: found with --to {to}; allowed: --to kubernetes", "on Slurm use salloc")
    submission = submitting.prepare(config, overrides, sweep, interactive)
    where = runs.target(to, submission.cfg)
    submission = submitting.with_save_times(submission)  # the time there is to save is held against what saves take
    if dry_run:
        text, passed = submitting.dry_run(submission, where)
        typer.echo(text)
        raise typer.Exit(0 if passed else int(ExitCode.CONFIG))
    typer.echo(submitting.submit(submission, where))


@app.command()
def status(run: o.Named, overrides: o.Overrides = o.NO_OVERRIDES, as_json: o.Json = False) -> None:
    """Say where a run stands.

    From the schedulers and the run's own storage, whatever machine it was submitted from.
    """
    from launch import runs

    found = runs.status(run, overrides)
    typer.echo(json.dumps(found, default=asdict, indent=1) if as_json else runs.told(found))


@app.command()
def logs(run: o.Named, overrides: o.Overrides = o.NO_OVERRIDES, lines: o.Lines = 50, follow: o.Follow = False) -> None:
    """Show a run's output."""
    from launch import runs

    shown = runs.following(run, lines, overrides) if follow else runs.logs(run, lines, overrides)
    if isinstance(shown, list):
        local.run(shown)
    else:
        for line in shown:
            typer.echo(line)


@app.command()
def stop(run: o.Named, overrides: o.Overrides = o.NO_OVERRIDES, now: o.Now = False) -> None:
    """Let a run save and leave.

    It is not put into the queue again; submitted again it resumes.
    """
    from launch import runs

    typer.echo(runs.stop(run, now, overrides))


@app.command("list")
def list_runs(storage: o.Storage = "") -> None:
    """List jobs and runs."""
    from launch import runs

    typer.echo(runs.listing(storage))


@app.command()
def chaos(
    config: o.Config, plan: o.Plan, overrides: o.Overrides = o.NO_OVERRIDES, starts: o.Starts = 0,
    plain: o.Plain = False,
) -> None:  # fmt: skip
    """Make faults in a run, compare with a calm one.

    Trains NAME-calm and NAME-chaos; ends with a table and whether samples and losses are the same.
    """
    local.run(local.chaos(local.read(config, overrides), plan, starts, plain))


@app.command()
def doctor(
    config: o.Config = "", overrides: o.Overrides = o.NO_OVERRIDES, to: o.DoctorTarget = "", as_json: o.Json = False
) -> None:
    """Look for what this machine lacks.

    A line each with ok, warn or bad, and the command that mends it; with CONFIG, also for that run: its storage is
    written to for a few seconds and cleaned. Exit code 69 if anything is bad.
    """
    from launch import doctor as looking

    found = []
    for each in looking.survey(local.read(config, overrides) if config else None, to):
        found.append(each)
        if not as_json:
            typer.echo(each.line)
    typer.echo(looking.as_json(found) if as_json else looking.summary(found))
    raise typer.Exit(int(looking.code(found)))


_BENCHES = ("op", "parts", "block", "loop", "data", "save", "evaluate", "log")


@app.command()
def profile(
    config: o.Config,
    overrides: o.Overrides = o.NO_OVERRIDES,
    steps: o.ProfileSteps = 10,
    ranks: o.Ranks = 1,
    as_json: o.Json = False,
) -> None:
    """Say where a step's time goes, part by part.

    Data, forward by part, backward, reduce, optimizer, averages and save, on this machine. A trace of steps in the run
    itself: train.profile.at_images.
    """
    local.run(local.profile(local.read(config, overrides), as_json, {"steps": steps, "ranks": ranks}))


@app.command(context_settings={"ignore_unknown_options": True})
def bench(what: o.Bench, passed: o.Passed = o.NO_OVERRIDES) -> None:
    """Measure: op, parts, block, loop, data, save, evaluate or log.

    op: the operator's backends against the textbook formula. parts: where its time goes. block: against a DiT block.
    loop: our training loop against a bare one. data: the reader of latents against the training, a folder of .npy and
    WebDataset (--url, --ranks, --samples). save: a save and a restore against DeepSpeed's own. evaluate: pictures a
    second and where the time goes (--images, --workers), precision and recall (--manifold REAL,GENERATED,DIMS).
    log: what telling of a run costs its steps.
    Options: --lengths, --batches, --widths, --modes, --backends (A,B,...), --rounds, --threads, --json.
    """
    if what not in _BENCHES:
        raise UsageError(f"found bench {what!r}; allowed: {', '.join(_BENCHES)}", "write diffussm bench op")
    local.run(local.bench(what, passed))


def main() -> None:
    """Console script: run the command; tell a typed error in two lines and exit with its code."""
    try:
        app()
    except DiffuSSMError as error:
        typer.echo(f"diffussm: {type(error).__name__}: {error}", err=True)
        sys.exit(int(error.code))
