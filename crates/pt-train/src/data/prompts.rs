//! Rows that only ask: answers to them are sampled, and what else a row holds is for whoever scores those.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::formats::{
    RowContent, Text, data_files, field_error, names, parse_adapter, parse_messages, parse_tools, read_values, renamed,
    source_names, text_value,
};
use super::{ReadOptions, Row};
use crate::error::{Origin, Result, TrainError};

/// Reads prompts, several sources one after the other, each beside all fields of its row under our names.
///
/// The prompt is the field `prompt`, a text or messages, or else `messages`; messages end with a turn that the
/// assistant is to answer. Beside it only `tools` and `adapter` are looked at: a `completion` or `label`, say, may be
/// anything.
///
/// # Errors
/// As [`read_rows`](super::read_rows).
pub fn read_prompts(paths: &[PathBuf], options: &ReadOptions) -> Result<Vec<(Row, Map<String, Value>)>> {
    let limit = options.max_rows.unwrap_or(usize::MAX);
    let mut prompts = Vec::new();
    for (path, source) in paths.iter().zip(source_names(paths)) {
        let before = prompts.len();
        for file in data_files(path)? {
            let room = limit.saturating_sub(prompts.len() - before);
            for (value, origin) in read_values(&file, room)? {
                let adapter = parse_adapter(&value, &origin)?;
                let fields = renamed(value, &origin, options)?;
                let content = parse_prompt(&fields, &origin)?;
                let content = if options.as_chat { content.into_chat() } else { content };
                prompts.push((Row { content, origin, source: source.clone(), adapter }, fields));
            }
        }
        if prompts.len() == before {
            return Err(TrainError::EmptyData { path: path.clone() });
        }
    }
    if prompts.is_empty() {
        return Err(TrainError::EmptyData { path: PathBuf::new() });
    }
    Ok(prompts)
}

fn parse_prompt(fields: &Map<String, Value>, origin: &Origin) -> Result<RowContent> {
    let (name, prompt) = if let Some(value) = fields.get("prompt") {
        ("prompt", text_value(value, "prompt", origin)?)
    } else if let Some(value) = fields.get("messages") {
        ("messages", Text::Chat(parse_messages(value, "messages", origin)?))
    } else {
        return Err(TrainError::MissingField {
            origin: origin.clone(),
            found: names(fields),
            expected: "`prompt` or `messages`".into(),
            suggestion: suggestion(fields),
        });
    };
    if let Text::Chat(messages) = &prompt
        && let Some(last) = messages.last()
        && !matches!(last.role.as_str(), "user" | "tool")
    {
        let field = format!("{name}[{}].role", messages.len() - 1);
        let role = Value::String(last.role.clone());
        return Err(field_error(origin, &field, &role, "`user` or `tool` in the last turn, which is to be answered"));
    }
    Ok(RowContent::Prompt { prompt, tools: parse_tools(fields) })
}

/// The column that is likely meant.
fn suggestion(fields: &Map<String, Value>) -> String {
    const USUAL: [&str; 6] = ["question", "query", "problem", "instruction", "input", "text"];
    let near = |ours| crate::config::nearest(ours, fields.keys().map(String::as_str)).map(|theirs| (ours, theirs));
    let usual = USUAL.into_iter().find(|name| fields.contains_key(*name)).map(|theirs| ("prompt", theirs));
    match usual.or_else(|| near("prompt")).or_else(|| near("messages")) {
        Some((ours, theirs)) => format!("map the column: --set data.columns.{ours}={theirs}"),
        None => "name the column with --set data.columns.prompt=YOURS".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Message;

    fn read(text: &str, options: &ReadOptions) -> Result<Vec<(Row, Map<String, Value>)>> {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("prompts.jsonl");
        std::fs::write(&path, text).expect("write");
        read_prompts(&[path], options)
    }

    #[test]
    fn prompts_keep_all_fields_of_their_rows() {
        let rows = [
            r#"{"prompt":"q","answer":7,"completion":3,"label":"odd"}"#,
            r#"{"prompt":[{"role":"user","content":"q"}],"chosen":"a","rejected":1,"tools":"[]"}"#,
            r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q"}],"level":{"a":[1]}}"#,
        ];
        let prompts = read(&rows.join("\n"), &ReadOptions::default()).expect("all parse");
        let user = Message::new("user", "q");
        let expected = [
            (Text::Plain("q".into()), None),
            (Text::Chat(vec![user.clone()]), Some(Value::Array(Vec::new()))),
            (Text::Chat(vec![Message::new("system", "s"), user]), None),
        ];
        for (((row, fields), line), (prompt, tools)) in prompts.iter().zip(rows).zip(expected) {
            assert_eq!(row.content, RowContent::Prompt { prompt, tools });
            assert_eq!(Value::Object(fields.clone()), serde_json::from_str::<Value>(line).expect("an object"));
        }
        assert_eq!((prompts[2].0.origin.position, prompts[2].0.source.as_str()), (3, "prompts"));
    }

    #[test]
    fn columns_texts_as_chat_and_limits_are_those_of_other_rows() {
        let text = "{\"question\":\"q \",\"answer\":1}\n{\"question\":\"r\"}\n";
        let columns = [("prompt".to_owned(), "question".to_owned())].into();
        let options = ReadOptions { columns, as_chat: true, max_rows: Some(1), ..ReadOptions::default() };
        let prompts = read(text, &options).expect("parses");
        assert_eq!(prompts.len(), 1);
        let prompt = Text::Chat(vec![Message::new("user", "q")]);
        assert_eq!(prompts[0].0.content, RowContent::Prompt { prompt, tools: None });
        assert_eq!(prompts[0].1.keys().collect::<Vec<_>>(), ["answer", "prompt"]);
    }

    #[test]
    fn faults_name_file_line_field_and_value() {
        let fault = |text: &str| read(text, &ReadOptions::default()).expect_err(text);
        let error = fault("{\"prompt\":\"a\"}\n{\"question\":\"b\",\"answer\":1}\n");
        let text = error.to_string();
        assert!(
            text.ends_with("prompts.jsonl:2: row has the fields `question`, `answer`, expected `prompt` or `messages`"),
            "{text}"
        );
        assert_eq!(error.hint().expect("a hint"), "map the column: --set data.columns.prompt=question");
        assert!(fault("{\"promt\":1}").hint().expect("a hint").ends_with("data.columns.prompt=promt"));
        assert!(fault("{\"mesages\":1}").hint().expect("a hint").ends_with("data.columns.messages=mesages"));
        assert!(fault("{\"zz\":1}").hint().expect("a hint").ends_with("data.columns.prompt=YOURS"));
        let answered = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}"#;
        assert!(fault(answered).to_string().contains("`messages[1].role` is \"assistant\", expected `user` or `tool`"));
        let system = r#"{"prompt":{"role":"system","content":"q"}}"#;
        assert!(fault(system).to_string().contains("`prompt[0].role` is \"system\""));
        for wrong in [r#"{"prompt":3}"#, r#"{"prompt":null}"#, r#"{"prompt":[]}"#, r#"{"messages":"q"}"#, "3"] {
            assert!(matches!(fault(wrong), TrainError::Field { .. }), "{wrong}");
        }
        assert!(matches!(fault(""), TrainError::EmptyData { .. }));
        assert!(matches!(fault("{"), TrainError::Json { .. }));
        assert!(matches!(read_prompts(&[], &ReadOptions::default()), Err(TrainError::EmptyData { .. })));
    }
}
