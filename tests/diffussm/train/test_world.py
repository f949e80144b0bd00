from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from diffussm.errors import MissingError
from diffussm.train.world import current

CPU = torch.device("cpu")


def test_no_process_group_is_refused() -> None:
    with pytest.raises(MissingError, match="no process group"):
        current(CPU)


@pytest.mark.world_size(2)
def test_environment_and_group_must_agree() -> None:
    world = current(CPU)
    assert (world.rank, world.size) == (dist.get_rank(), 2)
    assert world.leads == (dist.get_rank() == 0)
    patch = pytest.MonkeyPatch()
    with patch.context() as lie:
        lie.setenv("RANK", "1" if world.rank == 0 else "0")
        with pytest.raises(MissingError, match="process group says"):
            current(CPU)
    with patch.context() as gap:
        gap.delenv("LOCAL_WORLD_SIZE")
        with pytest.raises(MissingError, match="LOCAL_WORLD_SIZE not set"):
            current(CPU)
