"""Accelerators by name: what is understood, what is refused, and the devices that the compilers give."""

import pytest

from dflash_jax import topology as topologies
from dflash_jax.errors import InputError
from dflash_jax.topology import CHIPS, has_compiler, parse_topology, require_compiler


@pytest.mark.parametrize(
    ("text", "devices"),
    [("v5e:2x2", 4), ("v5p:4x4x4", 64), ("tpu7x:2x2x1", 8), ("v6e:16x16", 256), ("h100:8", 8), ("h100:16", 16)],
)
def test_a_topology_has_as_many_devices_as_jax_sees(text, devices):
    topology = parse_topology(text)
    assert topology.num_devices == devices
    assert str(topology) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v9:2x2", "unknown chip 'v9'; chips are v5e, v5p, v6e, tpu7x, h100, h200, a100"),
        ("v5e", "v5e needs a shape of 2 sizes, as in v5e:2x2"),
        ("v5p:2x2", "v5p needs a shape of 3 sizes, as in v5p:2x2x1"),
        ("v5p:2x0x2", "v5p needs a shape"),
        ("v6e:2*2", "v6e needs a shape"),
        ("h100:2x4", "h100 needs a number of devices, as in h100:8"),
        ("h100:12", "multiple of 8"),
    ],
)
def test_what_is_no_topology_is_refused_in_one_line(text, said):
    with pytest.raises(InputError) as refusal:
        parse_topology(text)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_peaks_are_those_of_one_device():
    both, one = CHIPS["tpu7x"], parse_topology("tpu7x:2x2x1")
    assert one.flops * 2 == both.flops == 2307e12
    assert one.hbm_bytes * 2 == both.hbm_bytes == 192 * 2**30
    assert one.hbm_bandwidth * 2 == both.hbm_bandwidth == 7380e9


def test_the_network_is_the_link_beyond_one_host():
    assert parse_topology("h100:8").link_bandwidth == CHIPS["h100"].link_bandwidth
    assert parse_topology("h100:16").link_bandwidth == CHIPS["h100"].network_bandwidth < 450e9


def test_every_chip_says_where_its_peaks_are_from():
    assert all(chip.source and chip.flops > 1e14 and chip.hbm_bandwidth > 5e11 for chip in CHIPS.values())


@pytest.mark.parametrize("name", ["v5p:2x2x1", "h100:8"])
def test_a_missing_compiler_is_named_with_what_to_install(monkeypatch, name):
    monkeypatch.setattr(topologies, "_installed", lambda module: False)
    with pytest.raises(InputError, match=r"pip install 'dflash-jax\[aot\]'"):
        require_compiler(parse_topology(name).chip)
    with pytest.raises(InputError, match="compiler for"):
        parse_topology(name).devices()


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h100:8", "h200:8", "a100:8"])
def test_compile_only_devices(name):
    topology = parse_topology(name)
    if not has_compiler(topology.chip):
        pytest.skip("needs the aot extra")
    devices = topology.devices()
    assert len(devices) == topology.num_devices
    assert devices[0].platform == ("tpu" if topology.chip.platform == "tpu" else "gpu")


@pytest.mark.skipif(not has_compiler(CHIPS["v5p"]), reason="needs the aot extra")
def test_a_shape_that_the_compiler_refuses_is_an_input_error():
    with pytest.raises(InputError, match="v5p:3x1x1: the compiler does not take it"):
        parse_topology("v5p:3x1x1").devices()
