//! Rows 1 to 5 and 13: quantizing, dequantizing, scales, rearranging.

use anyhow::Result;
use pt_quant::{
    Absmax, Bf16, Block4Matrix, BlockSize, Codebook, F16, NestedAbsmaxBuf, ScaleFormat, Stores, packed_len,
    quantize_into, roof,
};
use serde_json::json;
use std::hint::black_box;

use crate::contest::{Bench, Targets};
use crate::inputs::{Named, block4, converted, weights};

const N: usize = 4096;
const K: usize = 4096;
const LEN: usize = N * K;
const NONE: Targets = (None, None);

pub(crate) fn all(bench: &mut Bench) -> Result<()> {
    if bench.wants(1) {
        quantize::<f32>(bench)?;
        quantize::<Bf16>(bench)?;
        quantize::<F16>(bench)?;
    }
    if bench.wants(2) {
        dequantize::<f32>(bench, 2, (Some(0.9), Some(0.97)), (Some(1.0), Some(1.25)))?;
    }
    if bench.wants(3) {
        dequantize::<Bf16>(bench, 3, (Some(0.85), Some(0.95)), (Some(2.0), Some(2.5)))?;
        dequantize::<F16>(bench, 3, (Some(0.85), Some(0.95)), (Some(2.0), Some(2.5)))?;
    }
    if bench.wants(4) {
        tile::<f32>(bench)?;
        tile::<Bf16>(bench)?;
        tile::<F16>(bench)?;
    }
    if bench.wants(5) {
        nested(bench)?;
    }
    if bench.wants(13) {
        repack(bench)?;
    }
    Ok(())
}

fn quantize<T: Named>(bench: &mut Bench) -> Result<()> {
    let exec = bench.exec();
    let input: Vec<T> = converted(&weights(N, K));
    let (mut packed, mut absmax) = (vec![0; packed_len(LEN)], vec![0.0; LEN / 64]);
    let bytes = vec![1.0f32; LEN * size_of::<T>() / 4];
    let call = || {
        let done = quantize_into(&input, BlockSize::B64, &Codebook::nf4(), &mut packed, &mut absmax, &exec);
        done.unwrap_or_else(|error| unreachable!("{error}"));
    };
    bench
        .contest(1, &format!("quantize {} to NF4, 4096x4096", T::NAME), call)
        .work("weights", LEN as f64)
        .torch(
            "bitsandbytes quantize_4bit",
            json!({"kind": "quantize", "dtype": T::NAME, "n": N, "k": K}),
            (Some(100.0), Some(200.0)),
        )
        .here("reading the input (roof)", || _ = black_box(roof::read(&bytes, &exec)), (None, Some(0.7)))
        .run()
}

fn dequantize<T: Named>(bench: &mut Bench, row: u8, of_roof: Targets, of_peer: Targets) -> Result<()> {
    let exec = bench.exec();
    // At least 64 MiB of output, also in 16 bits.
    let rows = N * 4 / size_of::<T>();
    let block4 = block4(rows, K, &exec)?;
    let (mut out, mut roof_out) = (converted::<T>(&vec![0.0; rows * K]), vec![0.0f32; rows * K * size_of::<T>() / 4]);
    let call = || {
        let done = block4.as_ref().dequantize_into(&mut out, &exec);
        done.unwrap_or_else(|error| unreachable!("{error}"));
    };
    bench
        .contest(row, &format!("dequantize to {}, 64 MiB out", T::NAME), call)
        .work("weights", (rows * K) as f64)
        .work("bytes_out", (rows * K * size_of::<T>()) as f64)
        .here("writing the output past the caches (roof)", || roof::write(&mut roof_out, 1.0, &exec), of_roof)
        .torch(
            "bitsandbytes' C function",
            json!({"kind": "dequantize_raw", "dtype": T::NAME, "n": rows, "k": K}),
            of_peer,
        )
        .torch(
            "bitsandbytes dequantize_4bit",
            json!({"kind": "dequantize_op", "dtype": T::NAME, "n": rows, "k": K}),
            NONE,
        )
        .run()
}

fn tile<T: Named>(bench: &mut Bench) -> Result<()> {
    let exec = bench.exec();
    let block4 = block4(16, K, &exec)?;
    let mut out = converted::<T>(&vec![0.0; 16 * K]);
    let call = || {
        let done = block4.as_ref().dequantize_range_into(0, &mut out, Stores::Cached, &exec);
        done.unwrap_or_else(|error| unreachable!("{error}"));
    };
    bench
        .contest(4, &format!("dequantize 64 Ki weights to {} in the L2 cache", T::NAME), call)
        .work("weights", (16 * K) as f64)
        .torch(
            "bitsandbytes' C function",
            json!({"kind": "dequantize_raw", "dtype": T::NAME, "n": 16, "k": K}),
            (Some(3.0), Some(5.0)),
        )
        .run()
}

fn nested(bench: &mut Bench) -> Result<()> {
    let exec = bench.exec();
    let block4 = block4(N, K, &exec)?;
    let Absmax::F32(absmax) = block4.as_ref().absmax() else { unreachable!("scales are plain until they are nested") };
    let absmax = absmax.to_vec();
    let call = || {
        let nested = NestedAbsmaxBuf::quantize(&absmax, &exec);
        black_box(nested.unwrap_or_else(|error| unreachable!("{error}")));
    };
    bench
        .contest(5, "double quantization of the scales of 4096x4096", call)
        .work("scales", absmax.len() as f64)
        .torch(
            "bitsandbytes mean + quantize_blockwise",
            json!({"kind": "nested_encode", "n": N, "k": K}),
            (Some(20.0), None),
        )
        .run()?;
    let nested = NestedAbsmaxBuf::quantize(&absmax, &exec)?;
    let mut out = vec![0.0; absmax.len()];
    let call = || {
        let done = Absmax::Nested(nested.as_ref()).decode_into(0, &mut out, &exec);
        done.unwrap_or_else(|error| unreachable!("{error}"));
    };
    bench
        .contest(5, "undoing the double quantization of the scales of 4096x4096", call)
        .work("scales", absmax.len() as f64)
        .torch(
            "bitsandbytes dequantize_blockwise + offset",
            json!({"kind": "nested_decode", "n": N, "k": K}),
            (Some(20.0), None),
        )
        .run()
}

fn repack(bench: &mut Bench) -> Result<()> {
    let exec = bench.exec();
    let block4 = block4(N, K, &exec)?;
    let mut matrix = Block4Matrix::from_block4(block4.as_ref(), N, K, ScaleFormat::F32, &exec)?;
    let bytes = packed_len(LEN) + LEN / 64 * 4;
    let (from, mut to) = (vec![1.0f32; bytes / 4], vec![0.0f32; bytes / 4]);
    let mut copy = || _ = black_box(roof::copy(&from, &mut to, &exec));
    let call = || matrix.repack(block4.as_ref(), &exec).unwrap_or_else(|error| unreachable!("{error}"));
    bench
        .contest(13, "rearrange 4096x4096 into tiles", call)
        .work("bytes", bytes as f64)
        .torch(
            "bitsandbytes _convert_weight_packed_for_cpu",
            json!({"kind": "repack", "n": N, "k": K}),
            (Some(30.0), None),
        )
        .here("copying the same bytes (roof)", &mut copy, (None, Some(0.6)))
        .run()?;
    let (mut packed, mut absmax) = (vec![0; packed_len(LEN)], vec![0.0; LEN / 64]);
    let call =
        || matrix.to_block4_into(&mut packed, &mut absmax, &exec).unwrap_or_else(|error| unreachable!("{error}"));
    bench
        .contest(13, "rearrange tiles back into bitsandbytes' order, 4096x4096", call)
        .work("bytes", bytes as f64)
        .here("copying the same bytes (roof)", &mut copy, (None, Some(0.6)))
        .run()
}
