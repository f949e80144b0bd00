"""Arguments and options of the command line, with their help."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from diffussm.errors import UsageError

Version = Annotated[bool, Option("--version", help="Say the version.")]
Config = Annotated[str, Argument(metavar="CONFIG", help="YAML file, or the folder or URL of a run.")]
RunOrCheckpoint = Annotated[
    str, Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder or URL, one of its checkpoints, or a YAML file.")
]
Overrides = Annotated[
    list[str], Argument(metavar="KEY=VALUE", help="Keys of the config, set here, or YAML files to lay over it.")
]
DryRun = Annotated[bool, Option("--dry-run", help="Print config, plan and command line, then stop.")]
Checkpoint = Annotated[int | None, Option(metavar="IMAGES", min=0, help="Which checkpoint (default: the newest).")]

Classes = Annotated[str, Option(metavar="A,B,...", help='Rows of the grid (default: all classes); "a, b" is one.')]
PerClass = Annotated[int | None, Option(help="sample.per_class: pictures for each class.")]
Guidance = Annotated[float | None, Option(help="sample.guidance: 1 is none.")]
Sampler = Annotated[str | None, Option(help="sample.sampler: ddpm, ddim or dpm.")]
Steps = Annotated[int | None, Option(help="sample.steps: reverse steps.")]
Seed = Annotated[int | None, Option(help="sample.seed: seed of the noise.")]
Weights = Annotated[
    str | None, Option(metavar="FILE", help="sample.weights: weights that `diffussm ema` wrote, not a checkpoint's.")
]
Grid = Annotated[str, Option(metavar="FILE", help="Where the PNG goes (default: the run's samples/).")]

Latents = Annotated[str, Argument(metavar="RUN_OR_URL", help="A run, its latents (folder or s3:// URL), or a config.")]
Hashes = Annotated[bool, Option("--verify", help="Hold every file against its digest; no grid unless --grid is given.")]
DataGrid = Annotated[str, Option("--grid", metavar="FILE", help="Where the PNG goes (default: latents.png here).")]
Pictures = Annotated[int | None, Option(min=1, help="Pictures of each class in the grid (default: 3).")]

Strip = Annotated[str, Option(metavar="KIND", help="trajectory, interpolation, guidance or ema instead of the grid.")]
Values = Annotated[str, Option(metavar="A,B,...", help="Settings of a guidance or ema strip.")]
Npz = Annotated[str, Option(metavar="FILE", help="Also write the pictures as .npz, for ADM's script.")]
Images = Annotated[int | None, Option(help="evaluate.images: pictures the score is computed from.")]

To = Annotated[str, Option(metavar="DIR", help="Folder to be made.")]
Page = Annotated[str, Option(metavar="FILE", help="Where the page goes (default: report.html in the run).")]
Licence = Annotated[str, Option(metavar="SPDX", help="Licence named in the model card.")]
Push = Annotated[str, Option(metavar="OWNER/NAME", help="Also upload to this place on Hugging Face's hub.")]
Public = Annotated[bool, Option("--public", help="Make that place public; else it is private.")]
Workers = Annotated[str, Option(metavar="N,N,...", help="Numbers of workers to compare (default: the config's).")]
Json = Annotated[bool, Option("--json", help="As JSON.")]
Run = Annotated[str, Argument(metavar="RUN", help="Folder of a run, or its s3:// URL.")]
Verify = Annotated[bool, Option("--verify", help="Read every byte and hold it against the manifest.")]
Show = Annotated[int | None, Option(metavar="IMAGES", min=0, help="The manifest of one checkpoint as tables.")]
Export = Annotated[str, Option(metavar="KIND", help="Write master, plain, power-0.050, ... as one file.")]
ToFile = Annotated[str, Option(metavar="FILE", help="Safetensors file or s3:// object to write.")]
At = Annotated[int | None, Option(metavar="IMAGES", min=1, help="After how many images (default: the newest).")]
Length = Annotated[float, Option(help="Relative width sigma_rel of the average, 0.01 to 0.28.")]
NoWrite = Annotated[bool, Option("--dry-run", help="Print the coefficients and the fit, write nothing.")]

Named = Annotated[str, Argument(metavar="RUN", help="Name of a run, its config, its folder or its URL.")]
Target = Annotated[str, Option("--to", metavar="TARGET", help="Where it runs: slurm, kubernetes or local.")]
DoctorTarget = Annotated[
    str, Option("--to", metavar="TARGET", help="slurm or kubernetes must be reachable; bad if it is not.")
]
Sweep = Annotated[list[str], Option("--sweep", metavar="KEY=A,B", help="One run for each value (a job array).")]
Interactive = Annotated[bool, Option("--interactive", help="A Ray cluster to work in, without a job (Kubernetes).")]
Lines = Annotated[int, Option(min=0, help="Last lines to show.")]
Follow = Annotated[bool, Option("--follow", "-f", help="Go on showing what is added.")]
Now = Annotated[bool, Option("--now", help="End it at once, without a save.")]
Storage = Annotated[str, Option(metavar="URL", envvar="DIFFUSSM_STORAGE", help="Also list the runs in this storage.")]

Plan = Annotated[str, Option("--plan", metavar="PLAN", help="YAML file of faults.")]
Plain = Annotated[bool, Option("--plain", help="Kill the same network under plain Ray Train too, for comparison.")]
Starts = Annotated[int, Option(min=0, help="Most starts of the faulty run's driver; 0: one a fault, and 20.")]

ProfileSteps = Annotated[int, Option("--steps", min=1, help="Steps of each kind that are timed.")]
Ranks = Annotated[int, Option(min=1, help="Processes, each with the share of a step that a rank has in the run.")]

NO_OVERRIDES: list[str] = []

Bench = Annotated[str, Argument(metavar="op|parts|block|loop|data|save|evaluate|log", help="What to measure.")]
Passed = Annotated[
    list[str], Argument(metavar="...", help="CONFIG and key=value (loop, data), or options of the measurement.")
]


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers from 1, separated by commas; raises UsageError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{option}: found {text!r}; allowed: whole numbers from 1, as 8,64,256")
    return [int(part) for part in parts]
