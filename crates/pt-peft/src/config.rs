//! What the settings of all methods share: modules by name, and reading PEFT's JSON.

use crate::{PeftError, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// Modules by name or by pattern, as PEFT takes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Modules {
    /// A regular expression that the whole path must match; `all-linear` stands for every linear layer but the
    /// output layer.
    Pattern(String),
    /// Names, each the whole path or its end after a dot: `q_proj`, `self_attn.q_proj`.
    Names(Vec<String>),
}

impl Modules {
    /// Whether this is the word for every linear layer.
    pub fn is_all_linear(&self) -> bool {
        matches!(self, Self::Pattern(pattern) if pattern.eq_ignore_ascii_case("all-linear"))
    }

    /// As PEFT's file has it: a string, or a sorted list.
    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Pattern(pattern) => json!(pattern),
            Self::Names(names) => {
                let mut names = names.clone();
                names.sort();
                json!(names)
            }
        }
    }
}

/// PEFT's alphas are whole numbers as a rule; 32.0 is written 32.
pub(crate) fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

/// Whether a value leaves a feature off.
pub(crate) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub(crate) fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

/// A file of JSON.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(|source| PeftError::Read { path: path.into(), source })?;
    serde_json::from_slice(&text).map_err(|source| PeftError::Json { path: path.into(), source })
}

/// Typed access to the keys of a file.
pub(crate) struct Fields<'a> {
    pub(crate) path: &'a Path,
    pub(crate) value: &'a Value,
}

impl Fields<'_> {
    /// A key's value; `None` where it is missing or null.
    pub(crate) fn get<T: serde::de::DeserializeOwned>(&self, field: &str, expected: &str) -> Result<Option<T>> {
        match self.value.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match T::deserialize(value) {
                Ok(parsed) => Ok(Some(parsed)),
                Err(_) => Err(self.wrong(field, value, expected)),
            },
        }
    }

    /// That `peft_type` is this one.
    pub(crate) fn check_method(&self, expected: &str) -> Result<()> {
        let found = self.value.get("peft_type").unwrap_or(&Value::Null);
        if found.as_str() == Some(expected) {
            return Ok(());
        }
        Err(self.wrong("peft_type", found, &format!("\"{expected}\"")))
    }

    pub(crate) fn wrong(&self, field: &str, found: &Value, expected: &str) -> PeftError {
        let found = if found.is_null() { "missing".to_string() } else { found.to_string() };
        PeftError::Field { path: self.path.into(), field: field.into(), found, expected: expected.into() }
    }
}
