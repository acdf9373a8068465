//! Rows 14 to 18: 1-bit deltas.

use anyhow::Result;
use pt_quant::delta::{
    BitDelta, BitMatrix, DeltaArithmetic, DeltaMatrix, DeltaOptions, DeltaScaleBuf, DeltaWorkspace, ScaleAxis,
    add_tenants,
};
use pt_quant::dense::{GemmShape, Output, Workspace, gemm_nt};
use pt_quant::{Arithmetic, Bf16, ProductOptions, ScaleFormat, roof};
use serde_json::{Value, json};
use std::hint::black_box;

use crate::contest::{Bench, Targets};
use crate::inputs::{Named, cold_copies, converted, matrices, numbers, weights};

const N: usize = 4096;
const K: usize = 4096;
const LEN: usize = N * K;
const NONE: Targets = (None, None);

/// The arithmetics, with the targets of a single row: against llama.cpp's Q1_0, and against reading the signs cold.
const ARITHMETICS: [(&str, DeltaArithmetic, Targets, Targets); 4] = [
    ("f32", DeltaArithmetic::F32, (Some(1.6), Some(2.0)), NONE),
    ("int8", DeltaArithmetic::Int8, (Some(3.5), Some(6.0)), (Some(0.45), None)),
    // More accurate than int8 and as fast: held against the same.
    ("14-bit tables", DeltaArithmetic::Table14, (Some(3.5), Some(6.0)), (Some(0.45), None)),
    ("7-bit tables", DeltaArithmetic::Table7, (Some(6.0), Some(10.0)), (Some(0.75), Some(0.85))),
];

pub(crate) fn all(bench: &mut Bench) -> Result<()> {
    if bench.wants(14) {
        fit::<f32>(bench)?;
        fit::<Bf16>(bench)?;
    }
    if bench.wants(15) {
        for is_cold in [false, true] {
            for arithmetic in ARITHMETICS {
                one_row(bench, arithmetic, is_cold)?;
            }
        }
    }
    if bench.wants(16) {
        for m in [8, 128] {
            for (name, arithmetic, ..) in ARITHMETICS {
                many_rows(bench, name, arithmetic, m)?;
            }
            backward(bench, m)?;
            scale_gradient(bench, m)?;
        }
    }
    if bench.wants(17) {
        for count in [1, 8, 32] {
            tenants(bench, count, true)?;
            tenants(bench, count, false)?;
        }
    }
    if bench.wants(18) {
        merge::<f32>(bench)?;
        merge::<Bf16>(bench)?;
    }
    Ok(())
}

fn fit<T: Named>(bench: &mut Bench) -> Result<()> {
    let exec = bench.exec();
    let base: Vec<T> = converted(&weights(N, K));
    let tuned: Vec<T> = base.iter().zip(numbers(LEN, 0.001, 3)).map(|(w, d)| T::from_f32(w.to_f32() + d)).collect();
    let both = vec![1.0f32; 2 * LEN * size_of::<T>() / 4];
    let call = || {
        let delta = BitDelta::fit(&base, &tuned, N, K, ScaleAxis::Matrix, &exec);
        black_box(delta.unwrap_or_else(|error| unreachable!("{error}")));
    };
    bench
        .contest(14, &format!("1-bit delta of two {} matrices, 4096x4096", T::NAME), call)
        .work("weights", LEN as f64)
        .torch(
            "torch: subtract, mean magnitude, compare, pack",
            json!({"kind": "sign_pack", "dtype": T::NAME, "n": N, "k": K}),
            (Some(20.0), None),
        )
        .here("reading both matrices (roof)", || _ = black_box(roof::read(&both, &exec)), (Some(0.6), Some(0.85)))
        .run()
}

/// Deltas of any signs, each with memory of its own.
pub(crate) fn deltas(bench: &Bench, count: usize) -> Result<Vec<DeltaMatrix>> {
    let mut state = 1u64;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state ^ state >> 29
    };
    let signs = BitMatrix::new((0..LEN / 64).map(|_| word()).collect(), N, K)?;
    let delta = BitDelta::new(signs, DeltaScaleBuf::Matrix(0.001))?;
    let matrix = DeltaMatrix::new(delta.as_ref(), &bench.exec())?;
    Ok((0..count).map(|_| matrix.clone()).collect())
}

fn q1_0(m: usize, is_cold: bool) -> Value {
    let copies = if is_cold { cold_copies(LEN * 9 / 64) } else { 1 };
    json!({"kind": "product", "type": "q1_0", "n": N, "k": K, "m": m, "copies": copies})
}

fn one_row(
    bench: &mut Bench,
    (name, arithmetic, of_llama, of_roof): (&str, DeltaArithmetic, Targets, Targets),
    is_cold: bool,
) -> Result<()> {
    let exec = bench.exec();
    let deltas = deltas(bench, if is_cold { cold_copies(LEN / 8) } else { 1 })?;
    let bytes = deltas[0].size_in_bytes();
    let (x, mut y) = (numbers(K, 1.0, 7), vec![0.0f32; N]);
    let (mut workspace, mut turn) = (DeltaWorkspace::new(), 0);
    let options = DeltaOptions { arithmetic, output: Output::Replace };
    let call = || {
        turn += 1;
        let done = deltas[turn % deltas.len()].forward(&x, &mut y, 1, options, &mut workspace, &exec);
        done.unwrap_or_else(|error| unreachable!("{error}"));
    };
    let heat = if is_cold { "cold" } else { "hot" };
    let memory = vec![1.0f32; if is_cold { bytes / 4 * deltas.len() } else { 0 }];
    let mut read_turn = 0;
    // Targets against llama.cpp are for hot calls.
    let mut contest = bench
        .contest(15, &format!("1-bit product, {name}, 4096x4096, M=1, {heat}"), call)
        .work("bytes", bytes as f64)
        .ggml("llama.cpp Q1_0", q1_0(1, is_cold), if is_cold { (of_llama.0, None) } else { of_llama });
    if is_cold {
        let read = || {
            read_turn = (read_turn + 1) % deltas.len();
            black_box(roof::read(&memory[read_turn * (bytes / 4)..][..bytes / 4], &exec));
        };
        contest = contest.here("reading the signs (roof)", read, of_roof);
    }
    contest.run()
}

fn many_rows(bench: &mut Bench, name: &str, arithmetic: DeltaArithmetic, m: usize) -> Result<()> {
    let exec = bench.exec();
    let delta = &deltas(bench, 1)?[0];
    let (x, mut y) = (numbers(m * K, 1.0, 7), vec![0.0f32; m * N]);
    let mut workspace = DeltaWorkspace::new();
    let options = DeltaOptions { arithmetic, output: Output::Replace };
    let call = || {
        let done = delta.forward(&x, &mut y, m, options, &mut workspace, &exec);
        done.unwrap_or_else(|error| unreachable!("{error}"));
    };
    // The targets are those of the fastest arithmetic.
    let is_judged = matches!(arithmetic, DeltaArithmetic::Table7);
    let judged = |targets| if is_judged { targets } else { NONE };
    let mut contest = bench
        .contest(16, &format!("1-bit product, {name}, 4096x4096, M={m}"), call)
        .work("operations", 2.0 * (m * LEN) as f64)
        .ggml("llama.cpp Q1_0", q1_0(m, false), judged((Some(if m == 8 { 5.0 } else { 6.0 }), Some(12.0))));
    if m == 128 {
        let dense = json!({"kind": "linear", "dtype": "bf16", "n": N, "k": K, "m": m, "copies": 1});
        contest = contest.torch("torch linear, dense bf16", dense, judged((Some(1.3), Some(2.5))));
    }
    contest.run()
}

fn backward(bench: &mut Bench, m: usize) -> Result<()> {
    let exec = bench.exec();
    let delta = &deltas(bench, 1)?[0];
    let (grad, mut out) = (numbers(m * N, 1.0, 7), vec![0.0f32; m * K]);
    let mut workspace = DeltaWorkspace::new();
    let options = DeltaOptions { arithmetic: DeltaArithmetic::Table7, output: Output::Replace };
    let call = || {
        let done = delta.backward(&grad, &mut out, m, options, &mut workspace, &exec);
        done.unwrap_or_else(|error| unreachable!("{error}"));
    };
    bench
        .contest(16, &format!("gradient of a 1-bit product's input, 7-bit tables, 4096x4096, M={m}"), call)
        .work("operations", 2.0 * (m * LEN) as f64)
        .torch("torch mm, dense bf16", json!({"kind": "backward_dense", "dtype": "bf16", "n": N, "k": K, "m": m}), NONE)
        .run()
}

fn scale_gradient(bench: &mut Bench, m: usize) -> Result<()> {
    let exec = bench.exec();
    let delta = &deltas(bench, 1)?[0];
    let (x, grad, mut out) = (numbers(m * K, 1.0, 7), numbers(m * N, 1.0, 8), [0.0f32]);
    let mut workspace = DeltaWorkspace::new();
    let call = || {
        let done = delta.scale_gradient(&x, &grad, &mut out, m, DeltaArithmetic::Table7, &mut workspace, &exec);
        done.unwrap_or_else(|error| unreachable!("{error}"));
    };
    bench
        .contest(16, &format!("gradient of a delta's scale, 7-bit tables, 4096x4096, M={m}"), call)
        .work("operations", 2.0 * (m * LEN) as f64)
        .torch(
            "torch linear, dense bf16",
            json!({"kind": "linear", "dtype": "bf16", "n": N, "k": K, "m": m, "copies": 1}),
            NONE,
        )
        .run()
}

/// One request of each tenant: the base once, and a delta for each.
fn tenants(bench: &mut Bench, count: usize, is_nf4: bool) -> Result<()> {
    let exec = bench.exec();
    let deltas = deltas(bench, count)?;
    let deltas: Vec<&DeltaMatrix> = deltas.iter().collect();
    let order: Vec<Option<usize>> = (0..count).map(Some).collect();
    let nf4 = matrices(N, K, usize::from(is_nf4), ScaleFormat::F32, &exec)?;
    let dense: Vec<Bf16> = if is_nf4 { Vec::new() } else { converted(&weights(N, K)) };
    let x: Vec<Bf16> = converted(&numbers(count * K, 1.0, 7));
    let mut y = vec![0.0f32; count * N];
    let (mut workspace, mut delta_workspace) = (Workspace::new(), DeltaWorkspace::new());
    let options = ProductOptions { arithmetic: Arithmetic::Bf16, bias: None, output: Output::Replace };
    let shape = GemmShape { rows: count, columns: N, depth: K };
    let call = || {
        let base = match nf4.first() {
            Some(nf4) => nf4.forward(&x, &mut y, count, &options, &mut workspace, &exec),
            None => gemm_nt(&x, &dense, &mut y, shape, Output::Replace, &mut workspace, &exec),
        };
        let arithmetic = DeltaArithmetic::Table14;
        let done =
            base.and_then(|()| add_tenants(&deltas, &order, &x, &mut y, arithmetic, &mut delta_workspace, &exec));
        done.unwrap_or_else(|error| unreachable!("{error}"));
    };
    let targets = if count == 8 { (Some(5.0), Some(8.0)) } else { NONE };
    let each = deltas[0].size_in_bytes() as f64 / LEN as f64;
    let base = if is_nf4 { "NF4" } else { "bf16" };
    let separate = |kind: &str| json!({"kind": "separate", kind: "bf16", "n": N, "k": K, "tenants": count});
    bench
        .contest(17, &format!("{base} base and {count} deltas of {each:.4} B a weight, 4096x4096, one row each"), call)
        .torch(&format!("torch linear, dense bf16, {count} times"), separate("dtype"), targets)
        .ggml(&format!("ggml dense bf16, {count} times"), separate("type"), NONE)
        .run()
}

fn merge<T: Named>(bench: &mut Bench) -> Result<()> {
    let exec = bench.exec();
    let base: Vec<T> = converted(&weights(N, K));
    let tuned: Vec<T> = base.iter().zip(numbers(LEN, 0.001, 3)).map(|(w, d)| T::from_f32(w.to_f32() + d)).collect();
    let delta = BitDelta::fit(&base, &tuned, N, K, ScaleAxis::Matrix, &exec)?;
    let mut out = base.clone();
    let words = LEN * size_of::<T>() / 4;
    let (from, mut to) = (vec![1.0f32; words], vec![0.0f32; words]);
    let mut copy = || _ = black_box(roof::copy(&from, &mut to, &exec));
    let targets = (Some(0.7), Some(0.9));
    let roof = "copying the matrix past the caches (roof)";
    let call = || {
        let done = delta.as_ref().merge_into(&base, &mut out, &exec);
        done.unwrap_or_else(|error| unreachable!("{error}"));
    };
    bench
        .contest(18, &format!("{} base + delta into another matrix, 4096x4096", T::NAME), call)
        .work("bytes_out", (LEN * size_of::<T>()) as f64)
        .here(roof, &mut copy, targets)
        .run()?;
    let call = || delta.as_ref().merge(&mut out, &exec).unwrap_or_else(|error| unreachable!("{error}"));
    bench
        .contest(18, &format!("delta into the {} base itself, 4096x4096", T::NAME), call)
        .work("bytes_out", (LEN * size_of::<T>()) as f64)
        .here(roof, &mut copy, targets)
        .run()?;
    let mut weights = base.clone();
    let backup = delta.as_ref().merge_with_backup(&mut weights, &exec)?;
    let call = || backup.toggle(&mut weights, &exec).unwrap_or_else(|error| unreachable!("{error}"));
    bench
        .contest(18, &format!("unmerge bit for bit in the {} base, 4096x4096", T::NAME), call)
        .work("bytes_out", (LEN * size_of::<T>()) as f64)
        .here(roof, &mut copy, NONE)
        .run()
}
