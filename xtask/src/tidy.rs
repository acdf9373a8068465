//! `cargo xtask tidy`: format, clippy, docs, and the house rules that no other tool knows.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::process::{cargo, run, workspace};
use crate::setup::{self, Libtorch};

/// Runs every check (with `quick`, those that need no libtorch), then lists those that failed.
pub(crate) fn tidy(quick: bool) -> Result<()> {
    let libtorch = if quick { Libtorch::Linked } else { setup::setup()? };
    for (name, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        let installed = cargo(&libtorch).args([name, "--version"]).output();
        if !installed.is_ok_and(|output| output.status.success()) {
            bail!("`cargo {name}` is not installed\n  hint: rustup component add {component}");
        }
    }
    let mut failed = Vec::new();
    let mut check = |name: &'static str, outcome: Result<()>| {
        if let Err(error) = outcome {
            eprintln!("{error:#}");
            failed.push(name);
        }
    };
    check("house rules", house_rules(&workspace()));
    check("format", run(cargo(&libtorch).args(["fmt", "--all", "--check"])));
    if !quick {
        let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
        check("clippy", run(cargo(&libtorch).args(clippy)));
        let docs = ["doc", "--no-deps", "--workspace"];
        check("docs", run(cargo(&libtorch).args(docs).env("RUSTDOCFLAGS", "-Dwarnings")));
    }
    if failed.is_empty() {
        eprintln!("tidy: all checks pass");
        return Ok(());
    }
    bail!("tidy: {} failed; see above", failed.join(", "))
}

fn house_rules(root: &Path) -> Result<()> {
    let mut faults = Vec::new();
    for path in tracked_files(root) {
        // Binary fixtures are not text, and a file deleted but not yet committed is not there.
        let Ok(text) = fs::read_to_string(root.join(&path)) else {
            continue;
        };
        faults.extend(faults_of(&path.to_string_lossy(), &text));
    }
    match faults.len() {
        0 => Ok(()),
        count => bail!("{}\nhouse rules: {count} faults", faults.join("\n")),
    }
}

/// What git tracks; without git, every file outside the folders that git ignores.
fn tracked_files(root: &Path) -> Vec<PathBuf> {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root).stdin(Stdio::null()).output();
    if let Ok(output) = listed
        && output.status.success()
    {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        return text.split('\0').filter(|path| !path.is_empty()).map(PathBuf::from).collect();
    }
    let mut files = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let is_ignored =
                ["target", ".git", ".libtorch", "runs", "__pycache__"].iter().any(|ignored| name == *ignored);
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && !is_ignored => folders.push(entry.path()),
                Ok(kind) if kind.is_file() => {
                    files.extend(entry.path().strip_prefix(root).map(Path::to_path_buf));
                }
                _ => {}
            }
        }
    }
    files
}

/// Paths of one machine, and hosts that a mirror would replace. Split, so that this file holds none.
const FOREIGN: [&str; 5] = [
    concat!("/wo", "rk/"),
    concat!("/ro", "ot/"),
    concat!("/tmp/", "peers"),
    concat!("pypi", ".org"),
    concat!("python", "hosted"),
];

/// Longest Rust file; beyond it, a file is hardly about one idea.
const MAX_LINES: usize = 900;

fn faults_of(path: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if path != "Cargo.lock" {
        for (number, line) in text.lines().enumerate() {
            for foreign in FOREIGN.iter().filter(|foreign| line.contains(**foreign)) {
                faults.push(format!("{path}:{}: names `{foreign}`, which is of one machine or index", number + 1));
            }
        }
    }
    let in_tensor = path.starts_with("crates/pt-tensor/");
    if path.ends_with("Cargo.toml") && path != "Cargo.toml" && !in_tensor {
        for (number, line) in
            text.lines().enumerate().filter(|(_, line)| line.starts_with("tch") && has_word(line, "tch"))
        {
            faults.push(format!("{path}:{}: `{line}`: only pt-tensor depends on tch; use its re-exports", number + 1));
        }
    }
    if !path.ends_with(".rs") {
        return faults;
    }
    if text.lines().count() > MAX_LINES {
        faults.push(format!("{path}: {} lines, at most {MAX_LINES}; split it", text.lines().count()));
    }
    let may_be_unsafe = in_tensor || path.starts_with("crates/pt-quant/");
    let is_root = path.ends_with("/src/lib.rs") || path.ends_with("/src/main.rs");
    if is_root && !may_be_unsafe && !text.contains("#![forbid(unsafe_code)]") {
        faults.push(format!("{path}: the crate does not open with #![forbid(unsafe_code)]"));
    }
    for (number, line) in code_only(text).lines().enumerate() {
        let mut fault = |what: &str| faults.push(format!("{path}:{}: {what}", number + 1));
        if !in_tensor && line.contains("tch::") && has_word(line, "tch") {
            fault("only pt-tensor names tch; use its re-exports");
        }
        if !may_be_unsafe && has_word(line, "unsafe") {
            fault("unsafe code belongs in pt-tensor or pt-quant");
        }
        if ["todo", "unimplemented"].iter().any(|name| has_word(line, name) && line.contains(&format!("{name}!"))) {
            fault("unfinished code");
        }
        if line.contains("#[ignore") {
            fault("an ignored test shows nothing; make it run or remove it");
        }
    }
    faults
}

fn has_word(line: &str, word: &str) -> bool {
    let is_part = |found: char| found.is_alphanumeric() || found == '_';
    line.match_indices(word)
        .any(|(start, _)| !line[..start].ends_with(is_part) && !line[start + word.len()..].starts_with(is_part))
}

/// Rust source with comments and string contents blanked, lines kept. Not a full lexer: enough to keep prose
/// and messages from counting as code.
fn code_only(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(hashes) = raw_string_hashes(rest, &code) {
            let open = 2 + hashes;
            let close = format!("\"{}", "#".repeat(hashes));
            rest[open..].find(&close).map_or(rest.len(), |end| open + end + close.len())
        } else if first == '"' {
            string_length(rest)
        } else if rest.starts_with("'\"'") {
            3
        } else if rest.starts_with("'\\") {
            // An escaped character, such as '\'' or '\u{1f}'.
            rest[3..].find('\'').map_or(rest.len(), |end| end + 4)
        } else {
            code.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        };
        code.extend(rest[..skipped].chars().filter(|skipped| *skipped == '\n'));
        rest = &rest[skipped..];
    }
    code
}

/// For the start of `r"`, `r#"`, ...: the number of `#`.
fn raw_string_hashes(rest: &str, before: &str) -> Option<usize> {
    let after = rest.strip_prefix('r')?;
    if before.ends_with(|last: char| last.is_alphanumeric() && last != 'b' || last == '_') {
        return None;
    }
    let hashes = after.chars().take_while(|next| *next == '#').count();
    after[hashes..].starts_with('"').then_some(hashes)
}

fn string_length(rest: &str) -> usize {
    let mut is_escaped = false;
    for (index, next) in rest.char_indices().skip(1) {
        match next {
            '"' if !is_escaped => return index + 1,
            '\\' => is_escaped = !is_escaped,
            _ => is_escaped = false,
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(path: &str, text: &str) -> usize {
        faults_of(path, text).len()
    }

    #[test]
    fn only_pt_tensor_names_tch() {
        let line = "fn f(t: &tch::Tensor) {}\n";
        assert_eq!(faults("crates/pt-model/src/x.rs", line), 1);
        assert_eq!(faults("crates/pt-tensor/src/x.rs", line), 0);
        assert_eq!(faults("crates/pt-model/Cargo.toml", "[dependencies]\ntch.workspace = true\n"), 1);
        assert_eq!(faults("Cargo.toml", "tch = \"=0.24.0\"\n"), 0);
        assert_eq!(faults("crates/pt-model/src/x.rs", "//! Like `tch::Tensor`, batch::of, `switch::x`.\n"), 0);
    }

    #[test]
    fn unsafe_code_is_found_outside_its_crates_but_not_in_prose() {
        let code = "fn f() { unsafe { g() } }\n";
        assert_eq!(faults("xtask/src/x.rs", code), 1);
        assert_eq!(faults("crates/pt-quant/src/simd/avx2.rs", code), 0);
        assert_eq!(
            faults(
                "xtask/src/x.rs",
                "// unsafe\nlet a = \"unsafe \\\" unsafe\"; /* unsafe */ let b = r#\"unsafe\"#;\n"
            ),
            0
        );
        assert_eq!(faults("xtask/src/x.rs", "let quote = '\"'; unsafe { g() }\n"), 1);
    }

    #[test]
    fn a_crate_root_forbids_unsafe_code() {
        assert_eq!(faults("crates/pt-peft/src/lib.rs", "//! Docs.\n"), 1);
        assert_eq!(faults("crates/pt-peft/src/lib.rs", "//! Docs.\n#![forbid(unsafe_code)]\n"), 0);
        assert_eq!(faults("crates/pt-tensor/src/lib.rs", "//! Docs.\n"), 0);
    }

    #[test]
    fn unfinished_code_ignored_tests_and_machine_paths_are_faults() {
        assert_eq!(faults("xtask/src/x.rs", concat!("fn f() { to", "do!() }\n#[ig", "nore]\n")), 2);
        assert_eq!(faults("README.md", concat!("see /wo", "rk/main\n")), 1);
        assert_eq!(faults("README.md", "a framework/of ideas\n"), 0);
    }

    #[test]
    fn a_long_file_is_a_fault() {
        assert_eq!(faults("xtask/src/x.rs", &"\n".repeat(MAX_LINES)), 0);
        assert_eq!(faults("xtask/src/x.rs", &"\n".repeat(MAX_LINES + 1)), 1);
    }

    #[test]
    fn blanking_keeps_line_numbers() {
        assert_eq!(code_only("a\n/* b\nc */ d\n\"e\nf\" g"), "a\n\n d\n\n g");
    }
}
