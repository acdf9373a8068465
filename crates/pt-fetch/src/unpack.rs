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
    use serde_json::{Value, json};
    use std::collections::BTreeMap;
    use std::fs;

    /// Makes a wheel with Python, since that is what unpacks it; members named `.gz` are compressed.
    fn wheel(python: &Python, folder: &Path, members: &[(&str, &str)]) -> std::path::PathBuf {
        let path = folder.join("thing-1.0-py3-none-any.whl");
        let script = "import sys, zipfile, json, gzip\nwith zipfile.ZipFile(sys.argv[1], 'w') as z:\n    for name, text in json.loads(sys.argv[2]): z.writestr(name, gzip.compress(text.encode()) if name.endswith('.gz') else text)";
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

    /// The rows that a form makes of `text`, by file.
    fn rows_of(form: &str, text: &str) -> BTreeMap<String, Vec<Value>> {
        let mut rule = take(&["d/set.json"], "d/");
        rule.rows = Some(form.into());
        let (outcome, folder) = unpack_members(&[("d/set.json", text)], vec![rule]);
        outcome.unwrap();
        let files = fs::read_dir(folder.path().join("out")).unwrap();
        let read = |file: fs::DirEntry| {
            let text = fs::read_to_string(file.path()).unwrap();
            let rows = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            (file.file_name().into_string().unwrap(), rows)
        };
        files.map(|file| read(file.unwrap())).collect()
    }

    fn judged(instruction: &str, input: &str, outputs: [&str; 2], preference: i32) -> Value {
        json!({"instruction": instruction, "input": input, "output_1": outputs[0], "output_2": outputs[1], "preference": preference})
    }

    #[test]
    fn judged_outputs_become_pairs_without_ties_and_a_ranked_list() {
        let set = json!([
            judged("Do", "it", ["reference", "good"], 2),
            judged("Do", "it", ["reference", "bad"], 1),
            judged("Do", "it", ["reference", "same"], 0),
            judged("Do", "it", ["reference", " "], 1),
            judged("Do\n\nit", "", ["fine", "reference"], 1),
        ]);
        let files = rows_of("judged-pairs", &set.to_string());
        let (side, pairs) = files.iter().find(|(name, _)| !name.starts_with("rankings")).unwrap();
        let pair = |chosen: &str, rejected: &str| json!({"prompt": "Do\n\nit", "chosen": chosen, "rejected": rejected});
        let expected = [pair("good", "reference"), pair("reference", "bad"), pair("fine", "reference")];
        assert_eq!(pairs[..], expected, "the input belongs to the prompt, wherever it stood");
        let lists = &files[&format!("rankings_{side}")];
        assert_eq!((files.len(), lists.len()), (2, 1));
        let texts = lists[0]["completions"].as_array().unwrap();
        let ranks = texts.iter().zip(lists[0]["ranks"].as_array().unwrap());
        let rank_of: BTreeMap<_, _> =
            ranks.map(|(text, rank)| (text.as_str().unwrap(), rank.as_u64().unwrap())).collect();
        assert_eq!(rank_of, BTreeMap::from([("good", 0), ("fine", 0), ("reference", 1), ("bad", 2)]));
    }

    #[test]
    fn a_ranked_list_holds_at_most_eight_and_both_sides_of_the_reference() {
        let others: Vec<String> = (0..30).map(|index| format!("output {index}")).collect();
        let set: Vec<Value> = others
            .iter()
            .enumerate()
            .map(|(index, output)| judged("Do", "", ["reference", output], if index < 3 { 1 } else { 2 }))
            .collect();
        let files = rows_of("judged-pairs", &Value::from(set).to_string());
        let list = files.iter().find(|(name, _)| name.starts_with("rankings")).unwrap().1[0].clone();
        let mut ranks: Vec<u64> = list["ranks"].as_array().unwrap().iter().map(|rank| rank.as_u64().unwrap()).collect();
        ranks.sort_unstable();
        assert_eq!(ranks, [0, 0, 0, 0, 1, 2, 2, 2]);
    }

    #[test]
    fn rows_are_split_by_instruction_and_by_passage() {
        // The instruction, or the passage, is the first line of the prompt.
        let check = |form: &str, set: String| {
            let files = rows_of(form, &set);
            let first_line = |row: &Value| row["prompt"].as_str().unwrap().lines().next().unwrap().to_owned();
            let (train, validation) = (&files["train.jsonl"], &files["validation.jsonl"]);
            assert_eq!(train.len() + validation.len(), 400);
            assert!((20..80).contains(&validation.len()), "{}", validation.len());
            let held_out: Vec<String> = validation.iter().map(first_line).collect();
            assert!(train.iter().all(|row| !held_out.contains(&first_line(row))));
        };
        let each = || (0..200).flat_map(|index| [(index, "x"), (index, "y")]);
        let row = |(index, input)| judged(&format!("Do {index}"), input, ["a", "b"], 1);
        check("judged-pairs", Value::from_iter(each().map(row)).to_string());
        let row = |(index, question)| {
            let (right, wrong) = ("a", "b");
            json!({"knowledge": format!("Fact {index}."), "question": question, "right_answer": right, "hallucinated_answer": wrong})
        };
        check("halueval", each().map(|place| row(place).to_string() + "\n").collect());
    }

    #[test]
    fn answers_on_a_passage_become_pairs() {
        let row = json!({"knowledge": "A fact. ", "question": "What?", "right_answer": "This", "hallucinated_answer": "That"});
        let same =
            json!({"knowledge": "A fact.", "question": "Who?", "right_answer": "He", "hallucinated_answer": "He"});
        let files = rows_of("halueval", &format!("{row}\n{same}\n"));
        let rows: Vec<&Value> = files.values().flatten().collect();
        let expected = json!({"prompt": "A fact.\nQuestion: What?\nAnswer:", "chosen": " This", "rejected": " That"});
        assert_eq!(rows, [&expected]);
    }

    #[test]
    fn scored_answers_become_pairs_and_earlier_turns_messages() {
        let example =
            json!({"input": "Hi\n\nAssistant: Hello\n\nHuman: Why?", "target_scores": {"No.": 0, "Because.": 1}});
        let mut rule = take(&["d/a/task.json", "d/b/task.json"], "");
        (rule.append_to, rule.rows) = (Some("test.jsonl".into()), Some("scored-pairs".into()));
        let task = |name: &str| json!({"name": name, "examples": [example]}).to_string();
        let (outcome, folder) =
            unpack_members(&[("d/a/task.json", &task("a")), ("d/b/task.json", &task("b"))], vec![rule]);
        outcome.unwrap();
        let text = fs::read_to_string(folder.path().join("out/test.jsonl")).unwrap();
        let turn = |role: &str, text: &str| json!({"role": role, "content": text});
        let prompt = [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Why?")];
        let (chosen, rejected) = ([turn("assistant", "Because.")], [turn("assistant", "No.")]);
        let expected = json!({"prompt": prompt, "chosen": chosen, "rejected": rejected, "task": "a"});
        assert_eq!(serde_json::from_str::<Value>(text.lines().next().unwrap()).unwrap(), expected);
        assert_eq!(text.lines().count(), 2);
    }

    #[test]
    fn an_option_that_is_right_goes_before_a_wrong_one() {
        let doc = json!({"query": "Q: what?", "choices": ["ice", "fire"], "gold": 1});
        let lines = [0, 0, 1_000_000].map(|number| json!({"doc_id": number, "doc": doc}).to_string());
        let mut rule = take(&["d/requests.jsonl.gz"], "");
        (rule.append_to, rule.rows) = (Some("train.jsonl".into()), Some("choice-pairs".into()));
        let (outcome, folder) = unpack_members(&[("d/requests.jsonl.gz", &lines.join("\n"))], vec![rule]);
        outcome.unwrap();
        let row = fs::read_to_string(folder.path().join("out/train.jsonl")).unwrap();
        let expected =
            json!({"prompt": "Q: what?", "chosen": " fire", "rejected": " ice", "choices": ["ice", "fire"], "gold": 1});
        assert_eq!(serde_json::from_str::<Value>(&row).unwrap(), expected);
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
