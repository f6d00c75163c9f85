"""Hand-offs between pools in GPU memory, or of which one is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sides import connected, tokens
from test_codecs import LOSSY

from kv_transfer.codecs.names import CodecName

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a device for each side")


@pytest.mark.parametrize(
    "devices",
    [
        ("cuda:0", "cuda:0"),
        ("cuda:0", "cpu"),
        ("cpu", "cuda:0"),
        pytest.param(("cuda:0", "cuda:1"), marks=TWO, id="nccl"),
    ],
)
async def test_the_kv_arrives_bit_for_bit(devices: tuple[str, str]) -> None:
    async with connected(devices=devices) as sides:
        theirs, ours = [5, 6, 9, 2], [60, 3, 4, 1]
        sides.offer("t", theirs, 50)
        await sides.take("t", ours, 50)
        assert await sides.end() == ("t", "committed")
        np.testing.assert_array_equal(tokens(sides.taker_pool, ours, 0, 50), tokens(sides.giver_pool, theirs, 0, 50))


@pytest.mark.parametrize("devices", [("cuda:0", "cuda:0"), ("cuda:0", "cpu"), ("cpu", "cuda:0")])
@pytest.mark.parametrize("codec", LOSSY)
async def test_a_codec_brings_the_kv_near(devices: tuple[str, str], codec: CodecName) -> None:
    async with connected(devices=devices, codec=codec) as sides:
        sides.giver_pool.data.normal_()
        theirs, ours = list(range(8)), list(range(20, 28))
        sides.offer("t", theirs, 120)
        await sides.take("t", ours, 120)
        assert await sides.end() == ("t", "committed")
        taken, given = (
            torch.from_numpy(tokens(pool, table, 0, 120)).view(torch.bfloat16).double()
            for pool, table in ((sides.taker_pool, ours), (sides.giver_pool, theirs))
        )
        assert 0 < (taken - given).norm() / given.norm() < LOSSY[codec]
