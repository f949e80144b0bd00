"""Typed errors: what they say, how they travel, and the code each kind has."""

from __future__ import annotations

import pickle

import pytest

from diffussm import errors
from diffussm.errors import DiffuSSMError, ExitCode

KINDS = {
    errors.UsageError: 2,
    errors.ConfigError: 64,
    errors.DataError: 65,
    errors.StorageError: 66,
    errors.DivergedError: 67,
    errors.MissingError: 69,
    errors.Preempted: 75,
    errors.InfrastructureError: 76,
    errors.Superseded: 77,
}


@pytest.mark.parametrize(("kind", "code"), KINDS.items())
def test_each_kind_has_its_code(kind: type[DiffuSSMError], code: int) -> None:
    assert kind("x").code == code


def test_every_kind_is_listed_and_every_code_has_a_kind() -> None:
    own = {kind for kind in DiffuSSMError.__subclasses__() if kind.__module__ == "diffussm.errors"}
    assert own == set(KINDS)
    assert set(ExitCode) == {ExitCode.DONE, ExitCode.INTERNAL, *(kind.code for kind in KINDS)}


def test_the_remedy_stands_on_its_own_line() -> None:
    assert str(errors.DataError("it is gone", "bring it back")) == "it is gone\n  -> bring it back"
    assert str(errors.DataError("it is gone")) == "it is gone"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_between_processes(kind: type[DiffuSSMError]) -> None:
    back = pickle.loads(pickle.dumps(kind("it is gone", "bring it back")))  # noqa: S301 - made here
    assert type(back) is kind
    assert (back.message, back.remedy, back.code) == ("it is gone", "bring it back", kind.code)


def test_the_table_has_a_row_for_each_code() -> None:
    rows = errors.exit_code_table().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [str(code.value) for code in ExitCode]
    assert any(row.startswith("| 75 | `preempted` |") for row in rows)
