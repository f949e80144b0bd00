"""The command `diffussm`. Each command checks the config here, in well under a second, and then becomes its job."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from diffussm import __version__
from diffussm.errors import DiffuSSMError, UsageError
from launch import local

app = typer.Typer(
    name="diffussm",
    help="Train DiffuSSM, the attention-free latent diffusion model. The same command, started again, resumes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or the folder of a run.")]
MaybeConfig = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or the folder of a run.")]
Overrides = Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="Keys of the config, set here.")]
Checkpoint = Annotated[
    int | None, typer.Option(metavar="IMAGES", min=0, help="Which checkpoint (default: the newest).")
]
NONE: list[str] = []


@app.command()
def prepare(config: Config, overrides: Overrides = NONE) -> None:
    """Turn images into latent shards, unless there."""
    local.run(local.driver(local.read(config, overrides), "prepare"))


@app.command()
def train(
    config: Config,
    overrides: Overrides = NONE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print config, plan and command line, then stop.")] = False,
) -> None:
    """Prepare, train, sample and score; or resume.

    Goes on from the newest checkpoint of the run, and does nothing when the run is finished."""
    job = local.read(config, overrides)
    command = local.driver(job)
    if dry_run:
        from launch import plan, show

        typer.echo(f"{show.marked(job.cfg)}\n{plan.text(job.cfg)}\n\n{local.shown(command)}")
        return
    local.run(command)


@app.command()
def sample(
    config: Config,
    overrides: Overrides = NONE,
    classes: Annotated[str, typer.Option(metavar="A,B,...", help="Rows of the grid (default: all classes).")] = "",
    per_class: Annotated[int | None, typer.Option(help="sample.per_class: pictures for each class.")] = None,
    guidance: Annotated[float | None, typer.Option(help="sample.guidance: 1 is none.")] = None,
    sampler: Annotated[str | None, typer.Option(help="sample.sampler: ddpm, ddim or dpm.")] = None,
    steps: Annotated[int | None, typer.Option(help="sample.steps: reverse steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="sample.seed: seed of the noise.")] = None,
    grid: Annotated[str, typer.Option(metavar="FILE", help="Where the PNG goes (default: the run's samples/).")] = "",
    checkpoint: Checkpoint = None,
) -> None:
    """Draw a grid of pictures, one row a class."""
    named = {"per_class": per_class, "guidance": guidance, "sampler": sampler, "steps": steps, "seed": seed}
    job = local.read(config, overrides, {f"sample.{name}": value for name, value in named.items()})
    local.run(local.driver(job, "sample", {"classes": classes, "grid": grid, "checkpoint": checkpoint}))


@app.command()
def evaluate(
    config: Config,
    overrides: Overrides = NONE,
    images: Annotated[int | None, typer.Option(help="evaluate.images: pictures the score is computed from.")] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Score a trained run against its data."""
    job = local.read(config, overrides, {"evaluate.images": images})
    local.run(local.driver(job, "evaluate", {"checkpoint": checkpoint}))


@app.command()
def config(config: MaybeConfig = "", overrides: Overrides = NONE) -> None:
    """Explain all keys, or show one config.

    With CONFIG: every value as a job would see it, and the default beside each one that differs."""
    from launch import show

    if "=" in config:
        raise UsageError(f"found {config!r} where a config file is expected", "write diffussm config FILE key=value")
    if config:
        typer.echo(show.marked(local.read(config, overrides).cfg), nl=False)
    else:
        show.keys(sys.stdout)


@app.command()
def doctor(config: MaybeConfig = "", overrides: Overrides = NONE) -> None:
    """Look for what this machine lacks.

    Says what is there, what is missing, and the command that mends it; with CONFIG, also for that run."""
    local.run(local.preflight(local.read(config, overrides) if config else None))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"diffussm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Console script: run the command; tell a typed error in two lines and exit with its code."""
    try:
        app()
    except DiffuSSMError as error:
        typer.echo(f"diffussm: {type(error).__name__}: {error}", err=True)
        sys.exit(int(error.code))
