"""The model card of an exported run: written from what the run itself says, with its limits. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from diffussm.checkpoint.manifest import Manifest
from diffussm.config.schema import Config
from diffussm.data.passport import Passport
from diffussm.model.counts import Counts

UNKNOWN_LICENCE = "not stated; ask whoever trained it, and mind the licence of the data"
SHOWN_CLASSES = 12


@dataclass(frozen=True)
class Story:
    """Everything a card is written from."""

    cfg: Config
    passport: Passport
    images: int
    """Training images after which the weights stood."""
    manifest: Manifest | None
    """Of their checkpoint; None for weights from a file."""
    counts: Counts
    weights: str
    """Kind of weights exported: master, or an average."""
    evaluations: Sequence[Mapping[str, Any]]
    """Results stored with the run, as plain data; oldest first."""
    licence: str = ""
    """SPDX identifier; empty if nobody said."""


def write(story: Story) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    front = {"library_name": "diffusers", "tags": ["diffussm", "class-conditional", "state-space-model"]}
    if story.licence:
        front["license"] = story.licence
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {story.cfg.name}",
        _what(story),
        "## Use\n\n" + _use(story),
        "## Data\n\n" + _data(story),
        "## Recipe\n\n" + _recipe(story),
        "## Scores\n\n" + _scores(story),
        "## Limits\n\n" + _limits(story),
        "## Licence\n\n" + (story.licence or UNKNOWN_LICENCE),
        story.passport.credit,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _what(story: Story) -> str:
    passport, counts = story.passport, story.counts
    return (
        f"A class-conditional latent diffusion model without attention: DiffuSSM "
        f"([Yan, Gu and Rush](https://arxiv.org/abs/2311.18257)) with {counts.parameters:,} parameters and "
        f"{counts.macs / 1e9:,.2f} G multiply-adds for each forward pass, for {passport.resolution_px} px pictures of "
        f"{len(passport.classes)} class{'es' if len(passport.classes) != 1 else ''}. "
        f"Trained on {story.images:,} images seen; the weights are `{story.weights}`."
    )


def _use(story: Story) -> str:
    first = story.passport.classes[0]
    sampling = story.cfg.sample
    return (
        "```python\n"
        "from diffussm.export.pipeline import DiffuSSMPipeline\n\n"
        'pipe = DiffuSSMPipeline.from_pretrained("PATH")  # this folder, or its id on a hub\n'
        f"picture = pipe({first!r}, guidance_scale={sampling.guidance:g}, num_inference_steps={sampling.steps}, "
        "seed=0).images[0]\n"
        "```\n\n"
        "Its repository's `pip install .` is needed; no remote code is run. The same seed gives the picture that "
        "`diffussm sample` gives."
    )


def _data(story: Story) -> str:
    passport = story.passport
    names = ", ".join(passport.classes[:SHOWN_CLASSES])
    more = f" and {len(passport.classes) - SHOWN_CLASSES} more" if len(passport.classes) > SHOWN_CLASSES else ""
    rows = [
        ("source", passport.source),
        ("pictures", f"{passport.number:,}"),
        ("left out", f"{len(passport.skipped):,}"),
        ("classes", names + more),
        ("side", f"{passport.resolution_px} px, crop {passport.crop}"),
        ("autoencoder", f"{passport.autoencoder} (SHA-256 {passport.autoencoder_digest[:16]}), frozen"),
        ("digest of the latents' index", passport.index_digest),
    ]
    return _table(("what", "value"), rows)


def _recipe(story: Story) -> str:
    cfg, train, process = story.cfg, story.cfg.train, story.cfg.diffusion
    betas = f"{train.beta1:g} and {train.beta2:g}"
    rows = [
        ("optimiser", f"AdamW, lr {train.lr:g}, betas {betas}, decay {train.weight_decay:g}"),
        ("global batch", f"{train.global_batch}"),
        ("images seen", f"{story.images:,}"),
        ("warm-up, decay", f"{train.warmup_images:,} and {train.decay_images:,} images"),
        ("precision", train.precision.value),
        ("diffusion", f"{process.timesteps} steps, betas {process.beta_start:g} to {process.beta_end:g}"),
        ("label drop", f"{process.label_drop:g}"),
        ("seed", f"{cfg.seed}"),
    ]  # fmt: skip
    if story.manifest is not None:
        software = ", ".join(f"{name} {version}" for name, version in sorted(story.manifest.versions.items()))
        rows += [("config digest", story.manifest.config_digest), ("software", software)]
    return _table(("what", "value"), rows)


def _scores(story: Story) -> str:
    if not story.evaluations:
        return "None was computed."
    rows = [
        (
            f"{each['at_images']:,}",
            str(each.get("metric", "?")),
            _number(each.get("value")),
            f"{each.get('n', 0):,}",
            _number(each.get("floor")),
        )
        for each in story.evaluations
    ]
    return (
        _table(("images seen", "score", "value", "pictures", "real against real"), rows)
        + "\n\nScores of different extractors, counts or references do not compare with each other."
    )


def _limits(story: Story) -> str:
    few = story.passport.number < 10_000
    lines = [
        "Pictures show what the training data shows, with its gaps and its biases; nothing filters them.",
        "It draws only the classes listed above, at the one size it was trained at.",
        "It does not read text prompts.",
    ]
    if few:
        lines.append(f"With only {story.passport.number:,} training pictures it may reproduce some of them by heart.")
    return "\n".join(f"* {line}" for line in lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in cells)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
