"""NVFP4 weights times tens of rows of halves on sm_90: each warpgroup decodes its weight into the registers that `wgmma` reads.

For few rows of x the decoded weight, twice through shared memory in `hopper_mm`, would be most of the traffic there. Here it is the left
operand, from registers, and x is the right one. A warpgroup waits for each of its products at once, so that no register is written while
`wgmma` reads it (https://github.com/triton-lang/triton/issues/9433); meanwhile the other warpgroups of the program decode. A warp of its
own keeps the stages of shared memory full. x comes with the columns of each 128 in the order of `pair_columns_kernel`.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from fp4compile.codegen.kernels.hopper_mm import _barrier, _barriers, _load_tile, as_steps, decode_fragments, store_transposed, tile_at

CHUNK: gl.constexpr = gl.constexpr(128)  # of k, the unit of the tiled layout
STEP: gl.constexpr = gl.constexpr(64)  # of k, what x comes in
ROWS: gl.constexpr = gl.constexpr(64)  # of the weight, of a warpgroup


@gluon.jit
def register_mm_kernel(
    x_desc, codes_desc, scales_desc, a_global_ptr, b_global_ptr, bias_ptr, out_ptr,
    m, n, chunks, chunks_a_split, a_global_stride, b_global_stride, split_stride,
    BLOCK_M: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, FP16: gl.constexpr, BAND: gl.constexpr,
    PDL: gl.constexpr,    MULTIPLY_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """out (M, N) contiguous, or for each split of k one of (splits, M, N), whose sum it is then.

    Tiles: x (BLOCK_M, 64) of (M, 128 C), zero past its end; tiled codes (4 GROUPS, 8, 32) of (T, 8 C, 32) int32 and scales
    (4 GROUPS, 1, 32) of (T, C, 32) int32. A program has GROUPS warpgroups of 64 rows of the weight each, and stays for as many
    tiles of the output as there are. BAND row tiles of x run together.
    """
    HALF: gl.constexpr = gl.float16 if FP16 else gl.bfloat16
    first = gl.program_id(1) * chunks_a_split
    count = gl.minimum(chunks - first, chunks_a_split)
    out_ptr += gl.program_id(1).to(gl.int64) * split_stride
    x_shared = gl.allocate_shared_memory(HALF, [STAGES, BLOCK_M, CHUNK], x_desc.layout)
    codes_shared = gl.allocate_shared_memory(gl.int32, [STAGES, 4 * GROUPS, 8, 32], codes_desc.layout)
    scales_shared = gl.allocate_shared_memory(gl.int32, [STAGES, 4 * GROUPS, 1, 32], scales_desc.layout)
    ready = _barriers(STAGES, 1)
    free = _barriers(STAGES, GROUPS)
    last = (a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, a_global_stride, b_global_stride)
    loads = (x_desc, codes_desc, scales_desc, x_shared, codes_shared, scales_shared, ready, free, m, n, first, count, BAND, PDL)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply, (x_shared, codes_shared, scales_shared, ready, free, count, last, 0, BAND, FP16)),
                (_load_all, loads),
            ],
            [1], [LOAD_REGISTERS],
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (x_shared, codes_shared, scales_shared, ready, free, count, last, 0, BAND, FP16)),
                (_multiply, (x_shared, codes_shared, scales_shared, ready, free, count, last, 1, BAND, FP16)),
                (_load_all, loads),
            ],
            [4, 1], [MULTIPLY_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
    else:
        gl.static_assert(GROUPS == 4)
        gl.warp_specialize(
            [
                (_multiply, (x_shared, codes_shared, scales_shared, ready, free, count, last, 0, BAND, FP16)),
                (_multiply, (x_shared, codes_shared, scales_shared, ready, free, count, last, 1, BAND, FP16)),
                (_multiply, (x_shared, codes_shared, scales_shared, ready, free, count, last, 2, BAND, FP16)),
                (_multiply, (x_shared, codes_shared, scales_shared, ready, free, count, last, 3, BAND, FP16)),
                (_load_all, loads),
            ],
            [4, 4, 4, 1], [MULTIPLY_REGISTERS, MULTIPLY_REGISTERS, MULTIPLY_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip


@gluon.jit
def _load_all(
    x_desc, codes_desc, scales_desc, x_shared, codes_shared, scales_shared, ready, free, m, n, first, count,
    BAND: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Chunk after chunk of x, codes and scales into the stages, each when its readers are done with what it held."""
    STAGES: gl.constexpr = codes_shared.shape[0]
    TILES: gl.constexpr = codes_shared.shape[1]
    BLOCK_M: gl.constexpr = x_shared.shape[1]
    tiles = gl.cdiv(m, BLOCK_M) * gl.cdiv(n, 16 * TILES)
    row, column = tile_at(gl.program_id(0), m, n, BLOCK_M, 16 * TILES, BAND)
    for load in gl.static_range(STAGES):
        _load_weight(x_desc, codes_desc, scales_desc, codes_shared, scales_shared, ready, column // 16, first + load, load, load < count)
    if PDL:
        tl.extra.cuda.gdc_wait()  # the weight is older than the launch before this one, which made x
    for load in gl.static_range(STAGES):
        _load_x(x_desc, x_shared, ready, row, first + load, load, load < count)
    begun = gl.minimum(count, STAGES)
    done = begun
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = tile_at(index, m, n, BLOCK_M, 16 * TILES, BAND)
        # No variable of the loop: Triton takes two that begin alike for one, whatever becomes of them.
        for i in range(gl.where(index == gl.program_id(0), begun, 0), count):
            mbarrier.wait(free.index(done % STAGES), (done // STAGES & 1) ^ 1)
            _load_weight(x_desc, codes_desc, scales_desc, codes_shared, scales_shared, ready, column // 16, first + i, done, True)
            _load_x(x_desc, x_shared, ready, row, first + i, done, True)
            done += 1


@gluon.jit
def _load_weight(x_desc, codes_desc, scales_desc, codes_shared, scales_shared, ready, tile, chunk, i, wanted):
    """The first half of load `i`, which announces both."""
    stage = i % codes_shared.shape[0]
    at = ready.index(stage)
    mbarrier.expect(at, 2 * x_desc.block_type.nbytes + codes_desc.block_type.nbytes + scales_desc.block_type.nbytes, pred=wanted)
    _load_tile(codes_desc, [tile, chunk * 8, 0], at, codes_shared.index(stage), pred=wanted)
    _load_tile(scales_desc, [tile, chunk, 0], at, scales_shared.index(stage), pred=wanted)


@gluon.jit
def _load_x(x_desc, x_shared, ready, row, chunk, i, wanted):
    stage = i % ready.shape[0]
    at = ready.index(stage)
    steps = as_steps(x_shared)
    _load_tile(x_desc, [row, chunk * CHUNK], at, steps.index(2 * stage), pred=wanted)
    _load_tile(x_desc, [row, chunk * CHUNK + STEP], at, steps.index(2 * stage + 1), pred=wanted)


@gluon.jit
def _multiply(
    x_shared, codes_shared, scales_shared, ready, free, count, last, GROUP: gl.constexpr, BAND: gl.constexpr, FP16: gl.constexpr
):  # fmt: skip
    """[64, BLOCK_M] of the transposed output at a time, in the registers of one warpgroup."""
    a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, a_global_stride, b_global_stride = last
    STAGES: gl.constexpr = codes_shared.shape[0]
    BLOCK_N: gl.constexpr = 16 * codes_shared.shape[1]
    BLOCK_M: gl.constexpr = x_shared.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    CODES: gl.constexpr = _codes_layout()
    SCALES: gl.constexpr = _scales_layout()
    done = gl.to_tensor(0)
    for index in range(gl.program_id(0), gl.cdiv(m, BLOCK_M) * gl.cdiv(n, BLOCK_N), gl.num_programs(0)):
        acc = gl.zeros([ROWS, BLOCK_M], gl.float32, layout=MMA)
        for _ in range(count):
            stage = done % STAGES
            mbarrier.wait(ready.index(stage), done // STAGES & 1)
            codes = codes_shared.index(stage).slice(4 * GROUP, 4).load(CODES)
            scales = scales_shared.index(stage).slice(4 * GROUP, 4).load(SCALES)
            if BLOCK_M >= 128 and BLOCK_N >= 256:  # in halves, for there are few registers
                x_steps = as_steps(x_shared)
                for part in gl.static_range(2):
                    weight = gl.convert_layout(decode_fragments(codes, scales, part, x_shared.dtype), gl.DotOperandLayout(0, MMA, 2))
                    acc = warpgroup_mma(weight, x_steps.index(2 * stage + part).permute((1, 0)), acc)
            else:
                weight = gl.convert_layout(decode_fragments(codes, scales, None, x_shared.dtype), gl.DotOperandLayout(0, MMA, 2))
                acc = warpgroup_mma(weight, x_shared.index(stage).permute((1, 0)), acc)
            _barrier()  # all four warps have read
            mbarrier.arrive(free.index(stage), count=1)
            done += 1
        row, column = tile_at(index, m, n, BLOCK_M, BLOCK_N, BAND)
        store_transposed(
            acc, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, row, column + GROUP * ROWS, a_global_stride, b_global_stride, FP16
        )  # fmt: skip


@gluon.constexpr_function
def _codes_layout():
    """[4 tiles, 8, 32]: lane 4 g + t holds four words of row g and four of row g + 8."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 4, 0]], lane_bases=[[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]],
        warp_bases=[[1, 0, 0], [2, 0, 0]], block_bases=[], shape=[4, 8, 32],
    )  # fmt: skip


@gluon.constexpr_function
def _scales_layout():
    """[4 tiles, 1, 32]: lane 4 g + t holds the word with the scales of its two rows."""
    return gl.DistributedLinearLayout(
        reg_bases=[], lane_bases=[[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 0, 16]], warp_bases=[[1, 0, 0], [2, 0, 0]],
        block_bases=[], shape=[4, 1, 32],
    )  # fmt: skip
