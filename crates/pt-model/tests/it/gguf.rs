use crate::common::{cases, fixtures};
use proptest::prelude::*;
use pt_model::gguf::{Gguf, Value};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{Device, Tensor};
use std::path::Path;

fn parse(bytes: Vec<u8>) -> pt_model::Result<Gguf> {
    Gguf::from_bytes(Path::new("test.gguf"), bytes)
}

/// Everything that can be asked of a file that was parsed.
fn read_all(gguf: &Gguf) {
    for name in gguf.tensors().keys() {
        if let Ok(values) = gguf.dequantized(name) {
            assert_eq!(values.len(), gguf.tensors()[name].num_elements());
        }
    }
    for (key, value) in gguf.metadata().iter() {
        let _ = format!("{key} {value}");
        if let Value::Array(array) = value {
            assert!(array.scalars().count() <= array.len());
        }
    }
}

fn small_file(case: &str) -> Vec<u8> {
    std::fs::read(fixtures("gguf_types").join(case).join("x.gguf")).unwrap()
}

#[test]
fn golden_gguf_types_dequantize_to_the_same_bits() {
    for folder in cases("gguf_types") {
        let gguf = Gguf::open(&folder.join("x.gguf")).unwrap();
        let expected = SafetensorsReader::open(folder.join("expected.safetensors")).unwrap();
        let expected = expected.tensor("x", Device::Cpu).unwrap();
        assert_eq!(gguf.info("x").unwrap().shape, expected.size(), "{}", folder.display());
        let expected = Vec::<f32>::try_from(expected.view(-1)).unwrap();
        let found = gguf.dequantized("x").unwrap();
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.to_bits(), expected.to_bits(), "{}, element {i}: {found} {expected}", folder.display());
        }
    }
}

#[test]
fn metadata_of_every_type_is_read() {
    let gguf = Gguf::open(&fixtures("gguf_types/f32/x.gguf")).unwrap();
    let shown = |key: &str| gguf.metadata().get(&format!("test.{key}")).map(ToString::to_string).unwrap();
    let expected = [
        ("u8", "200"),
        ("i8", "-7"),
        ("u16", "60000"),
        ("i16", "-300"),
        ("u32", "4294967295"),
        ("i32", "-2147483648"),
        ("u64", "1099511627776"),
        ("i64", "-1099511627776"),
        ("f32", "0.10000000149011612"),
        ("f64", "0.1"),
        ("bool", "true"),
        ("string", "\"naïve\""),
        ("strings", "a list of 3"),
        ("integers", "a list of 3"),
    ];
    for (key, value) in expected {
        assert_eq!(shown(key), value, "{key}");
    }
    let path = gguf.path();
    assert_eq!(gguf.metadata().required_strings(path, "test.strings").unwrap(), ["a", "", "ü"]);
    assert_eq!(gguf.metadata().integers(path, "test.integers").unwrap().unwrap(), [1, -2, 3]);
}

#[test]
fn every_prefix_of_a_file_is_an_error() {
    for case in ["f32", "q4_1", "q6_k"] {
        let whole = small_file(case);
        assert!(parse(whole.clone()).is_ok());
        // The header has no padding after the last tensor here, so every byte is needed.
        let gguf = parse(whole.clone()).unwrap();
        let info = gguf.info("x").unwrap();
        for len in 0..(info.start + info.num_bytes) as usize {
            let error = parse(whole[..len].to_vec()).expect_err(&format!("a prefix of {len} bytes was read"));
            assert!(error.hint().is_some());
        }
    }
}

/// A version 3 header with these counts and this rest.
fn header(tensor_count: u64, metadata_count: u64, rest: &[u8]) -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend(tensor_count.to_le_bytes());
    bytes.extend(metadata_count.to_le_bytes());
    bytes.extend(rest);
    bytes
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend((dims.len() as u32).to_le_bytes());
    bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// Tensors of that table, then `data_len` bytes of data.
fn with_tensors(tensors: &[Vec<u8>], data_len: usize) -> Vec<u8> {
    let mut bytes = header(tensors.len() as u64, 0, &tensors.concat());
    bytes.resize(bytes.len().next_multiple_of(32) + data_len, 0);
    bytes
}

#[test]
fn headers_that_lie_are_errors_that_say_what_is_wrong() {
    let check = |bytes: Vec<u8>, part: &str| {
        let error = parse(bytes).expect_err(part).to_string();
        assert!(error.contains("test.gguf") && error.contains(part), "{error}: no {part:?}");
    };
    check(b"GGML\x03\0\0\0".to_vec(), "does not begin with `GGUF`");
    check(b"GGUF\x01\0\0\0".to_vec(), "version is 1");
    check(b"GGUF\0\0\0\x03".to_vec(), "big-endian");
    check(header(u64::MAX, 0, &[]), "the file ends in a tensor name");
    check(header(0, u64::MAX, &[]), "the file ends in a metadata key");
    check(header(0, 1, &u64::MAX.to_le_bytes()), "a metadata key takes 18446744073709551615 bytes");
    let value = |kind: u32, rest: &[u8]| [&string("k")[..], &kind.to_le_bytes(), rest].concat();
    check(header(0, 1, &value(8, &(1u64 << 40).to_le_bytes())), "k takes 1099511627776 bytes");
    check(header(0, 1, &value(13, &[0; 8])), "unknown type 13");
    let list = |kind: u32, len: u64| value(9, &[&kind.to_le_bytes()[..], &len.to_le_bytes()].concat());
    for kind in [0, 6, 8, 9, 12] {
        check(header(0, 1, &list(kind, 1 << 60)), "`k` lists");
    }
    check(header(0, 1, &value(8, &[&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat())), "not UTF-8");
    check(header(0, 2, &[value(7, &[1]), value(7, &[1])].concat()), "`k` stands there twice");
    let alignment = [&string("general.alignment")[..], &4u32.to_le_bytes(), &3u32.to_le_bytes()].concat();
    check(header(0, 1, &alignment), "general.alignment is 3");
    let nested = (0..6).fold(vec![], |mut bytes: Vec<u8>, _| {
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes
    });
    check(header(0, 1, &value(9, &nested)), "4 deep");

    check(with_tensors(&[tensor("x", &[8], 0, 0)], 31), "takes 32 bytes");
    check(with_tensors(&[tensor("x", &[8], 0, 1 << 40)], 32), "takes 32 bytes from byte 1099511627776");
    check(with_tensors(&[tensor("x", &[8], 0, u64::MAX - 31)], 32), "takes 32 bytes");
    check(with_tensors(&[tensor("x", &[8], 0, 7)], 64), "no multiple of 32");
    check(with_tensors(&[tensor("x", &[1 << 40, 1 << 40], 0, 0)], 32), "more than any file holds");
    check(with_tensors(&[tensor("x", &[0], 0, 0)], 32), "a dimension of 0");
    check(with_tensors(&[tensor("x", &[], 0, 0)], 32), "0 dimensions");
    check(with_tensors(&[tensor("x", &[1, 1, 1, 1, 1], 0, 0)], 32), "5 dimensions");
    check(with_tensors(&[tensor("x", &[8], 99, 0)], 32), "unknown storage type 99");
    check(with_tensors(&[tensor("x", &[33], 2, 0)], 64), "a multiple of 32 (Q4_0)");
    check(with_tensors(&[tensor("x", &[16], 0, 0), tensor("y", &[8], 0, 32)], 64), "`x` and `y` overlap");
    check(with_tensors(&[tensor("x", &[8], 0, 0), tensor("x", &[8], 0, 32)], 64), "`x` stands there twice");
    assert!(parse(with_tensors(&[tensor("x", &[8], 0, 0), tensor("y", &[8], 0, 32)], 64)).is_ok());
}

#[test]
fn a_type_that_cannot_be_read_yet_is_named_when_it_is_asked_for() {
    let gguf = parse(with_tensors(&[tensor("x", &[256], 10, 0)], 96)).unwrap();
    let error = gguf.dequantized("x").unwrap_err().to_string();
    assert!(error.contains("`x` is stored as Q2_K, expected one of F32"), "{error}");
    let error = gguf.dequantized("y").unwrap_err().to_string();
    assert!(error.contains("no tensor `y`"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(rest in prop::collection::vec(any::<u8>(), 0..400), counts in any::<(u8, u8)>()) {
        if let Ok(gguf) = parse(header(counts.0.into(), counts.1.into(), &rest)) {
            read_all(&gguf);
        }
        let _ = parse(rest);
    }

    #[test]
    fn a_changed_header_never_panics(
        case in prop::sample::select(vec!["f32", "q4_0", "q6_k"]),
        changes in prop::collection::vec((0usize..700, any::<u8>()), 1..6),
        wide in (0usize..700, prop::sample::select(vec![0u64, 1, 33, 1 << 20, 1 << 31, 1 << 40, u64::MAX / 2, u64::MAX])),
        is_wide in any::<bool>(),
    ) {
        let mut bytes = small_file(case);
        for (at, byte) in changes {
            let len = bytes.len();
            bytes[at % len] = byte;
        }
        if is_wide {
            let at = wide.0.min(bytes.len() - 8);
            bytes[at..at + 8].copy_from_slice(&wide.1.to_le_bytes());
        }
        if let Ok(gguf) = parse(bytes) {
            read_all(&gguf);
        }
    }
}

#[test]
fn the_element_order_is_that_of_torch() {
    let gguf = Gguf::open(&fixtures("gguf_types/f32/x.gguf")).unwrap();
    let values = gguf.dequantized("x").unwrap();
    let tensor = Tensor::from_slice(&values).view(gguf.info("x").unwrap().shape.as_slice());
    assert_eq!(tensor.double_value(&[2, 0]), 6.5e4);
}
