//! `cargo xtask test`: set up, fetch the small model, run every test, count.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{cargo, describe};
use crate::{fetch, neon, setup};

/// The model that integration tests load.
const MODEL: &str = "smollm2-135m-instruct";

/// Runs the tests of the workspace, or those that `extra` (arguments of `cargo test`) selects.
pub(crate) fn test(extra: &[String]) -> Result<()> {
    let libtorch = setup::setup()?;
    let model = fetch::one(MODEL)?;
    let mut command = cargo(&libtorch);
    command.arg("test").args(selection(extra)).args(extra).env("PT_TEST_MODEL", model);
    // First, so that the count of the whole workspace is the last line; a failure is told after it.
    let on_arm = if extra.is_empty() { neon::test_where_possible() } else { Ok(()) };
    run_counted(&mut command)?;
    on_arm
}

/// What goes before the user's arguments: the whole workspace unless packages are named, and every binary
/// even after one has failed.
pub(crate) fn selection(extra: &[String]) -> Vec<&'static str> {
    let before_dashes = extra.iter().take_while(|argument| *argument != "--");
    let mut names_packages = false;
    for argument in before_dashes {
        names_packages |= argument == "--workspace" || argument.starts_with("-p") || argument.starts_with("--package");
    }
    if names_packages { vec!["--no-fail-fast"] } else { vec!["--workspace", "--no-fail-fast"] }
}

/// Runs `cargo test`, passing its output on, and ends with the failures by name and `N passed, N failed`; returns
/// how many passed.
pub(crate) fn run_counted(command: &mut Command) -> Result<u64> {
    let line = describe(command);
    eprintln!("$ {line}");
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run `{line}`"))?;
    let mut tally = Tally::default();
    if let Some(output) = child.stdout.take() {
        let mut reader = BufReader::new(output);
        let mut bytes = Vec::new();
        // By bytes: a test may print what is not UTF-8.
        while reader.read_until(b'\n', &mut bytes).context("cannot read the output of cargo")? > 0 {
            std::io::stdout().write_all(&bytes).context("cannot write to standard output")?;
            tally.read(&String::from_utf8_lossy(&bytes));
            bytes.clear();
        }
    }
    let status = child.wait().context("cannot wait for cargo")?;
    if !tally.names.is_empty() {
        println!("\nfailed:");
        for name in &tally.names {
            println!("  {name}");
        }
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    if !status.success() && tally.failed == 0 {
        bail!(
            "`{line}` failed ({status}) though no test did: something did not build, or a test binary died; see above"
        );
    }
    if !status.success() {
        bail!("{} of {} tests failed", tally.failed, tally.failed + tally.passed);
    }
    Ok(tally.passed)
}

/// The sum over the result lines of all test binaries.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    names: Vec<String>,
}

impl Tally {
    fn read(&mut self, line: &str) {
        let line = line.trim_end();
        if let Some(counts) = line.strip_prefix("test result: ") {
            let count_before = |word: &str| {
                let before = counts.split_once(word).map_or("", |(before, _)| before.trim_end());
                before.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
            };
            self.passed += count_before(" passed;");
            self.failed += count_before(" failed;");
        } else if let Some(name) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            self.names.push(name.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_summed_and_failures_named() {
        let mut tally = Tally::default();
        for line in [
            "running 3 tests",
            "test a::works ... ok",
            "test a::breaks ... FAILED",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s\n",
            "test result: ok. 40 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 0.01s\n",
        ] {
            tally.read(line);
        }
        assert_eq!(tally, Tally { passed: 42, failed: 1, names: vec!["a::breaks".into()] });
    }

    #[test]
    fn naming_a_package_replaces_the_workspace() {
        let strings = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        assert_eq!(selection(&[]), ["--workspace", "--no-fail-fast"]);
        assert_eq!(selection(&strings(&["-p", "pt-model"])), ["--no-fail-fast"]);
        assert_eq!(selection(&strings(&["packed", "--", "-p"])), ["--workspace", "--no-fail-fast"]);
    }
}
