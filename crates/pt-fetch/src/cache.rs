//! Where fetched things live, how two processes keep out of each other's way, and whether there is room.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{FetchError, Result};

/// The workspace's folder in the user's cache: `$XDG_CACHE_HOME/pt`, else `~/Library/Caches/pt` on macOS
/// and `~/.cache/pt` elsewhere. It is not created here.
///
/// # Errors
/// [`FetchError::NoCacheDir`] when neither variable holds an absolute path.
pub fn cache_dir() -> Result<PathBuf> {
    cache_dir_from(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME"), cfg!(target_os = "macos"))
}

fn cache_dir_from(xdg: Option<OsString>, home: Option<OsString>, macos: bool) -> Result<PathBuf> {
    let absolute = |value: Option<OsString>| value.map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute(xdg)
        .or_else(|| absolute(home).map(|home| home.join(if macos { "Library/Caches" } else { ".cache" })))
        .ok_or(FetchError::NoCacheDir)?;
    Ok(base.join("pt"))
}

/// Held while one process fills a folder of the cache; the others wait. Released on drop, and by the
/// operating system when the process dies.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Waits for the lock `name` in `folder`, calling `on_wait` once if another process holds it.
///
/// # Errors
/// [`FetchError::Io`] when the lock file cannot be made.
pub fn lock(folder: &Path, name: &str, on_wait: impl FnOnce()) -> Result<Lock> {
    fs::create_dir_all(folder).map_err(FetchError::io("create", folder))?;
    let path = folder.join(format!(".{name}.lock"));
    let file = File::create(&path).map_err(FetchError::io("create", &path))?;
    if file.try_lock().is_err() {
        on_wait();
        file.lock().map_err(FetchError::io("lock", &path))?;
    }
    Ok(Lock { _file: file })
}

/// Fails when the file system that holds `path` has less than `needed_mb` megabytes free. Where the free
/// space cannot be told, nothing is said: the write itself will tell.
///
/// # Errors
/// [`FetchError::DiskSpace`].
pub fn check_free_space(path: &Path, needed_mb: u64) -> Result<()> {
    let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    match free_mb(existing) {
        Some(free_mb) if free_mb < needed_mb => {
            Err(FetchError::DiskSpace { path: existing.to_path_buf(), free_mb, needed_mb })
        }
        _ => Ok(()),
    }
}

fn free_mb(path: &Path) -> Option<u64> {
    // The standard library has no statvfs; `df -Pk` is in POSIX and prints one line per file system.
    let output = Command::new("df").arg("-Pk").arg(path).stdin(Stdio::null()).output().ok()?;
    free_mb_from_df(&String::from_utf8_lossy(&output.stdout))
}

fn free_mb_from_df(text: &str) -> Option<u64> {
    // Device names may hold spaces, so count from the percentage, which is the field before the mount point.
    let fields: Vec<&str> = text.lines().nth(1)?.split_whitespace().collect();
    let percent = fields.iter().position(|field| field.ends_with('%'))?;
    let kilobytes: u64 = fields.get(percent.checked_sub(1)?)?.parse().ok()?;
    Some(kilobytes / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_follows_xdg_then_home() {
        let from = |xdg: Option<&str>, home: Option<&str>, macos| {
            cache_dir_from(xdg.map(Into::into), home.map(Into::into), macos).ok()
        };
        assert_eq!(from(Some("/x"), Some("/h"), false), Some("/x/pt".into()));
        assert_eq!(from(None, Some("/h"), false), Some("/h/.cache/pt".into()));
        assert_eq!(from(None, Some("/h"), true), Some("/h/Library/Caches/pt".into()));
        assert_eq!(from(Some("relative"), Some("/h"), false), Some("/h/.cache/pt".into()));
        assert_eq!(from(Some(""), None, false), None);
    }

    #[test]
    fn free_space_is_read_from_df() {
        let text = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/my disk 100 40 2048000 40% /\n";
        assert_eq!(free_mb_from_df(text), Some(2000));
        assert_eq!(free_mb_from_df("nonsense"), None);
    }

    #[test]
    fn asking_for_more_space_than_any_disk_has_is_refused() {
        let error = check_free_space(Path::new("/not/there/yet"), u64::MAX).unwrap_err();
        assert!(matches!(error, FetchError::DiskSpace { .. }), "{error}");
        assert!(check_free_space(Path::new("/"), 0).is_ok());
    }

    #[test]
    fn a_second_holder_waits_for_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path(), "thing", || panic!("nobody else holds it")).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| lock(folder.path(), "thing", || sender.send(()).unwrap()).unwrap());
            receiver.recv().unwrap();
            drop(first);
        });
    }
}
