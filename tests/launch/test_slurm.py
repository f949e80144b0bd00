"""The batch script: the same for the same submission, plain to read, and nothing in it that a shell could misread."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from diffussm.config import Config, check
from diffussm.config.schema_jobs import Container
from diffussm.errors import MissingError
from launch import slurm, submit
from launch.target import Submission

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "docs" / "examples" / "imagenet-512-8-nodes.sbatch"
ODD = 'it\'s "odd" $(touch pwned) `touch pwned` ${HOME} \\ ; & | < > * é'


def imagenet(monkeypatch: pytest.MonkeyPatch) -> Submission:
    """imagenet-512 on 8 nodes, as from a folder that is the same everywhere."""
    monkeypatch.chdir("/")
    recipe, overlay = ROOT / "configs" / "imagenet-512.yaml", ROOT / "configs" / "cluster" / "slurm.yaml"
    places = ["storage=s3://diffussm/runs", "data.latents=s3://diffussm/latents/imagenet-512"]
    more = ["slurm.logs=/shared/logs", "slurm.python=/shared/venv/bin/python", "data.images=/shared/imagenet/train"]
    return submit.prepare(str(recipe), [str(overlay), *places, *more])


@pytest.fixture
def cfg() -> Config:
    made = Config(name="a")
    made.storage, made.data.latents, made.train.images = "/s", "/l", 1000
    made.slurm.python, made.slurm.logs = "/p", "/logs"
    return made


def made(cfg: Config, *variants: tuple[str, ...]) -> Submission:
    check(cfg)
    return Submission(cfg, submit.minimal(cfg), variants)


def test_the_script_of_imagenet_512_on_8_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """To renew it after a wanted change: write `slurm.render(...)` to the file and read the difference."""
    script = slurm.render(imagenet(monkeypatch))
    assert script == slurm.render(imagenet(monkeypatch))
    assert script == GOLDEN.read_text()


def test_the_shell_can_read_every_form(cfg: Config, tmp_path: Path) -> None:
    for container in Container:
        cfg.slurm.container = container
        cfg.slurm.image = "" if container is Container.none else f"/images/{ODD}.sif"
        cfg.slurm.mounts = [] if container is Container.none else [f"/a:/{ODD}", "/b:/b"]
        cfg.slurm.modules, cfg.slurm.environment = ["cuda/13.0", "nccl"], [f"A={ODD}"]
        for variants in ((), (("name=a-0", f"data.images={ODD}"), ("name=a-1",))):
            script = slurm.render(made(cfg, *variants))
            read = subprocess.run(
                ["bash", "-n"], input=script, text=True, capture_output=True, check=False, cwd=tmp_path
            )
            assert (read.returncode, read.stderr) == (0, ""), script


def test_a_container_sees_the_jobs_own_folder_and_brings_its_own_python(cfg: Config) -> None:
    cfg.slurm.container, cfg.slurm.image, cfg.slurm.python = Container.apptainer, "/i.sif", ""
    script = slurm.render(made(cfg))
    assert 'readonly INSIDE=(apptainer exec --bind "$SCRATCH" /i.sif)' in script
    assert "readonly PYTHON=python3\n" in script


def test_modules_are_found_though_a_batch_shell_reads_no_profile_and_may_be_careless(
    cfg: Config, tmp_path: Path
) -> None:
    cfg.slurm.modules = ["cuda/13.0"]
    lines = slurm.render(made(cfg)).splitlines()
    begin, end = lines.index(next(line for line in lines if line.startswith("set +u"))), lines.index("set -u")
    (tmp_path / "a-modules.sh").write_text('module() { echo "loaded $2 $NOBODY_SET_THIS"; }\n')
    body = "\n".join(["set -uo pipefail", *lines[begin : end + 1], 'echo "still strict: $NOR_THIS"'])
    body = body.replace("/etc/profile.d", str(tmp_path))
    done = subprocess.run(["bash", "-c", body], capture_output=True, text=True, check=False)
    assert done.stdout == "loaded cuda/13.0 \n", done.stderr
    assert "NOR_THIS: unbound variable" in done.stderr


def test_odd_values_arrive_as_they_are(cfg: Config, tmp_path: Path) -> None:
    """The script's own lines, run by bash: variables, arrays and the config in its here-document."""
    cfg.storage, cfg.slurm.python, cfg.slurm.environment = f"/s/{ODD}", f"/p/{ODD}", [f"A={ODD}"]
    cfg.data.classes = ["END_OF_CONFIG", "a\nb", "$(touch pwned)"]
    variants = ((f"data.images={ODD}",),)
    lines = slurm.render(made(cfg, *variants)).splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("CONFIG="))
    end = next(index for index, line in enumerate(lines) if line == "esac")
    kept = [line for line in lines if line.startswith(("readonly PYTHON=", "export A="))]
    show = 'printf "%s\\n" "$PYTHON" "$A" "${OVERRIDES[@]}"'
    script = "\n".join(
        [*kept, f"SCRATCH={tmp_path} ADDRESS=h PORT=1 SLURM_ARRAY_TASK_ID=0", *lines[begin : end + 1], show]
    )
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        f"/p/{ODD}",
        ODD,
        "cluster.address=h:1",
        "cluster.grace_s=300",
        f"data.images={ODD}",
    ]
    assert (tmp_path / "config.yaml").read_text() == submit.minimal(cfg)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_a_scratch_folder_that_is_there_already_is_not_used(cfg: Config, tmp_path: Path) -> None:
    (made_here,) = (line for line in slurm.render(made(cfg)).splitlines() if line.startswith("mkdir "))
    assert '"$SCRATCH"' in made_here
    for expected in (0, 76):
        script = f"SCRATCH={tmp_path}/scratch\n{made_here}\n"
        assert subprocess.run(["bash"], input=script, text=True, check=False).returncode == expected
    assert (tmp_path / "scratch").stat().st_mode & 0o777 == 0o700


def test_the_delimiter_never_stands_in_the_config() -> None:
    assert slurm._delimiter("a\nEND_OF_CONFIG\nEND_OF_CONFIG_\n") == "END_OF_CONFIG__"


def test_every_wish_becomes_an_option(cfg: Config) -> None:
    section = cfg.slurm
    section.partition, section.account, section.qos, section.constraint = "a,b", "me", "high", "x&y"
    section.exclude, section.dependency, section.begin = "n[1-3]", "afterok:12", "now+1hour"
    section.time_s, section.node_memory_bytes, section.exclusive = 90_061, 3 << 30, False
    section.options, section.logs = ["--nice=10"], "/lo gs"
    cfg.cluster.workers, cfg.cluster.workers_per_node, cfg.cluster.gpus_per_worker = 4, 2, 1
    given = slurm.options(made(cfg))
    assert given == [
        *("--job-name=diffussm-a", "--comment=/s/a", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4"),
        *("--gres=gpu:2", "--mem=3072M", "--time=1-01:01:01", "--partition=a,b", "--account=me", "--qos=high"),
        *("--constraint=x&y", "--exclude=n[1-3]", "--dependency=afterok:12", "--begin=now+1hour"),
        *("--signal=B:USR1@300", "--open-mode=append", '--output="/lo gs/%x-%j.log"', "--requeue", "--nice=10"),
    ]
    section.exclusive, section.node_memory_bytes, section.gres = True, 0, "gpu:h100:2"
    assert {"--exclusive", "--mem=0", "--gres=gpu:h100:2"} <= set(slurm.options(made(cfg)))


def test_a_sweep_has_an_array_and_logs_of_its_tasks(cfg: Config) -> None:
    cfg.slurm.array_limit = 2
    sweep = made(cfg, ("name=a-0",), ("name=a-1",), ("name=a-2",))
    assert slurm._array(sweep) == ["--array=0-2%2"]
    assert "--output=/logs/%x-%A_%a.log" in slurm.options(sweep)
    assert slurm._array(made(cfg)) == []


def test_without_slurm_it_says_so(cfg: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.Slurm().jobs() == []
    with pytest.raises(MissingError, match="sbatch: is not on this machine"):
        slurm.Slurm().submit(made(cfg))


def test_what_slurm_says_is_passed_on(cfg: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'Requested node configuration is not available' >&2\nexit 1\n")
    (tmp_path / "squeue").write_text('#!/bin/sh\necho \'{"errors": [], "jobs": []}\'\n')
    for name in ("sbatch", "squeue"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    cfg.slurm.logs = str(tmp_path / "logs")
    with pytest.raises(MissingError, match=r"--test-only.*not available"):
        slurm.Slurm().submit(made(cfg))
    assert not (tmp_path / "logs").exists()


def test_line_breaks_cannot_reach_an_option() -> None:
    with pytest.raises(ValueError, match="not one line"):
        slurm._verbatim("a\n#SBATCH --uid=0")


def test_stop_asks_a_running_job_and_cancels_a_waiting_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.target import Job

    asked: list[Any] = []
    monkeypatch.setattr(slurm, "_ask", lambda command, given="": asked.append(list(command)) or "")
    job = Job("7", "a", "RUNNING", True, "", 0, "", "")
    slurm.Slurm().stop(job, now=False)
    slurm.Slurm().stop(job, now=True)
    slurm.Slurm().stop(Job("8", "a", "PENDING", True, "", 0, "", ""), now=False)
    assert asked == [["scancel", "--batch", "--signal=USR2", "7"], ["scancel", "7"], ["scancel", "8"]]
