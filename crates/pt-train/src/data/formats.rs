//! Reading rows: JSONL files, JSON arrays, folders of them, several sources side by side.
//!
//! | form | fields | becomes |
//! | --- | --- | --- |
//! | chat | `messages` (`role`, `content`), optional `tools` | [`RowContent::Chat`] |
//! | ShareGPT | `conversations` (`from`, `value`), optional `system` | [`RowContent::Chat`] |
//! | prompt and completion | `prompt`, `completion`: texts or message lists | [`RowContent::Completion`] |
//! | pair | `chosen`, `rejected`, optional `prompt`, `margin`, `weight` | [`RowContent::Preference`] |
//! | ranked list | `completions` with `ranks` (0 the best) or `scores` (higher better), optional `prompt`, `weight` | [`RowContent::Preference`] |
//! | unpaired | `prompt`, `completion`, `label` (true, false), optional `weight` | [`RowContent::Preference`], with [`ReadOptions::preferences`] |
//! | Alpaca | `instruction`, `output`, optional `input`, `system` | [`RowContent::Completion`], as chat |
//! | plain text | `text` | [`RowContent::Text`] |
//! | prompt alone | `prompt`: a text or a message list | [`RowContent::Prompt`], with [`ReadOptions::prompt_only`] |
//!
//! Other names are mapped by [`ReadOptions::columns`]. Fields beyond these are ignored.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use pt_model::Content;
pub use pt_model::Message;

use super::preference_rows::parse_preference;
use super::preferences::Judgement;
use crate::error::{Origin, Result, TrainError};

/// Plain text, or turns for the chat template.
#[derive(Clone, Debug, PartialEq)]
pub enum Text {
    /// Tokenized as it stands.
    Plain(String),
    /// Rendered by the chat template first.
    Chat(Vec<Message>),
}

/// What a row says.
#[derive(Clone, Debug, PartialEq)]
pub enum RowContent {
    /// A conversation; each assistant turn is trained.
    Chat {
        /// The turns.
        messages: Vec<Message>,
        /// Tool descriptions for the template.
        tools: Option<Value>,
    },
    /// A prompt and what should follow.
    Completion {
        /// Context, never trained.
        prompt: Text,
        /// Trained.
        completion: Text,
        /// Tool descriptions for the template.
        tools: Option<Value>,
    },
    /// Text trained from its second token on.
    Text(String),
    /// Completions of one prompt and what was judged of them.
    Preference {
        /// Shared context; absent when each completion is a whole conversation, or a whole text.
        prompt: Option<Text>,
        /// Of a pair, the better one first.
        completions: Vec<Text>,
        /// Which is better, or whether each is good.
        judgement: Judgement,
        /// Factor of the row's loss.
        weight: f64,
        /// Tool descriptions for the template.
        tools: Option<Value>,
    },
    /// A prompt that something is to be generated for; it trains nothing.
    Prompt {
        /// The context.
        prompt: Text,
        /// Tool descriptions for the template.
        tools: Option<Value>,
    },
}

impl RowContent {
    /// Name of the form, for messages.
    pub fn form(&self) -> &'static str {
        match self {
            Self::Chat { .. } => "chat",
            Self::Completion { .. } => "prompt/completion",
            Self::Text(_) => "text",
            Self::Preference { .. } => "preference",
            Self::Prompt { .. } => "prompt-only",
        }
    }

    /// The prompt, where it is plain text that no chat template will render.
    pub fn plain_prompt(&self) -> Option<&str> {
        match self {
            Self::Completion { prompt: Text::Plain(text), .. }
            | Self::Prompt { prompt: Text::Plain(text), .. }
            | Self::Preference { prompt: Some(Text::Plain(text)), .. } => Some(text),
            _ => None,
        }
    }

    /// Plain prompts as a user's turn, what follows them as the assistant's; texts without a prompt stay.
    pub(super) fn into_chat(self) -> Self {
        let turn = |role: &str, text: Text| match text {
            Text::Plain(text) => Text::Chat(vec![Message::new(role, text.trim())]),
            chat => chat,
        };
        match self {
            Self::Completion { prompt, completion, tools } => {
                Self::Completion { prompt: turn("user", prompt), completion: turn("assistant", completion), tools }
            }
            Self::Preference { prompt: Some(prompt), completions, judgement, weight, tools } => Self::Preference {
                prompt: Some(turn("user", prompt)),
                completions: completions.into_iter().map(|text| turn("assistant", text)).collect(),
                judgement,
                weight,
                tools,
            },
            Self::Prompt { prompt, tools } => Self::Prompt { prompt: turn("user", prompt), tools },
            other => other,
        }
    }
}

/// A row and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What it says.
    pub content: RowContent,
    /// File and place.
    pub origin: Origin,
    /// Name of the source it belongs to.
    pub source: String,
    /// The adapter that it asks for, where several are at hand: its field `adapter`.
    pub adapter: Option<String>,
}

/// How files are read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReadOptions {
    /// Our field name to the file's, e.g. `prompt: question`.
    pub columns: BTreeMap<String, String>,
    /// Turn plain prompts, and what follows them, into turns of a user and of the assistant; spaces at their ends go.
    pub as_chat: bool,
    /// Read at most this many rows of each source.
    pub max_rows: Option<usize>,
    /// Take rows that hold a `prompt` and nothing to follow it: generation asks for no more.
    pub prompt_only: bool,
    /// Take only rows that judge completions, and `label` beside `prompt` and `completion` as such a judgement.
    pub preferences: bool,
}

/// Reads several sources one after the other; each row keeps the name of its source.
///
/// A source is named by its file stem or folder name, with `-2`, `-3` where two would share one.
///
/// # Errors
/// As [`read_source`]; also when `paths` is empty.
pub fn read_rows(paths: &[PathBuf], options: &ReadOptions) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (path, name) in paths.iter().zip(source_names(paths)) {
        rows.extend(read_source(path, &name, options)?);
    }
    if rows.is_empty() {
        return Err(TrainError::EmptyData { path: paths.first().cloned().unwrap_or_default() });
    }
    Ok(rows)
}

/// A name for each path, no two alike.
pub(super) fn source_names(paths: &[PathBuf]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for path in paths {
        let stem = path.file_stem().map_or_else(|| "data".to_owned(), |stem| stem.to_string_lossy().into_owned());
        let mut name = stem.clone();
        let mut copies = 1;
        while names.contains(&name) {
            copies += 1;
            name = format!("{stem}-{copies}");
        }
        names.push(name);
    }
    names
}

/// Reads one source: a `.jsonl` or `.json` file, or a folder of them in the order of their names.
///
/// # Errors
/// [`TrainError::Read`], [`TrainError::Json`] with the line, [`TrainError::MissingField`] and
/// [`TrainError::Field`] with the row, [`TrainError::EmptyData`], [`TrainError::UnknownFormat`].
pub fn read_source(path: &Path, name: &str, options: &ReadOptions) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let limit = options.max_rows.unwrap_or(usize::MAX);
    for file in data_files(path)? {
        for (value, origin) in read_values(&file, limit.saturating_sub(rows.len()))? {
            let adapter = parse_adapter(&value, &origin)?;
            let content = parse_row(value, &origin, options)?;
            let content = if options.as_chat { content.into_chat() } else { content };
            rows.push(Row { content, origin, source: name.to_owned(), adapter });
        }
    }
    if rows.is_empty() {
        return Err(TrainError::EmptyData { path: path.to_path_buf() });
    }
    Ok(rows)
}

pub(super) fn data_files(path: &Path) -> Result<Vec<PathBuf>> {
    let is_data = |path: &Path| {
        path.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("jsonl") || ext.eq_ignore_ascii_case("json"))
    };
    if !path.is_dir() {
        if path.exists() && !is_data(path) {
            let found = path.extension().map_or_else(String::new, |ext| format!(".{}", ext.to_string_lossy()));
            return Err(TrainError::UnknownFormat { path: path.to_path_buf(), found });
        }
        return Ok(vec![path.to_path_buf()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(TrainError::read(path))? {
        let file = entry.map_err(TrainError::read(path))?.path();
        if is_data(&file) && file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// The JSON values of a file, each with its place, at most `limit` of them.
pub(super) fn read_values(path: &Path, limit: usize) -> Result<Vec<(Value, Origin)>> {
    let bytes = std::fs::read(path).map_err(TrainError::read(path))?;
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes);
    let is_array = bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[');
    if is_array {
        let values: Vec<Value> = serde_json::from_slice(bytes).map_err(|error| TrainError::Json {
            origin: Origin { path: path.to_path_buf(), position: error.line(), is_line: true },
            message: error.to_string(),
        })?;
        let place = |position| Origin { path: path.to_path_buf(), position, is_line: false };
        return Ok(values.into_iter().take(limit).enumerate().map(|(at, value)| (value, place(at))).collect());
    }
    let mut values = Vec::new();
    for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        if values.len() == limit {
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let origin = Origin { path: path.to_path_buf(), position: index + 1, is_line: true };
        match serde_json::from_slice(line) {
            Ok(value) => values.push((value, origin)),
            Err(error) => {
                // The parser sees one line, so its own "line 1" would mislead.
                let message = error.to_string().replace(" at line 1 column", ", at column");
                return Err(TrainError::Json { origin, message });
            }
        }
    }
    Ok(values)
}

pub(super) fn parse_adapter(row: &Value, origin: &Origin) -> Result<Option<String>> {
    match row.get("adapter") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(name)) => Ok(Some(name.clone())),
        Some(other) => Err(field_error(origin, "adapter", other, "an adapter's name, or null")),
    }
}

/// The fields of a row under our names.
pub(super) fn renamed(value: Value, origin: &Origin, options: &ReadOptions) -> Result<Map<String, Value>> {
    let Value::Object(mut fields) = value else {
        return Err(field_error(origin, "row", &value, "an object"));
    };
    for (ours, theirs) in &options.columns {
        if let Some(value) = fields.remove(theirs) {
            fields.insert(ours.clone(), value);
        } else {
            return Err(TrainError::MissingField {
                origin: origin.clone(),
                found: names(&fields),
                expected: format!("`{theirs}` (mapped to `{ours}`)"),
                suggestion: nearest_hint(&fields, theirs).unwrap_or_else(|| "check data.columns".into()),
            });
        }
    }
    Ok(fields)
}

pub(super) fn parse_tools(fields: &Map<String, Value>) -> Option<Value> {
    fields.get("tools").filter(|tools| !tools.is_null()).map(|tools| match tools {
        // Some sets keep tools as JSON in a string, since columnar files dislike ragged objects.
        Value::String(text) => serde_json::from_str(text).unwrap_or_else(|_| tools.clone()),
        other => other.clone(),
    })
}

fn parse_row(value: Value, origin: &Origin, options: &ReadOptions) -> Result<RowContent> {
    let fields = renamed(value, origin, options)?;
    let has = |name: &str| fields.contains_key(name);
    let tools = parse_tools(&fields);
    if let Some(preference) = parse_preference(&fields, tools.clone(), options.preferences, origin)? {
        return Ok(preference);
    }
    if has("messages") {
        let messages = parse_messages(&fields["messages"], "messages", origin)?;
        return Ok(RowContent::Chat { messages, tools });
    }
    if has("conversations") {
        return Ok(RowContent::Chat { messages: parse_sharegpt(&fields, origin)?, tools });
    }
    if has("prompt") && has("completion") {
        let prompt = text_field(&fields, "prompt", origin)?;
        let completion = text_field(&fields, "completion", origin)?;
        match (&prompt, &completion) {
            (Text::Plain(_), Text::Plain(_)) | (Text::Chat(_), Text::Chat(_)) => {}
            _ => return Err(field_error(origin, "completion", &fields["completion"], "of the same kind as `prompt`")),
        }
        return Ok(RowContent::Completion { prompt, completion, tools });
    }
    if has("instruction") && has("output") {
        return parse_alpaca(&fields, origin);
    }
    if has("text") {
        return Ok(RowContent::Text(string_field(&fields, "text", origin)?));
    }
    if options.prompt_only && has("prompt") {
        return Ok(RowContent::Prompt { prompt: text_field(&fields, "prompt", origin)?, tools });
    }
    let forms =
        "`messages`; `prompt`, `completion`; `prompt`, `chosen`, `rejected`; `instruction`, `output`; or `text`";
    Err(TrainError::MissingField {
        origin: origin.clone(),
        suggestion: suggest_form(&fields),
        found: names(&fields),
        expected: if options.prompt_only { format!("`prompt`; {forms}") } else { forms.into() },
    })
}

fn parse_alpaca(fields: &Map<String, Value>, origin: &Origin) -> Result<RowContent> {
    let mut user = string_field(fields, "instruction", origin)?;
    let input = if fields.get("input").is_some_and(|input| !input.is_null()) {
        string_field(fields, "input", origin)?
    } else {
        String::new()
    };
    if !input.is_empty() {
        user.push('\n');
        user.push_str(&input);
    }
    let mut prompt = Vec::new();
    if fields.get("system").is_some_and(|system| system.as_str() != Some("") && !system.is_null()) {
        prompt.push(Message::new("system", string_field(fields, "system", origin)?));
    }
    prompt.push(Message::new("user", user));
    let completion = vec![Message::new("assistant", string_field(fields, "output", origin)?)];
    Ok(RowContent::Completion { prompt: Text::Chat(prompt), completion: Text::Chat(completion), tools: None })
}

pub(super) fn parse_sharegpt(fields: &Map<String, Value>, origin: &Origin) -> Result<Vec<Message>> {
    let value = &fields["conversations"];
    let Value::Array(turns) = value else {
        return Err(field_error(origin, "conversations", value, "a list of turns"));
    };
    let mut messages = Vec::new();
    if let Some(Value::String(system)) = fields.get("system").filter(|system| system.as_str() != Some("")) {
        messages.push(Message::new("system", system));
    }
    for (index, turn) in turns.iter().enumerate() {
        let place = |name: &str| format!("conversations[{index}].{name}");
        let (Some(from), Some(text)) =
            (turn.get("from").and_then(Value::as_str), turn.get("value").and_then(Value::as_str))
        else {
            // Some sets put role/content under this name.
            return parse_messages(value, "conversations", origin);
        };
        let Some(role) = sharegpt_role(from) else {
            return Err(field_error(origin, &place("from"), &turn["from"], "human, gpt, system or tool"));
        };
        messages.push(Message::new(role, text));
    }
    Ok(messages)
}

/// The template's name of a role in ShareGPT.
pub(super) fn sharegpt_role(from: &str) -> Option<&'static str> {
    Some(match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "chatgpt" | "bing" | "bard" => "assistant",
        "system" => "system",
        "tool" | "observation" => "tool",
        _ => return None,
    })
}

pub(super) fn parse_messages(value: &Value, field: &str, origin: &Origin) -> Result<Vec<Message>> {
    let Value::Array(list) = value else {
        return Err(field_error(origin, field, value, "a list of messages"));
    };
    if list.is_empty() {
        return Err(field_error(origin, field, value, "at least one message"));
    }
    let mut messages = Vec::with_capacity(list.len());
    for (index, item) in list.iter().enumerate() {
        let Value::Object(item_fields) = item else {
            return Err(field_error(origin, &format!("{field}[{index}]"), item, "an object with `role` and `content`"));
        };
        let mut extra = item_fields.clone();
        let role = match extra.shift_remove("role") {
            Some(Value::String(role)) => role,
            other => {
                return Err(field_error(
                    origin,
                    &format!("{field}[{index}].role"),
                    &other.unwrap_or(Value::Null),
                    "a string",
                ));
            }
        };
        let content = match extra.shift_remove("content") {
            Some(Value::String(text)) => Content::Text(text),
            Some(Value::Array(parts)) => Content::Text(parts_text(&parts).ok_or_else(|| {
                field_error(
                    origin,
                    &format!("{field}[{index}].content"),
                    &Value::Array(parts.clone()),
                    "text parts only",
                )
            })?),
            // A template may ask whether a turn of tool calls says nothing or has no such key.
            Some(Value::Null) if extra.contains_key("tool_calls") => Content::Null,
            None if extra.contains_key("tool_calls") => Content::Absent,
            other => {
                return Err(field_error(
                    origin,
                    &format!("{field}[{index}].content"),
                    &other.unwrap_or(Value::Null),
                    "a string",
                ));
            }
        };
        messages.push(Message { role, content, extra });
    }
    Ok(messages)
}

/// `[{"type": "text", "text": ..}, ..]` joined, as templates of text models want it; `None` when a part is not text.
fn parts_text(parts: &[Value]) -> Option<String> {
    parts.iter().map(|part| part.get("text").and_then(Value::as_str)).collect()
}

fn text_field(fields: &Map<String, Value>, name: &str, origin: &Origin) -> Result<Text> {
    text_value(&fields[name], name, origin)
}

/// A text or turns; `name` is the field that holds it, for messages.
pub(super) fn text_value(value: &Value, name: &str, origin: &Origin) -> Result<Text> {
    match value {
        Value::String(text) => Ok(Text::Plain(text.clone())),
        value @ Value::Array(_) => Ok(Text::Chat(parse_messages(value, name, origin)?)),
        value @ Value::Object(_) => Ok(Text::Chat(parse_messages(&Value::Array(vec![value.clone()]), name, origin)?)),
        other => Err(field_error(origin, name, other, "a string or a list of messages")),
    }
}

fn string_field(fields: &Map<String, Value>, name: &str, origin: &Origin) -> Result<String> {
    match &fields[name] {
        Value::String(text) => Ok(text.clone()),
        other => Err(field_error(origin, name, other, "a string")),
    }
}

pub(super) fn field_error(origin: &Origin, field: &str, found: &Value, expected: &'static str) -> TrainError {
    let mut text = match found {
        Value::Null => "missing or null".to_owned(),
        other => other.to_string(),
    };
    if text.chars().count() > 60 {
        text = text.chars().take(57).chain("...".chars()).collect();
    }
    TrainError::Field { origin: origin.clone(), field: field.to_owned(), found: text, expected }
}

pub(super) fn names(fields: &Map<String, Value>) -> Vec<String> {
    fields.keys().cloned().collect()
}

fn nearest_hint(fields: &Map<String, Value>, wanted: &str) -> Option<String> {
    let near = crate::config::nearest(wanted, fields.keys().map(String::as_str))?;
    Some(format!("did you mean `{near}`?"))
}

/// A near-miss of one of our names, or a column mapping for the names that sets commonly use.
pub(super) fn suggest_form(fields: &Map<String, Value>) -> String {
    const PROMPTS: [&str; 7] = ["question", "query", "input", "source", "instruction", "problem", "prompt"];
    const ANSWERS: [&str; 8] = ["answer", "response", "output", "target", "solution", "chosen", "label", "completion"];
    const OURS: [&str; 8] =
        ["messages", "conversations", "prompt", "completion", "chosen", "rejected", "output", "text"];
    let first = |names: &[&'static str]| names.iter().copied().find(|name| fields.contains_key(*name));
    if let (Some(prompt), Some(answer)) = (first(&PROMPTS), first(&ANSWERS)) {
        let map = |ours: &str, theirs: &str| {
            if ours == theirs { String::new() } else { format!(" --set data.columns.{ours}={theirs}") }
        };
        return format!("map the columns:{}{}", map("prompt", prompt), map("completion", answer));
    }
    for name in fields.keys().filter(|name| !OURS.contains(&name.as_str())) {
        if let Some(near) = crate::config::nearest(name, OURS) {
            return format!("`{name}` looks like `{near}`: rename it, or --set data.columns.{near}={name}");
        }
    }
    "name the columns with --set data.columns.prompt=YOURS --set data.columns.completion=YOURS".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str) -> Result<Vec<Row>> {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("write");
        read_source(&path, "test", &ReadOptions::default())
    }

    #[test]
    fn every_form_is_recognised() {
        let rows = read(
            "rows.jsonl",
            concat!(
                r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
                "\r\n\n",
                r#"{"prompt":"a","completion":"b"}"#,
                "\n",
                r#"{"prompt":[{"role":"user","content":"a"}],"completion":[{"role":"assistant","content":"b"}]}"#,
                "\n",
                r#"{"text":"a b"}"#,
                "\n",
                r#"{"prompt":"a","chosen":"b","rejected":"c"}"#,
                "\n",
                r#"{"instruction":"a","input":"x","output":"b"}"#,
                "\n",
                r#"{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]}"#,
            ),
        )
        .expect("all parse");
        let forms: Vec<_> = rows.iter().map(|row| row.content.form()).collect();
        assert_eq!(
            forms,
            ["chat", "prompt/completion", "prompt/completion", "text", "preference", "prompt/completion", "chat"]
        );
        assert_eq!(rows[1].origin.position, 3, "blank lines count as lines");
        let RowContent::Completion { prompt: Text::Chat(prompt), .. } = &rows[5].content else {
            panic!("alpaca is chat")
        };
        assert_eq!(prompt[0].content, "a\nx");
    }

    #[test]
    fn a_turn_of_tool_calls_may_say_nothing_or_have_no_content() {
        let turn = |content: &str| format!(r#"{{"messages":[{{"role":"assistant",{content}"tool_calls":[]}}]}}"#);
        for (content, want) in [(r#""content":null,"#, Content::Null), ("", Content::Absent)] {
            let rows = read("rows.jsonl", &turn(content)).expect("a good row");
            let RowContent::Chat { messages, .. } = &rows[0].content else { panic!("a chat") };
            assert_eq!(messages[0].content, want);
        }
    }

    #[test]
    fn a_prompt_alone_is_read_where_that_is_asked_for() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("prompts.jsonl");
        let text = concat!(
            r#"{"prompt":"Hi"}"#,
            "\n",
            r#"{"prompt":[{"role":"user","content":"Hi"}],"tools":[]}"#,
            "\n",
            r#"{"messages":[{"role":"user","content":"Hi"}]}"#,
            "\n",
            r#"{"prompt":"Hi","completion":"there"}"#,
        );
        std::fs::write(&path, text).expect("write");
        let options = ReadOptions { prompt_only: true, ..ReadOptions::default() };
        let rows = read_source(&path, "prompts", &options).expect("all parse");
        let forms: Vec<_> = rows.iter().map(|row| row.content.form()).collect();
        assert_eq!(forms, ["prompt-only", "prompt-only", "chat", "prompt/completion"]);
        assert_eq!(rows[0].content, RowContent::Prompt { prompt: Text::Plain("Hi".into()), tools: None });
        let error = read_source(&path, "prompts", &ReadOptions::default()).expect_err("nothing to train");
        assert!(matches!(error, TrainError::MissingField { .. }), "{error}");
        std::fs::write(&path, r#"{"promt":"Hi"}"#).expect("write");
        let error = read_source(&path, "prompts", &options).expect_err("a typo");
        assert!(error.to_string().contains("expected `prompt`; `messages`"), "{error}");
    }

    #[test]
    fn a_bad_line_is_named() {
        let error = read("rows.jsonl", "{\"text\":\"a\"}\n{\"text\": oops}\n").expect_err("line 2 is bad");
        let text = error.to_string();
        assert!(text.contains("rows.jsonl:2: not valid JSON") && text.contains("at column"), "{text}");
    }

    #[test]
    fn a_missing_field_names_row_fields_and_remedy() {
        let error = read("rows.jsonl", "{\"question\":\"a\",\"answer\":\"b\"}\n").expect_err("no form fits");
        assert!(error.to_string().contains("rows.jsonl:1: row has the fields `question`, `answer`"), "{error}");
        assert_eq!(
            error.hint().expect("a hint"),
            "map the columns: --set data.columns.prompt=question --set data.columns.completion=answer"
        );
        let error = read("rows.jsonl", "{\"mesages\":[]}\n").expect_err("no form fits");
        assert!(error.hint().expect("a hint").contains("looks like `messages`"));
    }

    #[test]
    fn columns_map_foreign_names() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("gsm.json");
        std::fs::write(&path, r#"[{"question":"q","answer":"a"}]"#).expect("write");
        let columns = [("prompt", "question"), ("completion", "answer")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        let options = ReadOptions { columns: columns.into(), ..ReadOptions::default() };
        let rows = read_rows(&[path.clone(), path], &options).expect("reads");
        assert_eq!(rows.iter().map(|row| row.source.as_str()).collect::<Vec<_>>(), ["gsm", "gsm-2"]);
        assert!(rows[0].origin.to_string().ends_with("gsm.json[0]"));
    }

    #[test]
    fn plain_prompts_become_turns_where_that_is_asked_for() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("rows.jsonl");
        let lines = [
            r#"{"prompt":"q ","completion":" a"}"#,
            r#"{"prompt":"q","chosen":"a","rejected":"b"}"#,
            r#"{"prompt":"q"}"#,
            r#"{"prompt":[{"role":"user","content":"q "}]}"#,
            r#"{"text":"t"}"#,
        ];
        std::fs::write(&path, lines.join("\n")).expect("write");
        let options = ReadOptions { prompt_only: true, as_chat: true, ..ReadOptions::default() };
        let rows = read_source(&path, "rows", &options).expect("all parse");
        let turn = |role: &str, text: &str| Text::Chat(vec![Message::new(role, text)]);
        let answer = |text: &str| turn("assistant", text);
        let expected = [
            RowContent::Completion { prompt: turn("user", "q"), completion: answer("a"), tools: None },
            RowContent::Preference {
                prompt: Some(turn("user", "q")),
                completions: vec![answer("a"), answer("b")],
                judgement: Judgement::Ranks { ranks: vec![0, 1], scores: None },
                weight: 1.0,
                tools: None,
            },
            RowContent::Prompt { prompt: turn("user", "q"), tools: None },
            RowContent::Prompt { prompt: turn("user", "q "), tools: None },
            RowContent::Text("t".into()),
        ];
        assert_eq!(rows.into_iter().map(|row| row.content).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn empty_wrong_and_absent_files_are_refused() {
        assert!(matches!(read("rows.jsonl", "\n \n"), Err(TrainError::EmptyData { .. })));
        assert!(matches!(read("rows.json", "[]"), Err(TrainError::EmptyData { .. })));
        assert!(matches!(read("rows.csv", "a,b"), Err(TrainError::UnknownFormat { .. })));
        assert!(matches!(read("rows.jsonl", "{\"text\": 3}"), Err(TrainError::Field { .. })));
        assert!(matches!(read("rows.jsonl", "[1,"), Err(TrainError::Json { .. })));
        assert!(matches!(read("rows.jsonl", "3"), Err(TrainError::Field { .. })));
        let absent = read_source(Path::new("no/such.jsonl"), "x", &ReadOptions::default()).expect_err("absent");
        assert!(matches!(absent, TrainError::Read { .. }));
    }
}
