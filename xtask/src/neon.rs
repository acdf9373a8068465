//! `cargo xtask test-neon`: the kernels for 64-bit Arm, run by QEMU on another processor.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::process::cargo;
use crate::setup::Libtorch;
use crate::test::run_counted;

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const QEMU: &str = "qemu-aarch64-static";

/// Runs the tests of `pt-quant` for 64-bit Arm; says what is missing when that cannot be done.
pub(crate) fn test() -> Result<()> {
    let missing = missing();
    if !missing.is_empty() {
        bail!("cannot run code for 64-bit Arm here; missing:\n  {}", missing.join("\n  "));
    }
    let mut command = cargo(&Libtorch::User);
    command.args(["test", "-p", "pt-quant", "--no-fail-fast", "--lib", "--tests", "--target", TARGET]);
    command.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER);
    // `max` has the dot-product extension.
    command.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", format!("{QEMU} -L /usr/aarch64-linux-gnu -cpu max"));
    run_counted(&mut command).map(drop)
}

/// As [`test()`], where it can be done: on Linux on another processor, with the packages installed.
pub(crate) fn test_where_possible() -> Result<()> {
    let is_foreign = cfg!(target_os = "linux") && !cfg!(target_arch = "aarch64");
    if is_foreign && missing().is_empty() {
        return test();
    }
    if is_foreign {
        eprintln!("the kernels for 64-bit Arm are not run: `cargo xtask test-neon` says what that takes");
    }
    Ok(())
}

/// What has to be installed, with the command for it.
fn missing() -> Vec<String> {
    let runs = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).stdin(Stdio::null()).output();
        output.ok().filter(|output| output.status.success())
    };
    let mut missing = Vec::new();
    // The folder is there exactly when the target's standard library is installed.
    let has_std = runs("rustc", &["--print", "target-libdir", "--target", TARGET])
        .is_some_and(|output| std::path::Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir());
    if !has_std {
        missing.push(format!("Rust's standard library for it: rustup target add {TARGET}"));
    }
    for (program, package) in [(LINKER, "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"), (QEMU, "qemu-user-static")] {
        if runs(program, &["--version"]).is_none() {
            missing.push(format!("{program}: on Debian and Ubuntu, apt-get install {package}"));
        }
    }
    missing
}
