//! The user's Python: found, checked for pip, and, where something is missing, how to get it.

use std::process::{Command, Stdio};

use crate::{FetchError, Result};

/// An interpreter that has pip.
#[derive(Debug, Clone)]
pub struct Python {
    program: String,
}

impl Python {
    /// The first of `python3` and `python` that runs, is version 3, and has pip.
    ///
    /// # Errors
    /// [`FetchError::NoPython`] or [`FetchError::NoPip`].
    pub fn find() -> Result<Self> {
        Self::find_among(&["python3", "python"])
    }

    fn find_among(programs: &[&str]) -> Result<Self> {
        let mut without_pip = None;
        for program in programs {
            let python = Self { program: (*program).to_owned() };
            let Ok(version) = python.command().args(["-c", "import sys; print(sys.version_info[0])"]).output() else {
                continue;
            };
            if !version.status.success() || version.stdout.trim_ascii() != b"3" {
                continue;
            }
            match python.command().args(["-m", "pip", "--version"]).output() {
                Ok(pip) if pip.status.success() => return Ok(python),
                Ok(pip) => {
                    let detail = last_line(&pip.stderr);
                    without_pip.get_or_insert(FetchError::NoPip { python: python.program, detail });
                }
                Err(_) => {}
            }
        }
        Err(without_pip.unwrap_or_else(|| FetchError::NoPython { tried: programs.join(", ") }))
    }

    /// A command of this interpreter that never reads standard input nor asks anything.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .stdin(Stdio::null())
            .env("PYTHONUNBUFFERED", "1")
            .env("PIP_NO_INPUT", "1")
            .env("PIP_DISABLE_PIP_VERSION_CHECK", "1")
            .env("PIP_REQUIRE_VIRTUALENV", "0");
        command
    }
}

/// The last non-empty line of a program's output, for one-line messages.
pub fn last_line(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no message").to_owned()
}

/// The command that installs `what` (`python3`, `pip` or `c++`) with the package manager that is here.
pub fn install_command(what: &str) -> String {
    let here = |program: &str| {
        std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
    };
    let manager = if cfg!(target_os = "macos") {
        "macos"
    } else {
        ["apt-get", "dnf", "pacman", "zypper", "apk"].into_iter().find(|program| here(program)).unwrap_or("")
    };
    install_command_with(manager, what)
}

fn install_command_with(manager: &str, what: &str) -> String {
    let command = match (manager, what) {
        ("macos", "c++") => "xcode-select --install",
        ("macos", "python3") => "xcode-select --install",
        ("macos", _) => "python3 -m ensurepip --upgrade",
        ("apt-get", "c++") => "sudo apt-get install g++",
        ("apt-get", "python3") => "sudo apt-get install python3 python3-pip",
        ("apt-get", _) => "sudo apt-get install python3-pip",
        ("dnf", "c++") => "sudo dnf install gcc-c++",
        ("dnf", "python3") => "sudo dnf install python3 python3-pip",
        ("dnf", _) => "sudo dnf install python3-pip",
        ("pacman", "c++") => "sudo pacman -S gcc",
        ("pacman", "python3") => "sudo pacman -S python python-pip",
        ("pacman", _) => "sudo pacman -S python-pip",
        ("zypper", "c++") => "sudo zypper install gcc-c++",
        ("zypper", "python3") => "sudo zypper install python3 python3-pip",
        ("zypper", _) => "sudo zypper install python3-pip",
        ("apk", "c++") => "sudo apk add g++",
        ("apk", "python3") => "sudo apk add python3 py3-pip",
        ("apk", _) => "sudo apk add py3-pip",
        (_, "c++") => "install g++ or clang++ with your package manager",
        (_, "python3") => "install Python 3.9 or newer with your package manager",
        (_, _) => "python3 -m ensurepip --upgrade",
    };
    command.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_interpreter_names_what_was_tried() {
        let error = Python::find_among(&["no-such-python-a", "no-such-python-b"]).unwrap_err();
        assert!(error.to_string().contains("no-such-python-a, no-such-python-b"), "{error}");
        assert!(error.hint().contains("install"), "{}", error.hint());
    }

    #[test]
    fn the_install_command_suits_the_package_manager() {
        assert_eq!(install_command_with("apt-get", "pip"), "sudo apt-get install python3-pip");
        assert_eq!(install_command_with("dnf", "c++"), "sudo dnf install gcc-c++");
        assert_eq!(install_command_with("macos", "c++"), "xcode-select --install");
        assert!(install_command_with("", "c++").contains("g++"));
    }

    #[test]
    fn the_last_line_skips_blank_ones() {
        assert_eq!(last_line(b"first\nthe reason \n\n"), "the reason");
        assert_eq!(last_line(b""), "no message");
    }
}
