# ruff: noqa: E501
"""Reading compiled programs: text as the TPU and GPU compilers write it, with answers worked out by hand."""

import pytest

from dflash_jax.hlo import Program, Shape

TEXT = r"""HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.9 = f32[] add(%a, %b)
}

%relayout (param_0: bf16[64,32]) -> bf16[32,64] {
  %param_0 = bf16[64,32]{1,0} parameter(0)
  ROOT %transpose.1 = bf16[32,64]{1,0} transpose(%param_0), dimensions={1,0}
}

%scaled (param_0.1: bf16[64,32]) -> bf16[64,32] {
  %param_0.1 = bf16[64,32]{1,0} parameter(0)
  ROOT %multiply.1 = bf16[64,32]{1,0} multiply(%param_0.1, %param_0.1)
}

%wrapped (param_0.2: bf16[16,32]) -> bf16[64,32] {
  %param_0.2 = bf16[16,32]{1,0} parameter(0)
  ROOT %all-gather.5 = bf16[64,32]{1,0} all-gather(%param_0.2), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main.1 (w: bf16[16,32], x: f32[8,100]) -> f32[8,100] {
  %w = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="weights[0][\'layers\'][0][\'down\'].value"}
  %x = f32[8,100]{1,0:T(8,128)} parameter(1), metadata={op_name="state.tokens"}
  %copy.1 = bf16[16,32]{0,1} copy(%w), backend_config={"estimated_cycles":"70"}
  %gathered = bf16[64,32]{1,0} all-gather(%copy.1), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="jit(step)/verify/layer0/mlp/dot"}
  %async = ((bf16[16,32]{1,0}), bf16[64,32]{1,0}) async-start(%w), calls=%wrapped, metadata={op_name="jit(step)/verify/layer1/mlp/dot"}
  %async-done.1 = bf16[64,32]{1,0} async-done(%async)
  %turned = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} fusion(%gathered), kind=kLoop, calls=%relayout, backend_config={"estimated_cycles":"30"}
  %scaled.1 = bf16[64,32]{1,0} fusion(%gathered), kind=kLoop, calls=%scaled
  %rows = bf16[64,32]{1,0} all-gather(%scaled.1), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0','axis_2'}, dimensions={0}
  %reduce.1 = (f32[8,100]{1,0}, f32[8]{0}) all-reduce(%x, %x), channel_id=4, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add.1
  %first = f32[8,100]{1,0} get-tuple-element(%reduce.1), index=0
  %scattered = f32[2,100]{1,0} reduce-scatter(%first), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add.1
  %start = (f32[2,100]{1,0}, f32[2,100]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%scattered), channel_id=6, source_target_pairs={{0,1},{1,0}}
  %done = f32[2,100]{1,0} collective-permute-done(%start)
  ROOT %big = f32[8,100,64]{2,1,0} custom-call(%first, /*index=1*/%done), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/accept/logits"}
}
"""


@pytest.fixture(scope="module")
def program():
    return Program(TEXT)


def test_every_collective_is_found_once_with_its_size_and_devices(program):
    found = [(c.kind, c.bytes, c.devices) for c in program.collectives()]
    gathered = 64 * 32 * 2
    assert sorted(found) == sorted(
        [
            ("all-gather", gathered, 4),  # inside the asynchronous call
            ("all-gather", gathered, 4),
            ("all-gather", gathered, 8),  # the axes of the mesh that it names
            ("all-reduce", 4 * (800 + 8), 4),
            ("reduce-scatter", 4 * 800, 4),
            ("collective-permute", 4 * 200, 2),
        ]
    )


def test_bytes_sent_are_those_of_a_ring(program):
    sent = {(c.kind, c.devices): c.sent for c in program.collectives()}
    assert sent["all-gather", 4] == 64 * 32 * 2 * 3 / 4
    assert sent["all-reduce", 4] == 2 * 4 * 808 * 3 / 4
    assert sent["reduce-scatter", 4] == 4 * 800 * 3 / 4
    assert sent["collective-permute", 2] == 4 * 200


def test_a_gathered_weight_is_told_from_gathered_rows(program):
    """Through copies and calls the parameter is still the weight; after a product it is something new."""
    gathers = [c.of_weight for c in program.collectives() if c.kind == "all-gather"]
    weight = "weights[0]['layers'][0]['down'].value"
    assert sorted(gathers, key=str) == [None, weight, weight]


def test_the_body_of_a_call_stands_where_it_is_called(program):
    assert {c.source for c in program.collectives() if c.of_weight} == {
        "jit(step)/verify/layer0/mlp/dot",
        "jit(step)/verify/layer1/mlp/dot",
    }


def test_temporaries_are_results_that_run_by_themselves(program):
    found = [(str(t.shape), t.shape.space, t.op) for t in program.temporaries()]
    assert found[0] == ("f32[8,100,64]", 0, "custom-call")
    assert ("bf16[32,64]", 1, "fusion") in found  # in VMEM
    assert not any(op in ("parameter", "transpose", "multiply", "get-tuple-element", "add") for *_, op in found)


def test_copies_of_weights_are_named(program):
    copies = {(str(t.shape), t.op) for t in program.temporaries() if t.of_weight}
    assert ("bf16[16,32]", "copy") in copies
    assert ("bf16[64,32]", "fusion") not in copies  # computed


def test_estimated_cycles_are_summed_over_what_runs(program):
    assert sum(i.cycles for _, i in program.scheduled()) == 100


def test_arguments_keep_their_names(program):
    assert [i.op_name for i in program.parameters()] == ["weights[0]['layers'][0]['down'].value", "state.tokens"]


@pytest.mark.parametrize(
    ("dtype", "size"), [("bf16", 2), ("f32", 4), ("pred", 1), ("s8", 1), ("f8e4m3fn", 1), ("s4", 0.5), ("u32", 4)]
)
def test_widths_of_dtypes(dtype, size):
    assert Shape(dtype, (6, 100)).bytes == 600 * size
