//! Damaged files of bitsandbytes' tensors: a named error, never a panic.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pt_quant::formats::bitsandbytes::{self, QuantState, SourceDtype};
use pt_quant::formats::gguf::GgufType;
use pt_quant::{Block4, BlockSize, Codebook, Exec, QuantError};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

type Parts = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A good file, taken apart.
fn parts() -> Parts {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../fixtures/quant/checkpoint_nf4_nested/checkpoint.safetensors");
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let part = |tensor: TensorView<'_>| (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec());
    file.iter().map(|(name, tensor)| (name.to_owned(), part(tensor))).collect()
}

fn read(parts: &Parts) -> Result<Block4, QuantError> {
    let views =
        parts.iter().map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let owned = bitsandbytes::read_owned(&file, "layer.weight");
    // Borrowed: the same, or what only borrowing asks for.
    match (bitsandbytes::read(&file, "layer.weight"), &owned) {
        (Ok(stored), Ok(loaded)) => assert_eq!(stored.weights.to_owned(), loaded.weights),
        (Err(QuantError::Misaligned { .. }), Ok(_)) => {}
        (Err(one), Err(other)) => assert_eq!(one, *other),
        (one, other) => panic!("{one:?} {other:?}"),
    }
    owned.map(|loaded| loaded.weights)
}

const STATE: &str = "layer.weight.quant_state.bitsandbytes__nf4";

#[test]
fn a_missing_tensor_is_named() {
    assert!(read(&parts()).is_ok());
    for name in parts().keys() {
        let mut parts = parts();
        parts.remove(name);
        assert_eq!(read(&parts), Err(QuantError::MissingTensor { name: name.clone() }));
    }
}

#[test]
fn a_tensor_of_another_size_or_format_is_named() {
    for name in parts().keys().filter(|name| *name != STATE) {
        for change in ["longer", "shorter", "empty", "format"] {
            let mut parts = parts();
            let (dtype, shape, data) = parts.get_mut(name).unwrap();
            match change {
                "longer" => data.extend([0; 4]),
                "shorter" => data.truncate(data.len() - 4),
                "empty" => data.clear(),
                // Codes may be stored as anything.
                _ if name == "layer.weight" => continue,
                _ => *dtype = if *dtype == Dtype::U8 { Dtype::I8 } else { Dtype::I32 },
            }
            let size = if matches!(dtype, Dtype::U8 | Dtype::I8) { 1 } else { 4 };
            *shape = vec![data.len() / size];
            match read(&parts) {
                Err(QuantError::Tensor { name: found, .. }) => assert_eq!(found, *name),
                other => panic!("{name} {change}: {other:?}"),
            }
        }
    }
}

#[test]
fn a_table_that_is_not_the_formats_is_refused() {
    let mut parts = parts();
    parts.get_mut("layer.weight.quant_map").unwrap().2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    assert!(matches!(read(&parts), Err(QuantError::Tensor { name, .. }) if name == "layer.weight.quant_map"));
}

fn with_state(json: &str) -> Result<Block4, QuantError> {
    let mut parts = parts();
    parts.insert(STATE.to_owned(), (Dtype::U8, vec![json.len()], json.as_bytes().to_vec()));
    read(&parts)
}

#[test]
fn a_state_that_does_not_fit_the_tensors_is_refused() {
    let good = String::from_utf8(parts()[STATE].2.clone()).unwrap();
    assert!(with_state(&good).is_ok());
    for (from, to) in [
        ("[150, 128]", "[150, 129]"),
        ("[150, 128]", "[]"),
        ("[150, 128]", "[0, 128]"),
        ("[150, 128]", "[4294967296, 4294967296, 4294967296]"),
        ("[150, 128]", "[18446744073709551615]"),
        ("\"blocksize\": 64", "\"blocksize\": 128"),
        ("\"blocksize\": 64", "\"blocksize\": 65"),
        ("\"nested_blocksize\": 256", "\"nested_blocksize\": 64"),
        ("\"nf4\"", "\"fp4\""),
        (", \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\"", ", \"offset\""),
        ("{", "{{"),
        ("}", ""),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good);
        let error = with_state(&bad).expect_err(&bad);
        assert!(!error.to_string().is_empty() && !error.hint().is_empty());
    }
}

/// Random bytes, and damaged copies of a good state: whatever comes, an answer. `PT_FUZZ_SECONDS` makes it longer; what once failed stands first.
#[test]
fn any_bytes_as_a_state_get_an_answer() {
    const REGRESSIONS: [&[u8]; 5] = [
        b"",
        b"{\"shape\": [1e400]}",
        b"{\"quant_type\": \"\\ud800\"}",
        &[0xff; 300],
        // An offset beyond f32 was read as infinity, which JSON cannot say.
        b"{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"bfloat16\", \"shape\": [150, 128], \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\": 0.0528751e308}",
    ];
    for bytes in REGRESSIONS {
        assert!(QuantState::parse("w", bytes).is_err());
    }
    let seconds = std::env::var("PT_FUZZ_SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(0.5);
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let good = parts();
    let good_state = &good[STATE].2;
    let words: [&[u8]; 14] = [
        b"null",
        b"-1",
        b"1e308",
        b"18446744073709551616",
        b"[",
        b"]",
        b"{}",
        b"\"",
        b"\\u0000",
        b"0.5",
        b"true",
        b",",
        b":",
        b"9223372036854775807",
    ];
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % below.max(1)
    };
    let mut count = 0u64;
    while Instant::now() < end {
        let mut bytes = good_state.clone();
        if next(8) == 0 {
            bytes = (0..next(200)).map(|_| next(256) as u8).collect();
        }
        for _ in 0..=next(4) {
            let place = next(bytes.len() + 1);
            match next(5) {
                0 if place < bytes.len() => bytes[place] = next(256) as u8,
                1 if place < bytes.len() => bytes[place] ^= 1 << next(8),
                2 => bytes.truncate(place),
                3 => bytes
                    .splice(
                        place..(place + next(12)).min(bytes.len()).max(place),
                        words[next(words.len())].iter().copied(),
                    )
                    .for_each(drop),
                _ => bytes.insert(place, b"0123456789"[next(10)]),
            }
        }
        if let Ok(state) = QuantState::parse("w", &bytes) {
            // What was read is written and read alike.
            assert_eq!(QuantState::parse("w", state.to_json().as_bytes()).as_ref(), Ok(&state), "{bytes:?}");
            let _ = state.len();
        }
        // A whole file with it now and then, and with a tensor cut.
        if count.is_multiple_of(16) {
            let mut parts = good.clone();
            parts.insert(STATE.to_owned(), (Dtype::U8, vec![bytes.len()], bytes));
            if next(2) == 0 {
                let names: Vec<String> = parts.keys().cloned().collect();
                let (dtype, shape, data) = parts.get_mut(&names[next(names.len())]).unwrap();
                data.truncate(next(data.len() + 1) / 4 * 4);
                *dtype = if next(2) == 0 { Dtype::U8 } else { Dtype::F32 };
                *shape = vec![if *dtype == Dtype::U8 { data.len() } else { data.len() / 4 }];
            }
            if let Ok(weights) = read(&parts) {
                let _: Vec<f32> = weights.as_ref().dequantize(&Exec::single());
            }
        }
        // Blocks of GGUF files: any bytes of the right number are blocks.
        if count.is_multiple_of(64) {
            let kind = [GgufType::Iq4Nl, GgufType::Mxfp4][next(2)];
            let blocks: Vec<u8> = (0..next(80)).map(|_| next(256) as u8).collect();
            if let Ok(weights) = kind.decode(&blocks) {
                let _: Vec<f32> = weights.as_ref().dequantize(&Exec::single());
                let _ = kind.encode(&weights.as_ref());
            }
        }
        count += 1;
    }
    if seconds > 1.0 {
        println!("{count} inputs in {seconds} s");
    }
}

#[test]
fn what_bitsandbytes_cannot_read_is_not_written() {
    let exec = Exec::single();
    let quantize = |book| Block4::quantize(&[0.1f32; 64], BlockSize::B64, book, &exec).unwrap();
    let weights = quantize(Codebook::iq4_nl());
    let error = bitsandbytes::tensors("w", &weights.as_ref(), &[64], SourceDtype::Float32);
    assert!(matches!(error, Err(QuantError::Value { what: "weights.codebook", .. })));
    let weights = quantize(Codebook::nf4());
    let error = bitsandbytes::tensors("w", &weights.as_ref(), &[8, 7], SourceDtype::Float32);
    assert_eq!(error, Err(QuantError::Length { what: "shape", found: 56, expected: 64 }));
    let error = bitsandbytes::tensors("w", &weights.as_ref(), &[usize::MAX, 2], SourceDtype::Float32);
    assert_eq!(error, Err(QuantError::Overflow { what: "shape" }));
}
