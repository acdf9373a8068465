//! `cargo xtask fetch`: models and data sets into the user's cache.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use pt_fetch::{catalog, find};

/// Fetches each name; without any, lists what there is.
pub(crate) fn fetch(names: &[String]) -> Result<()> {
    if names.is_empty() {
        let mut list = String::new();
        for entry in catalog() {
            let mark = if entry.is_fetched() { "fetched" } else { "" };
            list += &format!("{:<30} {mark:<8} {}\n", entry.name, entry.description);
            list += &format!("{:<39} {}\n", "", entry.licence);
        }
        // A reader that has seen enough, such as `head`, is no fault.
        let _ = std::io::stdout().write_all(list.as_bytes());
    }
    // A misspelt name is told before anything is downloaded.
    for name in names {
        find(name)?;
    }
    for name in names {
        one(name)?;
    }
    Ok(())
}

/// Fetches one entry, prints licence, size and path, and returns the path.
pub(crate) fn one(name: &str) -> Result<PathBuf> {
    let entry = find(name)?;
    let path = pt_fetch::fetch_entry(entry, &mut |line| eprintln!("{line}"))?;
    let megabytes = pt_fetch::fetch::size_of(&path) as f64 / 1e6;
    eprintln!("{name}: {} ({megabytes:.1} MB), licence: {}", path.display(), entry.licence);
    Ok(path)
}
