//! Against BitDelta's packing rule and ggml's Q1_0: `fixtures/delta`, made by `cargo xtask golden delta --regenerate`.

use std::fs;
use std::path::{Path, PathBuf};

use pt_quant::delta::{
    BitDelta, BitMatrix, DeltaArithmetic, DeltaMatrix, DeltaOptions, DeltaScale, DeltaScaleBuf, DeltaWorkspace,
    ScaleAxis,
};
use pt_quant::dense::Output;
use pt_quant::{Bf16, Element, Exec, F16, Isa};
use safetensors::{Dtype, SafeTensors};

fn cases() -> Vec<PathBuf> {
    let area = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/delta");
    let mut folders: Vec<_> = fs::read_dir(area).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 6);
    folders
}

fn setting(folder: &Path, key: &str) -> usize {
    let text = fs::read_to_string(folder.join("case.toml")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_prefix('=').map(str::to_owned));
    line.unwrap_or_else(|| panic!("no {key}")).trim().parse().unwrap()
}

/// An element with its little-endian bytes.
trait Stored: Element + PartialEq + std::fmt::Debug {
    fn read(bytes: &[u8]) -> Vec<Self>;
}

impl Stored for f32 {
    fn read(bytes: &[u8]) -> Vec<Self> {
        bytes.chunks_exact(4).map(|four| Self::from_le_bytes(four.try_into().unwrap())).collect()
    }
}

impl Stored for Bf16 {
    fn read(bytes: &[u8]) -> Vec<Self> {
        bytes.chunks_exact(2).map(|two| Self(u16::from_le_bytes(two.try_into().unwrap()))).collect()
    }
}

impl Stored for F16 {
    fn read(bytes: &[u8]) -> Vec<Self> {
        bytes.chunks_exact(2).map(|two| Self(u16::from_le_bytes(two.try_into().unwrap()))).collect()
    }
}

fn close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= tolerance * largest, "{what}: {found} is not {expected}");
    }
}

fn check<T: Stored>(inputs: &SafeTensors<'_>, expected: &SafeTensors<'_>, folder: &Path, exec: &Exec<'_>) {
    let what = format!("{} on {}", folder.display(), exec.isa());
    let floats = |name: &str| f32::read(expected.tensor(name).unwrap().data());
    let [n, k, rows] = ["out_features", "in_features", "rows"].map(|key| setting(folder, key));
    let [base, tuned] = ["base", "fine_tuned"].map(|name| T::read(inputs.tensor(name).unwrap().data()));
    let mask: Vec<i32> = expected
        .tensor("mask")
        .unwrap()
        .data()
        .chunks_exact(4)
        .map(|four| i32::from_le_bytes(four.try_into().unwrap()))
        .collect();
    let coeff = floats("coeff")[0];

    // Packing: the signs exactly, scales but for the rounding of the differences.
    let delta = BitDelta::fit(&base, &tuned, n, k, ScaleAxis::Matrix, exec).unwrap();
    let mut found = vec![0; mask.len()];
    delta.signs().to_bitdelta(&mut found, exec).unwrap();
    assert_eq!(found, mask, "{what}");
    let signs = BitMatrix::from_bitdelta(&mask, n, k, exec).unwrap();
    assert_eq!(signs.as_ref(), delta.signs(), "{what}");
    let rounding = match T::KIND {
        pt_quant::ElementKind::F32 => 1e-6,
        pt_quant::ElementKind::Bf16 => 1.0 / 512.0,
        pt_quant::ElementKind::F16 => 1.0 / 4096.0,
    };
    close(delta.scale().values(), &[coeff], rounding, &what);
    let by_row = BitDelta::fit(&base, &tuned, n, k, ScaleAxis::Row, exec).unwrap();
    close(by_row.scale().values(), &floats("row_means"), 1e-6, &what);

    // Merging and unmerging with their scale.
    let delta = BitDelta::new(signs, DeltaScaleBuf::Matrix(coeff)).unwrap();
    let mut weights = base.clone();
    let backup = delta.as_ref().merge_with_backup(&mut weights, exec).unwrap();
    assert!(weights == T::read(expected.tensor("merged").unwrap().data()), "{what}: merged weights");
    backup.toggle(&mut weights, exec).unwrap();
    assert!(weights == base, "{what}: unmerged weights");

    // Products.
    let [x, dy] = ["x", "dy"].map(|name| f32::read(inputs.tensor(name).unwrap().data()));
    let matrix = DeltaMatrix::new(delta.as_ref(), exec).unwrap();
    let mut workspace = DeltaWorkspace::new();
    for (arithmetic, tolerance) in [
        (DeltaArithmetic::F32, 2e-6),
        (DeltaArithmetic::Table14, 2e-4),
        (DeltaArithmetic::Int8, 2e-2),
        (DeltaArithmetic::Table7, 3e-2),
    ] {
        let options = DeltaOptions { arithmetic, output: Output::Replace };
        let mut y = vec![0.0f32; rows * n];
        matrix.forward(&x, &mut y, rows, options, &mut workspace, exec).unwrap();
        close(&y, &floats("y"), tolerance, &format!("{what}, y, {arithmetic:?}"));
        let mut dx = vec![0.0f32; rows * k];
        matrix.backward(&dy, &mut dx, rows, options, &mut workspace, exec).unwrap();
        close(&dx, &floats("dx"), tolerance, &format!("{what}, dx, {arithmetic:?}"));
    }
    let mut gradient = [0.0];
    matrix.scale_gradient(&x, &dy, &mut gradient, rows, DeltaArithmetic::F32, &mut workspace, exec).unwrap();
    close(&gradient, &floats("gradient"), 2e-5, &what);

    // Q1_0: their blocks to the same numbers and back to the same bytes, and ours but for the last bit of the scale.
    if k.is_multiple_of(128) {
        let blocks = expected.tensor("q1_0").unwrap().data();
        let stored = BitDelta::from_q1_0(blocks, n, k, exec).unwrap();
        let mut dense = vec![0.0f32; n * k];
        stored.as_ref().write_dense(&mut dense, exec).unwrap();
        assert!(dense == floats("q1_0_values"), "{what}: numbers of Q1_0 blocks");
        assert_eq!(stored.as_ref().to_q1_0().unwrap(), blocks, "{what}");
        let ours = BitDelta::fit(&base, &tuned, n, k, ScaleAxis::Group128, exec).unwrap();
        assert_eq!(ours.signs(), stored.signs(), "{what}");
        let (DeltaScale::Group128(ours), DeltaScale::Group128(theirs)) = (ours.scale(), stored.scale()) else {
            panic!("{what}: scales of groups");
        };
        close(ours, theirs, 1e-3, &what);
    }
}

#[test]
fn golden_delta_packing_merging_and_products_are_those_of_the_published_rule() {
    for folder in cases() {
        let [inputs, expected] =
            ["inputs", "expected"].map(|name| fs::read(folder.join(format!("{name}.safetensors"))).unwrap());
        let inputs = SafeTensors::deserialize(&inputs).unwrap();
        let expected = SafeTensors::deserialize(&expected).unwrap();
        for isa in Isa::available() {
            let exec = Exec::single().with_isa(isa).unwrap();
            match inputs.tensor("base").unwrap().dtype() {
                Dtype::F32 => check::<f32>(&inputs, &expected, &folder, &exec),
                Dtype::BF16 => check::<Bf16>(&inputs, &expected, &folder, &exec),
                Dtype::F16 => check::<F16>(&inputs, &expected, &folder, &exec),
                other => panic!("{other:?}"),
            }
        }
    }
}
