"""A real run goes out as a folder and comes back through diffusers with the same pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load_file

from diffussm.checkpoint.store import open_store
from diffussm.config import dump, load
from diffussm.config.schema import Config, Precision
from diffussm.data.latents import passport
from diffussm.errors import ConfigError, DataError, ExitCode, StorageError, UsageError
from diffussm.export.__main__ import main
from diffussm.export.folder import evaluations, export, push
from diffussm.export.pipeline import SAMPLERS, DiffuSSMPipeline
from diffussm.sample import Painter
from diffussm.train import loop
from diffussm.train.world import current
from tests.distributed import run_on_ranks
from tests.runs import BATCH, tiny_run

LABELS = [0, 1, 1]


def train_here(config: Path, scratch: Path) -> None:
    """On one rank; large steps, so that raw and averaged weights differ and guidance has something to guide."""
    loop.train(load(config), current(torch.device("cpu")), attempt=1, scratch=scratch, announce=lambda record: None)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("run")
    cfg = tiny_run(folder, images=4 * BATCH, checkpoint_images=2 * BATCH, lr=0.05)
    config = folder / "tiny.yaml"
    config.write_text(dump(cfg))
    run_on_ranks(Path(__file__), "train_here", {"config": config, "scratch": folder / "scratch"}, 1)
    store = open_store(f"{cfg.storage}/{cfg.name}")
    store.write(f"evaluations/{4 * BATCH:012d}-test-c0ffee00.json", evaluated("FD-Test", 12.5))
    return cfg


def evaluated(metric: str, value: float) -> bytes:
    score = {"value": value, "interval": None, "floor": 3.25}
    result = {"scores": {metric: score}, "n": 260, "checkpoint": {"weights": "ema-plain"}, "settings": {}}
    return json.dumps(result).encode()


@pytest.fixture(scope="module")
def folder(cfg: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(cfg, tmp_path_factory.mktemp("out") / "exported", licence="cc-by-4.0")


def painted(cfg: Config) -> np.ndarray:
    store = open_store(f"{cfg.storage}/{cfg.name}")
    return Painter.load(cfg, store, passport(cfg.data.latents)).paint(LABELS)


def quiet(pipe: DiffuSSMPipeline) -> DiffuSSMPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", list(SAMPLERS.values()), ids=lambda kind: kind.value)
def test_the_pipeline_draws_what_sample_draws(cfg: Config, kind: object, tmp_path: Path) -> None:
    cfg = load(write(cfg, tmp_path), [f"sample.sampler={kind.value}", "sample.guidance=2.0", "sample.seed=5"])  # type: ignore[attr-defined]
    pipe = quiet(DiffuSSMPipeline.from_pretrained(export(cfg, tmp_path / "out")))
    drawn = pipe(LABELS, guidance_scale=2.0, num_inference_steps=cfg.sample.steps, seed=5, output_type="np").images
    expected = painted(cfg)
    assert expected.std() > 5  # pictures with something on them
    assert np.array_equal(drawn, expected)
    again = pipe(LABELS[1:], 2.0, cfg.sample.steps, 5, first_index=1, output_type="np").images
    assert np.abs(again.astype(int) - expected[1:]).max() <= 1  # another batch, at most another rounding
    other = pipe(LABELS, 2.0, cfg.sample.steps, seed=6, output_type="np").images
    assert not np.array_equal(other, expected)


def test_a_pipeline_of_a_bf16_training_draws_in_bf16_where_sample_does(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: here the CPU is made to count as one."""
    cfg = load(write(cfg, tmp_path), ["train.precision=bf16"])
    pipe = quiet(DiffuSSMPipeline.from_pretrained(export(cfg, tmp_path / "out")))
    settings = {"guidance_scale": cfg.sample.guidance, "num_inference_steps": cfg.sample.steps, "output_type": "latent"}
    without = pipe(LABELS, **settings).images
    monkeypatch.setattr("diffussm.sample._is_bf16", lambda precision, device: precision is Precision.bf16)
    painter = Painter.load(cfg, open_store(f"{cfg.storage}/{cfg.name}"), passport(cfg.data.latents))
    painter.cast()
    drawn = pipe(LABELS, **settings).images
    assert torch.equal(drawn, painter.latents(LABELS))
    assert not torch.equal(drawn, without)


def write(cfg: Config, folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(dump(cfg))
    return path


def test_diffusers_finds_the_class_by_its_name(folder: Path) -> None:
    pipe = quiet(DiffusionPipeline.from_pretrained(folder))
    assert type(pipe) is DiffuSSMPipeline
    assert pipe.class_names == ["cat", "dog"]
    (picture,) = pipe("dog", num_inference_steps=2).images
    assert picture.size == (8, 8)


def test_a_process_that_knows_only_the_folder_loads_it(folder: Path) -> None:
    code = (
        "from diffussm.export.pipeline import DiffuSSMPipeline\n"
        f"pipe = DiffuSSMPipeline.from_pretrained({str(folder)!r})\n"
        "print(len(pipe([0, 1], num_inference_steps=1, output_type='np').images))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "2"


def test_weights_are_the_averages_under_the_names_of_the_training(cfg: Config, folder: Path) -> None:
    store = open_store(f"{cfg.storage}/{cfg.name}")
    painter = Painter.load(cfg, store, passport(cfg.data.latents))
    stored = load_file(folder / "network" / "diffusion_pytorch_model.safetensors")
    expected = dict(painter.model.state_dict())
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name


def test_nothing_in_the_folder_is_a_program(folder: Path) -> None:
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".md"}


def test_the_scheduler_can_be_swapped_and_a_foreign_one_is_refused(folder: Path) -> None:
    pipe = quiet(DiffuSSMPipeline.from_pretrained(folder))
    before = pipe(0, num_inference_steps=3, output_type="np").images
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert not np.array_equal(pipe(0, num_inference_steps=3, output_type="np").images, before)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ConfigError, match="found EulerDiscreteScheduler; allowed: DDPMScheduler"):
        pipe(0, num_inference_steps=3)


def test_unknown_classes_and_outputs_are_refused(folder: Path) -> None:
    pipe = quiet(DiffuSSMPipeline.from_pretrained(folder))
    for wrong in ("cow", 2, -1):
        with pytest.raises(ConfigError, match=r"class_labels: found .* allowed: 0 to 1, or cat, dog"):
            pipe(wrong)
    with pytest.raises(ConfigError, match="output_type"):
        pipe(0, output_type="jpeg")


def test_a_generator_gives_the_seed(folder: Path) -> None:
    pipe = quiet(DiffuSSMPipeline.from_pretrained(folder))
    draws = [
        pipe(0, num_inference_steps=2, generator=torch.Generator().manual_seed(s), output_type="np").images
        for s in (1, 1, 2)
    ]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_the_card_tells_data_recipe_scores_licence_and_limits(cfg: Config, folder: Path) -> None:
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    assert front["library_name"] == "diffusers"
    for words in ("cat, dog", "| pictures | 40 |", "| 32 | FD-Test | 12.5 | 260 | 3.25 |", "by heart", "lr 0.05"):
        assert words in text


def test_a_folder_with_something_in_it_is_left_alone(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UsageError, match="not an empty folder"):
        export(cfg, tmp_path)
    assert (tmp_path / "mine").read_text() == "keep"


def test_a_failed_export_leaves_nothing(cfg: Config, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        export(cfg, tmp_path / "out", images=12345)
    assert list(tmp_path.iterdir()) == []


def test_evaluations_come_oldest_first_and_must_be_json(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("evaluations/000000000200-A.json", evaluated("A", 2.0))
    store.write("evaluations/000000000100-A.json", evaluated("A", 1.0))
    assert [(e["at_images"], e["value"]) for e in evaluations(store)] == [(100, 1), (200, 2)]
    store.write("evaluations/000000000300-A.json", b'{"value": 3}')
    with pytest.raises(DataError, match=r"300-A\.json: is no result"):
        evaluations(store)


def test_the_command_tells_where_and_refuses_with_its_code(cfg: Config, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffussm.export", str(write(cfg, tmp_path)), "--to", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "README.md" in done.stdout
    assert subprocess.run(command, capture_output=True, check=False).returncode == ExitCode.USAGE


class FakeHub:
    """What `huggingface_hub.HfApi` is asked for."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", repository, "private" if private else "public", exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> str:
        if repo_id == "me/refused":
            raise LocalTokenNotFoundError("no token")
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))
        return f"https://hub/{repo_id}"


def test_a_pushed_folder_is_private_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("card")
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    assert push(tmp_path, "me/mine") == "https://hub/me/mine"
    assert push(tmp_path, "me/shown", public=True) == "https://hub/me/shown"
    assert FakeHub.calls == [
        ("create", "me/mine", "private", True), ("upload", "me/mine", ["README.md"]),
        ("create", "me/shown", "public", True), ("upload", "me/shown", ["README.md"]),
    ]  # fmt: skip
    with pytest.raises(StorageError, match=r"--push: me/refused was not uploaded .*no token"):
        push(tmp_path, "me/refused")


def test_public_needs_a_place(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(tmp_path / "x.yaml"), "--to", str(tmp_path / "out"), "--public"]) == ExitCode.USAGE
    assert "--public: found without --push" in capsys.readouterr().err
