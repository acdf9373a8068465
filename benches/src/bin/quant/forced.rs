//! Row 19: AVX2 where AVX-512 is there, against the plain code and against our best.

use anyhow::Result;
use pt_quant::delta::{DeltaArithmetic, DeltaMatrix, DeltaOptions, DeltaWorkspace};
use pt_quant::dense::{Output, Workspace};
use pt_quant::{Arithmetic, Block4Matrix, Exec, Isa, ProductOptions, ScaleFormat, Stores};

use crate::contest::{Bench, Targets};
use crate::deltas::deltas;
use crate::inputs::{block4, matrices, numbers};

const SCALAR: Targets = (Some(4.0), None);
const BEST: Targets = (None, Some(0.5));

pub(crate) fn all(bench: &mut Bench) -> Result<()> {
    if !bench.wants(19) || !Isa::Avx2.is_available() {
        return Ok(());
    }
    let best = bench.exec();
    let (forced, scalar) = (best.with_isa(Isa::Avx2)?, best.with_isa(Isa::Scalar)?);
    tile(bench, [forced, scalar, best])?;
    let matrix = &matrices(4096, 4096, 1, ScaleFormat::F32, &best)?[0];
    for (name, arithmetic) in [("f32", Arithmetic::F32), ("bf16", Arithmetic::Bf16), ("int8", Arithmetic::Int8)] {
        product(bench, name, arithmetic, matrix, [forced, scalar, best])?;
    }
    let delta = &deltas(bench, 1)?[0];
    for (name, arithmetic) in [("f32", DeltaArithmetic::F32), ("14-bit tables", DeltaArithmetic::Table14)] {
        delta_product(bench, name, arithmetic, delta, [forced, scalar, best])?;
    }
    Ok(())
}

fn delta_product(
    bench: &mut Bench,
    name: &str,
    arithmetic: DeltaArithmetic,
    delta: &DeltaMatrix,
    execs: [Exec<'static>; 3],
) -> Result<()> {
    let x = numbers(4096, 1.0, 7);
    let x = &x;
    let [forced, scalar, best] = execs.map(|exec| {
        let (mut y, mut workspace) = (vec![0.0f32; 4096], DeltaWorkspace::new());
        let options = DeltaOptions { arithmetic, output: Output::Replace };
        move || {
            let done = delta.forward(x, &mut y, 1, options, &mut workspace, &exec);
            done.unwrap_or_else(|error| unreachable!("{error}"));
        }
    });
    bench
        .contest(19, &format!("AVX2: 1-bit product, {name}, 4096x4096, M=1, hot"), forced)
        .work("bytes", delta.size_in_bytes() as f64)
        .here("own scalar code", scalar, SCALAR)
        .here("own best instruction set", best, BEST)
        .run()
}

fn tile(bench: &mut Bench, execs: [Exec<'static>; 3]) -> Result<()> {
    let block4 = block4(16, 4096, &execs[2])?;
    let block4 = &block4;
    let [forced, scalar, best] = execs.map(|exec| {
        let mut out = vec![0.0f32; 16 * 4096];
        move || {
            let done = block4.as_ref().dequantize_range_into(0, &mut out, Stores::Cached, &exec);
            done.unwrap_or_else(|error| unreachable!("{error}"));
        }
    });
    bench
        .contest(19, "AVX2: dequantize 64 Ki weights to f32 in the L2 cache", forced)
        .work("weights", (16 * 4096) as f64)
        .here("own scalar code", scalar, SCALAR)
        .here("own best instruction set", best, BEST)
        .run()
}

fn product(
    bench: &mut Bench,
    name: &str,
    arithmetic: Arithmetic,
    matrix: &Block4Matrix,
    execs: [Exec<'static>; 3],
) -> Result<()> {
    let x = numbers(4096, 1.0, 7);
    let x = &x;
    let [forced, scalar, best] = execs.map(|exec| {
        let (mut y, mut workspace) = (vec![0.0f32; 4096], Workspace::new());
        let options = ProductOptions { arithmetic, bias: None, output: Output::Replace };
        move || {
            let done = matrix.forward(x, &mut y, 1, &options, &mut workspace, &exec);
            done.unwrap_or_else(|error| unreachable!("{error}"));
        }
    });
    bench
        .contest(19, &format!("AVX2: product in {name}, 4096x4096, M=1, hot"), forced)
        .work("bytes", matrix.num_bytes() as f64)
        .here("own scalar code", scalar, SCALAR)
        .here("own best instruction set", best, BEST)
        .run()
}
