//! The JSON beside a 4-bit tensor.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Write as _;

use serde_json::{Map, Value};

use crate::element::ElementKind;
use crate::{BlockSize, Codebook, QuantError};

/// Which of bitsandbytes' codebooks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// [`Codebook::nf4`]
    Nf4,
    /// [`Codebook::fp4`]
    Fp4,
}

impl QuantType {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// As the JSON has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// Its values.
    #[must_use]
    pub const fn codebook(self) -> Codebook {
        match self {
            Self::Nf4 => Codebook::nf4(),
            Self::Fp4 => Codebook::fp4(),
        }
    }

    /// The type with this codebook.
    #[must_use]
    pub fn of(codebook: &Codebook) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.codebook() == *codebook)
    }

    /// The name of the tensor with the JSON of weight `name`.
    pub(super) fn state_key(self, name: &str) -> String {
        format!("{name}.quant_state.bitsandbytes__{}", self.name())
    }
}

/// The format that a weight had before it was quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceDtype {
    /// `f32`
    Float32,
    /// [`Bf16`](crate::Bf16)
    BFloat16,
    /// [`F16`](crate::F16)
    Float16,
}

impl SourceDtype {
    const ALL: [Self; 3] = [Self::Float32, Self::BFloat16, Self::Float16];

    /// torch's name of it, without `torch.`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::BFloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }
}

impl From<ElementKind> for SourceDtype {
    fn from(kind: ElementKind) -> Self {
        match kind {
            ElementKind::F32 => Self::Float32,
            ElementKind::Bf16 => Self::BFloat16,
            ElementKind::F16 => Self::Float16,
        }
    }
}

/// What the JSON says of a 4-bit tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    /// The codebook.
    pub quant_type: QuantType,
    /// Weights that share a scale.
    pub block_size: BlockSize,
    /// The format that the weight had.
    pub dtype: SourceDtype,
    /// The shape of the weight, `[out, in]` for a linear layer.
    pub shape: Vec<usize>,
    /// How the scales are quantized, if they are.
    pub nested: Option<NestedState>,
}

/// What the JSON says of scales that are quantized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NestedState {
    /// Scales that share a scale of their own.
    pub block_size: BlockSize,
    /// Added to every scale.
    pub offset: f32,
}

impl QuantState {
    /// Reads the bytes of the tensor `name`.
    ///
    /// # Errors
    /// [`QuantError::Json`] when they are no JSON object, [`QuantError::QuantState`] when a field is missing or wrong.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self, QuantError> {
        let object: Map<String, Value> = serde_json::from_slice(bytes)
            .map_err(|error| QuantError::Json { name: name.to_string(), message: error.to_string() })?;
        let fields = Fields { name, object: &object };
        let block_size = |field, expected| {
            let value = fields.get(field, expected)?;
            let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
            size.and_then(|size| BlockSize::new(size).ok()).ok_or_else(|| fields.wrong(field, expected))
        };
        let quant_type = fields.one_of("quant_type", QuantType::ALL, QuantType::name, "\"nf4\" or \"fp4\"")?;
        let dtypes = "\"float32\", \"bfloat16\" or \"float16\"";
        let dtype = fields.one_of("dtype", SourceDtype::ALL, SourceDtype::name, dtypes)?;
        let dimensions = "a list of dimensions";
        let shape = fields.get("shape", dimensions)?.as_array().and_then(|shape| {
            shape.iter().map(|size| usize::try_from(size.as_u64()?).ok()).collect::<Option<Vec<_>>>()
        });
        let shape = shape.ok_or_else(|| fields.wrong("shape", dimensions))?;
        let nested = if object.keys().any(|key| key.starts_with("nested_")) {
            fields.one_of("nested_dtype", ["float32"], |name| name, "\"float32\"")?;
            let number = "a number that f32 holds";
            let offset = fields.get("nested_offset", number)?.as_f64().map(|offset| offset as f32);
            let offset =
                offset.filter(|offset| offset.is_finite()).ok_or_else(|| fields.wrong("nested_offset", number))?;
            let block_size = block_size("nested_blocksize", "a power of two from 32 to 4096")?;
            Some(NestedState { block_size, offset })
        } else {
            None
        };
        let block_size = block_size("blocksize", "a power of two from 32 to 4096")?;
        Ok(Self { quant_type, block_size, dtype, shape, nested })
    }

    /// The JSON as Python's `json.dumps` writes it for bitsandbytes, byte for byte.
    #[must_use]
    pub fn to_json(&self) -> String {
        let Self { quant_type, block_size, dtype, shape, nested } = self;
        let shape: Vec<String> = shape.iter().map(ToString::to_string).collect();
        let mut json = format!(
            "{{\"quant_type\": \"{}\", \"blocksize\": {block_size}, \"dtype\": \"{}\", \"shape\": [{}]",
            quant_type.name(),
            dtype.name(),
            shape.join(", ")
        );
        if let Some(NestedState { block_size, offset }) = nested {
            let offset = python_float(f64::from(*offset));
            // Writing to a string does not fail.
            let _ = write!(
                json,
                ", \"nested_blocksize\": {block_size}, \"nested_dtype\": \"float32\", \"nested_offset\": {offset}"
            );
        }
        json + "}"
    }

    /// Elements of the shape.
    ///
    /// # Errors
    /// [`QuantError::Overflow`] when they are too many for any memory.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> Result<usize, QuantError> {
        let len = self.shape.iter().try_fold(1usize, |len, &size| len.checked_mul(size));
        // The weights themselves could not be had beyond this, so that sizes in bytes do not overflow later.
        len.filter(|&len| len <= isize::MAX as usize / 4).ok_or(QuantError::Overflow { what: "shape" })
    }
}

struct Fields<'a> {
    name: &'a str,
    object: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn get(&self, field: &'static str, expected: &'static str) -> Result<&Value, QuantError> {
        self.object.get(field).ok_or_else(|| self.wrong(field, expected))
    }

    fn one_of<T: Copy, const N: usize>(
        &self,
        field: &'static str,
        choices: [T; N],
        name: impl Fn(T) -> &'static str,
        expected: &'static str,
    ) -> Result<T, QuantError> {
        let value = self.get(field, expected)?.as_str();
        let found = choices.into_iter().find(|&choice| value == Some(name(choice)));
        found.ok_or_else(|| self.wrong(field, expected))
    }

    fn wrong(&self, field: &'static str, expected: &'static str) -> QuantError {
        let found = self.object.get(field).map_or_else(
            || "missing".to_string(),
            |value| {
                let mut text = value.to_string();
                // A damaged file may hold anything.
                if let Some((cut, _)) = text.char_indices().nth(60) {
                    text.truncate(cut);
                    text += "..";
                }
                text
            },
        );
        QuantError::QuantState { name: self.name.to_string(), field, found, expected }
    }
}

/// A number as Python's `repr` writes it: the shortest digits that give it back, with an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_string();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_string();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{value}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_python_does() {
        for (value, text) in [
            (0.052_875_161_170_959_47, "0.05287516117095947"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.0001, "0.0001"),
            (0.000_01, "1e-05"),
            (1.234_5e-7, "1.2345e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-2.5e120, "-2.5e+120"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }

    const GOOD: &str = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [150, 128], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05287516117095947}"#;

    #[test]
    fn json_is_read_and_written_back() {
        let state = QuantState::parse("w", GOOD.as_bytes()).unwrap();
        assert_eq!(state.shape, [150, 128]);
        assert_eq!(state.nested.unwrap().offset, 0.052_875_16);
        assert_eq!(state.to_json(), GOOD);
        // Unknown fields are of later versions.
        let more = GOOD.replacen('{', r#"{"colour": "red", "#, 1);
        assert_eq!(QuantState::parse("w", more.as_bytes()).unwrap(), state);
    }

    #[test]
    fn each_wrong_field_is_named() {
        for (from, to, field) in [
            (r#""nf4""#, r#""nf5""#, "quant_type"),
            (r#""quant_type""#, r#""kind""#, "quant_type"),
            ("64", "63", "blocksize"),
            ("64", "-64", "blocksize"),
            ("64", "64.5", "blocksize"),
            ("64", "18446744073709551616", "blocksize"),
            ("64", r#""64""#, "blocksize"),
            ("bfloat16", "int8", "dtype"),
            ("[150, 128]", "null", "shape"),
            ("[150, 128]", "[150, -1]", "shape"),
            ("[150, 128]", r#"[150, "128"]"#, "shape"),
            ("256", "0", "nested_blocksize"),
            (r#""nested_dtype": "float32", "#, "", "nested_dtype"),
            ("0.05287516117095947", "null", "nested_offset"),
            ("0.05287516117095947", "1e39", "nested_offset"),
        ] {
            let bad = GOOD.replacen(from, to, 1);
            match QuantState::parse("w", bad.as_bytes()) {
                Err(QuantError::QuantState { field: found, .. }) => assert_eq!(found, field, "{bad}"),
                other => panic!("{bad}: {other:?}"),
            }
        }
        for bad in ["", "{", "[]", "null", "\u{0}", &GOOD[..60], &GOOD.replace("0.05287516117095947", "NaN")] {
            assert!(matches!(QuantState::parse("w", bad.as_bytes()), Err(QuantError::Json { .. })), "{bad}");
        }
    }

    #[test]
    fn a_shape_too_large_for_memory_is_an_error() {
        let shape = format!("[{0}, {0}]", u64::MAX);
        let bad = GOOD.replacen("[150, 128]", &shape, 1);
        let state = QuantState::parse("w", bad.as_bytes()).unwrap();
        assert_eq!(state.len(), Err(QuantError::Overflow { what: "shape" }));
    }
}
