//! Prompts that responses are sampled for.

use std::path::PathBuf;

use pt_train::data::{self, Encode, Message, ReadOptions, RowContent, Text};
use pt_train::{Origin, TrainError};
use serde_json::{Map, Value};

use crate::error::{Result, RlhfError};
use crate::reward::Reward;

/// A prompt as its file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptRow {
    /// A text, taken as it stands, or turns for the chat template.
    pub prompt: Text,
    /// Tool descriptions for the template.
    pub tools: Option<Value>,
    /// All fields of the row, under the names of [`ReadOptions::columns`]: rewards look for their answers here.
    pub fields: Map<String, Value>,
    /// File and place.
    pub origin: Origin,
    /// Name of the source it belongs to.
    pub source: String,
}

/// A prompt that a model can be given.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Token ids, at least one.
    pub ids: Vec<i64>,
    /// The text that they stand for: with a chat template, its rendering up to where the response begins.
    pub text: String,
    /// What is asked, for people: the text, or the last turn without the template.
    pub question: String,
    /// All fields of the row.
    pub fields: Map<String, Value>,
    /// File and place.
    pub origin: Origin,
    /// Name of the source it belongs to.
    pub source: String,
}

/// Reads prompts from JSONL and JSON files and folders of them: `prompt`, a text or messages, or else `messages` that
/// end with a user's turn. Every field of a row is kept in [`PromptRow::fields`].
///
/// # Errors
/// [`RlhfError::Train`] with file, line, field and value, as [`pt_train::data::read_prompts`].
pub fn read_prompts(paths: &[PathBuf], options: &ReadOptions) -> Result<Vec<PromptRow>> {
    let mut prompts = Vec::new();
    for (row, fields) in data::read_prompts(paths, options)? {
        let form = row.content.form();
        let RowContent::Prompt { prompt, tools } = row.content else {
            return Err(TrainError::WrongForm { origin: row.origin, found: form, task: "sampling" }.into());
        };
        prompts.push(PromptRow { prompt, tools, fields, origin: row.origin, source: row.source });
    }
    Ok(prompts)
}

/// Tokens of the prompts: turns through the chat template with its generation prompt, texts as they stand after the
/// token that the tokenizer begins with.
///
/// Prompts of more than `max_prompt_tokens` are left out, so what comes back may be shorter than `rows`. `room` is the
/// longest prompt, in tokens, beside which a whole response fits: the model's context less virtual tokens and the
/// longest response. A prompt that is longer than that is an error and not left out, since it says that the settings do
/// not go together.
///
/// # Errors
/// [`RlhfError::Prompt`] for an empty prompt and for one that leaves no room, with its file and line;
/// [`RlhfError::Train`] when the tokenizer or the template refuses a row, and when every row was left out.
pub fn encode_prompts(
    rows: &[PromptRow],
    encoder: &dyn Encode,
    max_prompt_tokens: Option<usize>,
    room: usize,
) -> Result<Vec<Prompt>> {
    let longest = max_prompt_tokens.unwrap_or(usize::MAX);
    let mut prompts = Vec::with_capacity(rows.len());
    // The first one without room, and how many there are.
    let mut without_room: Option<(&Origin, usize)> = None;
    let mut num_without_room = 0;
    for row in rows {
        let prompt = encode_prompt(row, encoder)?;
        let length = prompt.ids.len();
        if length > longest {
            continue;
        }
        if length > room {
            num_without_room += 1;
            without_room.get_or_insert((&row.origin, length));
        }
        prompts.push(prompt);
    }
    if let Some((origin, length)) = without_room {
        return Err(RlhfError::Prompt {
            origin: origin.clone(),
            message: format!(
                "the prompt has {length} tokens, and beside the longest response the model's context holds {room} \
                 ({num_without_room} such prompt(s) in all)"
            ),
            hint: Some(if room == 0 {
                "the longest response fills the model's context: shorten it by rollout.max_new_tokens".into()
            } else {
                format!(
                    "leave such prompts out by rollout.max_prompt_tokens={room}, or shorten responses by rollout.max_new_tokens"
                )
            }),
        });
    }
    if prompts.is_empty() {
        let reasons = format!("{} over {longest} tokens", rows.len());
        return Err(TrainError::AllDropped { rows: rows.len(), reasons }.into());
    }
    Ok(prompts)
}

fn encode_prompt(row: &PromptRow, encoder: &dyn Encode) -> Result<Prompt> {
    let refused =
        |what| move |message| RlhfError::Train(TrainError::Encode { origin: row.origin.clone(), what, message });
    let (text, question) = match &row.prompt {
        Text::Plain(text) => (text.clone(), text.clone()),
        Text::Chat(messages) => {
            let rendered = encoder.render(messages, row.tools.as_ref(), true);
            let last = messages.last().map_or("", |message| message.content.as_str());
            (rendered.map_err(refused("the chat template"))?, last.to_owned())
        }
    };
    let ids = match &row.prompt {
        Text::Plain(text) => encoder.encode_plain(text),
        Text::Chat(_) => encoder.encode(&text),
    };
    let ids = ids.map_err(refused("tokenizing"))?;
    let says_nothing = match &row.prompt {
        Text::Plain(text) => text.trim().is_empty(),
        Text::Chat(messages) => messages.iter().all(is_blank),
    };
    if says_nothing || ids.is_empty() {
        return Err(RlhfError::Prompt {
            origin: row.origin.clone(),
            message: "the prompt is empty".into(),
            hint: Some("mend that row, or delete it".into()),
        });
    }
    let PromptRow { fields, origin, source, .. } = row;
    Ok(Prompt { ids, text, question, fields: fields.clone(), origin: origin.clone(), source: source.clone() })
}

fn is_blank(message: &Message) -> bool {
    message.content.as_str().trim().is_empty() && !message.extra.contains_key("tool_calls")
}

/// Whether every prompt's row has the fields that a reward needs, before the first response is sampled.
///
/// # Errors
/// [`RlhfError::Prompt`] for the first that has not, with its file and line.
pub fn check_rewards(prompts: &[Prompt], reward: &dyn Reward) -> Result<()> {
    for prompt in prompts {
        reward.check_fields(&prompt.fields).map_err(|error| RlhfError::Prompt {
            origin: prompt.origin.clone(),
            hint: error.hint(),
            message: error.to_string(),
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reward::build;

    /// One token per character; `Z` is refused, and plain text begins with token 1.
    struct Characters;

    impl Encode for Characters {
        fn encode(&self, text: &str) -> std::result::Result<Vec<i64>, String> {
            match text.contains('Z') {
                true => Err("cannot encode 'Z'".into()),
                false => Ok(text.chars().map(|c| i64::from(u32::from(c))).collect()),
            }
        }
        fn decode(&self, token_ids: &[i64]) -> String {
            token_ids.iter().filter_map(|&id| char::from_u32(u32::try_from(id).ok()?)).collect()
        }
        fn render(&self, messages: &[Message], _: Option<&Value>, open: bool) -> std::result::Result<String, String> {
            if messages.iter().any(|message| message.role == "tool") {
                return Err("no tools here".into());
            }
            let turns: String = messages.iter().map(|m| format!("<{}|{}>", m.role, m.content.as_str())).collect();
            Ok(turns + if open { "<assistant|" } else { "" })
        }
        fn stop_ids(&self) -> &[i64] {
            &[62]
        }
        fn bos_id(&self) -> Option<i64> {
            Some(1)
        }
    }

    fn rows(lines: &[&str]) -> Vec<PromptRow> {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("prompts.jsonl");
        std::fs::write(&path, lines.join("\n")).expect("write");
        read_prompts(&[path], &ReadOptions::default()).expect("reads")
    }

    fn encode(lines: &[&str], longest: Option<usize>, room: usize) -> Result<Vec<Prompt>> {
        encode_prompts(&rows(lines), &Characters, longest, room)
    }

    const CHAT: &str = r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q"}],"answer":3}"#;

    #[test]
    fn turns_are_rendered_with_the_generation_prompt_and_texts_stand_as_they_are() {
        let prompts = encode(&[CHAT, r#"{"prompt":"ab"}"#], None, 100).expect("fit");
        assert_eq!(prompts[0].text, "<system|s><user|q><assistant|");
        assert_eq!(prompts[0].ids, Characters.encode(&prompts[0].text).expect("encodes"));
        assert_eq!((prompts[0].question.as_str(), &prompts[0].fields["answer"]), ("q", &Value::from(3)));
        assert_eq!((prompts[1].ids.as_slice(), prompts[1].text.as_str()), ([1, 97, 98].as_slice(), "ab"));
        assert_eq!((prompts[1].question.as_str(), prompts[1].source.as_str()), ("ab", "prompts"));
    }

    #[test]
    fn empty_prompts_are_named() {
        let blank_turn = r#"{"messages":[{"role":"user","content":"  "}]}"#;
        for empty in [r#"{"prompt":""}"#, r#"{"prompt":" \n"}"#, blank_turn] {
            let error = encode(&[r#"{"prompt":"a"}"#, empty], None, 100).expect_err(empty);
            assert!(error.to_string().ends_with("prompts.jsonl:2: the prompt is empty"), "{error}");
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn prompts_without_room_are_an_error_and_longer_ones_than_wanted_are_left_out() {
        let lines = [r#"{"prompt":"a"}"#, r#"{"prompt":"abc"}"#, r#"{"prompt":"abcdef"}"#];
        assert_eq!(encode(&lines, None, 7).expect("all fit").len(), 3);
        let error = encode(&lines, None, 3).expect_err("two do not fit");
        let text = error.to_string();
        assert!(
            text.contains("prompts.jsonl:2: the prompt has 4 tokens") && text.contains("holds 3 (2 such"),
            "{text}"
        );
        assert!(error.hint().expect("a hint").contains("max_prompt_tokens=3"));
        assert_eq!(encode(&lines, Some(4), 4).expect("the last is left out").len(), 2);
        assert_eq!(encode(&lines, Some(3), 4).expect("two are left out").len(), 1);
        let error = encode(&lines, Some(1), 4).expect_err("nothing left");
        assert!(error.to_string().contains("all 3 rows were dropped: 3 over 1 tokens"), "{error}");
        assert!(encode(&lines, None, 0).expect_err("no room").hint().expect("a hint").contains("shorten"));
    }

    #[test]
    fn refusals_of_tokenizer_and_template_name_the_row() {
        let error = encode(&[r#"{"prompt":"a"}"#, r#"{"prompt":"Z"}"#], None, 9).expect_err("refused").to_string();
        assert!(error.ends_with("prompts.jsonl:2: tokenizing failed: cannot encode 'Z'"), "{error}");
        let error = encode(&[r#"{"prompt":{"role":"tool","content":"3"}}"#], None, 9).expect_err("refused").to_string();
        assert!(error.ends_with("prompts.jsonl:1: the chat template failed: no tools here"), "{error}");
    }

    #[test]
    fn rows_without_what_a_reward_needs_are_found_before_the_run() {
        let specs = serde_json::from_str::<Vec<_>>(r#"[{"type":"number"}]"#).expect("a list");
        let reward = build(&specs, &mut |_| unreachable!("no model")).expect("good");
        let prompts = encode(&[CHAT, r#"{"prompt":"a","solution":1}"#], None, 100).expect("fit");
        assert!(check_rewards(&prompts[..1], &reward).is_ok());
        let error = check_rewards(&prompts, &reward).expect_err("the second has no answer");
        let text = error.to_string();
        assert!(text.contains("prompts.jsonl:2: reward `number`: its row has no `answer`, it has `prompt`"), "{text}");
        assert!(error.hint().expect("a hint").contains("answer_field"));
    }
}
