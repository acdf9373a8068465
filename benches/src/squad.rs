//! SQuAD's questions as short rows.

use anyhow::{Context, Result, ensure};
use pt_model::{Message, Pretrained, PromptGroup};
use pt_train::Origin;
use pt_train::data::{DataConfig, Row, RowContent, Text, row_to_group};
use pt_train::encoder::ModelEncoder;
use serde_json::Value;
use std::path::Path;

/// Which articles rows are taken from; no article is in two parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// To train on.
    Training,
    /// To choose settings by.
    Validation,
    /// To report on.
    HeldOut,
}

impl Part {
    /// The first articles are held out as `pt demo sft` has them; those after them are for validation.
    fn of(article: usize) -> Self {
        match article {
            0..7 => Self::HeldOut,
            7..12 => Self::Validation,
            _ => Self::Training,
        }
    }
}

/// `count` rows of a part as `pt demo sft` asks them, each with the sentence that holds the answer for its passage, so that a
/// row has at most `max_tokens` tokens; evenly from all articles, the same on every machine.
///
/// # Errors
/// When the file cannot be read, or holds too few such questions.
pub fn answer_rows(
    squad: &Path,
    pretrained: &Pretrained,
    part: Part,
    count: usize,
    max_tokens: usize,
) -> Result<Vec<PromptGroup>> {
    let text = std::fs::read(squad).with_context(|| format!("cannot read {}", squad.display()))?;
    let squad: Value = serde_json::from_slice(&text)?;
    let encoder = ModelEncoder::new(pretrained).context("the model carries no tokenizer")?;
    let articles = squad["data"].as_array().into_iter().flatten().enumerate();
    let mut by_article: Vec<_> =
        articles.filter(|(index, _)| Part::of(*index) == part).map(|(_, article)| questions(article)).collect();
    let mut rows = Vec::new();
    // One question of each article in turn, from one place after another: neighbours share a passage.
    for round in 0.. {
        let mut is_any_left = false;
        for questions in &mut by_article {
            if rows.len() == count {
                return Ok(rows);
            }
            if questions.is_empty() {
                continue;
            }
            is_any_left = true;
            let (prompt, answer) = questions.remove(round * 37 % questions.len());
            let group = encode(&prompt, &answer, &encoder)?;
            if group.num_tokens() <= max_tokens {
                rows.push(group);
            }
        }
        ensure!(is_any_left, "SQuAD has {} questions of at most {max_tokens} tokens, expected {count}", rows.len());
    }
    Ok(rows)
}

/// Prompts and answers of one article.
fn questions(article: &Value) -> Vec<(String, String)> {
    let list = |value: &Value, field: &str| value[field].as_array().cloned().unwrap_or_default();
    let mut found = Vec::new();
    for paragraph in list(article, "paragraphs") {
        let context = paragraph["context"].as_str().unwrap_or_default();
        for question in list(&paragraph, "qas") {
            let answer = &question["answers"][0];
            let (Some(text), Some(start)) = (answer["text"].as_str(), answer["answer_start"].as_u64()) else {
                continue;
            };
            let (passage, ask) = (sentence(context, start as usize, text), question["question"].as_str());
            let ask = ask.unwrap_or_default().trim();
            let prompt = format!("{passage}\n\nQuestion: {ask}\nAnswer with a few words taken from the text.");
            found.push((prompt, text.to_owned()));
        }
    }
    found
}

/// The sentence with the answer that begins at the character `start`.
fn sentence<'a>(context: &'a str, start: usize, answer: &str) -> &'a str {
    let byte = context.char_indices().nth(start).map_or(context.len(), |(byte, _)| byte);
    let (before, after) = context.split_at(byte);
    let begin = before.rfind(". ").map_or(0, |at| at + 2);
    let rest = after.get(answer.len()..).unwrap_or_default();
    let end = rest.find(". ").map_or(context.len(), |at| byte + answer.len() + at + 1);
    context[begin..end].trim()
}

fn encode(prompt: &str, answer: &str, encoder: &ModelEncoder<'_>) -> Result<PromptGroup> {
    let turn = |role: &str, text: &str| Text::Chat(vec![Message::new(role, text)]);
    let row = Row {
        source: "squad".into(),
        adapter: None,
        origin: Origin { path: "squad.json".into(), position: 0, is_line: false },
        content: RowContent::Completion {
            prompt: turn("user", prompt),
            completion: turn("assistant", answer),
            tools: None,
        },
    };
    Ok(row_to_group(&row, encoder, DataConfig::default().train_turns)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passage_is_cut_to_the_sentence_with_the_answer() {
        let text = "É here. The cat sat on the mat. It slept.";
        assert_eq!(sentence(text, 12, "cat"), "The cat sat on the mat.");
        assert_eq!(sentence(text, 35, "slept"), "It slept.");
        assert_eq!(sentence(text, 0, "É"), "É here.");
        assert_eq!(sentence("one sentence", 0, "one"), "one sentence");
    }
}
