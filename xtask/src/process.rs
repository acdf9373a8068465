//! Running other programs: cargo in the workspace, Python in a pinned environment.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use pt_fetch::python::Python;

use crate::setup::Libtorch;

/// The root of the workspace.
pub(crate) fn workspace() -> PathBuf {
    // Cargo tells where the checkout is now; the compiled-in path is for running the binary by hand.
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    manifest.parent().map_or(manifest.clone(), Path::to_path_buf)
}

/// A cargo command in the workspace that sees the libtorch which `setup` found.
pub(crate) fn cargo(libtorch: &Libtorch) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()).stdin(Stdio::null());
    match libtorch {
        // `.cargo/config.toml` gives it to the child as it does to the user's own cargo.
        Libtorch::Linked => {
            command.env_remove("LIBTORCH");
        }
        Libtorch::User => {}
        Libtorch::PyTorch { lib } => {
            let name = if cfg!(target_os = "macos") { "DYLD_LIBRARY_PATH" } else { "LD_LIBRARY_PATH" };
            let mut paths = OsString::from(lib);
            if let Some(others) = std::env::var_os(name) {
                paths.push(":");
                paths.push(others);
            }
            command.env(name, paths);
        }
    }
    command
}

/// Prints the command, runs it, and fails when it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = describe(command);
    eprintln!("$ {line}");
    let status = command.status().with_context(|| format!("cannot run `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed ({status})");
    }
    Ok(())
}

/// The command as one would type it.
pub(crate) fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// The Python of a virtual environment in the cache that holds exactly `requirements`; made when it is
/// not there, or when the requirements changed.
pub(crate) fn pinned_python(name: &str, requirements: &Path) -> Result<PathBuf> {
    let wanted = fs::read_to_string(requirements).with_context(|| {
        format!("{} lists the packages of this environment; it cannot be read", requirements.display())
    })?;
    pinned_python_by(name, &wanted, 8000, |python| {
        run(Command::new(python).stdin(Stdio::null()).args(["-m", "pip", "install", "-r"]).arg(requirements))
    })
}

/// The Python of a virtual environment in the cache that `install` fills; made anew when `stamp` is not that of the
/// one that is there. It may take `megabytes` of disk.
pub(crate) fn pinned_python_by(
    name: &str,
    stamp: &str,
    megabytes: u64,
    install: impl FnOnce(&PathBuf) -> Result<()>,
) -> Result<PathBuf> {
    let cache = pt_fetch::cache::cache_dir()?;
    let _lock = pt_fetch::cache::lock(&cache, name, || eprintln!("another process is making {name}; waiting for it"))?;
    let folder = cache.join(name);
    let (python, made) = (folder.join("bin/python"), folder.join("requirements.txt"));
    if python.exists() && fs::read_to_string(&made).is_ok_and(|made| made == stamp) {
        return Ok(python);
    }
    eprintln!("making the Python environment {}", folder.display());
    pt_fetch::cache::check_free_space(&cache, megabytes)?;
    let base = Python::find()?;
    run(base.command().args(["-m", "venv", "--clear"]).arg(&folder))
        .context("cannot make a virtual environment; on Debian and Ubuntu: sudo apt-get install python3-venv")?;
    install(&python)?;
    // Last, so that an environment that was cut short is made anew.
    fs::write(&made, stamp).with_context(|| format!("cannot write {}", made.display()))?;
    Ok(python)
}
