//! Rows to prompt groups: which tokens there are, and which of them are trained.
//!
//! # Tokenization
//! The whole rendering is tokenized once, and a trained span begins where the tokens of its context (tokenized
//! alone) stop being a prefix of the whole. This is what TRL 1.16 does for prompt and completion rows, applied
//! to each assistant turn of a conversation: where a token merges across the boundary, that token is trained
//! and the end of the context is not seen on its own. Tokenizing the parts separately would give other ids
//! than the model meets at inference wherever text is generated without a special token at the boundary.
//!
//! # What is trained
//! An assistant turn from after the generation prompt to the end of its rendering, so the token that ends the
//! turn is a label, and so is a newline that the template puts after it (TRL trains it too; generation stops
//! before it, which costs one easy token). Plain completions and plain text get the first stop id appended
//! when they do not end in a stop id.
//!
//! Spans come from positions, never from ids: a pad or stop token that happens inside a prompt stays untrained.

use std::collections::BTreeMap;

use pt_model::{Completion, PromptGroup};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Encode, Message, ReadOptions, Row, RowContent, Text};
use crate::error::{Origin, Result, TrainError};

/// What becomes of a row longer than `max_length` tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TooLong {
    /// The run does not start.
    Refuse,
    /// The row is left out and counted.
    #[default]
    Drop,
    /// Tokens are cut from the start of the prompt; a completion too long by itself counts as nothing to train.
    TruncateLeft,
    /// Tokens are cut from the end; a row left without a label counts as nothing to train.
    TruncateRight,
}

/// Which assistant turns of a conversation are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrainTurns {
    /// Every one.
    #[default]
    All,
    /// The last one: for templates that render earlier turns differently once more follow.
    Last,
}

/// What becomes of a row that would train nothing; of preferences, that is also one that prefers nothing: both sides
/// equal, or all ranks tied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnEmpty {
    /// The run does not start.
    #[default]
    Refuse,
    /// The row is left out and counted.
    Drop,
}

/// How rows become groups. The part of a training configuration named `data`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Longest row in tokens, prompt and completion together.
    pub max_length: usize,
    /// What becomes of longer rows: `refuse`, `drop`, `truncate_left`, `truncate_right`.
    pub too_long: TooLong,
    /// What becomes of rows with nothing to train (or with preferences between equals): `refuse`, `drop`.
    pub on_empty: OnEmpty,
    /// Which assistant turns are trained: `all`, `last`.
    pub train_turns: TrainTurns,
    /// Refuse a source in which no row trains a token that ends a turn.
    pub require_stop: bool,
    /// Leave out rows whose tokens have been seen before.
    pub drop_duplicates: bool,
    /// Our field name to the file's, e.g. `prompt: question`.
    pub columns: BTreeMap<String, String>,
    /// Take plain prompts as a user's turn and what follows them as the assistant's, so that the chat template renders
    /// them.
    pub as_chat: bool,
    /// Read at most this many rows of each source.
    pub max_rows: Option<usize>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            max_length: 1024,
            too_long: TooLong::default(),
            on_empty: OnEmpty::default(),
            train_turns: TrainTurns::default(),
            require_stop: true,
            drop_duplicates: false,
            columns: BTreeMap::new(),
            as_chat: false,
            max_rows: None,
        }
    }
}

impl DataConfig {
    /// The part that reading files needs.
    pub fn read_options(&self) -> ReadOptions {
        ReadOptions {
            columns: self.columns.clone(),
            as_chat: self.as_chat,
            max_rows: self.max_rows,
            ..ReadOptions::default()
        }
    }
}

/// The group of a row for supervised training: the prompt is everything before the first trained token, the one
/// completion is the rest with its labels. Nothing is truncated here; see [`fit`].
///
/// A conversation without an assistant turn, or an empty completion, gives a group without labels; the checks
/// decide what becomes of it.
///
/// # Errors
/// [`TrainError::Encode`] when the tokenizer or the template refuses, [`TrainError::NotPrefixPreserving`],
/// [`TrainError::WrongForm`] for a row of preferences or of a prompt alone.
pub fn row_to_group(row: &Row, encoder: &dyn Encode, train_turns: TrainTurns) -> Result<PromptGroup> {
    let row_encoder = RowEncoder { encoder, origin: &row.origin };
    match &row.content {
        RowContent::Chat { messages, tools } => row_encoder.conversation(messages, tools.as_ref(), train_turns),
        RowContent::Completion { prompt, completion, tools } => {
            row_encoder.completion(prompt, completion, tools.as_ref())
        }
        RowContent::Text(text) => {
            let mut token_ids = row_encoder.plain_tokens(text)?;
            // As below: a stop token alone would hide that there is nothing to train.
            if !text.is_empty() {
                row_encoder.append_stop(&mut token_ids);
            }
            let end = token_ids.len();
            Ok(labelled(token_ids, &[(0, end)]))
        }
        RowContent::Preference { .. } | RowContent::Prompt { .. } => Err(TrainError::WrongForm {
            origin: row.origin.clone(),
            found: row.content.form(),
            task: "supervised training",
        }),
    }
}

/// Encodes one row; errors carry its origin.
pub(super) struct RowEncoder<'a> {
    pub(super) encoder: &'a dyn Encode,
    pub(super) origin: &'a Origin,
}

impl RowEncoder<'_> {
    fn tokens(&self, text: &str) -> Result<Vec<i64>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        self.encoder.encode(text).map_err(|message| self.refused("tokenizing", message))
    }

    fn plain_tokens(&self, text: &str) -> Result<Vec<i64>> {
        if text.is_empty() {
            return Ok(self.encoder.bos_id().into_iter().collect());
        }
        self.encoder.encode_plain(text).map_err(|message| self.refused("tokenizing", message))
    }

    fn render(&self, messages: &[Message], tools: Option<&Value>, add_generation_prompt: bool) -> Result<String> {
        let rendered = self.encoder.render(messages, tools, add_generation_prompt);
        rendered.map_err(|message| self.refused("the chat template", message))
    }

    fn refused(&self, what: &'static str, message: String) -> TrainError {
        TrainError::Encode { origin: self.origin.clone(), what, message }
    }

    fn append_stop(&self, token_ids: &mut Vec<i64>) {
        let stop_ids = self.encoder.stop_ids();
        if let (Some(last), Some(stop)) = (token_ids.last(), stop_ids.first())
            && !stop_ids.contains(last)
        {
            token_ids.push(*stop);
        }
    }

    /// The sequence of a prompt and what follows it; the boundary is as the module says.
    pub(super) fn completion(&self, prompt: &Text, completion: &Text, tools: Option<&Value>) -> Result<PromptGroup> {
        let (context, whole) = match (prompt, completion) {
            (Text::Plain(prompt), Text::Plain(completion)) => {
                let context = self.plain_tokens(prompt)?;
                let mut whole = self.plain_tokens(&format!("{prompt}{completion}"))?;
                // An empty completion stays empty: a stop token alone would hide the fault.
                if !completion.is_empty() {
                    self.append_stop(&mut whole);
                }
                (context, whole)
            }
            (Text::Chat(prompt), Text::Chat(completion)) => {
                let turns: Vec<Message> = prompt.iter().chain(completion).cloned().collect();
                let full = self.render(&turns, tools, false)?;
                let context = self.render(prompt, tools, true)?;
                self.check_prefix(&context, &full, prompt.len())?;
                let is_empty = completion.iter().all(is_blank);
                let context = self.tokens(&context)?;
                let whole = if is_empty { context.clone() } else { self.tokens(&full)? };
                (context, whole)
            }
            _ => {
                return Err(TrainError::Field {
                    origin: self.origin.clone(),
                    field: "completion".into(),
                    found: "text beside messages".into(),
                    expected: "of the same kind as `prompt`",
                });
            }
        };
        let start = common_prefix(&context, &whole);
        let end = whole.len();
        Ok(labelled(whole, &[(start, end)]))
    }

    fn conversation(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        train_turns: TrainTurns,
    ) -> Result<PromptGroup> {
        let mut turns: Vec<usize> = (0..messages.len()).filter(|&turn| messages[turn].role == "assistant").collect();
        // What follows the last assistant turn trains nothing and would only cost time.
        let messages = &messages[..turns.last().map_or(messages.len(), |turn| turn + 1)];
        let full = self.render(messages, tools, false)?;
        let whole = self.tokens(&full)?;
        if train_turns == TrainTurns::Last {
            turns = turns.split_off(turns.len().saturating_sub(1));
        }
        let mut spans = Vec::with_capacity(turns.len());
        for turn in turns.into_iter().filter(|&turn| !is_blank(&messages[turn])) {
            let before = self.render(&messages[..turn], tools, true)?;
            self.check_prefix(&before, &full, turn)?;
            let start = common_prefix(&self.tokens(&before)?, &whole);
            let end = if turn + 1 == messages.len() {
                whole.len()
            } else {
                let through = self.render(&messages[..=turn], tools, false)?;
                self.check_prefix(&through, &full, turn + 1)?;
                common_prefix(&self.tokens(&through)?, &whole)
            };
            spans.push((start, end));
        }
        Ok(labelled(whole, &spans))
    }

    fn check_prefix(&self, before: &str, full: &str, message: usize) -> Result<()> {
        if full.starts_with(before) {
            return Ok(());
        }
        let same = before
            .chars()
            .zip(full.chars())
            .take_while(|(one, other)| one == other)
            .map(|(one, _)| one.len_utf8())
            .sum();
        let excerpt = |text: &str| text[same..].chars().take(40).collect::<String>();
        Err(TrainError::NotPrefixPreserving {
            origin: self.origin.clone(),
            message,
            byte: same,
            before: excerpt(before),
            after: excerpt(full),
        })
    }
}

fn is_blank(message: &Message) -> bool {
    message.content.is_empty() && !message.extra.contains_key("tool_calls")
}

pub(super) fn common_prefix(one: &[i64], other: &[i64]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}

/// Splits a sequence at its first label. The first token of a sequence has nothing to be predicted from, so it
/// is context always.
fn labelled(token_ids: Vec<i64>, spans: &[(usize, usize)]) -> PromptGroup {
    let mut is_label = vec![false; token_ids.len()];
    for &(start, end) in spans {
        is_label[start.min(end)..end].fill(true);
    }
    if let Some(first) = is_label.first_mut() {
        *first = false;
    }
    let split = is_label.iter().position(|&label| label).unwrap_or(token_ids.len());
    let completion = Completion { token_ids: token_ids[split..].to_vec(), is_label: is_label[split..].to_vec() };
    PromptGroup { prompt: token_ids[..split].to_vec(), completions: vec![completion] }
}

/// What [`fit`] did to a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Short enough as it was.
    Whole(PromptGroup),
    /// Cut, with labels left in every completion.
    Cut(PromptGroup),
    /// Too long, and the policy says to leave it out.
    Dropped,
    /// Too long, and the policy's cut would leave a completion without a label.
    Emptied,
}

/// Applies the length policy; [`TooLong::Refuse`] drops here and the checks turn that into an error.
///
/// A cut never leaves a completion without a label: such a group is [`Fit::Emptied`] instead.
pub fn fit(group: PromptGroup, max_length: usize, policy: TooLong) -> Fit {
    let longest = group.longest_sequence();
    if longest <= max_length {
        return Fit::Whole(group);
    }
    let excess = longest - max_length;
    let mut cut = group;
    match policy {
        TooLong::Refuse | TooLong::Drop => return Fit::Dropped,
        TooLong::TruncateLeft => {
            // One token of context must stay for the first label to be predicted from.
            if excess >= cut.prompt.len() {
                return Fit::Emptied;
            }
            cut.prompt.drain(..excess);
        }
        TooLong::TruncateRight => {
            let room = max_length.saturating_sub(cut.prompt.len());
            for completion in &mut cut.completions {
                completion.token_ids.truncate(room);
                completion.is_label.truncate(room);
            }
        }
    }
    let each_is_trained = cut.completions.iter().all(|completion| completion.is_label.contains(&true));
    if each_is_trained { Fit::Cut(cut) } else { Fit::Emptied }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use std::path::PathBuf;

    /// One token per character, ChatML-like template; `Z` and anything outside ASCII is refused.
    pub(crate) struct Characters {
        /// Rewrites earlier assistant turns, as templates of reasoning models do.
        pub(crate) rewrites: bool,
        /// Leaves the end of turn out.
        pub(crate) endless: bool,
    }

    pub(crate) const CHARACTERS: Characters = Characters { rewrites: false, endless: false };

    impl Encode for Characters {
        fn encode(&self, text: &str) -> Result<Vec<i64>, String> {
            // "th" is one token (300), so that a merge across a boundary can be seen.
            let mut ids = Vec::new();
            for character in text.chars() {
                match (character, ids.last()) {
                    ('h', Some(&116)) => *ids.last_mut().expect("not empty") = 300,
                    (character, _) if character.is_ascii() && character != 'Z' => {
                        ids.push(i64::from(u32::from(character)))
                    }
                    _ => return Err(format!("cannot encode {character:?}")),
                }
            }
            Ok(ids)
        }
        fn decode(&self, token_ids: &[i64]) -> String {
            let text = |&id: &i64| if id == 300 { "th".to_owned() } else { char::from(id as u8).to_string() };
            token_ids.iter().map(text).collect()
        }
        fn render(
            &self,
            messages: &[Message],
            _: Option<&Value>,
            add_generation_prompt: bool,
        ) -> Result<String, String> {
            let mut text = String::new();
            for (index, message) in messages.iter().enumerate() {
                let role = message.role.chars().next().ok_or("empty role")?;
                let stays = !self.rewrites || index + 1 == messages.len() || message.role != "assistant";
                let content = if stays { message.content.as_str() } else { "*" };
                text.push_str(&format!("<{role}|{content}{}\n", if self.endless { "" } else { "$" }));
            }
            if add_generation_prompt {
                text.push_str("<a|");
            }
            Ok(text)
        }
        fn stop_ids(&self) -> &[i64] {
            &[36] // $
        }
    }

    pub(crate) fn row(content: RowContent, position: usize) -> Row {
        let origin = Origin { path: PathBuf::from("rows.jsonl"), position, is_line: true };
        Row { content, origin, source: "rows".into(), adapter: None }
    }

    pub(crate) fn plain(prompt: &str, completion: &str) -> RowContent {
        RowContent::Completion {
            prompt: Text::Plain(prompt.into()),
            completion: Text::Plain(completion.into()),
            tools: None,
        }
    }

    pub(crate) fn chat(turns: &[(&str, &str)]) -> RowContent {
        RowContent::Chat {
            messages: turns.iter().map(|(role, text)| Message::new(*role, *text)).collect(),
            tools: None,
        }
    }

    /// The whole sequence, and the sequence with unlabelled characters as dots.
    pub(crate) fn shown(group: &PromptGroup) -> (String, String) {
        let completion = &group.completions[0];
        let whole = CHARACTERS.decode(&group.prompt) + &CHARACTERS.decode(&completion.token_ids);
        let mut trained: String = ".".repeat(group.prompt.len());
        for (id, label) in completion.token_ids.iter().zip(&completion.is_label) {
            trained.push_str(&if *label { CHARACTERS.decode(&[*id]) } else { ".".into() });
        }
        (whole, trained)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;
    use proptest::prelude::*;

    fn group(content: RowContent) -> PromptGroup {
        row_to_group(&row(content, 1), &CHARACTERS, TrainTurns::All).expect("a good row")
    }

    #[test]
    fn a_plain_completion_gets_its_stop_token_once() {
        assert_eq!(shown(&group(plain("ab", "cd"))), ("abcd$".into(), "..cd$".into()));
        assert_eq!(shown(&group(plain("ab", "cd$"))), ("abcd$".into(), "..cd$".into()));
    }

    #[test]
    fn a_token_across_the_boundary_is_trained() {
        // The context alone is "a", "t"; the whole has "a", "th".
        let group = group(plain("at", "he"));
        assert_eq!(group.prompt, [97]);
        assert_eq!(group.completions[0].token_ids, [300, 101, 36]);
    }

    #[test]
    fn only_assistant_turns_are_trained_and_each_with_its_end() {
        let turns =
            [("system", "s"), ("user", "q"), ("assistant", "a1"), ("user", "r"), ("assistant", "b"), ("user", "tail")];
        let group = group(chat(&turns));
        let (whole, trained) = shown(&group);
        assert_eq!(whole, "<s|s$\n<u|q$\n<a|a1$\n<u|r$\n<a|b$\n");
        assert_eq!(trained, "...............a1$\n.........b$\n");
        let last = row_to_group(&row(chat(&turns), 1), &CHARACTERS, TrainTurns::Last).expect("a good row");
        assert_eq!(shown(&last).1, "............................b$\n");
    }

    #[test]
    fn a_rewriting_template_is_refused_with_the_place_and_last_turn_still_works() {
        let template = Characters { rewrites: true, endless: false };
        let row = row(chat(&[("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]), 7);
        let error = row_to_group(&row, &template, TrainTurns::All).expect_err("rewrites");
        assert!(matches!(error, TrainError::NotPrefixPreserving { message: 2, .. }), "{error}");
        assert!(error.hint().expect("a hint").contains("train_turns=last"));
        let group = row_to_group(&row, &template, TrainTurns::Last).expect("the last turn is stable");
        assert_eq!(shown(&group).1, ".....................b$\n");
    }

    #[test]
    fn text_is_trained_from_its_second_token() {
        assert_eq!(shown(&group(RowContent::Text("abc".into()))), ("abc$".into(), ".bc$".into()));
    }

    /// [`Characters`] with `^` put before plain text.
    struct Begun;

    impl Encode for Begun {
        fn encode(&self, text: &str) -> Result<Vec<i64>, String> {
            CHARACTERS.encode(text)
        }
        fn decode(&self, token_ids: &[i64]) -> String {
            CHARACTERS.decode(token_ids)
        }
        fn render(&self, messages: &[Message], tools: Option<&Value>, open: bool) -> Result<String, String> {
            CHARACTERS.render(messages, tools, open)
        }
        fn stop_ids(&self) -> &[i64] {
            CHARACTERS.stop_ids()
        }
        fn bos_id(&self) -> Option<i64> {
            Some(94) // ^
        }
    }

    #[test]
    fn plain_text_begins_with_the_token_that_the_tokenizer_asks_for_and_chat_with_its_template() {
        let shown = |content| shown(&row_to_group(&row(content, 1), &Begun, TrainTurns::All).expect("a good row"));
        assert_eq!(shown(RowContent::Text("abc".into())), ("^abc$".into(), ".abc$".into()));
        assert_eq!(shown(RowContent::Text("^abc".into())).0, "^abc$", "spelled out already");
        assert_eq!(shown(plain("ab", "cd")), ("^abcd$".into(), "...cd$".into()));
        assert_eq!(shown(plain("", "cd")), ("^cd$".into(), ".cd$".into()));
        assert!(shown(chat(&[("user", "q"), ("assistant", "a")])).0.starts_with("<u|"));
        for empty in [RowContent::Text(String::new()), plain("", ""), plain("ab", "")] {
            let group = row_to_group(&row(empty, 1), &Begun, TrainTurns::All).expect("a good row");
            assert_eq!(group.num_labels(), 0);
        }
    }

    #[test]
    fn rows_with_nothing_to_train_have_no_labels() {
        for content in [
            plain("ab", ""),
            chat(&[("user", "q")]),
            chat(&[("user", "q"), ("assistant", "")]),
            RowContent::Text("a$".chars().take(0).collect()),
        ] {
            assert_eq!(group(content).num_labels(), 0);
        }
    }

    #[test]
    fn tokenizer_errors_carry_the_row() {
        let error = row_to_group(&row(plain("Z", "a"), 4), &CHARACTERS, TrainTurns::All).expect_err("refused");
        assert_eq!(error.to_string(), "rows.jsonl:4: tokenizing failed: cannot encode 'Z'");
    }

    #[test]
    fn the_length_policies_keep_labels_or_drop() {
        let long = || group(plain("abcdef", "xyz")); // 6 + 4 tokens
        assert!(matches!(fit(long(), 10, TooLong::Drop), Fit::Whole(_)));
        assert_eq!(fit(long(), 9, TooLong::Drop), Fit::Dropped);
        let Fit::Cut(left) = fit(long(), 7, TooLong::TruncateLeft) else { panic!("room for it") };
        assert_eq!(shown(&left).0, "defxyz$".to_string());
        assert_eq!(fit(long(), 4, TooLong::TruncateLeft), Fit::Emptied);
        let Fit::Cut(right) = fit(long(), 7, TooLong::TruncateRight) else { panic!("room for it") };
        assert_eq!(shown(&right).1, "......x");
        assert_eq!(fit(long(), 6, TooLong::TruncateRight), Fit::Emptied);
    }

    proptest! {
        #[test]
        fn a_group_is_the_whole_rendering_and_trains_the_answers(texts in prop::collection::vec("[a-gt-y]{1,6}", 1..6)) {
            let roles = ["user", "assistant"];
            let turns: Vec<_> = texts.iter().enumerate().map(|(i, text)| (roles[i % 2], text.as_str())).collect();
            let group = group(chat(&turns));
            let used = if turns.len() > 1 { turns.len() / 2 * 2 } else { 1 };
            let messages: Vec<_> = turns[..used].iter().map(|(role, text)| Message::new(*role, *text)).collect();
            let (whole, trained) = shown(&group);
            prop_assert_eq!(whole, CHARACTERS.render(&messages, None, false).expect("renders"));
            let answers: String = turns[..used].iter().skip(1).step_by(2).map(|(_, text)| format!("{text}$\n")).collect();
            prop_assert_eq!(trained.replace('.', ""), answers);
        }

        #[test]
        fn a_fitted_group_is_short_and_trains_something(prompt in "[a-g]{1,20}", completion in "[a-g]{1,20}", max_length in 1usize..40) {
            for policy in [TooLong::Drop, TooLong::TruncateLeft, TooLong::TruncateRight] {
                if let Fit::Whole(group) | Fit::Cut(group) = fit(group(plain(&prompt, &completion)), max_length, policy) {
                    prop_assert!(group.num_tokens() <= max_length);
                    prop_assert!(group.num_labels() > 0);
                }
            }
        }
    }
}
