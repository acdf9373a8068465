"""The peers of the suite `quant` that live in torch: bitsandbytes' C functions and operations, torch's dense products."""

import argparse
import ctypes
import logging
import sys

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--threads", type=int, default=1)
arguments = parser.parse_args()

logging.disable(logging.WARNING)
import bitsandbytes
import bitsandbytes.functional as functional
import numpy
import torch
from bitsandbytes.cextension import lib
from quant_peer import Bare, Skip, fastest, serve

torch.set_num_threads(arguments.threads)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BLOCK = 64


def huge(tensor: torch.Tensor) -> torch.Tensor:
    """The same in memory that numpy has asked to be huge pages: what is allocated beforehand lies in them on both sides.
    What an operation allocates by itself is as torch allocates it."""
    size, page = tensor.numel() * tensor.element_size(), 2 << 20
    memory = numpy.empty(size + page, dtype=numpy.uint8)
    start = -memory.ctypes.data % page
    return torch.from_numpy(memory)[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def weights(case: dict, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return huge((torch.randn(case["n"], case["k"], generator=generator) * 0.02).to(dtype))


def outputs(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return huge(torch.zeros(rows, columns, dtype=dtype))


def quantized(case: dict):
    packed, state = functional.quantize_4bit(weights(case), blocksize=BLOCK, quant_type="nf4")
    state.absmax = huge(state.absmax)
    return huge(packed), state


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def quantize(case: dict):
    values = weights(case, DTYPES[case["dtype"]])
    return lambda _: functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")


def dequantize_raw(case: dict):
    """The C function on a preallocated output."""
    names = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
    function = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{names[case['dtype']]}")
    packed, state = quantized(case)
    out = outputs(case["n"], case["k"], DTYPES[case["dtype"]])
    rows, columns = ctypes.c_longlong(case["n"]), ctypes.c_longlong(case["k"])
    block, none = ctypes.c_longlong(BLOCK), ctypes.c_longlong(0)
    buffers = (pointer(packed), pointer(state.absmax), pointer(out))
    call = lambda _, keep=(packed, state, out): function(*buffers, block, rows, columns)
    return Bare(call, lambda _: function(*buffers, block, none, columns))


def dequantize_op(case: dict):
    packed, state = quantized(case)
    state.dtype = DTYPES[case["dtype"]]
    return lambda _: functional.dequantize_4bit(packed, state)


def nested_encode(case: dict):
    """What compress_statistics does to the scales."""
    absmax = quantized(case)[1].absmax

    def call(_):
        offset = absmax.mean()
        functional.quantize_blockwise(absmax - offset, blocksize=256)

    return call


def nested_decode(case: dict):
    absmax = quantized(case)[1].absmax
    offset = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    return lambda _: functional.dequantize_blockwise(codes, state) + offset


def linear(case: dict):
    """Dense x · Wᵀ as torch does it: the faster of `linear` and `mm` into a preallocated output."""
    dtype, copies = DTYPES[case["dtype"]], case["copies"]
    first = weights(case, dtype)
    each = [first] + [huge(first) for _ in range(copies - 1)]
    x = torch.randn(case["m"], case["k"]).to(dtype)
    out = outputs(case["m"], case["n"], dtype)
    return fastest(
        [
            lambda turn: torch.nn.functional.linear(x, each[turn % copies]),
            lambda turn: torch.mm(x, each[turn % copies].t(), out=out),
        ]
    )


def linear_packed(case: dict):
    """Dense x · Wᵀ through oneDNN with weights that it rearranged beforehand, as torch.compile uses it."""
    dtype, copies = DTYPES[case["dtype"]], case["copies"]
    try:
        pack = torch.ops.mkldnn._reorder_linear_weight
        each = [pack(weights(case, dtype), case["m"]) for _ in range(copies)]
    except (AttributeError, RuntimeError) as error:
        raise Skip(f"oneDNN does not pack: {str(error).splitlines()[0]}") from error
    x = torch.randn(case["m"], case["k"]).to(dtype)
    call = torch.ops.mkldnn._linear_pointwise
    return lambda turn: call(x, each[turn % copies], None, "none", [], "")


def backward_dense(case: dict):
    dtype = DTYPES[case["dtype"]]
    w, grad = weights(case, dtype), torch.randn(case["m"], case["n"]).to(dtype)
    out = outputs(case["m"], case["k"], dtype)
    return lambda _: torch.mm(grad, w, out=out)


def fused_layout(case: dict):
    """The weights of bitsandbytes' fused product: rearranged, scales in bf16."""
    packed, state = quantized(case)
    state.dtype = torch.bfloat16
    return functional._convert_weight_packed_for_cpu(packed, state)


def fused(case: dict):
    """The C function of the fused bf16 product on a preallocated output."""
    copies = case["copies"]
    if not functional.has_avx512bf16():
        raise Skip("bitsandbytes' fused product takes AVX-512 BF16")
    first, state = fused_layout(case)
    each = [huge(first) for _ in range(copies)]
    scales = [state.absmax] + [state.absmax.clone() for _ in range(copies - 1)]
    x = torch.randn(case["m"], case["k"]).to(torch.bfloat16)
    out = outputs(case["m"], case["n"], torch.bfloat16)
    function = lib.gemv_4bit_inference_cpu_nf4_bf16
    m, n, k, none = (ctypes.c_int64(size) for size in (case["m"], case["n"], case["k"], 0))
    block = ctypes.c_int64(BLOCK)
    buffers = [(pointer(x), pointer(w), pointer(scale), pointer(out)) for w, scale in zip(each, scales)]
    strides = (ctypes.c_int64(x.stride(0)), ctypes.c_int64(out.stride(0)))
    keep = (each, scales, x, out)
    call = lambda turn, keep=keep: function(m, n, k, *buffers[turn % copies], block, *strides)
    return Bare(call, lambda _: function(none, none, k, *buffers[0], block, *strides))


def matmul_op(case: dict):
    """`matmul_4bit` as training calls it: it dequantizes the matrix and multiplies."""
    dtype = DTYPES[case["dtype"]]
    packed, state = quantized(case)
    state.dtype = dtype
    x = torch.randn(case["m"], case["k"]).to(dtype).requires_grad_()
    return lambda _: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)


def matmul_backward(case: dict):
    """The backward pass of `matmul_4bit` to its input."""
    dtype = DTYPES[case["dtype"]]
    packed, state = quantized(case)
    state.dtype = dtype
    x = torch.randn(case["m"], case["k"]).to(dtype).requires_grad_()
    grad = torch.randn(case["m"], case["n"]).to(dtype)
    y = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
    return lambda _: torch.autograd.grad(y, x, grad, retain_graph=True)


def repack(case: dict):
    packed, state = quantized(case)
    state.dtype = torch.bfloat16
    nested = state.nested
    kept = state.absmax

    def call(_):
        # It changes the state in place.
        state.absmax, state.nested = kept, nested
        functional._convert_weight_packed_for_cpu(packed, state)

    return call


def sign_pack(case: dict):
    """The 1-bit delta of two matrices: mean magnitude, and signs in bits."""
    dtype = DTYPES[case["dtype"]]
    base = weights(case, dtype)
    tuned = huge(base + 0.001 * torch.randn(case["n"], case["k"]).to(dtype))
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)

    def call(_):
        delta = tuned.float() - base.float()
        scale = delta.abs().mean()
        return scale, ((delta >= 0).view(torch.uint8).view(-1, 8) * places).sum(1, dtype=torch.uint8)

    return call


def separate(case: dict):
    """One dense product a tenant, each with weights of its own."""
    dtype, tenants = DTYPES[case["dtype"]], case["tenants"]
    first = weights(case, dtype)
    each = [huge(first) for _ in range(tenants)]
    x = torch.randn(tenants, 1, case["k"]).to(dtype)
    rows = [x[tenant] for tenant in range(tenants)]

    def call(_):
        for row, w in zip(rows, each):
            torch.nn.functional.linear(row, w)

    return call


def main() -> None:
    kinds = [quantize, dequantize_raw, dequantize_op, nested_encode, nested_decode, linear, linear_packed, backward_dense]
    kinds += [fused, matmul_op, matmul_backward, repack, sign_pack, separate]
    by_name = {kind.__name__: kind for kind in kinds}

    def prepare(case: dict):
        kind = by_name[case["kind"]]
        # Only matmul_4bit and its backward pass are called with gradients on.
        if kind in (matmul_op, matmul_backward):
            return kind(case)
        with torch.no_grad():
            call = kind(case)
        return call

    torch.set_grad_enabled(True)
    versions = {"torch": torch.__version__.split("+")[0], "bitsandbytes": bitsandbytes.__version__}
    serve({**versions, "isa": torch.backends.cpu.get_cpu_capability()}, torch.get_num_threads(), prepare)


if __name__ == "__main__":
    sys.exit(main())
