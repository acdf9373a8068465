//! The key-value part of a GGUF header, with typed reads.

use crate::error::nearest;
use crate::{ModelError, Result};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// One metadata value. The widths of the file's number types are not kept.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An unsigned integer.
    Unsigned(u64),
    /// A signed integer.
    Signed(i64),
    /// A float; one of 32 bits is exact here.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// A list of one type.
    Array(Array),
}

/// A list of metadata values, as compact as in the file.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Texts.
    Strings(Vec<String>),
    /// Numbers or truth values: the file's type id and little-endian bytes.
    Scalars {
        /// Type id.
        kind: u32,
        /// Little-endian bytes of all elements.
        bytes: Vec<u8>,
    },
    /// Lists.
    Arrays(Vec<Array>),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsigned(n) => write!(f, "{n}"),
            Self::Signed(n) => write!(f, "{n}"),
            Self::Float(x) => write!(f, "{x}"),
            Self::Bool(b) => write!(f, "{b}"),
            Self::String(text) => write!(f, "{text:?}"),
            Self::Array(array) => write!(f, "a list of {}", array.len()),
        }
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Strings(list) => list.len(),
            Self::Scalars { kind, bytes } => bytes.len() / scalar_size(*kind).unwrap_or(1) as usize,
            Self::Arrays(list) => list.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements of a list of numbers or truth values; none for other lists.
    pub fn scalars(&self) -> impl Iterator<Item = Value> {
        let (kind, bytes): (u32, &[u8]) = match self {
            Self::Scalars { kind, bytes } => (*kind, bytes),
            _ => (0, &[]),
        };
        bytes.chunks_exact(scalar_size(kind).unwrap_or(1) as usize).filter_map(move |bytes| scalar(kind, bytes))
    }
}

/// Bytes that a number or truth value of that type id takes.
pub(super) fn scalar_size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Decodes one number or truth value; `None` for a type id that is neither, or too few bytes.
pub(super) fn scalar(kind: u32, bytes: &[u8]) -> Option<Value> {
    let mut wide = [0u8; 8];
    let size = scalar_size(kind)? as usize;
    wide[..size].copy_from_slice(bytes.get(..size)?);
    let unsigned = u64::from_le_bytes(wide);
    Some(match kind {
        0 | 2 | 4 | 10 => Value::Unsigned(unsigned),
        1 => Value::Signed(i64::from(unsigned as i8)),
        3 => Value::Signed(i64::from(unsigned as i16)),
        5 => Value::Signed(i64::from(unsigned as i32)),
        11 => Value::Signed(unsigned as i64),
        6 => Value::Float(f64::from(f32::from_bits(unsigned as u32))),
        12 => Value::Float(f64::from_bits(unsigned)),
        _ => Value::Bool(unsigned != 0),
    })
}

/// The metadata of a GGUF file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    entries: BTreeMap<String, Value>,
}

impl Metadata {
    /// Sets a key; true when it was there before.
    pub fn insert(&mut self, key: String, value: Value) -> bool {
        self.entries.insert(key, value).is_some()
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// All keys and values, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    fn missing(&self, path: &Path, key: &str, expected: &str) -> ModelError {
        let near = nearest(key, self.entries.keys().map(String::as_str));
        ModelError::MissingField { path: path.into(), field: key.into(), expected: expected.into(), near }
    }

    fn read<T>(&self, path: &Path, key: &str, expected: &str, take: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        take(value).map(Some).ok_or_else(|| ModelError::field(path, key, value.to_string(), expected))
    }

    fn required<T>(&self, path: &Path, key: &str, expected: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.missing(path, key, expected))
    }

    /// Text under a key.
    ///
    /// # Errors
    /// [`ModelError::Field`] for another type; `path` stands in the error.
    pub fn text(&self, path: &Path, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ModelError::field(path, key, other.to_string(), "a string")),
        }
    }

    /// As [`text`](Self::text), and [`ModelError::MissingField`] when the key is not there.
    ///
    /// # Errors
    /// See above.
    pub fn required_text(&self, path: &Path, key: &str) -> Result<&str> {
        let text = self.text(path, key)?;
        self.required(path, key, "a string", text)
    }

    /// A size from 1 to 2³¹ − 1.
    ///
    /// # Errors
    /// [`ModelError::Field`] for anything else.
    pub fn size(&self, path: &Path, key: &str) -> Result<Option<i64>> {
        self.read(path, key, "a whole number from 1 to 2147483647", |value| {
            integer(value).filter(|&n| n > 0 && n <= i64::from(i32::MAX))
        })
    }

    /// As [`size`](Self::size), and [`ModelError::MissingField`] when the key is not there.
    ///
    /// # Errors
    /// See above.
    pub fn required_size(&self, path: &Path, key: &str) -> Result<i64> {
        let size = self.size(path, key)?;
        self.required(path, key, "a whole number from 1", size)
    }

    /// A token id.
    ///
    /// # Errors
    /// [`ModelError::Field`] for anything but a whole number from 0 to 2³¹ − 1.
    pub fn token_id(&self, path: &Path, key: &str) -> Result<Option<i64>> {
        self.read(path, key, "a token id", |value| integer(value).filter(|&n| n >= 0 && n <= i64::from(i32::MAX)))
    }

    /// A finite number.
    ///
    /// # Errors
    /// [`ModelError::Field`] for anything else.
    pub fn number(&self, path: &Path, key: &str) -> Result<Option<f64>> {
        self.read(path, key, "a number", |value| match value {
            Value::Float(x) => Some(*x).filter(|x| x.is_finite()),
            other => integer(other).map(|n| n as f64),
        })
    }

    /// As [`number`](Self::number), and [`ModelError::MissingField`] when the key is not there.
    ///
    /// # Errors
    /// See above.
    pub fn required_number(&self, path: &Path, key: &str) -> Result<f64> {
        let number = self.number(path, key)?;
        self.required(path, key, "a number", number)
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`ModelError::Field`] for anything else.
    pub fn flag(&self, path: &Path, key: &str) -> Result<Option<bool>> {
        self.read(path, key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A list of texts.
    ///
    /// # Errors
    /// [`ModelError::Field`] for anything else, [`ModelError::MissingField`] when the key is not there.
    pub fn required_strings(&self, path: &Path, key: &str) -> Result<&[String]> {
        match self.get(key) {
            None => Err(self.missing(path, key, "a list of strings")),
            Some(Value::Array(Array::Strings(list))) => Ok(list),
            Some(other) => Err(ModelError::field(path, key, other.to_string(), "a list of strings")),
        }
    }

    /// A list of whole numbers.
    ///
    /// # Errors
    /// [`ModelError::Field`] for anything else.
    pub fn integers(&self, path: &Path, key: &str) -> Result<Option<Vec<i64>>> {
        self.read(path, key, "a list of whole numbers", |value| match value {
            Value::Array(array @ Array::Scalars { .. }) => array.scalars().map(|value| integer(&value)).collect(),
            _ => None,
        })
    }
}

fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::Unsigned(n) => i64::try_from(*n).ok(),
        Value::Signed(n) => Some(*n),
        _ => None,
    }
}
