from __future__ import annotations

from pathlib import Path

from diffussm.checkpoint.digest import digest_file


def test_the_digest_sees_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(5 << 20))
    before = digest_file(path)
    with path.open("r+b") as file:
        file.seek((5 << 20) - 1)
        file.write(b"\x01")
    assert digest_file(path) != before
