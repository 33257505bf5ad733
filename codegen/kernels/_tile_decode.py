"""Device helpers of the decode products: codes become halves in the very registers that the tensor core reads.

A pair is an int32 that holds two 16-bit floats. PTX false spells the few instructions that Triton has no word for in plain Triton, which is
what the interpreter runs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_words(address, present, MASKED: tl.constexpr, STREAM: tl.constexpr, PTX: tl.constexpr):
    """Four int32 at each byte `address` (16-byte aligned); zeros where MASKED and `present` is 0. STREAM: read once, so not kept in L1."""
    if PTX:
        HINT: tl.constexpr = ".L1::no_allocate.L2::128B" if STREAM else ""
        if MASKED:
            return tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; @p ld.global.nc"
                + HINT
                + ".v4.b32 {$0, $1, $2, $3}, [$4]; }",
                "=&r,=&r,=&r,=&r,l,r",
                [address.to(tl.int64), present],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=False,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                "ld.global.nc" + HINT + ".v4.b32 {$0, $1, $2, $3}, [$4];",
                "=r,=r,=r,=r,l",
                [address.to(tl.int64)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=False,
                pack=1,
            )
    else:
        word = address.to(tl.pointer_type(tl.int32))
        inside = present != 0
        return (
            tl.load(word, mask=inside, other=0),
            tl.load(word + 1, mask=inside, other=0),
            tl.load(word + 2, mask=inside, other=0),
            tl.load(word + 3, mask=inside, other=0),
        )


@triton.jit
def load_scales(address, present, BITS: tl.constexpr, MASKED: tl.constexpr, PTX: tl.constexpr):
    """BITS (16 or 32) at each byte `address`, aligned, as int32; zeros where MASKED and `present` is 0."""
    if PTX:
        LOAD: tl.constexpr = "ld.global.nc.u16" if BITS == 16 else "ld.global.nc.b32"
        if MASKED:
            return tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p " + LOAD + " $0, [$1]; }",
                "=&r,l,r",
                [address.to(tl.int64), present],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(LOAD + " $0, [$1];", "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
    else:
        DTYPE: tl.constexpr = tl.uint16 if BITS == 16 else tl.int32
        return tl.load(address.to(tl.pointer_type(DTYPE)), mask=present != 0, other=0).to(tl.int32)


@triton.jit
def decode_pair(word, NIBBLE: tl.constexpr, FP16: tl.constexpr):
    """Nibbles NIBBLE and NIBBLE + 4 of `word` as a pair, times 2^-14 in float16 or 2^-126 in bfloat16.

    The sign goes to the top bit, the three magnitude bits to the boundary of exponent and mantissa, where 0.5 is a subnormal number.
    """
    MASK: tl.constexpr = 0x0E000E00 if FP16 else 0x01C001C0
    LEFT: tl.constexpr = (9 if FP16 else 6) - 4 * NIBBLE
    if LEFT >= 0:
        magnitude = (word << LEFT) & MASK
    else:
        magnitude = (word >> -LEFT) & MASK
    sign = word << (12 - 4 * NIBBLE) if NIBBLE < 3 else word
    return (sign & -0x7FFF8000) | magnitude


@triton.jit
def tiled_pair(first, second, PAIR: tl.constexpr, FP16: tl.constexpr):
    """Codes 2 PAIR and 2 PAIR + 1 of the 16 in two words of a tiled weight (see `reference/tiled_words.py`), scaled as by `decode_pair`."""
    if PAIR == 0 or PAIR == 2 or PAIR == 5:
        word = first
    elif PAIR == 1 or PAIR == 3 or PAIR == 6:
        word = second
    else:
        word = (first & 0x06030603) | (second & ~0x06030603)
    if FP16:
        return (_turn(word, 2 * PAIR) & -0x7FFF8000) | (_turn(word, 2 * PAIR + 3) & 0x0E000E00)
    else:
        return _turn(word, 2 * PAIR) & -0x7E3F7E40


@triton.jit
def _turn(word, LEFT: tl.constexpr):
    if LEFT == 0:
        return word
    elif LEFT <= 6:
        return word << LEFT  # what a turn brings in from above is masked out
    else:
        return (word << LEFT) | (word.to(tl.uint32, bitcast=True) >> (32 - LEFT)).to(tl.int32, bitcast=True)


@triton.jit
def decode_scales(two, FP16: tl.constexpr, PTX: tl.constexpr):
    """The e4m3 bytes of `two` (the upper half is ignored) as two pairs of equal halves, times 2^7 in float16 or 2^118 in bfloat16.

    With `decode_pair` this leaves a product of 2^-7 or 2^-8 times its value, exact. NaN reads as 480: see `nan_flags`.
    """
    spread = (two & 0x00FF) | ((two << 8) & 0x00FF0000)
    LEFT: tl.constexpr = 7 if FP16 else 4
    MAGNITUDE: tl.constexpr = 0x3F803F80 if FP16 else 0x07F007F0
    both = ((spread << LEFT) & MAGNITUDE) | ((spread << 8) & -0x7FFF8000)
    if FP16:
        both = multiply_pairs(both, 0x78007800, FP16, PTX)  # 2^15
    else:
        both = multiply_pairs(multiply_pairs(both, 0x7B007B00, FP16, PTX), 0x7B007B00, FP16, PTX)  # 2^119 each
    return (both & 0xFFFF) | (both << 16), (both & -0x10000) | ((both >> 16) & 0xFFFF)


@triton.jit
def nan_flags(four):
    """The top bit of each byte of `four` that is an e4m3 NaN; the other bits are noise."""
    return (four & 0x7F7F7F7F) + 0x01010101


@triton.jit
def multiply_pairs(a, b, FP16: tl.constexpr, PTX: tl.constexpr):
    """Products of pairs. sm_80 multiplies bfloat16 by FMA only; its addend -0 changes nothing."""
    b += tl.zeros_like(a)
    if PTX:
        ASM: tl.constexpr = "mul.rn.f16x2 $0, $1, $2;" if FP16 else "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }"
        return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    else:
        low = _bits(_value(a, 0, FP16) * _value(b, 0, FP16), FP16)
        high = _bits(_value(a, 1, FP16) * _value(b, 1, FP16), FP16)
        return low | (high << 16)


@triton.jit
def _value(pair, HIGH: tl.constexpr, FP16: tl.constexpr):
    bits = (pair >> 16) & 0xFFFF if HIGH else pair & 0xFFFF
    if FP16:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _bits(value, FP16: tl.constexpr):
    """Bits of float32 `value`, which the half type holds exactly."""
    if FP16:
        return value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    else:
        return (value.to(tl.int32, bitcast=True) >> 16) & 0xFFFF


@triton.jit
def low_halves(a, b):
    return (a & 0xFFFF) | (b << 16)


@triton.jit
def high_halves(a, b):
    return ((a >> 16) & 0xFFFF) | (b & -0x10000)


@triton.jit
def mma(d0, d1, d2, d3, a0, a1, a2, a3, b0, b1, FP16: tl.constexpr, PTX: tl.constexpr):
    """`mma.sync.m16n8k16` of each warp, whose 32 lanes 4 g + t are the last dimension of every operand.

    a0, a2 are rows g, a1, a3 rows g + 8 of the left operand; b0, b1 column g of the right one; d0, d1 are columns 2 t and 2 t + 1 of row g,
    d2, d3 those of row g + 8. Lane t of both operands must hold the same k.
    """
    if PTX:
        HALF: tl.constexpr = "f16" if FP16 else "bf16"
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32." + HALF + "." + HALF + ".f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3",
            [a0, a1, a2, a3, b0, b1, d0, d1, d2, d3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    else:
        like = d0
        t0, t1 = _own_columns(_products(a0, b0, like, FP16) + _products(a2, b1, like, FP16), like)
        t2, t3 = _own_columns(_products(a1, b0, like, FP16) + _products(a3, b1, like, FP16), like)
        return d0 + t0, d1 + t1, d2 + t2, d3 + t3


@triton.jit
def _products(a, b, like, FP16: tl.constexpr):
    """[warps, 8 rows, 8 columns]: sums over the four lanes t and both halves of lane (row, t) of `a` times lane (column, t) of `b`."""
    WARPS: tl.constexpr = like.numel // 32
    a = tl.broadcast_to(a, like.shape)
    b = tl.broadcast_to(b, like.shape)
    total = tl.zeros([WARPS, 8, 8], tl.float32)
    for high in tl.static_range(2):
        left = tl.reshape(_value(a, high, FP16), [WARPS, 8, 1, 4])
        right = tl.reshape(_value(b, high, FP16), [WARPS, 1, 8, 4])
        total += tl.sum(left * right, axis=3)
    return total


@triton.jit
def _own_columns(products, like):
    """Columns 2 t and 2 t + 1 of `products` [warps, 8, 8], each shaped as `like`."""
    even, odd = tl.split(tl.reshape(products, [products.shape[0], 8, 4, 2]))
    return tl.reshape(even, like.shape), tl.reshape(odd, like.shape)


@triton.jit
def finish(
    acc, a_global_ptr, b_global_ptr, bias_ptr, row, n, column, m, a_global_stride, b_global_stride, FP16: tl.constexpr
):  # fmt: skip
    """Epilogue on sums of decoded products for rows `row` < n of the weight and `column` < m of x.

    Times the product of the global scales, plus the bias of each `row`, one rounding each.
    """
    UNIT: tl.constexpr = 128.0 if FP16 else 256.0  # what decode_pair and decode_scales left out
    acc = acc * UNIT
    if a_global_ptr is not None:
        scale = tl.load(a_global_ptr + column * a_global_stride, mask=column < m, other=0.0)
        if b_global_ptr is not None:
            scale = scale * tl.load(b_global_ptr + row * b_global_stride, mask=row < n, other=0.0)
        acc = acc * scale
    elif b_global_ptr is not None:
        acc = acc * tl.load(b_global_ptr + row * b_global_stride, mask=row < n, other=0.0)
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)
    return acc
