"""The topology of a cluster: from what Ray and nvidia-smi say, and from links that were timed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.cli import cli
from cluster.hardware import of_gpus
from cluster.link_speed import Echo, Speed, measure
from cluster.nvidia_topo import Matrix, card_gb_s, parse_matrix
from cluster.ray_nodes import RayNode
from cluster.ray_topology import topology_of
from core.errors import ConfigError
from placement.topology import read_topology, to_yaml

MATRIX = (
    "\t\x1b[4mGPU0\tGPU1\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tPIX\tSYS\t0-55,112-167\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\tNODE\t0-55,112-167\t0\t\tN/A\n"
    "NIC0\tPIX\tSYS\t X \tSYS\t\t\t\t\n"
    "NIC1\tSYS\tNODE\tSYS\t X \t\t\t\t\n\n"
    "Legend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n\n"
    "NIC Legend:\n\n  NIC0: mlx5_0\n  NIC1: mlx5_1\n"
)
LISTED = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559\n"


def gpu_node(name: str, gpus: int = 8, accelerator: str | None = "H100") -> RayNode:
    return RayNode(name, f"10.0.0.{name}", 64, gpus, 10**12, {}, accelerator)


def core_node(name: str, cores: int = 4) -> RayNode:
    return RayNode(name, f"10.0.1.{name}", cores, 0, cores * 2 * 10**9, {})


def test_the_card_nearest_to_each_gpu_counts_and_of_those_the_farthest() -> None:
    assert parse_matrix(MATRIX) == Matrix(between=450.0, out=15.0)
    older = MATRIX.replace("NIC0", "mlx5_0").replace("NIC1", "mlx5_1")
    assert parse_matrix(older) == parse_matrix(MATRIX)


def test_cores_after_the_matrix_are_no_links() -> None:
    alone = "\tGPU0\tCPU Affinity\nGPU0\t X \t0-15\n"
    assert parse_matrix(alone) == Matrix(between=0.0, out=None)


def test_a_machine_with_cards_has_a_link_to_others_of_its_kind() -> None:
    found = of_gpus(LISTED, MATRIX, card_gb_s=12.5)
    assert found.across("H100", "H100") is not None
    assert [(wire.within, wire.between, wire.gb_per_s) for wire in found.links] == [
        ("here", None, 450.0),
        (None, ("here", "here"), 12.5),
    ]


@pytest.mark.parametrize(
    ("files", "rate"),
    [
        ({"infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n", "net/eth0/speed": "10000\n"}, 50.0),
        ({"net/eth0/speed": "25000\n", "net/lo/speed": "10000000\n", "net/eth1/speed": "-1\n"}, 3.125),
        ({"net/eth0/speed": ""}, None),
        ({}, None),
    ],
)
def test_the_rate_of_a_card_is_what_the_kernel_says(tmp_path: Path, files: dict[str, str], rate: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert card_gb_s(tmp_path) == rate


def test_nodes_alike_are_one_kind_and_every_link_is_there(tmp_path: Path) -> None:
    found = topology_of([gpu_node("1"), gpu_node("2"), core_node("3"), RayNode("4", "10.0.0.4", 0, 0, 10**9, {})])
    assert found.pools == {"H100": 16, "cpu": 4}
    assert [(node.name, node.count, node.memory_gb) for node in found.nodes] == [("h100-0", 2, 80), ("cpu-1", 1, 2.0)]
    (tmp_path / "t.yaml").write_text(to_yaml(found))
    assert read_topology(tmp_path / "t.yaml") == found


def test_measured_links_replace_those_of_the_table_and_the_slowest_counts() -> None:
    speeds = {("1", "2"): 3.0, ("1", "3"): 1.0, ("2", "3"): 2.0}
    found = topology_of(
        [core_node("1"), core_node("2"), core_node("3")],
        inside=lambda node: Speed(float(node.node_id) + 5, 9.0),
        between=lambda one, other: Speed(speeds[one.node_id, other.node_id], 70.04),
    )
    inside, across = found.inside("cpu"), found.across("cpu", "cpu")
    assert inside is not None
    assert across is not None
    assert (inside.gb_per_s, across.gb_per_s, across.latency_us) == (6.0, 1.0, 70.0)
    assert "measured" in found.source


def test_nodes_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Ray does not know the GPUs of the node 10\.0\.0\.1: write a topology file"):
        topology_of([gpu_node("1", accelerator=None)])
    with pytest.raises(ConfigError, match="no device 'Abacus' in the table"):
        topology_of([gpu_node("1", accelerator="Abacus")])
    with pytest.raises(ConfigError, match="no node of the Ray cluster has cores or GPUs"):
        topology_of([])


def test_a_link_is_timed_over_tcp() -> None:
    echo = Echo("127.0.0.1")
    answering = threading.Thread(target=echo.answer)
    answering.start()
    found = measure(echo.where())
    answering.join(10)
    assert found.gb_per_s > 0.01
    assert 0 < found.latency_us < 10**6


def test_this_machine_is_printed_as_a_file_that_is_read_again(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["topology", "--out", str(tmp_path / "t.yaml")], catch_exceptions=False)
    assert done.output == ""
    assert read_topology(tmp_path / "t.yaml").pools


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("topology", "--measure"), "--measure has no meaning without --ray-address"),
        (("topology", "--ray-address", "http://x"), "--ray-address http://x: "),
        (
            (
                "plan",
                "m",
                "--slo",
                "ttft=1,tpot=1",
                "--lengths",
                "prompt=1,output=1",
                "--ray-address",
                "a",
                "--device",
                "H100",
            ),
            "--ray-address says what the topology is",
        ),
        (("topology", "--ray-address", "127.0.0.1:1"), "--ray-address 127.0.0.1:1: nobody answers there: .*refused"),
        (("topology", "--ray-address", "127.0.0.1:99999"), "nobody answers there"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
