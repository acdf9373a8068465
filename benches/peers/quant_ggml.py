"""The peers of the suite `quant` that live in ggml: products with its quantized and dense weights, one graph of one
`mul_mat` each, with weights in the buffer that llama.cpp would put them in ("repacked" where there is a layout for it).

The shared libraries are those that llama-cpp-python was built with.
"""

import argparse
import ctypes
import sys
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy
from quant_peer import Skip, serve

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--threads", type=int, default=1)
arguments = parser.parse_args()

# `enum ggml_type`
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 8, "iq4_nl": 20, "bf16": 30, "tq2_0": 35, "mxfp4": 39, "q1_0": 41}


def load():
    import importlib.util

    folder = Path(importlib.util.find_spec("llama_cpp").submodule_search_locations[0]) / "lib"
    suffix = "dylib" if sys.platform == "darwin" else "so"
    mode = ctypes.RTLD_GLOBAL
    base = ctypes.CDLL(str(folder / f"libggml-base.{suffix}"), mode=mode)
    cpu = ctypes.CDLL(str(folder / f"libggml-cpu.{suffix}"), mode=mode)
    return base, cpu


class InitParameters(ctypes.Structure):
    """`struct ggml_init_params`"""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


BASE, CPU = load()


def function(library, name, result, *parameters):
    found = getattr(library, name)
    found.restype, found.argtypes = result, parameters
    return found


init = function(BASE, "ggml_init", c_void_p, InitParameters)
free = function(BASE, "ggml_free", None, c_void_p)
new_tensor_2d = function(BASE, "ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64)
mul_mat = function(BASE, "ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p)
new_graph = function(BASE, "ggml_new_graph", c_void_p, c_void_p)
expand = function(BASE, "ggml_build_forward_expand", None, c_void_p, c_void_p)
num_bytes = function(BASE, "ggml_nbytes", c_size_t, c_void_p)
row_size = function(BASE, "ggml_row_size", c_size_t, c_int, c_int64)
type_name = function(BASE, "ggml_type_name", c_char_p, c_int)
quantize_chunk = function(
    BASE, "ggml_quantize_chunk", c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p
)
tensor_set = function(BASE, "ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)
tensor_alloc = function(BASE, "ggml_backend_tensor_alloc", c_int, c_void_p, c_void_p, c_void_p)
alloc_size = function(BASE, "ggml_backend_buft_get_alloc_size", c_size_t, c_void_p, c_void_p)
alloc_buffer = function(BASE, "ggml_backend_buft_alloc_buffer", c_void_p, c_void_p, c_size_t)
buffer_type_name = function(BASE, "ggml_backend_buft_name", c_char_p, c_void_p)
buffer_base = function(BASE, "ggml_backend_buffer_get_base", c_void_p, c_void_p)
buffer_free = function(BASE, "ggml_backend_buffer_free", None, c_void_p)
alloc_rest = function(BASE, "ggml_backend_alloc_ctx_tensors", c_void_p, c_void_p, c_void_p)
compute = function(BASE, "ggml_backend_graph_compute", c_int, c_void_p, c_void_p)
device_of = function(BASE, "ggml_backend_get_device", c_void_p, c_void_p)
registry_of = function(BASE, "ggml_backend_dev_backend_reg", c_void_p, c_void_p)
address_of = function(BASE, "ggml_backend_reg_get_proc_address", c_void_p, c_void_p, c_char_p)
default_type = function(BASE, "ggml_backend_dev_buffer_type", c_void_p, c_void_p)
supports = function(BASE, "ggml_backend_dev_supports_op", c_bool, c_void_p, c_void_p)
cpu_init = function(CPU, "ggml_backend_cpu_init", c_void_p)
set_threads = function(CPU, "ggml_backend_cpu_set_n_threads", None, c_void_p, c_int)


def buffer_types(backend) -> list[int]:
    """Those with layouts of their own first, plain memory last: the order in which llama.cpp tries them."""
    device = device_of(backend)
    found = []
    address = address_of(registry_of(device), b"ggml_backend_dev_get_extra_bufts")
    if address:
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
        index = 0
        while extra[index]:
            found.append(extra[index])
            index += 1
    return found + [default_type(device)]


# It says which tensors it rearranges.
SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
function(BASE, "ggml_log_set", None, type(SILENT), c_void_p)(SILENT, None)
BACKEND = cpu_init()
set_threads(BACKEND, arguments.threads)
KEPT: list = []


def release() -> None:
    for context, buffers in KEPT:
        for buffer in buffers:
            buffer_free(buffer)
        free(context)
    KEPT.clear()


class Product:
    """`copies` graphs of one product each, with weights of their own."""

    def __init__(self, case: dict) -> None:
        kind, n, k, m, copies = TYPES[case["type"]], case["n"], case["k"], case["m"], case.get("copies", 1)
        if not type_name(kind) or type_name(kind).decode() != case["type"]:
            raise Skip(f"this ggml has no type {case['type']}")
        values = (numpy.random.default_rng(1).standard_normal((n, k), dtype=numpy.float32) * 0.02).astype(numpy.float32)
        data = numpy.zeros(n * row_size(kind, k), dtype=numpy.uint8)
        if case["type"] == "f32":
            data = values.view(numpy.uint8).reshape(-1)
        else:
            quantize_chunk(kind, values.ctypes.data, data.ctypes.data, 0, n, k, None)
        context = init(InitParameters(copies * (1 << 18) + (1 << 20), None, True))
        buffers = []
        x = new_tensor_2d(context, 0, k, m)
        self.graphs = []
        for _ in range(copies):
            w = new_tensor_2d(context, kind, k, n)
            y = mul_mat(context, w, x)
            buffers.append(self.place(w, y, case))
            tensor_set(w, data.ctypes.data, 0, num_bytes(w))
            graph = new_graph(context)
            expand(graph, y)
            self.graphs.append(graph)
        buffers.append(alloc_rest(context, BACKEND))
        activations = numpy.random.default_rng(2).standard_normal((m, k), dtype=numpy.float32)
        tensor_set(x, activations.ctypes.data, 0, activations.nbytes)
        KEPT.append((context, buffers))

    def place(self, w, y, case: dict) -> int:
        for kind in buffer_types(BACKEND):
            is_plain = kind == default_type(device_of(BACKEND))
            if not case.get("repack", True) and not is_plain:
                continue
            buffer = alloc_buffer(kind, alloc_size(kind, w))
            tensor_alloc(buffer, w, buffer_base(buffer))
            # A layout of its own is only for some types and shapes.
            if is_plain or supports(device_of(BACKEND), y):
                self.layout = buffer_type_name(kind).decode()
                return buffer
            buffer_free(buffer)
            # The tensor forgets where it was: `buffer` and `data` of `struct ggml_tensor`.
            forget(w)
        raise Skip("no memory for the weights")

    def __call__(self, turn: int) -> int:
        return compute(BACKEND, self.graphs[turn % len(self.graphs)])


class Tensor(ctypes.Structure):
    """`struct ggml_tensor`, up to what is needed here."""

    _fields_ = [
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", c_void_p),
    ]


def forget(tensor: int) -> None:
    fields = Tensor.from_address(tensor)
    fields.buffer = fields.data = fields.extra = None


class Separate:
    """One product after the other, in one graph each: what T tenants with dense weights cost."""

    def __init__(self, case: dict) -> None:
        self.product = Product({**case, "copies": case["tenants"], "m": 1})

    def __call__(self, turn: int) -> None:
        for index in range(len(self.product.graphs)):
            self.product(index)


def main() -> None:
    import importlib.metadata

    def prepare(case: dict):
        return Separate(case) if case["kind"] == "separate" else Product(case)

    version = importlib.metadata.version("llama-cpp-python")
    names = [buffer_type_name(kind).decode() for kind in buffer_types(BACKEND)]
    serve({"llama_cpp_python": version, "buffers": names}, arguments.threads, prepare, release)


if __name__ == "__main__":
    main()
