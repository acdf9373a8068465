//! Against bitsandbytes 0.50.2 and the gguf package: `fixtures/quant`, made by `cargo xtask golden quant --regenerate`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use pt_quant::formats::bitsandbytes::{self, SourceDtype};
use pt_quant::formats::gguf::GgufType;
use pt_quant::{
    Absmax, AbsmaxBuf, Bf16, Block4, Block4Ref, BlockSize, Codebook, DynamicMap, Element, Exec, F16, Isa,
    NestedAbsmaxBuf, QuantError,
};
use safetensors::{Dtype, SafeTensors};

struct Case {
    name: String,
    settings: String,
    folder: PathBuf,
}

impl Case {
    fn all(kind: &str) -> Vec<Self> {
        let area = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/quant");
        let mut folders: Vec<_> = fs::read_dir(area).unwrap().map(|entry| entry.unwrap().path()).collect();
        folders.sort();
        let cases = folders.into_iter().map(|folder| Self {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            settings: fs::read_to_string(folder.join("case.toml")).unwrap(),
            folder,
        });
        let cases: Vec<_> = cases.filter(|case| case.setting("kind") == kind).collect();
        assert!(!cases.is_empty(), "no case is of kind {kind}");
        cases
    }

    fn setting(&self, key: &str) -> &str {
        let value = self.settings.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix('='));
        value.unwrap_or_else(|| panic!("{}: no {key}", self.name)).trim().trim_matches('"')
    }

    fn book(&self) -> Codebook {
        match self.setting("quant_type") {
            "nf4" => Codebook::nf4(),
            "fp4" => Codebook::fp4(),
            other => panic!("{}: {other}", self.name),
        }
    }

    fn block_size(&self) -> BlockSize {
        BlockSize::new(self.setting("block_size").parse().unwrap()).unwrap()
    }

    fn file(&self, name: &str) -> Tensors {
        Tensors::read(&self.folder.join(name))
    }
}

/// The tensors of a file: format and bytes.
struct Tensors(BTreeMap<String, (Dtype, Vec<u8>)>);

impl Tensors {
    fn read(path: &PathBuf) -> Self {
        let bytes = fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        Self(file.iter().map(|(name, tensor)| (name.to_owned(), (tensor.dtype(), tensor.data().to_vec()))).collect())
    }

    fn bytes(&self, name: &str) -> &[u8] {
        &self.0.get(name).unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        self.bytes(name).chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
    }

    fn u16s(&self, name: &str) -> impl Iterator<Item = u16> {
        self.bytes(name).chunks_exact(2).map(|two| u16::from_le_bytes(two.try_into().unwrap()))
    }

    /// Calls with the tensor in the format that it has.
    fn with_numbers<R>(&self, name: &str, run: impl Numbers<R>) -> R {
        match self.0[name].0 {
            Dtype::F32 => run.call(&self.f32s(name)),
            Dtype::BF16 => run.call(&self.u16s(name).map(Bf16).collect::<Vec<_>>()),
            Dtype::F16 => run.call(&self.u16s(name).map(F16).collect::<Vec<_>>()),
            other => panic!("{name} is {other:?}"),
        }
    }

    /// Equal bit for bit, but that any NaN stands for any other.
    fn check<T: Element>(&self, name: &str, found: &[T], what: &str) {
        let expected: Vec<T> = match T::KIND {
            pt_quant::ElementKind::F32 => self.f32s(name).into_iter().map(T::from_f32).collect(),
            pt_quant::ElementKind::Bf16 => self.u16s(name).map(|bits| T::from_f32(Bf16(bits).to_f32())).collect(),
            pt_quant::ElementKind::F16 => self.u16s(name).map(|bits| T::from_f32(F16(bits).to_f32())).collect(),
        };
        assert_eq!(found.len(), expected.len(), "{what}: {name}");
        for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
            let (found, expected) = (found.to_f32(), expected.to_f32());
            let is_same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
            assert!(is_same, "{what}: {name}[{index}] is {found}, expected {expected}");
        }
    }
}

trait Numbers<R> {
    fn call<T: Element>(self, numbers: &[T]) -> R;
}

fn execs() -> impl Iterator<Item = (String, Exec<'static>)> {
    Isa::available().map(|isa| (isa.to_string(), Exec::single().with_isa(isa).unwrap()))
}

struct Quantize<'a>(&'a Case, &'a Exec<'a>);

impl Numbers<Block4> for Quantize<'_> {
    fn call<T: Element>(self, numbers: &[T]) -> Block4 {
        Block4::quantize(numbers, self.0.block_size(), self.0.book(), self.1).unwrap()
    }
}

fn check_dequantized(expected: &Tensors, stored: &Block4Ref<'_>, exec: &Exec<'_>, what: &str) {
    expected.check("dequantized_f32", &stored.dequantize::<f32>(exec), what);
    expected.check("dequantized_bf16", &stored.dequantize::<Bf16>(exec), what);
    expected.check("dequantized_f16", &stored.dequantize::<F16>(exec), what);
}

#[test]
fn golden_quant_4_bit_codes_scales_and_numbers_are_those_of_bitsandbytes() {
    let cases = Case::all("4bit");
    assert!(cases.len() >= 20);
    for case in &cases {
        let (inputs, expected) = (case.file("inputs.safetensors"), case.file("expected.safetensors"));
        for (isa, exec) in execs() {
            let what = format!("{} on {isa}", case.name);
            let found = inputs.with_numbers("x", Quantize(case, &exec));
            assert_eq!(found.as_ref().packed(), expected.bytes("packed"), "{what}");
            let Absmax::F32(absmax) = found.as_ref().absmax() else { panic!("plain scales") };
            expected.check("absmax", absmax, &what);
            check_dequantized(&expected, &found.as_ref(), &exec, &what);
        }
    }
}

struct DtypeOf;

impl Numbers<SourceDtype> for DtypeOf {
    fn call<T: Element>(self, _: &[T]) -> SourceDtype {
        T::KIND.into()
    }
}

#[test]
fn golden_quant_checkpoints_are_read_and_written_byte_for_byte() {
    for case in Case::all("checkpoint") {
        let bytes = fs::read(case.folder.join("checkpoint.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (inputs, expected) = (case.file("inputs.safetensors"), case.file("expected.safetensors"));
        assert!(bitsandbytes::is_quantized(&file, "layer.weight") && !bitsandbytes::is_quantized(&file, "layer.bias"));
        let loaded = bitsandbytes::read_owned(&file, "layer.weight").unwrap();
        // Where the file lies in memory decides whether it can be borrowed.
        match bitsandbytes::read(&file, "layer.weight") {
            Ok(stored) => {
                assert_eq!((stored.weights.to_owned(), &stored.state), (loaded.weights.clone(), &loaded.state))
            }
            Err(error) => assert!(matches!(error, QuantError::Misaligned { .. }), "{error}"),
        }
        let state = &loaded.state;
        assert_eq!(state.block_size, case.block_size());
        assert_eq!(state.dtype, inputs.with_numbers("x", DtypeOf), "{}", case.name);
        let stored = loaded.weights.as_ref();
        for (isa, exec) in execs() {
            let what = format!("{} on {isa}", case.name);
            let mut scales = vec![0.0; stored.absmax().len()];
            stored.absmax().decode_into(0, &mut scales, &exec).unwrap();
            expected.check("scales", &scales, &what);
            check_dequantized(&expected, &stored, &exec, &what);
            // Ours from the same input: the same codes; the scales too, given torch's mean.
            let mut ours = inputs.with_numbers("x", Quantize(&case, &exec));
            assert_eq!(ours.as_ref().packed(), stored.packed(), "{what}");
            if let Absmax::Nested(nested) = stored.absmax() {
                let absmax = expected.f32s("plain_absmax");
                let found = NestedAbsmaxBuf::quantize_with_offset(&absmax, nested.offset(), &exec).unwrap();
                assert_eq!(found.as_ref(), nested, "{what}");
                let mean = NestedAbsmaxBuf::quantize(&absmax, &exec).unwrap().as_ref().offset();
                assert!(
                    (mean - nested.offset()).abs() <= 4.0 * f32::EPSILON * mean,
                    "{what}: {mean} {}",
                    nested.offset()
                );
                let (packed, _) = ours.into_parts();
                ours =
                    Block4::new(packed, AbsmaxBuf::Nested(found), stored.len(), state.block_size, case.book()).unwrap();
            }
            // Codes that are stored as another format are a matter of their tensor's header alone.
            let saved = bitsandbytes::tensors("layer.weight", &ours.as_ref(), &state.shape, state.dtype).unwrap();
            let written = safetensors::serialize(saved, None).unwrap();
            if case.name.contains("storage") {
                let written = SafeTensors::deserialize(&written).unwrap();
                for (name, tensor) in written.iter() {
                    assert_eq!(tensor.data(), file.tensor(name).unwrap().data(), "{what}: {name}");
                }
            } else {
                let (written, file) = (SafeTensors::deserialize(&written).unwrap(), &file);
                assert_eq!(written.names().len(), file.names().len());
                for (name, tensor) in written.iter() {
                    assert_eq!(tensor, file.tensor(name).unwrap(), "{what}: {name}");
                }
            }
        }
    }
}

struct Dynamic<'a>(&'a DynamicMap, BlockSize, &'a Exec<'a>);

impl Numbers<(Vec<u8>, Vec<f32>)> for Dynamic<'_> {
    fn call<T: Element>(self, numbers: &[T]) -> (Vec<u8>, Vec<f32>) {
        let (mut codes, mut absmax) = (vec![0; numbers.len()], vec![0.0; self.1.num_blocks(numbers.len())]);
        self.0.quantize_into(numbers, self.1, &mut codes, &mut absmax, self.2).unwrap();
        (codes, absmax)
    }
}

#[test]
fn golden_quant_8_bit_codes_scales_and_numbers_are_those_of_bitsandbytes() {
    for case in Case::all("8bit") {
        let map = if case.setting("signed") == "true" { DynamicMap::signed() } else { DynamicMap::unsigned() };
        let (inputs, expected) = (case.file("inputs.safetensors"), case.file("expected.safetensors"));
        for (isa, exec) in execs() {
            let what = format!("{} on {isa}", case.name);
            let (codes, absmax) = inputs.with_numbers("x", Dynamic(map, case.block_size(), &exec));
            assert_eq!(codes, expected.bytes("codes"), "{what}");
            expected.check("absmax", &absmax, &what);
            fn numbers<T: Element>(
                map: &DynamicMap,
                codes: &[u8],
                absmax: &[f32],
                size: BlockSize,
                exec: &Exec<'_>,
            ) -> Vec<T> {
                let mut out = vec![T::from_f32(0.0); codes.len()];
                map.dequantize_into(codes, absmax, size, &mut out, exec).unwrap();
                out
            }
            let size = case.block_size();
            expected.check("dequantized_f32", &numbers::<f32>(map, &codes, &absmax, size, &exec), &what);
            expected.check("dequantized_bf16", &numbers::<Bf16>(map, &codes, &absmax, size, &exec), &what);
            expected.check("dequantized_f16", &numbers::<F16>(map, &codes, &absmax, size, &exec), &what);
        }
    }
}

#[test]
fn golden_quant_tables_are_those_of_bitsandbytes() {
    for case in Case::all("tables") {
        let expected = case.file("expected.safetensors");
        for (name, book) in [("nf4", Codebook::nf4()), ("fp4", Codebook::fp4())] {
            expected.check(&format!("{name}.values"), book.values(), name);
            let order = expected.bytes(&format!("{name}.order"));
            for (rank, border) in expected.f32s(&format!("{name}.borders")).into_iter().enumerate() {
                assert_eq!(book.nearest(border), order[rank], "{name}: at border {rank}");
                assert_eq!(book.nearest(border.next_up()), order[rank + 1], "{name}: above border {rank}");
            }
        }
        for (name, map) in [("signed", DynamicMap::signed()), ("unsigned", DynamicMap::unsigned())] {
            expected.check(&format!("{name}.values"), map.values(), name);
            for (rank, border) in expected.f32s(&format!("{name}.borders")).into_iter().enumerate() {
                assert_eq!(usize::from(map.nearest(border)), rank, "{name}");
                assert_eq!(usize::from(map.nearest(border.next_up())), rank + 1, "{name}");
            }
        }
    }
}

#[test]
fn golden_quant_gguf_blocks_are_those_of_the_gguf_package() {
    for case in Case::all("gguf") {
        let expected = case.file("expected.safetensors");
        let kind = if case.name.ends_with("iq4_nl") { GgufType::Iq4Nl } else { GgufType::Mxfp4 };
        let weights = kind.decode(expected.bytes("blocks")).unwrap();
        assert_eq!(kind.encode(&weights.as_ref()).unwrap(), expected.bytes("blocks"));
        for (isa, exec) in execs() {
            // Numbers, not bits: the package has no negative zero.
            let numbers: Vec<f32> = weights.as_ref().dequantize(&exec);
            assert_eq!(numbers, expected.f32s("dequantized"), "{} on {isa}", case.name);
        }
        if kind == GgufType::Mxfp4 {
            assert_eq!(kind.quantize(&expected.f32s("x")).unwrap(), expected.bytes("quantized"));
        }
    }
}

/// The comparison itself: a wrong entry of the table, halves of bytes in the other order, or scales one block off do not pass it.
#[test]
fn golden_quant_comparison_notices_small_faults() {
    let cases = Case::all("4bit");
    let case = cases.iter().find(|case| case.name == "nf4_f32").unwrap();
    let expected = case.file("expected.safetensors");
    let (packed, absmax) = (expected.bytes("packed"), expected.f32s("absmax"));
    let exec = Exec::single();
    let differs = |packed: &[u8], absmax: &[f32], book: Codebook| {
        let stored = Block4Ref::new(packed, Absmax::F32(absmax), 2 * packed.len(), case.block_size(), book).unwrap();
        let numbers: Vec<f32> = stored.dequantize(&exec);
        numbers != expected.f32s("dequantized_f32")
    };
    assert!(!differs(packed, &absmax, Codebook::nf4()));
    for code in 0..16 {
        let mut values = *Codebook::nf4().values();
        values[code] = if code == 7 { 1e-9 } else { values[code].next_up() };
        assert!(differs(packed, &absmax, Codebook::new(values).unwrap()), "entry {code}");
    }
    let swapped: Vec<u8> = packed.iter().map(|byte| byte.rotate_left(4)).collect();
    assert!(differs(&swapped, &absmax, Codebook::nf4()));
    let mut shifted = absmax.clone();
    shifted.rotate_left(1);
    assert!(differs(packed, &shifted, Codebook::nf4()));
    // Quantizing with a border moved by a few units in the last place shows in the case of ties.
    let case = cases.iter().find(|case| case.name == "nf4_ties").unwrap();
    let (inputs, expected) = (case.file("inputs.safetensors"), case.file("expected.safetensors"));
    for code in 1..15 {
        let mut values = *Codebook::nf4().values();
        values[code] += if code == 7 { 3e-8 } else { 6.0 * (values[code].next_up() - values[code]) };
        let book = Codebook::new(values).unwrap();
        let found = Block4::quantize(&inputs.f32s("x"), case.block_size(), book, &exec).unwrap();
        assert_ne!(found.as_ref().packed(), expected.bytes("packed"), "entry {code}");
    }
}
