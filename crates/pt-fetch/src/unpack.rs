//! Unpacks chosen members of a package file with Python's standard library; nothing in it is run.

use std::path::Path;

use crate::catalog::Package;
use crate::python::{Python, last_line};
use crate::{FetchError, Result};

/// Unpacks what `package.take` asks for from `archive` into `destination`.
///
/// # Errors
/// [`FetchError::Unpack`] when the archive is broken, a member's path would leave the folder, or a
/// pattern matches nothing.
pub fn unpack(python: &Python, package: &Package, archive: &Path, destination: &Path) -> Result<()> {
    let failed = |detail: String| FetchError::Unpack { package: package.requirement(), detail };
    let rules = serde_json::to_string(&package.take).map_err(|error| failed(error.to_string()))?;
    let output = python
        .command()
        .args(["-c", include_str!("unpack.py")])
        .arg(archive)
        .arg(destination)
        .arg(rules)
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() { Ok(()) } else { Err(failed(last_line(&output.stderr))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{Form, Take};
    use std::fs;

    /// Makes a wheel with Python, since that is what unpacks it.
    fn wheel(python: &Python, folder: &Path, members: &[(&str, &str)]) -> std::path::PathBuf {
        let path = folder.join("thing-1.0-py3-none-any.whl");
        let script = "import sys, zipfile, json\nwith zipfile.ZipFile(sys.argv[1], 'w') as z:\n    for name, text in json.loads(sys.argv[2]): z.writestr(name, text)";
        let members = serde_json::to_string(members).unwrap();
        let status = python.command().args(["-c", script]).arg(&path).arg(members).status().unwrap();
        assert!(status.success());
        path
    }

    fn take(members: &[&str], strip: &str) -> Take {
        Take {
            members: members.iter().map(|glob| (*glob).to_owned()).collect(),
            except: vec!["*.DS_Store".into()],
            strip: strip.into(),
            append_to: None,
            rows: None,
        }
    }

    fn unpack_members(members: &[(&str, &str)], rules: Vec<Take>) -> (Result<()>, tempfile::TempDir) {
        let python = Python::find().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let archive = wheel(&python, folder.path(), members);
        let package = Package {
            name: "thing".into(),
            version: "1.0".into(),
            sha256: String::new(),
            form: Form::Wheel,
            platforms: Vec::new(),
            take: rules,
        };
        let out = folder.path().join("out");
        fs::create_dir(&out).unwrap();
        (unpack(&python, &package, &archive, &out), folder)
    }

    #[test]
    fn only_the_members_asked_for_are_written_with_the_prefix_removed() {
        let members = [("thing/data/a/x.jsonl", "1"), ("thing/data/.DS_Store", "2"), ("thing/code.py", "3")];
        let (outcome, folder) = unpack_members(&members, vec![take(&["thing/data/*"], "thing/data/")]);
        outcome.unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("out/a/x.jsonl")).unwrap(), "1");
        assert_eq!(fs::read_dir(folder.path().join("out")).unwrap().count(), 1);
    }

    #[test]
    fn parts_are_appended_in_order() {
        let mut rule = take(&["p/1.bin", "p/2.bin"], "");
        rule.append_to = Some("model.gguf".into());
        let (outcome, folder) = unpack_members(&[("p/1.bin", "GG"), ("p/2.bin", "UF")], vec![rule]);
        outcome.unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("out/model.gguf")).unwrap(), "GGUF");
    }

    #[test]
    fn questions_and_answers_become_prompts_and_completions() {
        let mut rule = take(&["d/train.jsonl"], "");
        (rule.append_to, rule.rows) = (Some("train.jsonl".into()), Some("question-answer".into()));
        let text = "{\"question\": \"1+1?\", \"answer\": \"2\", \"idx\": 0}\n";
        let (outcome, folder) = unpack_members(&[("d/train.jsonl", text)], vec![rule]);
        outcome.unwrap();
        let rows = fs::read_to_string(folder.path().join("out/train.jsonl")).unwrap();
        assert_eq!(rows, "{\"prompt\": \"1+1?\", \"completion\": \"2\"}\n");
    }

    #[test]
    fn a_path_that_leaves_the_folder_is_refused() {
        let (outcome, folder) = unpack_members(&[("thing/../../evil", "1")], vec![take(&["thing/*"], "thing/")]);
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains("unsafe path"), "{error}");
        assert!(!folder.path().join("evil").exists());
    }

    #[test]
    fn a_pattern_without_a_member_is_an_error() {
        let (outcome, _folder) = unpack_members(&[("thing/a", "1")], vec![take(&["thing/a", "thing/b"], "thing/")]);
        assert!(outcome.unwrap_err().to_string().contains("no member matches thing/b"));
    }

    #[test]
    fn a_truncated_archive_is_an_error_not_a_panic() {
        let python = Python::find().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("thing.whl");
        fs::write(&archive, b"PK\x03\x04 and then nothing").unwrap();
        let package = Package {
            name: "thing".into(),
            version: "1.0".into(),
            sha256: String::new(),
            form: Form::Wheel,
            platforms: Vec::new(),
            take: vec![take(&["*"], "")],
        };
        let error = unpack(&python, &package, &archive, folder.path()).unwrap_err();
        assert!(error.to_string().starts_with("cannot unpack thing==1.0"), "{error}");
    }
}
