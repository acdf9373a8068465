//! `cargo xtask fetch`: models and data sets into the user's cache.

use std::path::PathBuf;

use anyhow::Result;
use pt_fetch::{Kind, catalog, find};

/// Fetches each name; without any, lists what there is.
pub(crate) fn fetch(names: &[String]) -> Result<()> {
    if names.is_empty() {
        for entry in catalog().iter().filter(|entry| entry.kind != Kind::Library) {
            let mark = if entry.is_fetched() { "fetched" } else { "" };
            println!(
                "{:<30} {:<8} {}\n{:40}{}",
                entry.name, mark, entry.description, "", entry.licence
            );
        }
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
    eprintln!(
        "{name}: {} ({megabytes:.1} MB), licence: {}",
        path.display(),
        entry.licence
    );
    Ok(path)
}
