//! The fields of rows that judge completions.

use serde_json::{Map, Value};

use super::formats::{
    RowContent, Text, field_error, names, parse_messages, parse_sharegpt, sharegpt_role, suggest_form, text_value,
};
use super::preferences::{Judgement, Scores, dense_ranks};
use super::{Message, Row};
use crate::error::{Origin, Result, TrainError};

/// The forms that hold a judgement, for messages.
const FORMS: &str = "`chosen`, `rejected`; `completions` with `ranks` or `scores`; or `prompt`, `completion`, `label`";

/// The content of a row that judges completions; `None` where nothing in it says so.
///
/// With `is_wanted`, `label` beside one completion is read as its judgement, and a row that judges nothing is an error.
pub(super) fn parse_preference(
    fields: &Map<String, Value>,
    tools: Option<Value>,
    is_wanted: bool,
    origin: &Origin,
) -> Result<Option<RowContent>> {
    let has = |name: &str| fields.contains_key(name);
    let (prompt, completions, judgement) = if has("chosen") && has("rejected") {
        let sides = ["chosen", "rejected"].map(|name| turn_value(&fields[name], name, origin));
        let [chosen, rejected] = sides;
        let scores = number(fields, "margin", origin)?.map(Scores::of_margin);
        (shared_prompt(fields, origin)?, vec![chosen?, rejected?], Judgement::Ranks { ranks: vec![0, 1], scores })
    } else if has("completions") && (has("ranks") || has("scores")) {
        let completions = completion_list(&fields["completions"], origin)?;
        let scores = numbers(fields, "scores", completions.len(), origin)?;
        let ranks = match numbers(fields, "ranks", completions.len(), origin)? {
            Some(ranks) => dense_ranks(&ranks),
            None => dense_ranks(&scores.iter().flatten().map(|score| -score).collect::<Vec<_>>()),
        };
        let scores = scores.map(|scores| scores.into_iter().collect());
        (shared_prompt(fields, origin)?, completions, Judgement::Ranks { ranks, scores })
    } else if is_wanted && has("label") && (has("completion") || has("messages") || has("conversations")) {
        let (prompt, completion) = labelled_turn(fields, origin)?;
        let Value::Bool(label) = fields["label"] else {
            return Err(field_error(origin, "label", &fields["label"], "true (desirable) or false"));
        };
        (Some(prompt), vec![completion], Judgement::Labels(vec![label]))
    } else if is_wanted {
        return Err(TrainError::MissingField {
            origin: origin.clone(),
            found: names(fields),
            suggestion: suggestion(fields),
            expected: FORMS.into(),
        });
    } else {
        return Ok(None);
    };
    same_kind(&prompt, &completions, fields, origin)?;
    let weight = number(fields, "weight", origin)?.unwrap_or(1.0);
    if weight < 0.0 {
        return Err(field_error(origin, "weight", &fields["weight"], "a number of at least 0"));
    }
    Ok(Some(RowContent::Preference { prompt, completions, judgement, weight, tools }))
}

/// `prompt`, or the ShareGPT turns that precede both sides.
fn shared_prompt(fields: &Map<String, Value>, origin: &Origin) -> Result<Option<Text>> {
    match fields.get("prompt").filter(|prompt| !prompt.is_null()) {
        Some(prompt) => text_value(prompt, "prompt", origin).map(Some),
        None if fields.contains_key("conversations") => parse_sharegpt(fields, origin).map(Text::Chat).map(Some),
        None => Ok(None),
    }
}

/// A side: text, messages, one message, or one ShareGPT turn.
fn turn_value(value: &Value, name: &str, origin: &Origin) -> Result<Text> {
    match (value.get("from").and_then(Value::as_str), value.get("value").and_then(Value::as_str)) {
        (Some(from), Some(text)) => match sharegpt_role(from) {
            Some(role) => Ok(Text::Chat(vec![Message::new(role, text)])),
            None => Err(field_error(origin, &format!("{name}.from"), &value["from"], "human, gpt, system or tool")),
        },
        _ => text_value(value, name, origin),
    }
}

fn completion_list(value: &Value, origin: &Origin) -> Result<Vec<Text>> {
    match value {
        Value::Array(list) if list.len() >= 2 => {
            let place = |index: usize| format!("completions[{index}]");
            list.iter().enumerate().map(|(index, item)| turn_value(item, &place(index), origin)).collect()
        }
        other => Err(field_error(origin, "completions", other, "a list of at least two")),
    }
}

/// The prompt and the judged completion of an unpaired row; in a conversation that is its last turn.
fn labelled_turn(fields: &Map<String, Value>, origin: &Origin) -> Result<(Text, Text)> {
    if let Some(completion) = fields.get("completion") {
        let prompt = fields.get("prompt").unwrap_or(&Value::Null);
        return Ok((text_value(prompt, "prompt", origin)?, text_value(completion, "completion", origin)?));
    }
    let (name, mut messages) = match fields.get("messages") {
        Some(messages) => ("messages", parse_messages(messages, "messages", origin)?),
        None => ("conversations", parse_sharegpt(fields, origin)?),
    };
    match messages.pop() {
        Some(last) if last.role == "assistant" && !messages.is_empty() => {
            Ok((Text::Chat(messages), Text::Chat(vec![last])))
        }
        _ => Err(field_error(origin, name, &fields[name], "turns that end with the assistant's")),
    }
}

fn same_kind(prompt: &Option<Text>, completions: &[Text], fields: &Map<String, Value>, origin: &Origin) -> Result<()> {
    let is_chat = |text: &Text| matches!(text, Text::Chat(_));
    let expected = if prompt.is_some() { "of the same kind as `prompt`" } else { "of the same kind as the others" };
    let kind = prompt.as_ref().or(completions.first()).is_some_and(is_chat);
    let Some(odd) = completions.iter().position(|text| is_chat(text) != kind) else { return Ok(()) };
    let (name, value) = if fields.contains_key("completions") && !fields.contains_key("chosen") {
        (format!("completions[{odd}]"), &fields["completions"][odd])
    } else {
        let name = if fields.contains_key("chosen") { ["chosen", "rejected"][odd] } else { "completion" };
        (name.to_owned(), &fields[name])
    };
    Err(field_error(origin, &name, value, expected))
}

fn number(fields: &Map<String, Value>, name: &str, origin: &Origin) -> Result<Option<f64>> {
    match fields.get(name).filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(value) => finite(value).map(Some).ok_or_else(|| field_error(origin, name, value, "a finite number")),
    }
}

fn numbers(fields: &Map<String, Value>, name: &str, count: usize, origin: &Origin) -> Result<Option<Vec<f64>>> {
    let value = match fields.get(name).filter(|value| !value.is_null()) {
        None => return Ok(None),
        Some(value) => value,
    };
    let Value::Array(list) = value else {
        return Err(field_error(origin, name, value, "a list of numbers"));
    };
    if list.len() != count {
        let found = format!("a list of {} for {count} completions", list.len());
        let expected = "one number for each of `completions`";
        return Err(TrainError::Field { origin: origin.clone(), field: name.to_owned(), found, expected });
    }
    let number = |(index, item): (usize, &Value)| {
        finite(item).ok_or_else(|| field_error(origin, &format!("{name}[{index}]"), item, "a finite number"))
    };
    list.iter().enumerate().map(number).collect::<Result<_>>().map(Some)
}

fn finite(value: &Value) -> Option<f64> {
    value.as_f64().filter(|number| number.is_finite())
}

/// What would make a judgement of the fields at hand.
fn suggestion(fields: &Map<String, Value>) -> String {
    let has = |name: &str| fields.contains_key(name);
    match () {
        () if has("chosen") => "each `chosen` needs a `rejected` beside it: --set data.columns.rejected=YOURS".into(),
        () if has("rejected") => "each `rejected` needs a `chosen` beside it: --set data.columns.chosen=YOURS".into(),
        () if has("completions") => "`completions` need `ranks` (0 the best) or `scores` (higher is better)".into(),
        () if has("completion") || has("messages") => {
            "a row with one completion needs a `label`, true or false; rows without a judgement are for `pt sft`".into()
        }
        () => suggest_form(fields),
    }
}

impl Row {
    /// What the prompt is, as one text that is equal for equal prompts; empty for forms that have none of their own.
    pub fn prompt_key(&self) -> String {
        let key = |prompt: &Text| match prompt {
            Text::Plain(text) => text.clone(),
            Text::Chat(messages) => serde_json::to_string(messages).unwrap_or_default(),
        };
        match &self.content {
            RowContent::Completion { prompt, .. } | RowContent::Prompt { prompt, .. } => key(prompt),
            RowContent::Preference { prompt, completions, .. } => {
                key(&super::preferences::explicit(prompt.as_ref(), completions).0)
            }
            RowContent::Chat { messages, .. } => {
                let last = messages.iter().rposition(|message| message.role == "assistant").unwrap_or(messages.len());
                key(&Text::Chat(messages[..last].to_vec()))
            }
            RowContent::Text(_) => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::formats::{ReadOptions, read_source};
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn read(row: &Value) -> Result<RowContent> {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, row.to_string()).expect("write");
        let options = ReadOptions { preferences: true, ..ReadOptions::default() };
        Ok(read_source(&path, "rows", &options)?.remove(0).content)
    }

    fn judged(row: &Value) -> (Judgement, f64) {
        match read(row).expect("a good row") {
            RowContent::Preference { judgement, weight, .. } => (judgement, weight),
            other => panic!("{other:?}"),
        }
    }

    fn ranks(ranks: &[u32], scores: Option<&[f64]>) -> Judgement {
        Judgement::Ranks { ranks: ranks.into(), scores: scores.map(Scores::from) }
    }

    /// The message after the row's place, and the hint.
    fn fault(row: &Value) -> (String, String) {
        let error = read(row).expect_err("a bad row");
        let text = error.to_string();
        let (_, message) = text.split_once("rows.jsonl:1: ").expect("the row is named");
        (message.to_owned(), error.hint().expect("a hint"))
    }

    #[test]
    fn pairs_lists_and_labels_are_read_with_margins_and_weights() {
        let pair = json!({"prompt": "p", "chosen": "a", "rejected": "b"});
        assert_eq!(judged(&pair), (ranks(&[0, 1], None), 1.0));
        let pair = json!({"chosen": "pa", "rejected": "pb", "margin": -0.5, "weight": 2, "prompt": null});
        let margin = Judgement::Ranks { ranks: vec![0, 1], scores: Some(Scores::of_margin(-0.5)) };
        assert_eq!(judged(&pair), (margin, 2.0));
        let list = json!({"prompt": "p", "completions": ["a", "b", "c"], "ranks": [3, 1.5, 1.5]});
        assert_eq!(judged(&list), (ranks(&[1, 0, 0], None), 1.0));
        let list = json!({"prompt": "p", "completions": ["a", "b", "c"], "scores": [0.5, 0.9, 0.5]});
        assert_eq!(judged(&list), (ranks(&[1, 0, 1], Some(&[0.5, 0.9, 0.5])), 1.0));
        let row = json!({"prompt": "p", "completion": "a", "label": false});
        assert_eq!(judged(&row), (Judgement::Labels(vec![false]), 1.0));
    }

    #[test]
    fn messages_and_sharegpt_turns_are_read_too() {
        let user = json!({"role": "user", "content": "q"});
        let answer = json!({"role": "assistant", "content": "a"});
        let turn = |value: &Value| text_value(value, "x", &origin()).expect("messages");
        let prompt_of = |row: &Value| match read(row).expect("a good row") {
            RowContent::Preference { prompt, completions, .. } => (prompt, completions),
            other => panic!("{other:?}"),
        };
        let expected = (Some(turn(&json!([user]))), vec![turn(&json!([answer])); 2]);
        assert_eq!(prompt_of(&json!({"prompt": [user], "chosen": [answer], "rejected": answer})), expected);
        let from = json!({"from": "gpt", "value": "a"});
        let conversations = json!([{"from": "human", "value": "q"}]);
        assert_eq!(prompt_of(&json!({"conversations": conversations, "chosen": from, "rejected": from})), expected);
        assert_eq!(prompt_of(&json!({"prompt": user, "completions": [answer, [answer]], "ranks": [0, 1]})), expected);
        let unpaired = (expected.0, vec![turn(&answer)]);
        assert_eq!(prompt_of(&json!({"messages": [user, answer], "label": true})), unpaired);
        let row = json!({"prompt": [user], "completion": [answer], "label": true});
        assert_eq!(prompt_of(&row), unpaired);
    }

    fn origin() -> Origin {
        Origin { path: "rows.jsonl".into(), position: 1, is_line: true }
    }

    #[test]
    fn faults_name_field_value_and_what_was_expected() {
        let message = |row: Value| fault(&row).0;
        assert_eq!(
            message(json!({"prompt": "p", "completions": ["a"], "ranks": [0]})),
            r#"`completions` is ["a"], expected a list of at least two"#
        );
        assert_eq!(
            message(json!({"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1, 2]})),
            "`ranks` is a list of 3 for 2 completions, expected one number for each of `completions`"
        );
        assert_eq!(
            message(json!({"prompt": "p", "completions": ["a", "b"], "scores": [0, "1"]})),
            r#"`scores[1]` is "1", expected a finite number"#
        );
        assert_eq!(
            message(json!({"prompt": "p", "completion": "a", "label": 1})),
            "`label` is 1, expected true (desirable) or false"
        );
        let pair = |name: &str, value: Value| {
            let mut row = json!({"prompt": "p", "chosen": "a", "rejected": "b"});
            row[name] = value;
            message(row)
        };
        assert_eq!(pair("margin", json!("NaN")), r#"`margin` is "NaN", expected a finite number"#);
        assert_eq!(pair("weight", json!(-1)), "`weight` is -1, expected a number of at least 0");
        assert_eq!(
            pair("rejected", Value::Null),
            "`rejected` is missing or null, expected a string or a list of messages"
        );
        let chat = json!([{"role": "assistant", "content": "b"}]);
        assert!(pair("rejected", chat).ends_with("expected of the same kind as `prompt`"));
        let row = json!({"messages": [{"role": "user", "content": "q"}], "label": true});
        assert!(message(row).ends_with("expected turns that end with the assistant's"));
    }

    #[test]
    fn a_row_that_judges_nothing_is_told_what_it_lacks() {
        let (message, hint) = fault(&json!({"prompt": "p", "chosen": "a"}));
        assert_eq!(message, format!("row has the fields `prompt`, `chosen`, expected {FORMS}"));
        assert_eq!(hint, "each `chosen` needs a `rejected` beside it: --set data.columns.rejected=YOURS");
        assert!(fault(&json!({"prompt": "p", "completions": ["a", "b"]})).1.contains("need `ranks`"));
        assert!(fault(&json!({"prompt": "p", "completion": "a"})).1.contains("needs a `label`"));
        // A NaN is no JSON, and an infinite number no number.
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("rows.jsonl");
        for margin in ["NaN", "1e999"] {
            std::fs::write(&path, format!(r#"{{"chosen":"a","rejected":"b","margin":{margin}}}"#)).expect("write");
            let error = read_source(&path, "rows", &ReadOptions::default()).expect_err("no number");
            assert!(matches!(error, TrainError::Json { .. }), "{error}");
        }
    }

    #[test]
    fn without_the_option_a_label_says_nothing() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, r#"{"prompt":"p","completion":"a","label":7}"#).expect("write");
        let rows = read_source(&path, "rows", &ReadOptions::default()).expect("as before");
        assert_eq!(rows[0].content.form(), "prompt/completion");
    }

    proptest! {
        #[test]
        fn a_list_of_scores_ranks_as_sorting_does(scores in prop::collection::vec(-3i32..3, 2..8)) {
            let row = json!({"prompt": "p", "completions": vec!["a"; scores.len()], "scores": scores});
            let (Judgement::Ranks { ranks, .. }, _) = judged(&row) else { panic!("ranks") };
            for (i, j) in (0..scores.len()).flat_map(|i| (0..scores.len()).map(move |j| (i, j))) {
                prop_assert_eq!(ranks[i].cmp(&ranks[j]), scores[j].cmp(&scores[i]));
            }
            prop_assert_eq!(ranks.iter().min(), Some(&0));
        }

        #[test]
        fn no_value_in_any_field_panics(
            value in prop_oneof![Just(json!(null)), Just(json!([])), Just(json!({})), Just(json!([[], {}])), Just(json!("x")),
                Just(json!(-1.5)), Just(json!(true)), Just(json!([{"role": 1}])), Just(json!({"from": "gpt", "value": "x"}))],
            field in 0usize..8,
            form in 0usize..4,
        ) {
            let mut row = [
                json!({"prompt": "p", "chosen": "a", "rejected": "b"}),
                json!({"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1], "scores": [1, 0]}),
                json!({"prompt": "p", "completion": "a", "label": true}),
                json!({"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"}),
            ][form].clone();
            let names = ["prompt", "chosen", "rejected", "completions", "ranks", "scores", "label", "conversations"];
            row[names[field]] = value;
            if let Ok(RowContent::Preference { completions, judgement, weight, .. }) = read(&row) {
                let judged = match judgement {
                    Judgement::Ranks { ranks, .. } => ranks.len(),
                    Judgement::Labels(labels) => labels.len(),
                };
                prop_assert_eq!(completions.len(), judged);
                prop_assert!(weight >= 0.0);
            }
        }
    }
}
