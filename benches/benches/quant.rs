//! `cargo bench -p pt-benches --no-default-features --bench quant [FILTER]`: pt-quant's kernels on each instruction set that
//! this processor has, beside memcpy. Names read area/what/size/instruction set.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pt_quant::dense::{GemmShape, Output, Workspace, gemm_nt};
use pt_quant::{
    Arithmetic, Bf16, Block4, Block4Matrix, BlockSize, Codebook, Element, Exec, Isa, ProductOptions, ScaleFormat,
    quantize_into,
};
use std::hint::black_box;

const N: usize = 4096;
const K: usize = 4096;

/// Numbers from -0.02 to 0.02.
fn numbers<T: Element>(len: usize) -> Vec<T> {
    (0..len as u32)
        .map(|index| T::from_f32((index.wrapping_mul(2_654_435_761) as f32 / u32::MAX as f32 - 0.5) * 0.04))
        .collect()
}

fn execs() -> impl Iterator<Item = Exec<'static>> {
    Isa::available().filter_map(|isa| Exec::single().with_isa(isa).ok())
}

fn copies(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("memcpy/f32/4096x4096");
    let (from, mut to) = (vec![1.0f32; N * K], vec![0.0f32; N * K]);
    group.throughput(Throughput::Bytes((N * K * 4) as u64));
    group.bench_function("std", |bencher| bencher.iter(|| black_box(&mut to).copy_from_slice(black_box(&from))));
    group.finish();
}

fn quantize(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("nf4/quantize/4096x4096");
    group.throughput(Throughput::Bytes((N * K * 4) as u64)).sample_size(10);
    let input = numbers::<f32>(N * K);
    let (mut packed, mut absmax) = (vec![0; N * K / 2], vec![0.0; N * K / 64]);
    for exec in execs() {
        group.bench_function(exec.isa().name(), |bencher| {
            bencher.iter(|| quantize_into(&input, BlockSize::B64, &Codebook::nf4(), &mut packed, &mut absmax, &exec));
        });
    }
    group.finish();
}

fn dequantize<T: Element>(criterion: &mut Criterion, name: &str) {
    let mut group = criterion.benchmark_group(format!("nf4/dequantize/4096x4096/{name}"));
    group.throughput(Throughput::Bytes((N * K * size_of::<T>()) as u64)).sample_size(20);
    let block4 = Block4::quantize(&numbers::<f32>(N * K), BlockSize::B64, Codebook::nf4(), &Exec::single());
    let Ok(block4) = block4 else { return };
    let mut out = numbers::<T>(N * K);
    for exec in execs() {
        group.bench_function(exec.isa().name(), |bencher| {
            bencher.iter(|| block4.as_ref().dequantize_into(&mut out, &exec));
        });
    }
    group.finish();
}

fn products(criterion: &mut Criterion) {
    let exec = Exec::single();
    let block4 = Block4::quantize(&numbers::<f32>(N * K), BlockSize::B64, Codebook::nf4(), &exec);
    let matrix = block4.and_then(|weights| Block4Matrix::from_block4(weights.as_ref(), N, K, ScaleFormat::F32, &exec));
    let Ok(matrix) = matrix else { return };
    for (name, arithmetic) in [("f32", Arithmetic::F32), ("bf16", Arithmetic::Bf16), ("int8", Arithmetic::Int8)] {
        for rows in [1, 8] {
            let mut group = criterion.benchmark_group(format!("nf4/product/4096x4096/{name}/rows={rows}"));
            group.throughput(Throughput::Bytes(matrix.num_bytes() as u64)).sample_size(20);
            let (x, mut y) = (numbers::<f32>(rows * K), vec![0.0f32; rows * N]);
            let mut workspace = Workspace::new();
            let options = ProductOptions { arithmetic, bias: None, output: Output::Replace };
            for exec in execs() {
                group.bench_function(exec.isa().name(), |bencher| {
                    bencher.iter(|| matrix.forward(&x, &mut y, rows, &options, &mut workspace, &exec));
                });
            }
            group.finish();
        }
    }
}

fn dense<T: Element>(criterion: &mut Criterion, name: &str) {
    let mut group = criterion.benchmark_group(format!("dense/gemm_nt/64x1024x1024/{name}"));
    let shape = GemmShape { rows: 64, columns: 1024, depth: 1024 };
    group.throughput(Throughput::Elements(2 * 64 * 1024 * 1024)).sample_size(20);
    let (x, w) = (numbers::<T>(64 * 1024), numbers::<T>(1024 * 1024));
    let (mut y, mut workspace) = (vec![0.0; 64 * 1024], Workspace::new());
    for exec in execs() {
        group.bench_function(exec.isa().name(), |bencher| {
            bencher.iter(|| gemm_nt(&x, &w, &mut y, shape, Output::Replace, &mut workspace, &exec));
        });
    }
    group.finish();
}

fn all(criterion: &mut Criterion) {
    copies(criterion);
    quantize(criterion);
    dequantize::<f32>(criterion, "f32");
    dequantize::<Bf16>(criterion, "bf16");
    products(criterion);
    dense::<f32>(criterion, "f32");
    dense::<Bf16>(criterion, "bf16");
}

criterion_group!(benches, all);
criterion_main!(benches);
