"""NVFP4 weights times bfloat16 or float16 rows on sm_90: some warps decode the weight into shared memory, the others run `wgmma` on it.

Written in Gluon, for plain Triton cannot say what makes it fast and safe. A warp that waits for its `wgmma` decodes nothing meanwhile, so
warps are specialized. Everything global comes by TMA, for the fence that hands decoded weights to the tensor core waits for loads under
way. Both operands of every `wgmma` lie in shared memory: no register is read behind the compiler's back
(https://github.com/triton-lang/triton/issues/9433). Gluon has no interpreter: tests of values need the GPU.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from fp4compile.codegen.kernels import _tile_decode

CHUNK: gl.constexpr = gl.constexpr(128)  # of k, the unit of the tiled layout
STEP: gl.constexpr = gl.constexpr(64)  # of k, what x comes in: a stage of it is 128 bytes wide, as swizzled tiles are

# Triton 3.7 and 3.8 renamed these.
_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def as_steps(weight):
        """Chunks (stages, N, 128) of the weight, or of x, as steps (2 stages, N, 64), which is how swizzled tiles lie in memory."""
        return weight.reinterpret(weight.dtype, [2 * weight.shape[0], weight.shape[1], STEP], weight.layout)

else:

    @gluon.jit
    def as_steps(weight):
        return weight._reinterpret(weight.dtype, [2 * weight.shape[0], weight.shape[1], STEP], weight.layout)


_tiled_pair = gluon.jit(_tile_decode.tiled_pair.fn)
# Two e4m3 bytes to two pairs of equal halves, exact, NaN to NaN: an instruction of sm_89 makes halves of them.
_SCALES_FLOAT16: gl.constexpr = gl.constexpr(
    "{ .reg .b32 both, power; cvt.rn.f16x2.e4m3x2 both, $2; mov.b32 power, 0x58005800; mul.rn.f16x2 both, both, power; "
    "prmt.b32 $0, both, both, 0x1010; prmt.b32 $1, both, both, 0x3232; }"
)
_SCALES_BFLOAT16: gl.constexpr = gl.constexpr(
    "{ .reg .b32 both; .reg .b16 low, high; .reg .f32 x, y; cvt.rn.f16x2.e4m3x2 both, $2; mov.b32 {low, high}, both; "
    "cvt.f32.f16 x, low; cvt.f32.f16 y, high; mul.f32 x, x, 0f7A800000; mul.f32 y, y, 0f7A800000; "
    "cvt.rn.bf16x2.f32 $0, x, x; cvt.rn.bf16x2.f32 $1, y, y; }"
)


@gluon.jit
def hopper_mm_kernel(
    x_desc, codes_desc, scales_desc, a_global_ptr, b_global_ptr, bias_ptr, row_tiles_ptr, out_ptr,
    m, n, chunks, chunks_a_split, tiles_a_group, a_global_stride, b_group_stride, b_global_stride, split_stride,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, X_STAGES: gl.constexpr, W_STAGES: gl.constexpr, CODE_STAGES: gl.constexpr,
    FP16: gl.constexpr, BAND: gl.constexpr, DECODE_WARPS: gl.constexpr, DECODE_REGISTERS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """out (M, N) contiguous, or for each split of k one of (splits, M, N), whose sum it is then.

    Tiles: x (BLOCK_M, 64) of (M, K), zero past its end; tiled codes (BLOCK_N / 16, 8, 32) of (T, 8 C, 32) int32 and scales
    (BLOCK_N / 16, 1, 32) of (T, C, 32) int32. BAND row tiles of x run together. Where `row_tiles_ptr` is given, `m` counts the tiles
    that `group_tiles_kernel` describes there, and a group's weight has `tiles_a_group` tiles of 16 rows.
    """
    HALF: gl.constexpr = gl.float16 if FP16 else gl.bfloat16
    W_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16)
    TILES: gl.constexpr = BLOCK_N // 16
    if row_tiles_ptr is None:
        row, column = tile_at(gl.program_id(0), m, n, BLOCK_M, BLOCK_N, BAND)
        end, group = m, 0
    else:
        m_tile, column = tile_at(gl.program_id(0), m, n, 1, BLOCK_N, BAND)
        row = gl.load(row_tiles_ptr + 3 * m_tile)
        end = gl.load(row_tiles_ptr + 3 * m_tile + 1)
        group = gl.load(row_tiles_ptr + 3 * m_tile + 2)
        if row >= end:
            return
        if b_global_ptr is not None:
            b_global_ptr += group * b_group_stride
    tile = group * tiles_a_group + column // 16
    first = gl.program_id(1) * chunks_a_split
    count = gl.minimum(chunks - first, chunks_a_split)

    x_shared = gl.allocate_shared_memory(HALF, [X_STAGES, BLOCK_M, STEP], x_desc.layout)
    w_shared = gl.allocate_shared_memory(HALF, [W_STAGES, BLOCK_N, CHUNK], W_LAYOUT)
    codes_shared = gl.allocate_shared_memory(gl.int32, [CODE_STAGES, TILES, 8, 32], codes_desc.layout)
    scales_shared = gl.allocate_shared_memory(gl.int32, [CODE_STAGES, TILES, 1, 32], scales_desc.layout)
    x_ready = _barriers(X_STAGES, 1)
    codes_ready = _barriers(CODE_STAGES, 1)
    w_ready = _barriers(W_STAGES, 1)
    w_free = _barriers(W_STAGES, 1)
    gl.warp_specialize(
        [
            (_multiply, (
                x_desc, codes_desc, scales_desc, x_shared, codes_shared, scales_shared, w_shared, x_ready, codes_ready, w_ready, w_free,
                first, count, a_global_ptr, b_global_ptr, bias_ptr, out_ptr + gl.program_id(1).to(gl.int64) * split_stride,
                end, n, row, column, tile, a_global_stride, b_global_stride, FP16,
            )),
            (_decode_all, (codes_shared, scales_shared, w_shared, codes_ready, w_ready, w_free, count, PARTS)),
        ],
        [DECODE_WARPS],
        [DECODE_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=COUNT)
    return barriers


@gluon.jit
def tile_at(index, m, n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BAND: gl.constexpr):
    """(first row, first column) of tile `index`: BAND row tiles share the tiles of the weight in L2, and stay there themselves."""
    n_tiles = gl.cdiv(n, BLOCK_N)
    first = index // (BAND * n_tiles) * BAND
    height = gl.minimum(gl.cdiv(m, BLOCK_M) - first, BAND)
    inside = index % (BAND * n_tiles)
    return (first + inside % height) * BLOCK_M, inside // height * BLOCK_N


@gluon.jit
def _multiply(
    x_desc, codes_desc, scales_desc, x_shared, codes_shared, scales_shared, w_shared, x_ready, codes_ready, w_ready, w_free, first, count,
    a_global_ptr, b_global_ptr, bias_ptr, out_ptr, end, n, row, column, tile, a_global_stride, b_global_stride, FP16: gl.constexpr,
):  # fmt: skip
    """One tile of the output, [BLOCK_M, BLOCK_N] in registers. These warps start all loads too, for they have time while `wgmma` runs.

    What a stage held is no longer read once the next chunk is multiplied: x and the decoded weight by the wait for their `wgmma`, the codes
    by the news that they are decoded.
    """
    W_STAGES: gl.constexpr = w_shared.shape[0]
    BLOCK_N: gl.constexpr = w_shared.shape[1]
    X_STAGES: gl.constexpr = x_shared.shape[0]
    BLOCK_M: gl.constexpr = x_shared.shape[1]
    CODE_STAGES: gl.constexpr = codes_shared.shape[0]
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 16])
    w_steps = as_steps(w_shared)
    steps = 2 * count
    for stage in gl.static_range(CODE_STAGES):
        _load_codes(codes_desc, scales_desc, codes_shared, scales_shared, codes_ready, tile, first, stage, stage < count)
    for stage in gl.static_range(X_STAGES):
        _load_x(x_desc, x_shared, x_ready, row, first, stage, stage < steps)
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=MMA)
    for i in range(count):
        mbarrier.wait(w_ready.index(i % W_STAGES), i // W_STAGES & 1)
        for half in gl.static_range(2):
            step = 2 * i + half
            mbarrier.wait(x_ready.index(step % X_STAGES), step // X_STAGES & 1)
            weight = w_steps.index(2 * (i % W_STAGES) + half)
            acc = warpgroup_mma(x_shared.index(step % X_STAGES), weight.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            _barrier()  # now every warpgroup is done with the step before
            if half == 0:
                mbarrier.arrive(w_free.index((i + W_STAGES - 1) % W_STAGES), count=1, pred=i > 0)
                later = i + CODE_STAGES
                _load_codes(codes_desc, scales_desc, codes_shared, scales_shared, codes_ready, tile, first, later, later < count)
            later_step = step + X_STAGES - 1
            _load_x(x_desc, x_shared, x_ready, row, first, later_step, (step > 0) & (later_step < steps))
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _barrier()
    _store(acc, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, end, n, row, column, a_global_stride, b_global_stride, FP16)


@gluon.jit
def _load_x(x_desc, x_shared, x_ready, row, first, i, wanted):
    stage = i % x_shared.shape[0]
    mbarrier.expect(x_ready.index(stage), x_desc.block_type.nbytes, pred=wanted)
    _load_tile(x_desc, [row, first * CHUNK + i * STEP], x_ready.index(stage), x_shared.index(stage), pred=wanted)


@gluon.jit
def _decode_all(codes_shared, scales_shared, w_shared, codes_ready, w_ready, w_free, count, PARTS: gl.constexpr):
    """Every chunk of the weight's tile, decoded one after the other into the stages of `w_shared`, each in PARTS for fewer registers."""
    CODE_STAGES: gl.constexpr = codes_shared.shape[0]
    W_STAGES: gl.constexpr = w_shared.shape[0]
    CODES: gl.constexpr = _codes_layout(codes_shared.shape[1] // PARTS, gl.num_warps())
    SCALES: gl.constexpr = _scales_layout(codes_shared.shape[1] // PARTS, gl.num_warps())
    PART: gl.constexpr = codes_shared.shape[1] // PARTS
    for i in range(count):
        mbarrier.wait(codes_ready.index(i % CODE_STAGES), i // CODE_STAGES & 1)
        for part in gl.static_range(PARTS):
            codes = codes_shared.index(i % CODE_STAGES).slice(part * PART, PART).load(CODES)
            scales = scales_shared.index(i % CODE_STAGES).slice(part * PART, PART).load(SCALES)
            weight = _decode(codes, scales, w_shared.dtype)
            if part == 0:
                mbarrier.wait(w_free.index(i % W_STAGES), (i // W_STAGES & 1) ^ 1)
            w_shared.index(i % W_STAGES).slice(16 * PART * part, 16 * PART).store(weight)
        fence_async_shared()
        _barrier()  # all have read and written
        mbarrier.arrive(w_ready.index(i % W_STAGES), count=1)


@gluon.jit
def _load_codes(codes_desc, scales_desc, codes_shared, scales_shared, codes_ready, tile, first, i, wanted):
    stage = i % codes_shared.shape[0]
    ready = codes_ready.index(stage)
    mbarrier.expect(ready, codes_desc.block_type.nbytes + scales_desc.block_type.nbytes, pred=wanted)
    _load_tile(codes_desc, [tile, (first + i) * 8, 0], ready, codes_shared.index(stage), pred=wanted)
    _load_tile(scales_desc, [tile, first + i, 0], ready, scales_shared.index(stage), pred=wanted)


@gluon.constexpr_function
def _codes_layout(tiles, num_warps):
    """[tiles, 8, 32]: lane 8 t + g holds four words of row g and four of row g + 8; no two lanes meet in a bank, reading or writing."""
    each = [[1 << i, 0, 0] for i in range(tiles.bit_length() - 1)]
    warps = num_warps.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 4, 0], *each[warps:]], lane_bases=[[0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 0, 4], [0, 0, 8]],
        warp_bases=each[:warps], block_bases=[], shape=[tiles, 8, 32],
    )  # fmt: skip


@gluon.constexpr_function
def _scales_layout(tiles, num_warps):
    """[tiles, 1, 32]: lane 8 t + g holds the word with the scales of its two rows."""
    each = [[1 << i, 0, 0] for i in range(tiles.bit_length() - 1)]
    warps = num_warps.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=each[warps:], lane_bases=[[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 0, 1], [0, 0, 2]], warp_bases=each[:warps],
        block_bases=[], shape=[tiles, 1, 32],
    )  # fmt: skip


@gluon.jit
def _decode(codes, scales, HALF: gl.constexpr):
    """[16 tiles, 128] in HALF, in the order of k."""
    FP16: gl.constexpr = gl.float16 == HALF
    TILES: gl.constexpr = codes.shape[0]
    first, second = gl.split(gl.reshape(codes, [16 * TILES, 8, 2]))
    both = gl.reshape(scales, [TILES, 8, 4])
    scale = gl.permute(gl.join(_by_block(both, FP16), _by_block(both >> 16, FP16)), (0, 4, 1, 2, 3))
    scale = gl.convert_layout(gl.reshape(scale, first.shape), first.type.layout, assert_trivial=True)
    every = _block_pairs(first, second, scale, FP16)
    every = gl.join(every.to(gl.int16), (every >> 16).to(gl.int16))  # [rows, blocks, bits 2 to 0 of the pair, half of the pair]
    return gl.reshape(every, [16 * TILES, 128]).to(HALF, bitcast=True)


@gluon.jit
def decode_fragments(codes, scales, PART: gl.constexpr, HALF: gl.constexpr):
    """[16 tiles, 128] in HALF, in the order of `pair_columns_kernel`: all lanes' first blocks, then their second ones; or PART alone."""
    FP16: gl.constexpr = gl.float16 == HALF
    TILES: gl.constexpr = codes.shape[0]
    first, second = gl.split(gl.reshape(codes, [16 * TILES, 4, 2, 2]))  # [rows, t, block]
    both = gl.reshape(scales, [TILES, 8, 4])
    scale = gl.permute(gl.join(_by_block(both, FP16), _by_block(both >> 16, FP16)), (0, 4, 1, 2, 3))
    scale = gl.convert_layout(gl.reshape(scale, first.shape), first.type.layout, assert_trivial=True)
    if PART is None:
        every = _block_pairs(first, second, scale, FP16)
        every = gl.join(every.to(gl.int16), (every >> 16).to(gl.int16))  # [rows, t, block, bits 2 to 0 of the pair, half of the pair]
        every = gl.permute(every, (0, 2, 3, 4, 5, 1, 6))
    else:
        every = _block_pairs(gl.split(first)[PART], gl.split(second)[PART], gl.split(scale)[PART], FP16)
        every = gl.join(every.to(gl.int16), (every >> 16).to(gl.int16))
        every = gl.permute(every, (0, 2, 3, 4, 1, 5))
    return gl.reshape(every, [16 * TILES, 128 if PART is None else 64]).to(HALF, bitcast=True)


@gluon.jit
def _block_pairs(first, second, scale, FP16: gl.constexpr):
    """[..., 2, 2, 2]: the eight pairs of each two words of a block, times their `scale`."""
    p0 = _multiply_pairs(_tiled_pair(first, second, 0, FP16), scale, FP16)
    p1 = _multiply_pairs(_tiled_pair(first, second, 1, FP16), scale, FP16)
    p2 = _multiply_pairs(_tiled_pair(first, second, 2, FP16), scale, FP16)
    p3 = _multiply_pairs(_tiled_pair(first, second, 3, FP16), scale, FP16)
    p4 = _multiply_pairs(_tiled_pair(first, second, 4, FP16), scale, FP16)
    p5 = _multiply_pairs(_tiled_pair(first, second, 5, FP16), scale, FP16)
    p6 = _multiply_pairs(_tiled_pair(first, second, 6, FP16), scale, FP16)
    p7 = _multiply_pairs(_tiled_pair(first, second, 7, FP16), scale, FP16)
    return gl.join(gl.join(gl.join(p0, p4), gl.join(p2, p6)), gl.join(gl.join(p1, p5), gl.join(p3, p7)))


@gluon.jit
def _by_block(two, FP16: gl.constexpr):
    """[tiles, g, t, 2]: pairs of the scale of each block, the two low bytes of `two`, times 2^7 or 2^118; see `decode_scales`."""
    ASM: gl.constexpr = _SCALES_FLOAT16 if FP16 else _SCALES_BFLOAT16
    first, second = gl.inline_asm_elementwise(ASM, "=r,=r,h", [two.to(gl.int16)], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    return gl.join(first, second)


@gluon.jit
def _multiply_pairs(a, b, FP16: gl.constexpr):
    ASM: gl.constexpr = "mul.rn.f16x2 $0, $1, $2;" if FP16 else "mul.rn.bf16x2 $0, $1, $2;"
    return gl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _store(
    acc, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, end, n, row, column, a_global_stride, b_global_stride, FP16: gl.constexpr
):  # fmt: skip
    """Epilogue of the tile that begins at (`row`, `column`): by quarters, for what belongs to a column needs registers too."""
    if acc.shape[1] > 64:
        WIDTH: gl.constexpr = acc.shape[1] // 2
        left, right = gl.split(gl.permute(gl.reshape(acc, [acc.shape[0], 2, WIDTH]), (0, 2, 1)))
        _store(left, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, end, n, row, column, a_global_stride, b_global_stride, FP16)
        _store(right, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, end, n, row, column + WIDTH, a_global_stride, b_global_stride, FP16)
    else:
        _finish(acc, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, end, n, row, column, a_global_stride, b_global_stride, FP16)


@gluon.jit
def _finish(
    acc, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, end, n, row, column, a_global_stride, b_global_stride, FP16: gl.constexpr
):  # fmt: skip
    """Times the product of the global scales, plus the bias, one rounding each."""
    UNIT: gl.constexpr = 128.0 if FP16 else 256.0  # what decoding left out
    LAYOUT: gl.constexpr = acc.type.layout
    row += gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    column += gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    if a_global_ptr is not None:
        scale = gl.load(a_global_ptr + row * a_global_stride, mask=row < end, other=0.0)[:, None]
        if b_global_ptr is not None:
            scale = scale * gl.load(b_global_ptr + column * b_global_stride, mask=column < n, other=0.0)[None, :]
        acc = acc * (scale * UNIT)
    elif b_global_ptr is not None:
        acc = acc * (gl.load(b_global_ptr + column * b_global_stride, mask=column < n, other=0.0) * UNIT)[None, :]
    else:
        acc = acc * UNIT
    if bias_ptr is not None:
        acc = acc + gl.load(bias_ptr + column, mask=column < n, other=0.0).to(gl.float32)[None, :]
    at = out_ptr + row.to(gl.int64)[:, None] * n + column[None, :]
    gl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(row < end)[:, None] & (column < n)[None, :])


@gluon.jit
def store_transposed(
    acc, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, row, column, a_global_stride, b_global_stride, FP16: gl.constexpr
):  # fmt: skip
    """Epilogue of [rows of the weight from `column`, rows of x from `row`], by pieces, times the global scales, plus the bias."""
    if acc.shape[1] > 16:
        WIDTH: gl.constexpr = acc.shape[1] // 2
        left, right = gl.split(gl.permute(gl.reshape(acc, [acc.shape[0], 2, WIDTH]), (0, 2, 1)))
        store_transposed(left, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, row, column, a_global_stride, b_global_stride, FP16)
        store_transposed(
            right, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, row + WIDTH, column, a_global_stride, b_global_stride, FP16
        )  # fmt: skip
    else:
        UNIT: gl.constexpr = 128.0 if FP16 else 256.0  # what decoding left out
        LAYOUT: gl.constexpr = acc.type.layout
        column += gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, LAYOUT))
        row += gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, LAYOUT))
        if a_global_ptr is not None:
            scale = gl.load(a_global_ptr + row * a_global_stride, mask=row < m, other=0.0)[None, :]
            if b_global_ptr is not None:
                scale = scale * gl.load(b_global_ptr + column * b_global_stride, mask=column < n, other=0.0)[:, None]
            acc = acc * (scale * UNIT)
        elif b_global_ptr is not None:
            acc = acc * (gl.load(b_global_ptr + column * b_global_stride, mask=column < n, other=0.0) * UNIT)[:, None]
        else:
            acc = acc * UNIT
        if bias_ptr is not None:
            acc = acc + gl.load(bias_ptr + column, mask=column < n, other=0.0).to(gl.float32)[:, None]
        at = out_ptr + row.to(gl.int64)[None, :] * n + column[:, None]
        gl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(column < n)[:, None] & (row < m)[None, :])
