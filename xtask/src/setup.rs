//! `cargo xtask setup`: a CPU libtorch in the user's cache, linked into the workspace as `.libtorch`, where
//! `.cargo/config.toml` points LIBTORCH to. Plain cargo and rust-analyzer work from then on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use pt_fetch::python::{install_command, last_line};

use crate::process::workspace;

/// The version of libtorch that our tch binds.
const VERSION: &str = "2.11.0";

/// Where libtorch comes from.
#[derive(Debug)]
pub(crate) enum Libtorch {
    /// `.libtorch` in the workspace.
    Linked,
    /// The user's LIBTORCH.
    User,
    /// The PyTorch of the user's Python (LIBTORCH_USE_PYTORCH), with its folder of libraries.
    PyTorch { lib: PathBuf },
}

/// Makes libtorch usable and says what it did; instant when nothing is to do.
pub(crate) fn setup() -> Result<Libtorch> {
    check_compiler()?;
    if std::env::var_os("LIBTORCH_USE_PYTORCH").is_some() {
        return installed_pytorch();
    }
    let link = workspace().join(".libtorch");
    // Cargo itself sets LIBTORCH to the link (see .cargo/config.toml) unless the user has set it.
    if let Some(prefix) = std::env::var_os("LIBTORCH").map(PathBuf::from).filter(|prefix| *prefix != link) {
        check_prefix(&prefix)?;
        eprintln!("setup: using LIBTORCH={}", prefix.display());
        return Ok(Libtorch::User);
    }
    let name = platform_entry(std::env::consts::OS, std::env::consts::ARCH, cfg!(target_env = "musl"))?;
    let entry = pt_fetch::library(name).with_context(|| format!("packages.json holds no {name}"))?;
    let folder = entry.folder()?;
    if let Some(prefix) = own_link(&link, &folder)? {
        eprintln!("setup: .libtorch is {}, outside this cache; using it as it is", prefix.display());
        return Ok(Libtorch::Linked);
    }
    if !entry.is_fetched() {
        eprintln!("setup: fetching libtorch {VERSION} ({})", entry.licence);
        eprintln!("setup: up to half a gigabyte to download, into {}", folder.display());
        pt_fetch::fetch_entry(entry, &mut |line| eprintln!("setup: {line}"))?;
    }
    if fs::read_link(&link).is_ok_and(|target| target == folder) {
        eprintln!("setup: libtorch {VERSION} is in place: .libtorch -> {}", folder.display());
    } else {
        // Before the link, not only after a download: a library that did not load once is in the cache all the same.
        check_loads(&folder)?;
        replace_link(&link, &folder)?;
        eprintln!("setup: linked .libtorch -> {}; plain `cargo build` works now", folder.display());
    }
    Ok(Libtorch::Linked)
}

/// The catalog's name of libtorch for a platform.
fn platform_entry(os: &str, arch: &str, is_musl: bool) -> Result<&'static str> {
    match (os, arch, is_musl) {
        ("linux", "x86_64", false) => Ok("libtorch-2.11.0-linux-x86_64"),
        ("linux", "aarch64", false) => Ok("libtorch-2.11.0-linux-aarch64"),
        ("macos", "aarch64", _) => Ok("libtorch-2.11.0-macos-aarch64"),
        _ => bail!(
            "there is no ready-made libtorch {VERSION} for {os} {arch}{}; \
             build one and set LIBTORCH to its prefix (the folder with lib/ and include/)",
            if is_musl { " with musl" } else { "" }
        ),
    }
}

/// A live prefix that someone linked, or put, at `.libtorch` by hand; `None` when the place is ours to fill.
fn own_link(link: &Path, folder: &Path) -> Result<Option<PathBuf>> {
    let Ok(metadata) = fs::symlink_metadata(link) else {
        return Ok(None);
    };
    if !metadata.is_symlink() {
        check_prefix(link).with_context(|| format!("{} is not a link, so it is left alone", link.display()))?;
        return Ok(Some(link.to_path_buf()));
    }
    let target = fs::read_link(link).with_context(|| format!("cannot read {}", link.display()))?;
    // A libtorch of this tool, perhaps of an earlier pin, is replaced; so is a link to nothing.
    let is_ours = target.parent() == folder.parent()
        && target.file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            name.strip_prefix("libtorch-")
                .is_some_and(|version| version.starts_with(|first: char| first.is_ascii_digit()))
        });
    if is_ours || check_prefix(link).is_err() { Ok(None) } else { Ok(Some(target)) }
}

/// Points `link` to `folder` in one step, so that a build at the same time never misses it.
fn replace_link(link: &Path, folder: &Path) -> Result<()> {
    let next = link.with_extension(format!("{}.tmp", std::process::id()));
    let _ = fs::remove_file(&next);
    symlink(folder, &next)
        .and_then(|()| fs::rename(&next, link))
        .with_context(|| format!("cannot make the link {}", link.display()))
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_target: &Path, _link: &Path) -> std::io::Result<()> {
    Err(std::io::Error::new(std::io::ErrorKind::Unsupported, "links need Unix; set LIBTORCH instead"))
}

/// Whether `prefix` can be built against.
fn check_prefix(prefix: &Path) -> Result<()> {
    let shown = prefix.display();
    if prefix.is_relative() {
        bail!("LIBTORCH is {shown}, a relative path; each crate is built in its own folder, so make it absolute");
    }
    for folder in ["lib", "include"] {
        if !prefix.join(folder).is_dir() {
            bail!(
                "LIBTORCH is {shown}, which has no folder {folder}/; point it at a libtorch {VERSION} prefix, or unset it"
            );
        }
    }
    if let Ok(found) = fs::read_to_string(prefix.join("build-version")) {
        check_version(found.trim(), &format!("LIBTORCH={shown}"))?;
    }
    Ok(())
}

fn check_version(found: &str, place: &str) -> Result<()> {
    let plain = found.split('+').next().unwrap_or(found);
    if plain != VERSION && std::env::var_os("LIBTORCH_BYPASS_VERSION_CHECK").is_none() {
        bail!("{place} is version {found}, expected {VERSION}");
    }
    Ok(())
}

/// The PyTorch that the build script of tch will find: it asks `python` inside a virtual environment, else `python3`.
fn installed_pytorch() -> Result<Libtorch> {
    let program = if std::env::var_os("VIRTUAL_ENV").is_some() { "python" } else { "python3" };
    let script =
        "import os, torch; print(torch.__version__); print(os.path.join(os.path.dirname(torch.__file__), 'lib'))";
    let output = Command::new(program).args(["-c", script]).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("LIBTORCH_USE_PYTORCH is set, but `{program}` cannot be run"))?;
    if !output.status.success() {
        bail!(
            "LIBTORCH_USE_PYTORCH is set, but `{program}` cannot import torch: {}; \
             run `{program} -m pip install torch=={VERSION}`, or unset it",
            last_line(&output.stderr)
        );
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let (version, lib) = text.trim().split_once('\n').context("`python` printed no version and path of torch")?;
    check_version(version, "the PyTorch of LIBTORCH_USE_PYTORCH")?;
    eprintln!("setup: using PyTorch {version} (LIBTORCH_USE_PYTORCH), libraries in {lib}");
    Ok(Libtorch::PyTorch { lib: lib.into() })
}

/// The compiler that the `cc` crate will call for tch's C++ files: $CXX, else `c++`.
fn check_compiler() -> Result<()> {
    let works = |program: &str| {
        let output = Command::new(program).arg("--version").stdin(Stdio::null()).output();
        output.is_ok_and(|output| output.status.success())
    };
    // CXX may carry a wrapper or flags: `ccache g++`.
    let chosen = std::env::var("CXX").ok().filter(|value| !value.trim().is_empty());
    if let Some(program) = chosen.as_deref().and_then(|value| value.split_whitespace().next()) {
        if !works(program) {
            bail!("CXX is `{program}`, which cannot be run; unset it or name a C++ compiler");
        }
        return Ok(());
    }
    if works("c++") {
        return Ok(());
    }
    match ["g++", "clang++"].into_iter().find(|program| works(program)) {
        Some(program) => {
            bail!("there is `{program}` but no `c++`; run `export CXX={program}` and try again")
        }
        None => bail!(
            "no C++ compiler was found (tried c++, g++, clang++)\n  hint: install one: {}",
            install_command("c++")
        ),
    }
}

/// Loads the new library once: a C library that is too old shows here and not deep in a build.
fn check_loads(prefix: &Path) -> Result<()> {
    if cfg!(target_os = "macos") {
        return Ok(());
    }
    let library = prefix.join("lib/libtorch_cpu.so");
    let output = pt_fetch::python::Python::find()?
        .command()
        .args(["-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])"])
        .arg(&library)
        .env("LD_LIBRARY_PATH", prefix.join("lib"))
        .output()
        .context("cannot run Python")?;
    if !output.status.success() {
        bail!("{}: libtorch does not load on this machine: {}", library.display(), last_line(&output.stderr));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_platform_of_the_table_is_in_the_catalog() {
        for (os, arch) in [("linux", "x86_64"), ("linux", "aarch64"), ("macos", "aarch64")] {
            let entry = pt_fetch::library(platform_entry(os, arch, false).unwrap()).unwrap();
            assert!(entry.name.ends_with(&format!("{os}-{arch}")), "{}", entry.name);
            let torch = &entry.packages[0];
            assert_eq!(torch.requirement(), format!("torch=={VERSION}"));
            assert!(torch.platforms[0].ends_with(if os == "macos" { "arm64" } else { arch }));
        }
    }

    #[test]
    fn other_platforms_are_told_to_bring_their_own() {
        for (os, arch, is_musl) in [("windows", "x86_64", false), ("macos", "x86_64", false), ("linux", "x86_64", true)]
        {
            let message = platform_entry(os, arch, is_musl).unwrap_err().to_string();
            assert!(message.contains("set LIBTORCH") && message.contains(os), "{message}");
        }
    }

    fn prefix(root: &Path, name: &str) -> PathBuf {
        let prefix = root.join(name);
        fs::create_dir_all(prefix.join("lib")).unwrap();
        fs::create_dir_all(prefix.join("include")).unwrap();
        prefix
    }

    #[test]
    fn a_prefix_needs_lib_and_include_and_the_right_version() {
        let root = tempfile::tempdir().unwrap();
        let good = prefix(root.path(), "good");
        check_prefix(&good).unwrap();
        fs::write(good.join("build-version"), "2.11.0+cu130\n").unwrap();
        check_prefix(&good).unwrap();
        fs::write(good.join("build-version"), "2.4.0").unwrap();
        assert!(check_prefix(&good).unwrap_err().to_string().contains("version 2.4.0, expected 2.11.0"));
        fs::remove_dir(good.join("include")).unwrap();
        assert!(check_prefix(&good).unwrap_err().to_string().contains("include/"));
        assert!(check_prefix(Path::new("libtorch")).unwrap_err().to_string().contains("relative"));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_of_ours_or_to_nothing_is_replaced_and_one_by_hand_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let current = prefix(root.path(), "cache/libtorch-2.11.0-linux-x86_64");
        let older = prefix(root.path(), "cache/libtorch-2.10.0-linux-x86_64");
        let by_hand = prefix(root.path(), "elsewhere/libtorch");
        let link = root.path().join(".libtorch");

        assert_eq!(own_link(&link, &current).unwrap(), None);
        replace_link(&link, &older).unwrap();
        assert_eq!(own_link(&link, &current).unwrap(), None);
        replace_link(&link, &root.path().join("gone")).unwrap();
        assert_eq!(own_link(&link, &current).unwrap(), None);
        replace_link(&link, &by_hand).unwrap();
        assert_eq!(own_link(&link, &current).unwrap(), Some(by_hand));
        replace_link(&link, &current).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), current);
    }

    #[test]
    fn a_folder_in_the_links_place_is_never_touched() {
        let root = tempfile::tempdir().unwrap();
        let link = root.path().join(".libtorch");
        fs::create_dir(&link).unwrap();
        let error = own_link(&link, Path::new("/cache/libtorch")).unwrap_err();
        assert!(format!("{error:#}").contains("left alone"), "{error:#}");
        assert!(link.is_dir());
    }
}
