from __future__ import annotations

from pathlib import Path

import pytest

from diffussm.data.ranged import braces, expand, open_file
from diffussm.errors import DataError
from tests.s3 import BUCKET, S3Server


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{9..11}", ["a-9", "a-10", "a-11"]),
        ("{x,y}-{0..1}", ["x-0", "x-1", "y-0", "y-1"]),
        ("a-{3..1}", []),
    ],
)
def test_braces(pattern: str, texts: list[str]) -> None:
    assert braces(pattern) == texts


@pytest.fixture
def place(tmp_path: Path, s3_server: S3Server, request: pytest.FixtureRequest) -> list[str]:
    """The same files in a folder and in a bucket."""
    prefix = request.node.name.split("[")[0]
    for name in ("b/2.tar", "b/10.tar", "c.tar", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 1000)
        s3_server.client().put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=name.encode() * 1000)
    return [str(tmp_path), s3_server.url(prefix)]


def test_patterns_on_disk_and_in_a_bucket(place: list[str]) -> None:
    for root in place:
        assert expand(f"{root}/b/*.tar", ".tar") == [f"{root}/b/10.tar", f"{root}/b/2.tar"]
        assert expand(f"{root}/b/{{2..2}}.tar", ".tar") == [f"{root}/b/2.tar"]
        assert expand(f"{root}/{{c,b/2}}.tar", ".tar") == [f"{root}/c.tar", f"{root}/b/2.tar"]
        assert expand(f"{root}/", ".tar") == [f"{root}/b/10.tar", f"{root}/b/2.tar", f"{root}/c.tar"]
        with pytest.raises(DataError, match=r"b/3\.tar names no \.tar file"):
            expand(f"{root}/b/{{2..3}}.tar", ".tar")
        with pytest.raises(DataError, match="twice"):
            expand(f"{root}/{{c,c}}.tar", ".tar")


def test_a_file_is_read_where_it_is_sought(place: list[str]) -> None:
    for root in place:
        with open_file(f"{root}/b/2.tar", 100) as file:
            assert file.read(7) == b"b/2.tar"
            file.seek(-7, 2)
            assert file.read(100) == b"b/2.tar"
            assert file.read(1) == b""
            file.seek(700)
            assert file.read() == b"b/2.tar" * 900
        with pytest.raises(DataError, match=r"gone\.tar is not there"):
            open_file(f"{root}/gone.tar", 100)
