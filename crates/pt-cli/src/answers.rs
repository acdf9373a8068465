//! A model's answers to held-out prompts, for reports.

use crate::commands::generate::{prompt_ids, split_last_answer};
use crate::talk;
use anyhow::Result;
use pt_model::{CausalLm, GenerateConfig, Message, Sites, check_prompt, generate};
use pt_train::data::{Encode, Judgement, Row, RowContent, Text};
use pt_train::encoder::ModelEncoder;
use std::rc::Rc;

/// A held-out prompt and the answer that its row gives.
pub(crate) struct Question {
    pub(crate) token_ids: Vec<i64>,
    pub(crate) prompt: String,
    pub(crate) expected: String,
}

/// About `count` questions, evenly spaced over the rows that ask one and leave room for an answer.
pub(crate) fn questions(
    rows: &[&Row],
    count: usize,
    encoder: &ModelEncoder<'_>,
    model: &CausalLm,
    sites: &dyn Sites,
) -> Result<Vec<Question>> {
    let mut questions = Vec::new();
    for number in 0..count.min(rows.len()) {
        let row = rows[number * rows.len() / count.min(rows.len())];
        let row = row.with_explicit_prompt();
        let Some((prompt, expected)) = texts(&row.content).filter(|(prompt, _)| !prompt.is_empty()) else { continue };
        let token_ids = prompt_ids(&row, encoder)?;
        if check_prompt(model, &token_ids, sites).is_ok() {
            questions.push(Question { token_ids, prompt, expected });
        }
    }
    Ok(questions)
}

/// What a row asks and the answer it gives, as a reader wants to see them.
fn texts(content: &RowContent) -> Option<(String, String)> {
    let last = |messages: &[Message]| messages.last().map(|message| message.content.as_str().to_string());
    let shown = |text: &Text| match text {
        Text::Plain(text) => Some(text.clone()),
        Text::Chat(messages) => last(messages),
    };
    match content {
        RowContent::Chat { messages, .. } => {
            let (before, answer) = split_last_answer(messages);
            Some((last(before)?, answer?.content.as_str().to_string()))
        }
        RowContent::Completion { prompt, completion, .. } => Some((shown(prompt)?, shown(completion)?)),
        RowContent::Preference { prompt: Some(prompt), completions, judgement, .. } => {
            let best = match judgement {
                Judgement::Ranks { ranks, .. } => ranks.iter().position(|rank| *rank == 0)?,
                Judgement::Labels(labels) => labels.iter().position(|is_desirable| *is_desirable)?,
            };
            Some((shown(prompt)?, shown(&completions[best])?))
        }
        _ => None,
    }
}

/// Greedy answers, in order.
pub(crate) fn answers(
    model: &CausalLm,
    sites: &Rc<dyn Sites>,
    encoder: &ModelEncoder<'_>,
    prompts: &[Vec<i64>],
    max_new_tokens: usize,
    what: &str,
) -> Result<Vec<String>> {
    let config = GenerateConfig { max_new_tokens, stop_ids: encoder.stop_ids().to_vec(), ..Default::default() };
    let mut work = talk::Work::new(what, prompts.len(), "prompts");
    let (mut answers, mut num_tokens) = (Vec::new(), 0);
    for batch in prompts.chunks(16) {
        let rows = generate(model, Some(encoder.tokenizer), batch, &config, sites, |_, _| {
            num_tokens += 1;
            work.note(format!("{num_tokens} tokens"));
            true
        })?;
        answers.extend(rows.into_iter().map(|row| row.text.unwrap_or_default().trim().to_string()));
        work.set(answers.len());
    }
    work.finish();
    Ok(answers)
}
