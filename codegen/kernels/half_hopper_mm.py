"""Product of two matrices of halves on sm_90 with the epilogue of the block-scaled ones, whose operands were dequantized before.

Decoding inside the product keeps the tensor cores waiting; a pass that dequantizes costs a few percent of a large product and leaves one
that runs as fast as any of halves. Programs stay for as many tiles as there are: while the sums of one are stored, a warp of its own
already loads the next.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from fp4compile.codegen.kernels.hopper_mm import _barrier, _barriers, _load_tile, tile_at

STEP: gl.constexpr = gl.constexpr(64)  # of k
PIECE: gl.constexpr = gl.constexpr(64)  # columns of the output that leave through shared memory together

# Triton 3.7 and 3.8 renamed this.
_store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def half_hopper_mm_kernel(
    a_desc, b_desc, out_desc, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, k, a_global_stride, b_global_stride,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """out (M, N) contiguous = A (M, K) times B (N, K) transposed, times both global scales, plus bias (N).

    Tiles: A (BLOCK_M, 64), B (BLOCK_N, 64), zero past their ends. `out_desc` stores (BLOCK_M / 2, 64), or is None, where rows of `out` do
    not begin where the copy engine wants them. BAND row tiles run together.
    """
    HALF: gl.constexpr = a_desc.dtype
    a_shared = gl.allocate_shared_memory(HALF, [STAGES, BLOCK_M, STEP], a_desc.layout)
    b_shared = gl.allocate_shared_memory(HALF, [STAGES, BLOCK_N, STEP], b_desc.layout)
    OUT: gl.constexpr = HALF if out_desc is None else out_desc.dtype
    out_shared = gl.allocate_shared_memory(OUT, [2, BLOCK_M // 2, PIECE], a_desc.layout)
    ready = _barriers(STAGES, 1)
    free = _barriers(STAGES, 2)
    last = (out_desc, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, k, a_global_stride, b_global_stride)
    gl.warp_specialize(
        [
            (_multiply, (a_shared, b_shared, out_shared, ready, free, last, 0, BAND)),
            (_multiply, (a_shared, b_shared, out_shared, ready, free, last, 1, BAND)),
            (_load_all, (a_desc, b_desc, a_shared, b_shared, ready, free, m, n, k, BAND)),
        ],
        [4, 1],
        [MULTIPLY_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _load_all(a_desc, b_desc, a_shared, b_shared, ready, free, m, n, k, BAND: gl.constexpr):
    STAGES: gl.constexpr = a_shared.shape[0]
    BLOCK_M: gl.constexpr = a_shared.shape[1]
    BLOCK_N: gl.constexpr = b_shared.shape[1]
    steps = gl.cdiv(k, STEP)
    done = gl.to_tensor(0)
    for index in range(gl.program_id(0), gl.cdiv(m, BLOCK_M) * gl.cdiv(n, BLOCK_N), gl.num_programs(0)):
        row, column = tile_at(index, m, n, BLOCK_M, BLOCK_N, BAND)
        for i in range(steps):
            stage = done % STAGES
            mbarrier.wait(free.index(stage), (done // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            _load_tile(a_desc, [row, i * STEP], ready.index(stage), a_shared.index(stage))
            _load_tile(b_desc, [column, i * STEP], ready.index(stage), b_shared.index(stage))
            done += 1


@gluon.jit
def _multiply(a_shared, b_shared, out_shared, ready, free, last, GROUP: gl.constexpr, BAND: gl.constexpr):
    """Half the rows of each tile of this program, by one warpgroup."""
    out_desc, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, k, a_global_stride, b_global_stride = last
    STAGES: gl.constexpr = a_shared.shape[0]
    BLOCK_M: gl.constexpr = a_shared.shape[1]
    BLOCK_N: gl.constexpr = b_shared.shape[1]
    ROWS: gl.constexpr = BLOCK_M // 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    steps = gl.cdiv(k, STEP)
    done = gl.to_tensor(0)
    for index in range(gl.program_id(0), gl.cdiv(m, BLOCK_M) * gl.cdiv(n, BLOCK_N), gl.num_programs(0)):
        row, column = tile_at(index, m, n, BLOCK_M, BLOCK_N, BAND)
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=MMA)
        for i in range(steps):
            stage = done % STAGES
            mbarrier.wait(ready.index(stage), done // STAGES & 1)
            a = a_shared.index(stage).slice(GROUP * ROWS, ROWS)
            acc = warpgroup_mma(a, b_shared.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            _barrier()  # all four warps are done with the step before
            mbarrier.arrive(free.index((done + STAGES - 1) % STAGES), count=1, pred=i > 0)
            done += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _barrier()
        mbarrier.arrive(free.index((done + STAGES - 1) % STAGES), count=1)
        _store(acc, out_desc, out_shared, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, row + GROUP * ROWS, column,
               a_global_stride, b_global_stride, GROUP)  # fmt: skip
    if out_desc is not None:
        tma.store_wait(0)


@gluon.jit
def _store(
    acc, out_desc, out_shared, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, row, column, a_global_stride, b_global_stride,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Epilogue of the tile that begins at (`row`, `column`), by pieces, for what belongs to a column needs registers too."""
    if acc.shape[1] > PIECE:
        WIDTH: gl.constexpr = acc.shape[1] // 2
        left, right = gl.split(gl.permute(gl.reshape(acc, [acc.shape[0], 2, WIDTH]), (0, 2, 1)))
        _store(left, out_desc, out_shared, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, row, column,
               a_global_stride, b_global_stride, GROUP)  # fmt: skip
        _store(right, out_desc, out_shared, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, row, column + WIDTH,
               a_global_stride, b_global_stride, GROUP)  # fmt: skip
    else:
        LAYOUT: gl.constexpr = acc.type.layout
        rows = row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, LAYOUT))
        columns = column + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, LAYOUT))
        if a_global_ptr is not None:
            scale = gl.load(a_global_ptr + rows * a_global_stride, mask=rows < m, other=0.0)[:, None]
            if b_global_ptr is not None:
                scale = scale * gl.load(b_global_ptr + columns * b_global_stride, mask=columns < n, other=0.0)[None, :]
            acc = acc * scale
        elif b_global_ptr is not None:
            acc = acc * gl.load(b_global_ptr + columns * b_global_stride, mask=columns < n, other=0.0)[None, :]
        if bias_ptr is not None:
            acc = acc + gl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(gl.float32)[None, :]
        value = acc.to(out_ptr.dtype.element_ty)
        if out_desc is None:
            at = out_ptr + rows.to(gl.int64)[:, None] * n + columns[None, :]
            gl.store(at, value, mask=(rows < m)[:, None] & (columns < n)[None, :])
        else:
            piece = out_shared.index(GROUP)
            tma.store_wait(0)
            _barrier()  # the thread that waited for the piece before may not be this one
            piece.store(value)
            fence_async_shared()
            _barrier()
            _store_tile(out_desc, [row, column], piece)
