"""What the pods need of their image, read from the Dockerfile; it is not built here."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

from diffussm.config.schema import Config
from launch.kubernetes.pods import SCRATCH

ROOT = Path(__file__).parents[2]
LINES = [
    line
    for line in (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]


def of(instruction: str) -> list[str]:
    return [line.removeprefix(f"{instruction} ") for line in LINES if line.startswith(f"{instruction} ")]


def test_the_linter_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, ROOT / "cluster" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_base_is_named_with_its_version_and_the_right_python() -> None:
    (base,) = of("FROM")
    assert base.startswith("python:3.11-")
    assert not base.endswith("latest")


def test_it_runs_as_the_user_of_the_pods() -> None:
    (user,) = of("USER")
    wanted = Config().kubernetes.user_id
    assert user == f"{wanted}:{wanted}"
    assert any(f"--uid {wanted}" in run and f"--home-dir {SCRATCH['home']}" in run for run in of("RUN"))
    after = LINES[LINES.index(f"USER {user}") + 1 :]
    assert not [line for line in after if line.startswith(("RUN", "COPY", "USER"))]  # nothing is root's again


def test_the_environment_is_the_locked_one_and_ours_brings_nothing_along() -> None:
    installs = [run for run in of("RUN") if "pip install" in run]
    assert installs[0].endswith("-r .ci/requirements.lock")
    assert "--no-deps ." in installs[1]
    assert all("--no-cache-dir" in run for run in installs)


def test_no_secret_can_be_baked_in() -> None:
    assert not of("ARG")
    assert not of("ADD")
    assert not [line for line in of("ENV") if any(word in line.upper() for word in ("KEY", "TOKEN", "SECRET"))]


@pytest.mark.parametrize("name", sorted({part for copy in of("COPY") for part in copy.split()[:-1]}))
def test_what_is_copied_exists_and_is_not_ignored(name: str) -> None:
    assert (ROOT / name).exists()
    ignored = False
    for rule in (ROOT / ".dockerignore").read_text().split():
        if fnmatch.fnmatch(name, rule.removeprefix("!")):
            ignored = not rule.startswith("!")
    assert not ignored


def test_a_clone_s_private_files_stay_outside() -> None:
    rules = (ROOT / ".dockerignore").read_text().split()
    assert rules[0] == "*"  # only what is named goes in: no .git, no runs, no environment
