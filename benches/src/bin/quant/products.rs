//! Rows 6 to 12: products with NF4 weights.

use anyhow::Result;
use pt_quant::dense::{Output, Workspace};
use pt_quant::{Arithmetic, Bf16, Block4Matrix, Element, ProductOptions, ScaleFormat, roof};
use serde_json::json;
use std::hint::black_box;

use crate::contest::{Bench, Contest, Targets};
use crate::inputs::{Named, cold_copies, converted, matrices, numbers};

const NONE: Targets = (None, None);
const SHAPES: [(usize, usize); 2] = [(4096, 4096), (11008, 4096)];

pub(crate) fn all(bench: &mut Bench) -> Result<()> {
    for (n, k) in SHAPES {
        for is_cold in [false, true] {
            if bench.wants(6) {
                gemv_f32(bench, n, k, is_cold)?;
            }
            if bench.wants(7) {
                gemv_bf16(bench, n, k, is_cold)?;
            }
            if bench.wants(8) {
                gemv_int8(bench, n, k, is_cold)?;
            }
        }
    }
    for m in [2, 4, 8, 16] {
        if bench.wants(9) {
            few_f32(bench, m)?;
        }
        if bench.wants(10) {
            few_bf16(bench, m)?;
        }
    }
    if bench.wants(11) {
        many_f32(bench)?;
        many_bf16(bench)?;
    }
    if bench.wants(12) {
        for m in [1, 8, 128, 512] {
            backward::<f32>(bench, m)?;
            backward::<Bf16>(bench, m)?;
        }
    }
    Ok(())
}

/// Our product, as a contest. Hot calls use one matrix, cold ones take copies in turn.
fn forward<'a, T: Named>(
    bench: &'a mut Bench,
    (row, what): (u8, &str),
    matrices: &'a [Block4Matrix],
    m: usize,
    arithmetic: Arithmetic,
) -> Contest<'a> {
    let (n, k) = (matrices[0].out_features(), matrices[0].in_features());
    let call = forward_call::<T, _>(bench, matrices, m, arithmetic);
    let heat = match (m, matrices.len()) {
        (1, 1) => ", hot",
        (1, _) => ", cold",
        _ => "",
    };
    bench
        .contest(row, &format!("{what}, {n}x{k}, M={m}{heat}"), call)
        .work("operations", 2.0 * (m * n * k) as f64)
        .work("bytes", matrices[0].num_bytes() as f64)
}

/// One product of the next matrix in turn.
fn forward_call<'a, T: Named, M: AsRef<[Block4Matrix]> + 'a>(
    bench: &Bench,
    matrices: M,
    m: usize,
    arithmetic: Arithmetic,
) -> impl FnMut() + use<'a, T, M> {
    let exec = bench.exec();
    let (n, k) = (matrices.as_ref()[0].out_features(), matrices.as_ref()[0].in_features());
    let x: Vec<T> = converted(&numbers(m * k, 1.0, 7));
    let mut y: Vec<T> = converted(&vec![0.0; m * n]);
    let (mut workspace, mut turn) = (Workspace::new(), 0);
    let options = ProductOptions { arithmetic, bias: None, output: Output::Replace };
    move || {
        turn += 1;
        let matrices = matrices.as_ref();
        let done = matrices[turn % matrices.len()].forward(&x, &mut y, m, &options, &mut workspace, &exec);
        done.unwrap_or_else(|error| unreachable!("{error}"));
    }
}

/// What a contest calls the same product with doubly quantized scales, which are decoded for each panel.
const NESTED: &str = "the same with scales in 8 bits";

fn some_matrices(bench: &Bench, n: usize, k: usize, is_cold: bool, scales: ScaleFormat) -> Result<Vec<Block4Matrix>> {
    matrices(n, k, if is_cold { cold_copies(n * k / 2) } else { 1 }, scales, &bench.exec())
}

/// How ggml is asked for a product; repacked weights where it has a layout for them.
fn ggml(kind: &str, n: usize, k: usize, m: usize, bytes_per_weight: f64, is_cold: bool) -> serde_json::Value {
    let bytes = (n * k) as f64 * bytes_per_weight;
    let copies = if is_cold { cold_copies(bytes as usize) } else { 1 };
    json!({"kind": "product", "type": kind, "n": n, "k": k, "m": m, "copies": copies})
}

fn linear<T: Named>(n: usize, k: usize, m: usize, is_cold: bool) -> serde_json::Value {
    let copies = if is_cold { cold_copies(n * k * size_of::<T>()) } else { 1 };
    json!({"kind": "linear", "dtype": T::NAME, "n": n, "k": k, "m": m, "copies": copies})
}

fn fused(n: usize, k: usize, m: usize, is_cold: bool) -> serde_json::Value {
    json!({"kind": "fused", "n": n, "k": k, "m": m, "copies": if is_cold { cold_copies(n * k / 2) } else { 1 }})
}

/// Reads as many bytes as the weights have, from memory that no cache holds.
fn read_roof(bench: &Bench, bytes: usize) -> impl FnMut() + 'static {
    let exec = bench.exec();
    let len = bytes / 4;
    let copies = cold_copies(bytes);
    let data = vec![1.0f32; len * copies];
    let mut turn = 0;
    move || {
        turn = (turn + 1) % copies;
        black_box(roof::read(&data[turn * len..][..len], &exec));
    }
}

fn gemv_f32(bench: &mut Bench, n: usize, k: usize, is_cold: bool) -> Result<()> {
    let matrices = some_matrices(bench, n, k, is_cold, ScaleFormat::F32)?;
    let nested = some_matrices(bench, n, k, is_cold, ScaleFormat::AsStored)?;
    let nested = forward_call::<f32, _>(bench, nested, 1, Arithmetic::F32);
    let roof = is_cold.then(|| read_roof(bench, matrices[0].num_bytes()));
    let llama = if is_cold { (Some(0.95), Some(1.15)) } else { (Some(1.0), Some(1.4)) };
    let mut contest = forward::<f32>(bench, (6, "product in f32"), &matrices, 1, Arithmetic::F32)
        .ggml("llama.cpp IQ4_NL", ggml("iq4_nl", n, k, 1, 0.5625, is_cold), llama)
        .torch("torch linear, dense f32", linear::<f32>(n, k, 1, is_cold), (Some(5.0), Some(8.0)));
    contest = contest.here(NESTED, nested, NONE);
    if let Some(roof) = roof {
        contest = contest.here("reading the weights (roof)", roof, (Some(0.55), Some(0.65)));
    }
    contest.run()
}

fn gemv_bf16(bench: &mut Bench, n: usize, k: usize, is_cold: bool) -> Result<()> {
    let matrices = some_matrices(bench, n, k, is_cold, ScaleFormat::F32)?;
    let nested = some_matrices(bench, n, k, is_cold, ScaleFormat::AsStored)?;
    let nested = forward_call::<Bf16, _>(bench, nested, 1, Arithmetic::Bf16);
    let roof = is_cold.then(|| read_roof(bench, matrices[0].num_bytes()));
    let (bnb, llama) = match is_cold {
        true => ((Some(1.3), Some(1.75)), (Some(1.15), Some(1.4))),
        false => ((Some(1.0), Some(1.4)), (Some(1.1), Some(1.6))),
    };
    let mut contest = forward::<Bf16>(bench, (7, "product in bf16"), &matrices, 1, Arithmetic::Bf16)
        .torch("bitsandbytes' fused C function", fused(n, k, 1, is_cold), bnb)
        .ggml("llama.cpp IQ4_NL", ggml("iq4_nl", n, k, 1, 0.5625, is_cold), llama)
        .torch("torch linear, dense bf16", linear::<Bf16>(n, k, 1, is_cold), (Some(5.0), Some(7.0)));
    contest = contest.here(NESTED, nested, NONE);
    if let Some(roof) = roof {
        contest = contest.here("reading the weights (roof)", roof, NONE);
    }
    contest.run()
}

fn gemv_int8(bench: &mut Bench, n: usize, k: usize, is_cold: bool) -> Result<()> {
    let matrices = some_matrices(bench, n, k, is_cold, ScaleFormat::F32)?;
    let nested = some_matrices(bench, n, k, is_cold, ScaleFormat::AsStored)?;
    let nested = forward_call::<f32, _>(bench, nested, 1, Arithmetic::Int8);
    let roof = is_cold.then(|| read_roof(bench, matrices[0].num_bytes()));
    let llama = if is_cold { (Some(1.3), Some(1.45)) } else { (Some(1.8), Some(2.3)) };
    let mut contest = forward::<f32>(bench, (8, "product in int8 (W4A8)"), &matrices, 1, Arithmetic::Int8).ggml(
        "llama.cpp IQ4_NL",
        ggml("iq4_nl", n, k, 1, 0.5625, is_cold),
        llama,
    );
    contest = contest.here(NESTED, nested, NONE);
    if let Some(roof) = roof {
        contest = contest.here("reading the weights (roof)", roof, (None, Some(0.85)));
    }
    contest.run()
}

/// Gates are for M = 8; other sizes are shown beside it.
fn at_8(m: usize, targets: Targets) -> Targets {
    if m == 8 { targets } else { NONE }
}

/// As many multiplications and additions, in registers.
fn multiply_roof<T: Named>(bench: &Bench, operations: usize) -> impl FnMut() + 'static {
    let (exec, is_f32) = (bench.exec(), T::NAME == "f32");
    let roof = if is_f32 { roof::multiply_f32 } else { roof::multiply_bf16 };
    move || _ = black_box(roof(operations, &exec))
}

const MULTIPLY: &str = "as many operations in registers (roof)";

fn few_f32(bench: &mut Bench, m: usize) -> Result<()> {
    let (n, k) = SHAPES[0];
    let roof = multiply_roof::<f32>(bench, 2 * m * n * k);
    let matrices = some_matrices(bench, n, k, false, ScaleFormat::F32)?;
    forward::<f32>(bench, (9, "product in f32"), &matrices, m, Arithmetic::F32)
        .torch("torch linear, dense f32", linear::<f32>(n, k, m, false), at_8(m, (Some(3.0), Some(5.0))))
        .torch(
            "bitsandbytes matmul_4bit, f32",
            json!({"kind": "matmul_op", "dtype": "f32", "n": n, "k": k, "m": m}),
            at_8(m, (Some(15.0), Some(25.0))),
        )
        .here(MULTIPLY, roof, NONE)
        .run()
}

fn few_bf16(bench: &mut Bench, m: usize) -> Result<()> {
    let (n, k) = SHAPES[0];
    let roof = multiply_roof::<Bf16>(bench, 2 * m * n * k);
    let matrices = some_matrices(bench, n, k, false, ScaleFormat::F32)?;
    let nested = some_matrices(bench, n, k, false, ScaleFormat::AsStored)?;
    let nested = forward_call::<Bf16, _>(bench, nested, m, Arithmetic::Bf16);
    forward::<Bf16>(bench, (10, "product in bf16"), &matrices, m, Arithmetic::Bf16)
        .torch("bitsandbytes' fused C function", fused(n, k, m, false), at_8(m, (Some(1.0), Some(1.4))))
        .torch("torch linear, dense bf16", linear::<Bf16>(n, k, m, false), at_8(m, (Some(1.9), Some(3.0))))
        .ggml("llama.cpp IQ4_NL", ggml("iq4_nl", n, k, m, 0.5625, false), NONE)
        .here(NESTED, nested, NONE)
        .here(MULTIPLY, roof, NONE)
        .run()
}

/// Dense weights that oneDNN has rearranged for its own kernels: not an anchor, but what torch could do.
fn packed<T: Named>(n: usize, k: usize, m: usize) -> serde_json::Value {
    json!({"kind": "linear_packed", "dtype": T::NAME, "n": n, "k": k, "m": m, "copies": 1})
}

fn many_f32(bench: &mut Bench) -> Result<()> {
    let ((n, k), m) = (SHAPES[0], 128);
    let roof = multiply_roof::<f32>(bench, 2 * m * n * k);
    let matrices = some_matrices(bench, n, k, false, ScaleFormat::F32)?;
    let nested = some_matrices(bench, n, k, false, ScaleFormat::AsStored)?;
    let nested = forward_call::<f32, _>(bench, nested, m, Arithmetic::F32);
    forward::<f32>(bench, (11, "product in f32"), &matrices, m, Arithmetic::F32)
        .torch("torch linear, dense f32", linear::<f32>(n, k, m, false), (Some(1.8), Some(2.3)))
        .torch(
            "bitsandbytes matmul_4bit, f32",
            json!({"kind": "matmul_op", "dtype": "f32", "n": n, "k": k, "m": m}),
            (Some(2.5), Some(4.0)),
        )
        .torch("oneDNN, dense f32, rearranged beforehand", packed::<f32>(n, k, m), NONE)
        .here(NESTED, nested, NONE)
        .here(MULTIPLY, roof, NONE)
        .run()
}

fn many_bf16(bench: &mut Bench) -> Result<()> {
    let ((n, k), m) = (SHAPES[0], 128);
    let roof = multiply_roof::<Bf16>(bench, 2 * m * n * k);
    let matrices = some_matrices(bench, n, k, false, ScaleFormat::F32)?;
    let nested = some_matrices(bench, n, k, false, ScaleFormat::AsStored)?;
    let nested = forward_call::<Bf16, _>(bench, nested, m, Arithmetic::Bf16);
    forward::<Bf16>(bench, (11, "product in bf16"), &matrices, m, Arithmetic::Bf16)
        .torch("torch linear, dense bf16", linear::<Bf16>(n, k, m, false), (Some(0.9), Some(1.05)))
        .torch("bitsandbytes' fused C function", fused(n, k, m, false), (Some(1.15), Some(1.35)))
        .torch("oneDNN, dense bf16, rearranged beforehand", packed::<Bf16>(n, k, m), NONE)
        .ggml("llama.cpp IQ4_NL", ggml("iq4_nl", n, k, m, 0.5625, false), NONE)
        .here(NESTED, nested, NONE)
        .here(MULTIPLY, roof, NONE)
        .run()
}

fn backward<T: Named + Element>(bench: &mut Bench, m: usize) -> Result<()> {
    let (n, k) = SHAPES[0];
    let exec = bench.exec();
    let arithmetic = if T::NAME == "f32" { Arithmetic::F32 } else { Arithmetic::Bf16 };
    let roof = multiply_roof::<T>(bench, 2 * m * n * k);
    let options = ProductOptions { arithmetic, bias: None, output: Output::Replace };
    let call_with = |scales| -> Result<_> {
        let matrices = matrices(n, k, 1, scales, &exec)?;
        let grad: Vec<T> = converted(&numbers(m * n, 1.0, 7));
        let mut out: Vec<T> = converted(&vec![0.0; m * k]);
        let mut workspace = Workspace::new();
        Ok(move || {
            let done = matrices[0].backward(&grad, &mut out, m, &options, &mut workspace, &exec);
            done.unwrap_or_else(|error| unreachable!("{error}"));
        })
    };
    let (call, nested) = (call_with(ScaleFormat::F32)?, call_with(ScaleFormat::AsStored)?);
    let targets = match m {
        8 => (Some(8.0), Some(15.0)),
        128 => (Some(2.0), Some(3.5)),
        _ => NONE,
    };
    bench
        .contest(12, &format!("gradient of the input in {}, {n}x{k}, M={m}", T::NAME), call)
        .work("operations", 2.0 * (m * n * k) as f64)
        .torch(
            &format!("bitsandbytes matmul_4bit's backward, {}", T::NAME),
            json!({"kind": "matmul_backward", "dtype": T::NAME, "n": n, "k": k, "m": m}),
            targets,
        )
        .here(NESTED, nested, NONE)
        .here(MULTIPLY, roof, NONE)
        .run()
}
