//! How much of the answer a response has, and how little else.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::answer::{Normalization, answer_faults, row_answers, wrong_answer};
use super::{Fault, Reward, Sample, check};
use crate::error::Result;

/// A reward of 0 to 1: SQuAD's F1 of the response's words and those of the answer in the prompt's row, the best of them
/// where there are several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct F1Config {
    /// Name in metrics; null for `f1`.
    pub name: Option<String>,
    /// Factor of the score in the sum of rewards.
    pub weight: f64,
    /// Field of the prompt's row with the answer: a text, or a list of them, any of which will do.
    pub answer_field: String,
}

impl Default for F1Config {
    fn default() -> Self {
        Self { name: None, weight: 1.0, answer_field: "answer".into() }
    }
}

impl F1Config {
    /// Every fault, each naming its field, what it is and what was expected.
    pub fn faults(&self) -> Vec<String> {
        answer_faults(&self.answer_field, None)
    }
}

/// F1 of the words of two texts in SQuAD's normalization: 2·precision·recall / (precision + recall), words counted as
/// often as they stand in both. 1 for two texts without words. Rajpurkar et al. 2016,
/// <https://arxiv.org/abs/1606.05250>, the evaluation script of version 1.1.
pub fn token_f1(response: &str, answer: &str) -> f64 {
    let [given, wanted] = [response, answer].map(|text| Normalization::Squad.apply(text));
    let given: Vec<&str> = given.split_whitespace().collect();
    let mut left: Vec<&str> = wanted.split_whitespace().collect();
    let (num_given, num_wanted) = (given.len(), left.len());
    if num_given == 0 || num_wanted == 0 {
        return f64::from(num_given == num_wanted);
    }
    let mut num_same = 0.0;
    for word in given {
        if let Some(place) = left.iter().position(|wanted| *wanted == word) {
            left.swap_remove(place);
            num_same += 1.0;
        }
    }
    2.0 * num_same / (num_given + num_wanted) as f64
}

/// F1 with the answer; see [`F1Config`].
pub struct F1 {
    name: String,
    config: F1Config,
}

impl F1 {
    /// Under a name for metrics.
    ///
    /// # Errors
    /// [`RlhfError::Config`](crate::RlhfError::Config) with every fault of the configuration.
    pub fn new(name: &str, config: &F1Config) -> Result<Self> {
        check(name, config.faults())?;
        Ok(Self { name: name.to_owned(), config: config.clone() })
    }

    /// The answers of a row that will do.
    fn answers<'a>(&self, fields: &'a Map<String, Value>) -> std::result::Result<Vec<&'a str>, Fault> {
        let field = &self.config.answer_field;
        let text =
            |value: &'a Value| value.as_str().ok_or_else(|| wrong_answer(field, value, "a text, or a list of texts"));
        row_answers(fields, field)?.iter().map(text).collect()
    }
}

impl Reward for F1 {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
        let score = |(index, sample): (usize, &Sample<'_>)| {
            let answers = self.answers(sample.fields).map_err(|fault| fault.at_sample(&self.name, index, samples))?;
            Ok(answers.iter().map(|answer| token_f1(sample.response, answer)).fold(0.0, f64::max))
        };
        samples.iter().enumerate().map(score).collect()
    }

    fn check_fields(&self, fields: &Map<String, Value>) -> Result<()> {
        self.answers(fields).map(drop).map_err(|fault| fault.into_error(&self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn words_are_counted_as_often_as_both_have_them() {
        assert_eq!(token_f1("10th century.", "the 10th century"), 1.0);
        assert!((token_f1("in the 10th century", "10th century") - 0.8).abs() < 1e-12);
        // One of three words in common, given three times: 2·1 / (3 + 1).
        assert_eq!(token_f1("no no no", "no"), 0.5);
        assert_eq!(token_f1("France", "10th century"), 0.0);
        assert_eq!((token_f1("", "x"), token_f1("the", "a")), (0.0, 1.0));
    }

    #[test]
    fn the_best_of_several_answers_counts() {
        let mut reward = F1::new("f1", &F1Config::default()).expect("good");
        let row = r#"{"answer":["10th and 11th","the 10th century"]}"#;
        assert_eq!(scores(&mut reward, row, &["10th century", "France"]), [1.0, 0.0]);
    }

    #[test]
    fn rows_without_a_text_are_found_before_the_run() {
        let reward = F1::new("f1", &F1Config::default()).expect("good");
        for (fields, found) in [(r#"{"prompt":"a"}"#, "no `answer`"), (r#"{"answer":[1]}"#, "is 1, expected a text")] {
            let error = reward.check_fields(&row(fields)).expect_err(fields).to_string();
            assert!(error.contains(found), "{error}");
        }
        assert!(F1::new("f1", &F1Config { answer_field: String::new(), ..F1Config::default() }).is_err());
    }
}
