from __future__ import annotations

from pathlib import Path

from diffussm.checkpoint.retain import delete, litter, superfluous, tidy
from diffussm.checkpoint.store import LocalStore


def test_the_newest_stay() -> None:
    names = ["c/000000000003", "c/000000000001", "c/000000000002"]
    last = "c/000000000003"
    assert superfluous(names, 2, last) == ["c/000000000001"]
    assert superfluous(names, 3, last) == []
    assert superfluous(names, 1, last) == ["c/000000000001", "c/000000000002"]


def test_a_newer_one_that_was_refused_costs_no_good_one_its_place() -> None:
    names = ["c/000000000001", "c/000000000002", "c/000000000009"]
    assert superfluous(names, 1, saved="c/000000000002") == ["c/000000000001"]
    assert superfluous(names, 2, saved="c/000000000002") == []


def test_milestones_stay_for_ever() -> None:
    folders = {"c/1": False, "c/2": True, "c/3": False, "c/4": True, "c/5": False}
    assert superfluous(folders, 1, "c/5") == ["c/1", "c/3"]
    assert superfluous(folders, 2, "c/5") == ["c/1", "c/3"]
    assert superfluous(folders, 3, "c/5") == ["c/1"]


def test_litter_is_what_killed_saves_left() -> None:
    keys = [
        "c/1/attempt0001-rank00000.safetensors",  # its manifest never came
        "c/2/manifest.json", "c/2/attempt0001-rank00000.safetensors",
        "c/3/quarantine.json", "c/3/attempt0001-rank00000.safetensors",
        "c/4/manifest.json", "c/4/attempt0001-rank00000.safetensors", "c/4/attempt0002-rank00000.safetensors",
        "c/4/quarantine.json",
        "c/5/attempt0002-rank00000.safetensors",  # under way
    ]  # fmt: skip
    assert litter(keys, "c/4", 2) == [
        "c/1/attempt0001-rank00000.safetensors", "c/4/attempt0001-rank00000.safetensors", "c/4/quarantine.json",
    ]  # fmt: skip


def test_the_manifest_goes_first_and_neighbours_stay(tmp_path: Path) -> None:
    class Recording(LocalStore):
        deleted: list[str] = []  # noqa: RUF012 - one store in this test

        def delete(self, key: str) -> None:
            self.deleted.append(key)
            super().delete(key)

    store = Recording(str(tmp_path))
    for key in ("c/1/a.safetensors", "c/1/manifest.json", "c/10/manifest.json"):
        store.write(key, b"x")
    delete(store, "c/1")
    assert store.deleted == ["c/1/manifest.json", "c/1/a.safetensors"]
    assert list(store.keys()) == ["c/10/manifest.json"]


def test_an_empty_folder_of_a_killed_write_or_deletion_goes(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    for folder in ("c/1", "c/2", "c/9"):
        (tmp_path / folder).mkdir(parents=True)
    store.write("c/2/attempt0001-rank00000.safetensors", b"x")
    assert list(store.unfinished("c/")) == ["c/1/", "c/9/"]
    tidy(store, "c/3", attempt=1, keep=2)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["9"]  # newer ones are left alone
