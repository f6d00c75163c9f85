"""Clusters from a file, and this machine from what nvidia-smi prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.hardware import copy_gb_s, of_cores, of_gpus
from core.errors import ConfigError
from placement.topology import Topology, of_device, read_topology

MIXED = """
nodes:
  - {name: fast, device: H100, devices: 8, memory_gb: 80, count: 2, dollars_per_hour: 3}
  - {name: cheap, device: L40S, devices: 4, memory_gb: 48, dollars_per_hour: 1}
links:
  - {within: fast, gb_per_s: 450}
  - {within: cheap, gb_per_s: 32}
  - {between: [fast, fast], gb_per_s: 50}
  - {between: [cheap, fast], gb_per_s: 12.5, latency_us: 30}
"""


def read(tmp_path: Path, text: str) -> Topology:
    (tmp_path / "cluster.yaml").write_text(text)
    return read_topology(tmp_path / "cluster.yaml")


def test_pools_are_counted_over_nodes(tmp_path: Path) -> None:
    found = read(tmp_path, MIXED)
    assert found.pools == {"H100": 16, "L40S": 4}
    assert (found.most_in_a_node("L40S"), found.most_in_a_node("H100"), found.priced) == (4, 8, True)


def test_links_are_those_of_the_kinds_of_devices_and_of_several_the_slowest_counts(tmp_path: Path) -> None:
    older = "{name: older, device: H100, devices: 8, memory_gb: 80}\nlinks:\n  - {within: older, gb_per_s: 300}\n"
    older += "".join(f"  - {{between: [older, {name}], gb_per_s: 25}}\n" for name in ("fast", "cheap"))
    mixed, three = read(tmp_path, MIXED), read(tmp_path, MIXED.replace("links:\n", f"  - {older}"))
    for found, speeds in ((mixed, (450, 32, 50, 12.5, None)), (three, (300, 32, 25, 12.5, None))):
        within = [found.inside(kind) for kind in ("H100", "L40S")]
        between = [found.across(*pair) for pair in (("H100", "H100"), ("L40S", "H100"), ("L40S", "L40S"))]
        assert tuple(wire and wire.gb_per_s for wire in (*within, *between)) == speeds


def test_a_link_takes_its_time_for_each_token_and_some_more(tmp_path: Path) -> None:
    across = read(tmp_path, MIXED).across("H100", "L40S")
    assert across is not None
    link = across.link(125_000)
    assert (link.ms_per_token, link.latency_ms) == pytest.approx((0.01, 0.03))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("links:", "links: []\nrest:"), "unknown field `rest`"),
        (("  - {within: fast, gb_per_s: 450}\n", ""), "links: none within fast: KV would have no way there"),
        (("  - {between: [fast, fast], gb_per_s: 50}\n", ""), "links: none between fast and fast"),
        (("{within: cheap,", "{within: dear,"), r"links\[1\]: there is no node 'dear'; there are cheap, fast"),
        (("{within: cheap,", "{"), r"links\[1\]: has either within"),
        (("gb_per_s: 450", "gb_per_s: 0"), r"links\[0\]\.gb_per_s: 0\.0 is not above 0"),
        (("latency_us: 30", "latency_us: -1"), r"links\[3\]\.latency_us: -1"),
        (("devices: 4", "devices: 0"), r"nodes\[1\]\.devices: 0 is not 1 or more"),
        (("memory_gb: 48", "memory_gb: -1"), r"nodes\[1\]\.memory_gb: -1"),
        (("dollars_per_hour: 1}", "dollars_per_hour: 0}"), r"nodes\[1\]\.dollars_per_hour: 0"),
        (("name: cheap", "name: fast"), r"nodes\[0\]\.name: two kinds are named fast"),
        (("devices: 8", "devices: 10001"), r"<= 10000 - at `\$\.nodes\[0\]\.devices`"),
        (("devices: 8", "devices: many"), r"nodes\[0\]\.devices"),
    ],
)
def test_what_is_wrong_is_said_with_the_file_and_the_field(tmp_path: Path, change, message: str) -> None:
    assert change[0] in MIXED
    with pytest.raises(ConfigError, match=rf"cluster\.yaml: .*{message}"):
        read(tmp_path, MIXED.replace(*change))


def test_a_topology_without_links_is_refused(tmp_path: Path) -> None:
    told = (
        "links: none within fast, none within cheap, none between fast and fast, none between fast and cheap: KV would "
        "have no way there; add 4, the first as {within: fast, gb_per_s: 100}"
    )
    with pytest.raises(ConfigError, match=told):
        read(tmp_path, MIXED[: MIXED.index("links")])


def test_a_link_that_is_missing_is_told_as_it_is_written(tmp_path: Path) -> None:
    given = MIXED.replace("  - {between: [cheap, fast], gb_per_s: 12.5, latency_us: 30}\n", "")
    with pytest.raises(ConfigError, match=r"add 1, the first as \{between: \[fast, cheap\], gb_per_s: 100\}"):
        read(tmp_path, given)


def test_one_device_needs_no_link(tmp_path: Path) -> None:
    assert read(tmp_path, "nodes: [{name: a, device: H100, devices: 1, memory_gb: 80}]").across("H100", "H100") is None


def test_so_many_of_a_device_are_full_nodes_and_a_rest() -> None:
    found = of_device("H100", 20)
    assert [(node.count, node.devices) for node in found.nodes] == [(2, 8), (1, 4)]
    assert found.pools == {"H100": 20}
    assert of_device("H100", 4).pools == {"H100": 4}


# --- this machine ----------------------------------------------------------------------------------------------------

LISTED = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559\n"
MATRIX = """\tGPU0\tGPU1\tNIC0\tCPU Affinity
GPU0\t X \tNV18\tPIX\t0-31
GPU1\tNV18\t X \tSYS\t0-31
NIC0\tPIX\tSYS\t X
"""


def test_gpus_are_what_nvidia_smi_says() -> None:
    found = of_gpus(LISTED, MATRIX)
    assert found.pools == {"H100": 2}
    assert found.nodes[0].memory_gb == pytest.approx(85.5, abs=0.1)
    assert found.links[0].gb_per_s == 450


def test_the_slowest_pair_counts() -> None:
    assert of_gpus(LISTED, MATRIX.replace("GPU1\tNV18", "GPU1\tSYS")).links[0].gb_per_s == 12


@pytest.mark.parametrize(
    ("listed", "matrix", "message"),
    [
        ("", MATRIX, "names no GPU"),
        (LISTED + "NVIDIA L4, 100\n", MATRIX, "NVIDIA H100 80GB HBM3, NVIDIA L4"),
        (LISTED, MATRIX.replace("NV18", "WEIRD"), "WEIRD"),
        (LISTED, "", "topo -m says nothing of GPUs"),
    ],
)
def test_output_that_is_not_understood_asks_for_a_file(listed: str, matrix: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*write a topology file"):
        of_gpus(listed, matrix)


def test_without_gpus_every_core_is_a_device() -> None:
    found = of_cores(4, 8 * 10**9, 12.0)
    assert (found.pools, found.nodes[0].memory_gb, found.links[0].gb_per_s) == ({"cpu": 4}, 2.0, 12.0)
    assert of_cores(1, 10**9, 12.0).links == ()


def test_copies_in_memory_are_measured() -> None:
    assert copy_gb_s() > 0.1
