//! Chat templates: Jinja as Hugging Face templates use it, equal to transformers' rendering byte for byte.
//!
//! minijinja renders; added here are what transformers adds (`raise_exception`, `strftime_now`, its own `tojson`,
//! the `{% generation %}` tag, which marks the assistant's part and prints nothing) and Python's way of printing
//! values. One difference stays: minijinja has no tuples, so `{{ (1, 2) }}` prints as a list.

mod python;

use crate::{ModelError, Result};
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use std::path::Path;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub role: String,
    /// What is said.
    #[serde(default, skip_serializing_if = "Content::is_absent")]
    pub content: Content,
    /// Everything else, `tool_calls` say, passed on to the template.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl Message {
    /// A turn with a role and a content only.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Content::Text(content.into()), extra: serde_json::Map::new() }
    }
}

/// What a turn says. Templates see it as the conversation gives it: one may ask whether it is none or left out, or
/// walk over its parts.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(try_from = "serde_json::Value")]
pub enum Content {
    /// A text.
    Text(String),
    /// A list of text parts, `{"type": "text", "text": ..}`, and their concatenation.
    Parts(Vec<serde_json::Value>, String),
    /// Null: a turn of tool calls, say.
    Null,
    /// The message has no `content`.
    #[default]
    Absent,
}

impl Content {
    /// The text; empty where there is none.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Text(text) | Self::Parts(_, text) => text,
            Self::Null | Self::Absent => "",
        }
    }

    /// Whether there is no text.
    pub fn is_empty(&self) -> bool {
        self.as_str().is_empty()
    }

    fn is_absent(&self) -> bool {
        *self == Self::Absent
    }
}

impl PartialEq<&str> for Content {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}

impl TryFrom<serde_json::Value> for Content {
    /// What is wrong with the value.
    type Error = String;

    fn try_from(value: serde_json::Value) -> std::result::Result<Self, String> {
        match value {
            serde_json::Value::Null => Ok(Self::Null),
            serde_json::Value::String(text) => Ok(Self::Text(text)),
            serde_json::Value::Array(parts) => {
                let texts = parts.iter().map(|part| match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(text)) => Ok(text),
                    _ => Err(format!("`content` has the part {part}, expected parts of type `text`")),
                });
                let text = texts.collect::<std::result::Result<String, String>>()?;
                Ok(Self::Parts(parts, text))
            }
            other => Err(format!("`content` is {other}, expected a string or a list of text parts")),
        }
    }
}

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => text.serialize(serializer),
            Self::Parts(parts, _) => parts.serialize(serializer),
            Self::Null | Self::Absent => serializer.serialize_none(),
        }
    }
}

/// A parsed chat template.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Parses a template; `bos_token` and `eos_token` are what it may print by those names.
    ///
    /// # Errors
    /// [`ModelError::TemplateSyntax`] with the line.
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, _, value| python::write_str(out, value));
        environment.add_filter("string", |value: &Value| python::str(value));
        // As Jinja, it trims the text of any value, the Python text.
        environment.add_filter("trim", |value: &Value, chars: Option<String>| match chars {
            None => python::str(value).trim().to_string(),
            Some(chars) => python::str(value).trim_matches(|c| chars.contains(c)).to_string(),
        });
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: &str| -> std::result::Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
        });
        environment.add_function("strftime_now", |format: &str| python::strftime(format, std::time::SystemTime::now()));
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| ModelError::TemplateSyntax { line: error.line().unwrap_or(1), reason: reason(&error) })?;
        let owned = |token: Option<&str>| token.map(str::to_string);
        Ok(Self { environment, source: source.into(), bos_token: owned(bos_token), eos_token: owned(eos_token) })
    }

    /// The template of a Hugging Face folder: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`;
    /// `None` when there is neither.
    ///
    /// # Errors
    /// [`ModelError::Read`], [`ModelError::Json`], [`ModelError::Field`], [`ModelError::TemplateSyntax`].
    pub fn from_folder(folder: &Path) -> Result<Option<Self>> {
        let (in_config, bos_token, eos_token) = crate::tokenizer::template_of_config(folder)?;
        let source = crate::tokenizer::template_file(folder)?.or(in_config);
        source.map(|source| Self::new(&source, bos_token.as_deref(), eos_token.as_deref())).transpose()
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation. `tools` is the list of tool descriptions that the template may print;
    /// `add_generation_prompt` appends the opening of an assistant's turn.
    ///
    /// # Errors
    /// [`ModelError::TemplateRender`] when the template refuses the messages (`raise_exception`) or fails on them.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let failed =
            |error: Error| ModelError::TemplateRender { line: error.line().unwrap_or(0), reason: reason(&error) };
        let mut context = std::collections::BTreeMap::from([
            ("messages", Value::from_serialize(messages)),
            ("tools", tools.map_or(Value::from(()), Value::from_serialize)),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ]);
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            if let Some(token) = token {
                context.insert(name, Value::from(token.as_str()));
            }
        }
        self.environment.get_template(NAME).and_then(|template| template.render(context)).map_err(failed)
    }
}

fn reason(error: &Error) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), str::to_string)
}

/// `tojson` as transformers defines it: no escaping of HTML, and Python's separators and keyword arguments.
fn tojson(value: &Value, kwargs: Kwargs) -> std::result::Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    kwargs.assert_all_used()?;
    let separators = match separators.as_deref() {
        None if indent.is_some() => (",".to_string(), ": ".to_string()),
        None => (", ".to_string(), ": ".to_string()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "separators takes two strings")),
    };
    if value.kind() == ValueKind::Undefined {
        return Err(Error::new(ErrorKind::UndefinedError, "tojson of an undefined value"));
    }
    let mut json =
        serde_json::to_value(value).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let format = python::JsonFormat { indent, is_ascii: ensure_ascii.unwrap_or(false), separators };
    Ok(Value::from_safe_string(format.to_string(&json)))
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, which minijinja does not know, by an `if` that always
/// holds. The whitespace marks and the lines stay as they are.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else { break };
        let (tag, after) = tag.split_at(end);
        out.push_str(&match tag[2..].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => tag.replacen("generation", "if true", 1),
            "endgeneration" => tag.replacen("endgeneration", "endif", 1),
            _ => tag.to_string(),
        });
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: serde_json::Value) -> Result<String> {
        let messages: Vec<Message> = serde_json::from_value(messages).unwrap();
        ChatTemplate::new(source, Some("<s>"), Some("</s>"))?.render(&messages, None, true)
    }

    #[test]
    fn generation_tags_print_nothing() {
        let source = "{% for m in messages %}{% generation %}\n{{ m.content }}{%- endgeneration -%}{% endfor %}";
        assert_eq!(render(source, json!([{"role": "user", "content": "a"}])).unwrap(), "a");
    }

    #[test]
    fn a_syntax_error_names_its_line() {
        let error = render("a\n{% for m in %}", json!([])).unwrap_err();
        assert!(matches!(error, ModelError::TemplateSyntax { line: 2, .. }), "{error:?}");
        assert!(error.hint().is_some());
    }

    #[test]
    fn a_raised_exception_is_the_reason() {
        let error = render("\n{{ raise_exception('roles must alternate') }}", json!([])).unwrap_err();
        assert_eq!(error.to_string(), "chat template, line 2: roles must alternate");
    }

    #[test]
    fn values_print_as_in_python() {
        let messages = json!([{"role": "user", "content": "x", "flags": [true, null, 1.0, "it's", {"a": "b"}]}]);
        let text = render("{{ messages[0].flags }}{{ none }}{{ false }}{{ messages[0].missing }}", messages).unwrap();
        assert_eq!(text, r#"[True, None, 1.0, "it's", {'a': 'b'}]NoneFalse"#);
    }

    #[test]
    fn contents_may_be_null_absent_or_parts_of_text() {
        let read = |json: serde_json::Value| serde_json::from_value::<Message>(json);
        let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
        assert_eq!(read(parts.clone()).unwrap().content, "ab");
        let null = json!({"role": "assistant", "content": null, "tool_calls": []});
        let message = read(null.clone()).unwrap();
        assert_eq!((message.content.as_str(), message.extra.len()), ("", 1));
        let absent = json!({"role": "assistant", "tool_calls": []});
        for json in [parts, null, absent] {
            assert_eq!(serde_json::to_value(read(json.clone()).unwrap()).unwrap(), json, "written as it was read");
        }
        assert!(read(json!({"role": "user", "content": [{"type": "image"}]})).is_err());
        assert!(read(json!({"role": "user", "content": 1})).is_err());
    }

    #[test]
    fn a_template_can_tell_null_from_absent_and_walk_over_parts() {
        let source = "{% for m in messages %}[{% if m.content is not defined %}absent{% elif m.content is none %}null\
            {% elif m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}({{ p.text }}){% endfor %}\
            {% endif %}]{% endfor %}";
        let messages = json!([{"role": "a"}, {"role": "a", "content": null}, {"role": "a", "content": "x"},
            {"role": "a", "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "z"}]}]);
        assert_eq!(render(source, messages).unwrap(), "[absent][null][x][(y)(z)]");
    }
}
