//! One pinned package file: fetched by pip, checked, and fetched anew if it came broken.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use sha2::{Digest, Sha256};

use crate::catalog::{Form, Package};
use crate::python::{Python, last_line};
use crate::{FetchError, Result};

/// Something that brings a package's file into an empty folder.
pub trait Source {
    /// Downloads `package` into `folder`, leaving exactly one file there.
    ///
    /// # Errors
    /// [`FetchError::Download`] when nothing came.
    fn download(&self, package: &Package, folder: &Path) -> Result<()>;
}

/// The package index that the user's pip is set up for.
#[derive(Debug)]
pub struct Pip {
    python: Python,
}

impl Pip {
    /// Finds Python and its pip.
    ///
    /// # Errors
    /// [`FetchError::NoPython`] or [`FetchError::NoPip`].
    pub fn find() -> Result<Self> {
        Ok(Self { python: Python::find()? })
    }

    /// The interpreter, for unpacking.
    pub fn python(&self) -> &Python {
        &self.python
    }
}

impl Source for Pip {
    fn download(&self, package: &Package, folder: &Path) -> Result<()> {
        let mut command = self.python.command();
        // pip writes to its temporary folder first; that may be a small file system of its own.
        command.env("TMPDIR", folder.parent().unwrap_or(folder));
        // On a terminal pip shows its bar; it prints that to its standard output, ours may be data.
        let is_terminal = io::stderr().is_terminal();
        command.stdout(if is_terminal { Stdio::from(io::stderr()) } else { Stdio::null() });
        match package.form {
            Form::Wheel => {
                // One Python version and platform whatever the user runs, so that one checksum fits all. The cache
                // of pip is left alone: it would keep half a gigabyte, and may be where a broken file comes from.
                command
                    .args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"])
                    .args(["--retries", "3"])
                    .args(["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]);
                if !is_terminal {
                    command.args(["--progress-bar", "off", "--quiet"]);
                }
                for platform in &package.platforms {
                    command.args(["--platform", platform]);
                }
                command.arg("--dest").arg(folder).arg(package.requirement());
            }
            Form::Sdist => {
                command.args(["-c", include_str!("download_sdist.py"), &package.name, &package.version]).arg(folder);
            }
        }
        let output = command.stderr(Stdio::piped()).spawn().and_then(std::process::Child::wait_with_output);
        let output = output
            .map_err(|error| FetchError::Download { package: package.requirement(), detail: error.to_string() })?;
        if output.status.success() {
            return Ok(());
        }
        Err(FetchError::Download { package: package.requirement(), detail: reason(&output.stderr) })
    }
}

/// Why pip failed, in one line. Without a network it says that no version exists; the reason then stands in
/// its warnings.
fn reason(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let starting = |prefix: &str| text.lines().rev().find_map(|line| line.trim().strip_prefix(prefix).map(str::trim));
    match (text.lines().find_map(|line| line.trim().strip_prefix("ERROR:")), starting("WARNING:")) {
        (Some(error), Some(warning)) if error.contains("Could not find a version") => {
            format!("{} ({warning})", error.trim())
        }
        (Some(error), _) => error.trim().to_owned(),
        (None, _) => last_line(stderr),
    }
}

/// The checked file of `package` in `folder`, which belongs to this package alone. A good file left by an
/// earlier run is kept; a partial or foreign one is deleted. A file that fails its check is deleted and
/// fetched anew, once.
///
/// # Errors
/// [`FetchError::Checksum`] when the second copy is wrong too; [`FetchError::Download`].
pub fn obtain(source: &dyn Source, package: &Package, folder: &Path, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    if let Some(file) = only_file(folder) {
        if sha256_of(&file)? == package.sha256 {
            return Ok(file);
        }
        say(&format!("{}: an earlier download is incomplete; fetching it anew", package.requirement()));
    }
    let mut outcome = attempt(source, package, folder);
    if let Err(error) = &outcome {
        say(&format!("{error}; trying once more"));
        outcome = attempt(source, package, folder);
    }
    outcome
}

fn attempt(source: &dyn Source, package: &Package, folder: &Path) -> Result<PathBuf> {
    empty_folder(folder)?;
    source.download(package, folder)?;
    let file = only_file(folder).ok_or_else(|| FetchError::Download {
        package: package.requirement(),
        detail: "pip reported success but left no single file".into(),
    })?;
    let found = sha256_of(&file)?;
    if found != package.sha256 {
        fs::remove_file(&file).map_err(FetchError::io("delete", &file))?;
        return Err(FetchError::Checksum { what: package.requirement(), found, expected: package.sha256.clone() });
    }
    Ok(file)
}

/// The file in `folder`, if there is exactly one entry and it is a file.
fn only_file(folder: &Path) -> Option<PathBuf> {
    let mut entries = fs::read_dir(folder).ok()?.flatten();
    let path = entries.next()?.path();
    (entries.next().is_none() && path.is_file()).then_some(path)
}

/// Makes `folder` exist and be empty.
pub(crate) fn empty_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(FetchError::io("empty", folder)(error));
        }
        _ => {}
    }
    fs::create_dir_all(folder).map_err(FetchError::io("create", folder))
}

/// SHA-256 of a file in lower-case hexadecimal.
///
/// # Errors
/// [`FetchError::Io`].
pub fn sha256_of(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(FetchError::io("open", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(FetchError::io("read", path))? {
            0 => return Ok(format!("{:x}", hasher.finalize())),
            count => hasher.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Plays back one outcome per call: the bytes of a file, or `None` for a failure that leaves half a file.
    struct Script(RefCell<Vec<Option<&'static [u8]>>>);

    impl Script {
        fn new(outcomes: &[Option<&'static [u8]>]) -> Self {
            Self(RefCell::new(outcomes.iter().rev().copied().collect()))
        }
    }

    impl Source for Script {
        fn download(&self, package: &Package, folder: &Path) -> Result<()> {
            let outcome = self.0.borrow_mut().pop().expect("no further download was expected");
            fs::write(folder.join("file.whl"), outcome.unwrap_or(b"half")).unwrap();
            match outcome {
                Some(_) => Ok(()),
                None => Err(FetchError::Download { package: package.requirement(), detail: "line cut".into() }),
            }
        }
    }

    // printf hello | sha256sum
    const HELLO: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    fn package() -> Package {
        Package {
            name: "thing".into(),
            version: "1.0".into(),
            sha256: HELLO.into(),
            form: Form::Wheel,
            platforms: Vec::new(),
            take: Vec::new(),
        }
    }

    fn obtain_with(outcomes: &[Option<&'static [u8]>], folder: &Path) -> (Result<PathBuf>, Vec<String>) {
        let mut said = Vec::new();
        let outcome = obtain(&Script::new(outcomes), &package(), folder, &mut |line| said.push(line.to_owned()));
        (outcome, said)
    }

    #[test]
    fn the_checksum_is_sha256() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs::write(&path, "hello").unwrap();
        assert_eq!(sha256_of(&path).unwrap(), HELLO);
    }

    #[test]
    fn a_good_file_is_fetched_once_and_then_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = obtain_with(&[Some(b"hello")], folder.path()).0.unwrap();
        assert_eq!(fs::read(path).unwrap(), b"hello");
        assert!(obtain_with(&[], folder.path()).0.is_ok());
    }

    #[test]
    fn a_wrong_file_is_deleted_and_fetched_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (outcome, said) = obtain_with(&[Some(b"hullo"), Some(b"hello")], folder.path());
        assert_eq!(fs::read(outcome.unwrap()).unwrap(), b"hello");
        assert!(said[0].contains("expected 2cf24dba"), "{said:?}");
    }

    #[test]
    fn a_wrong_file_twice_is_an_error_that_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (outcome, _) = obtain_with(&[Some(b"hullo"), Some(b"hullo")], folder.path());
        let error = outcome.unwrap_err();
        assert!(matches!(error, FetchError::Checksum { .. }), "{error}");
        assert!(error.hint().contains("twice"), "{}", error.hint());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_line_that_is_cut_is_tried_once_more() {
        let folder = tempfile::tempdir().unwrap();
        assert!(obtain_with(&[None, Some(b"hello")], folder.path()).0.is_ok());
        let folder = tempfile::tempdir().unwrap();
        let error = obtain_with(&[None, None], folder.path()).0.unwrap_err();
        assert!(error.to_string().contains("thing==1.0"), "{error}");
    }

    #[test]
    fn the_reason_of_a_failure_includes_the_warning_about_the_network() {
        let stderr = b"WARNING: Retrying: connection refused\nERROR: Could not find a version that satisfies x\nERROR: No match\n";
        assert_eq!(reason(stderr), "Could not find a version that satisfies x (Retrying: connection refused)");
        assert_eq!(reason(b"ERROR: no space left\n"), "no space left");
        assert_eq!(reason(b"Traceback\nMemoryError\n"), "MemoryError");
    }

    #[test]
    fn a_partial_file_of_a_killed_run_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file.whl.part"), "hel").unwrap();
        let (outcome, said) = obtain_with(&[Some(b"hello")], folder.path());
        assert_eq!(outcome.unwrap(), folder.path().join("file.whl"));
        assert!(said[0].contains("incomplete"), "{said:?}");
    }
}
