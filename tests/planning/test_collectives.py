"""Counting collectives in HLO text, including loops, asynchronous instructions and the traffic of ring algorithms."""

# ruff: noqa: E501

import pytest

from micro_dit.planning.collectives import Traffic, collectives

PROGRAM = """\
HloModule jit_step, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (t: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %t = (s32[], bf16[8,64]{1,0}) parameter(0)
  %v = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %all-gather.1 = bf16[32,64]{1,0:T(8,128)(2,1)} all-gather(%v), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %out = (s32[], bf16[8,64]{1,0}) tuple(%i, %w)
}

%cond (t: (s32[], bf16[8,64])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

%wrapped (p: f32[16]) -> f32[2] {
  ROOT %reduce-scatter.5 = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

ENTRY %main (a: f32[16], b: f32[4,4]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %all-reduce.2 = (f32[16]{0}, f32[4,4]{1,0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %loop = (s32[], bf16[8,64]{1,0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"59"}}
  %async = ((f32[16]), f32[2], u32[]) async-start(%a), calls=%wrapped
  %done = f32[2]{0} async-done(%async)
  %all-gather-start.3 = (f32[16]{0}, f32[128]{0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}
  %all-gather-done.3 = f32[128]{0} all-gather-done(%all-gather-start.3)
  ROOT %collective-permute.4 = f32[16]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
}
"""


def test_traffic_is_summed_over_a_program() -> None:
    found = collectives(PROGRAM, devices=8)
    assert set(found) == {"all-reduce", "all-gather", "reduce-scatter", "collective-permute"}
    assert found["all-reduce"] == Traffic(1, 128, 128)  # 2·(2-1)/2 times 16 + 16 float32
    gathered = 59 * 32 * 64 * 2
    assert found["all-gather"].count == 60
    assert found["all-gather"].bytes == pytest.approx(gathered + 512)
    assert found["all-gather"].sent == pytest.approx(gathered * 3 / 4 + 512 * 7 / 8)
    assert found["all-gather"].hidden == 1  # the instruction with -start and -done
    assert found["reduce-scatter"] == Traffic(1, 64, 56, hidden=1)
    assert found["collective-permute"] == Traffic(1, 64, 64)


TPU = """\
%all-reduce-scatter.1 (input: bf16[16,64]) -> bf16[2,64] {
  %all-reduce.6 = bf16[16,64]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=8, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.13 = bf16[2,64]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.6, %multiply.6, %zero), dynamic_slice_sizes={2,64}
}

%begun (p: bf16[2,64]) -> (bf16[2,64], bf16[16,64], u32[]) {
  %all-gather.1 = bf16[16,64]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %start = (bf16[2,64]{1,0}, bf16[16,64]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (p: bf16[2,64], q: bf16[8,8]) -> (bf16[16,64], bf16[8,8]) {
  %product = bf16[8,8]{1,0} convolution(%q, %q), dim_labels=bf_io->bf
  %all-gather.2 = bf16[16,64]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %both = (bf16[16,64]{1,0}, bf16[8,8]{1,0}) tuple(%all-gather.2, %product)
}

ENTRY %main (p: bf16[2,64], q: bf16[8,8], g: bf16[16,64]) -> bf16[2,64] {
  %async-collective-start = (bf16[2,64]{1,0}, bf16[16,64]{1,0}, u32[]) fusion(%p), kind=kCustom, calls=%begun
  %fusion.7 = (bf16[16,64]{1,0}, bf16[8,8]{1,0}) fusion(%p, %q), kind=kOutput, calls=%async_collective_fusion.7
  %all-gather.3 = bf16[16,64]{1,0} all-gather(%p), channel_id=4, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %fusion.8 = bf16[2,64]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_tpu_collectives_in_fusions_are_counted_once() -> None:
    size = 16 * 64 * 2
    assert collectives(TPU, devices=8) == {
        "reduce-scatter": Traffic(1, size, size * 7 / 8),
        "all-gather": Traffic(2, 2 * size, 2 * size * 7 / 8, hidden=1),
    }


def test_one_device_sends_nothing() -> None:
    assert collectives("ENTRY %main (a: f32[2]) -> f32[2] {\n  ROOT %b = f32[2]{0} negate(%a)\n}", devices=1) == {}


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("[2,4]<=[8]", 4),
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("mesh['data'=4,'fsdp'=2] {'fsdp'}", 2),
        ("mesh['data'=4,'fsdp'=2] {'data','fsdp'}", 8),
        ("mesh['data'=4,'fsdp'=2] {'data':(1)2,'fsdp'}", 4),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
        ("{}", 8),
    ],
)
def test_the_size_of_device_groups_is_parsed(groups: str, size: int) -> None:
    line = f"ROOT %r = f32[64]{{0}} all-reduce(%a), channel_id=1, replica_groups={groups}, to_apply=%add"
    found = collectives(f"ENTRY %main (a: f32[64]) -> f32[64] {{\n  {line}\n}}", devices=8)
    assert found["all-reduce"].sent == pytest.approx(256 * 2 * (size - 1) / size)
