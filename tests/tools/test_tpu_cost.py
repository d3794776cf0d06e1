# ruff: noqa: E501
"""The cost of a compiled program, read from a short hand-written text."""

from var_jax.tools import tpu_cost as hlo

TEXT = """\
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%product (p: bf16[8,16]) -> bf16[8,8] {
  %p = bf16[8,16]{1,0} parameter(0)
  %piece = bf16[64,16]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}, frontend_attributes={chain_id="4"}
  ROOT %dot = bf16[8,8]{1,0} convolution(%p, %piece), dim_labels=bf_io->bf
}

%other.layer (p: bf16[8,16]) -> bf16[8,8] {
  %p = bf16[8,16]{1,0} parameter(0)
  %piece = bf16[64,16]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}, frontend_attributes={chain_id="5"}
  ROOT %dot = bf16[8,8]{1,0} convolution(%p, %piece), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (p: bf16[64,16]) -> bf16[8,16] {
  %p = bf16[64,16]{1,0} parameter(0)
  %sum = bf16[64,16]{1,0} all-reduce(%p), channel_id=9, to_apply=%add
  ROOT %mine = bf16[8,16]{1,0} dynamic-slice(%sum)
}

%body (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %state = (s32[], bf16[8,16]) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%state), index=1
  %f = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"100"}
  %g = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"100"}
  %l = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%other.layer, backend_config={"estimated_cycles":"100"}
  %k = bf16[8,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/block_causal_forward/pallas_call"}
  %h = bf16[8,16]{1,0} fusion(%f), kind=kCustom, calls=%all-reduce-scatter.1
  %r1 = bf16[16,16]{1,0} reduce-scatter(%h), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %r2 = bf16[16,16]{1,0} reduce-scatter(%h), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %next = (s32[], bf16[8,16]) tuple(%x, %h)
}

%condition (state: (s32[], bf16[8,16])) -> pred[] {
  %state = (s32[], bf16[8,16]) parameter(0)
  %limit = s32[]{:T(128)} constant(16)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %more = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %c = bf16[8,16]{0,1} copy(%x), backend_config={"estimated_cycles":"7"}
  %loop = (s32[], bf16[8,16]) while(%c), condition=%condition, body=%body
  ROOT %out = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""
PROGRAM = hlo.Program(TEXT)


def test_loop_bodies_count_for_every_trip():
    assert hlo.cycles(PROGRAM) == {"matrix products": 16 * 300, "copies and layouts": 7}


def test_a_trip_count_in_the_text():
    line = '%loop = while(%c), body=%b, backend_config={"known_trip_count":{"n":"30"}}'
    assert PROGRAM.trips(line) == 30


def test_kernels_are_counted_by_name():
    assert hlo.kernels(PROGRAM) == {"block_causal_forward": 16}


def test_pieces_count_once_and_reduce_scatters_are_recognized():
    # 64 x 16 bfloat16 each, a trip; the second fusion's piece belongs to the same gather, that of
    # the other layer on the same channel to another, and the reduce-scatters that share a channel
    # are two, beside the one in a fusion.
    size = 64 * 16 * 2 * 16
    assert hlo.collective_bytes(PROGRAM) == {"all-gather": 2 * size, "reduce-scatter": 3 * size}
