"""The documents are true: every command line in them is one that the command line takes, and the cheap ones run."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import Exit, TyperException
from typer.testing import CliRunner

from diffussm.bench import __main__ as bench
from diffussm.config import check, load
from diffussm.config.explain import describe
from launch import cli, local

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BASE = "configs/quickstart.yaml"

STANDS_FOR = {"CONFIG": BASE, "my.yaml": BASE, "IMAGES": "1", "N": "1"}
"""Words that a reader replaces, and what the test puts there."""
LEFT_OUT = {"...", "key=value", "KEY=VALUE"}

BLOCK = re.compile(r"^    (?:\.venv/bin/)?diffussm +((?:--?)?[a-z].*)$")
SPAN = re.compile(r"`(?:\.venv/bin/)?diffussm +([^`]+)`")
ROW = re.compile(r"^\| `diffussm ([a-z]+)[^|]*")
KEY = re.compile(r"`([a-z]+(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`")


@dataclass(frozen=True)
class Line:
    """A command line of a document."""

    where: str
    words: tuple[str, ...]
    whole: bool
    """A line of its own, which can be pasted; in running text arguments may be left out."""

    @property
    def name(self) -> str:
        return shlex.join(self.words)


def words_of(text: str) -> Iterator[tuple[str, ...]]:
    """The command lines that a text stands for: [A] is optional, a|b are two."""
    split = shlex.split(text.replace("\\|", "|"), comments=True)
    bare = [word if "=[" in word else word.strip("[]") for word in split]
    choices = [[STANDS_FOR.get(each, each) for each in word.split("|")] for word in bare if word not in LEFT_OUT]
    for chosen in itertools.product(*choices):
        yield tuple(re.sub(r"=N$", "=1", word) for word in chosen)


def lines_of(document: Path) -> Iterator[Line]:
    text = re.sub(r" *\\\n *", " ", document.read_text())
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{document.name}:{number}"
        block = BLOCK.match(line)
        if block:
            yield from (Line(where, words, True) for words in words_of(block.group(1)))
        else:
            for span in SPAN.findall(line):
                yield from (Line(where, words, False) for words in words_of(span))


def unique(lines: Iterator[Line]) -> list[Line]:
    return list({line.words: line for line in sorted(lines, key=lambda line: line.whole)}.values())


LINES = unique(line for document in DOCUMENTS for line in lines_of(document))
GROUP = typer.main.get_command(cli.app)


def command_of(line: Line) -> tuple[TyperCommand, list[str]]:
    """The command that takes the line, and its own words."""
    command: Any = GROUP
    words = list(line.words)
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        found = command.commands.get(words[0])
        assert found, f"{line.where}: diffussm has no command {words[0]}"
        command, words = found, words[1:]
    return command, words


def parsed(line: Line) -> dict[str, Any]:
    """What the command line makes of it."""
    command, words = command_of(line)
    try:
        return command.make_context("diffussm", words).params
    except Exit:  # --help, --version
        return {}
    except TyperException as error:
        if str(error).startswith("Missing parameter") and not line.whole:
            return {}
        raise AssertionError(f"{line.where}: diffussm {line.name}: {error}") from error


def test_commands_are_found_at_all() -> None:
    assert {"train", "submit", "plan", "status", "doctor"} <= {line.words[0] for line in LINES}
    assert sum(line.whole for line in LINES) > 15


def test_the_readme_tells_of_every_command() -> None:
    told = {line.words[0] for line in unique(lines_of(ROOT / "README.md"))}
    assert set(GROUP.commands) - told == set()  # type: ignore[attr-defined]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_a_command_is_one_that_exists(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = parsed(line)
    named, overrides = given.get("config") or "", [text for text in given.get("overrides") or [] if text]
    if line.words[0] == "bench" and len(line.words) > 1 and line.words[1] != "--help":
        asked = bench.parse(line.words[1:])  # its options are those of the measurement, not of the command line
        named, overrides = asked.config, asked.overrides
    if not named.endswith(".yaml"):
        named = BASE  # a run's name or folder: its keys are those of any config
    assert (ROOT / named).exists(), f"{line.where}: there is no {named}"
    if overrides:
        check(load(named, overrides))


@pytest.mark.parametrize("words", [("trian", "CONFIG"), ("train", "CONFIG", "--stpes", "3"), ("plan",)], ids=" ".join)
def test_a_wrong_command_is_noticed(words: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError):
        parsed(Line("here", words, True))


CHEAP = [line for line in LINES if {"plan", "config"} & {line.words[0]} or "--dry-run" in line.words]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.mark.parametrize("line", [line for line in CHEAP if "ema" not in line.words], ids=lambda line: line.name)
def test_a_cheap_command_runs(line: Line, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder instead of the bucket that the line may name."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(local, "run", lambda command: pytest.fail(f"it would start {command}"))
    here = [f"storage={place}/runs", f"data.latents={place}/latents"] if len(line.words) > 1 else []
    here += [f"kubernetes.claims=[disk={place}]"] if "kubernetes" in line.words else []  # pods see no other folder
    done = CliRunner().invoke(cli.app, [*line.words, *here], catch_exceptions=False)
    assert done.exit_code == 0, f"{line.where}: diffussm {line.name}\n{done.output}"
    assert done.output


@pytest.mark.parametrize("name", sorted({line.words[0] for line in LINES if not line.words[0].startswith("-")}))
def test_a_command_has_help(name: str) -> None:
    done = CliRunner().invoke(cli.app, [name, "--help"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "Usage: " in done.output


@functools.cache
def options(name: str) -> frozenset[str]:
    command = GROUP.commands[name]  # type: ignore[attr-defined]
    return frozenset(option for parameter in command.params for option in parameter.opts)


def rows() -> Iterator[tuple[str, str, str]]:
    for document in DOCUMENTS:
        for number, line in enumerate(document.read_text().splitlines(), start=1):
            if found := ROW.match(line):
                yield f"{document.name}:{number}", found.group(1), line


@pytest.mark.parametrize(("where", "name", "row"), list(rows()), ids=lambda text: text[:24])
def test_a_table_names_options_that_its_command_has(where: str, name: str, row: str) -> None:
    if name not in ("evaluate", "ema", "bench"):
        named = set(re.findall(r"`(--[a-z-]+)", row))
        assert named <= options(name), f"{where}: {named - options(name)}"


@pytest.mark.parametrize(
    "document", [each for each in DOCUMENTS if each.name != "architecture.md"], ids=lambda p: p.name
)
def test_a_document_names_keys_that_exist(document: Path) -> None:
    known = {key.name for key in describe()}
    sections = {name.split(".")[0] for name in known if "." in name}
    named = {key for key in KEY.findall(document.read_text()) if key.split(".")[0] in sections}
    named = {key for key in named if not key.endswith((".json", ".py"))}

    modules = {
        ".".join(path.relative_to(ROOT / "diffussm").with_suffix("").parts)
        for path in (ROOT / "diffussm").rglob("*.py")
    }
    assert named - known - modules == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_points_at_is_there(document: Path) -> None:
    text = document.read_text()
    links = {link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link}
    assert [link for link in sorted(links) if not (document.parent / link).exists()] == []
    files = set(re.findall(r"(?<![\w/])(?:tests|diffussm|cluster|launch|configs)/[\w/.-]+\.(?:py|yaml)\b", text))
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    targets = set(re.findall(r"\bmake ([a-z-]+)`|^    make ([a-z-]+)", text, re.MULTILINE))
    rules = (ROOT / "Makefile").read_text()
    assert [
        name
        for pair in targets
        for name in pair
        if name and not re.search(rf"^{name}:|^.PHONY:.* {name}\b", rules, re.M)
    ] == []


def test_the_config_of_the_tutorial_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    block = re.search(r"^    # my\.yaml\n((?:    .*\n)+)", text, re.MULTILINE)
    assert block
    written = textwrap.dedent(block.group(1)).replace("base: configs", f"base: {ROOT}/configs")
    (tmp_path / "my.yaml").write_text(written)
    cfg = load(tmp_path / "my.yaml")
    check(cfg)
    assert cfg.name == "my-pictures"


def test_the_messages_of_the_troubleshooting_are_ours() -> None:
    """The words of each message stand in the code, joined over the lines of a literal."""
    sources = [path.read_text() for name in ("diffussm", "cluster", "launch") for path in (ROOT / name).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| (?:\d+ \| )?`([^`]+)` \|", text, re.MULTILINE)
    assert len(messages) > 25
    assert [message for message in messages if message not in code] == []
