//! Rewards: what a response is worth, by rule, by a program of the user's, or by a model.
//!
//! | type | scores |
//! | --- | --- |
//! | `exact` | whether the response, or a part of it, is the answer of the prompt's row: [`ExactMatch`] |
//! | `f1` | how much of that answer it has, and how little else: [`F1`] |
//! | `number` | whether its number is the row's: [`NumberMatch`] |
//! | `pattern` | whether a regular expression matches: [`PatternMatch`] |
//! | `length` | whether its length is in a window: [`LengthWindow`] |
//! | `format` | whether parts stand in order, whether it is JSON, whether it ended: [`FormatCheck`] |
//! | `command` | by what a program prints: [`ExternalCommand`] |
//! | `model` | by a reward model, which the caller of [`build`] supplies |
//!
//! A [`RewardSpec`] describes one in a configuration, [`build`] makes a [`WeightedSum`] of a list of them.
//!
//! ```
//! use pt_rlhf::reward::{RewardSpec, Sample, build};
//! let specs: Vec<RewardSpec> = serde_json::from_str(
//!     r#"[{"type": "number"}, {"type": "length", "unit": "words", "max": 5, "weight": 0.5}]"#,
//! )?;
//! let mut reward = build(&specs, &mut |_| unreachable!("no reward model among them"))?;
//! let row = serde_json::from_str(r#"{"prompt": "12 + 30 =", "answer": 42}"#)?;
//! let sample = |response| Sample {
//!     prompt: "12 + 30 =", response, prompt_ids: &[], response_ids: &[], is_ended: true, fields: &row,
//! };
//! let parts = reward.score_parts(&[sample("It is 42."), sample("40")])?;
//! assert_eq!(parts.total, [1.5, 0.5]);
//! assert_eq!(parts.by_name[0], ("number".to_owned(), vec![1.0, 0.0]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod answer;
mod command;
mod config;
mod f1;
mod format;
mod length;
mod number;
mod pattern;
mod sum;

pub use answer::{ExactConfig, ExactMatch, Normalization, NumberConfig, NumberMatch, Percent};
pub use command::{CommandConfig, ExternalCommand};
pub use config::{ModelReward, RewardSpec, build, reward_faults, rewards_text};
pub use f1::{F1, F1Config, token_f1};
pub use format::{FormatCheck, FormatConfig};
pub use length::{LengthConfig, LengthUnit, LengthWindow};
pub use pattern::{PatternConfig, PatternMatch};
pub use sum::{Parts, WeightedSum};

use regex::Regex;
use serde_json::{Map, Value};

use crate::error::{Result, RlhfError};

/// A response and all that a reward may know of it.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The prompt as the model read it: with a chat template, its rendering.
    pub prompt: &'a str,
    /// What the model wrote, without the token that ended it.
    pub response: &'a str,
    /// Token ids of the prompt.
    pub prompt_ids: &'a [i64],
    /// Token ids of the response, the token that ended it included.
    pub response_ids: &'a [i64],
    /// Whether the model ended the response; false where it was cut at the longest length.
    pub is_ended: bool,
    /// All fields of the prompt's row.
    pub fields: &'a Map<String, Value>,
}

/// A judge of responses.
///
/// Laws: [`score`](Self::score) gives one finite number per sample, in order (whoever calls it goes through
/// [`checked_scores`], which makes sure), and a score does not depend on the other samples of the call.
pub trait Reward {
    /// Name in metrics and messages.
    fn name(&self) -> &str;

    /// One score per sample, in order; more is better.
    ///
    /// # Errors
    /// [`RlhfError::Reward`] when a sample cannot be scored.
    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>>;

    /// Whether a prompt's row has what the score needs, so that a fault in the last row is found before the first step.
    ///
    /// # Errors
    /// [`RlhfError::Reward`] when it has not.
    fn check_fields(&self, fields: &Map<String, Value>) -> Result<()> {
        let _ = fields;
        Ok(())
    }
}

/// The scores of `samples`, each finite and as many as there are samples.
///
/// # Errors
/// [`RlhfError::Reward`] for another number of scores, and for one that is NaN or infinite, with the sample's number
/// and the start of its text; those of [`Reward::score`].
pub fn checked_scores(reward: &mut dyn Reward, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
    let scores = reward.score(samples)?;
    if scores.len() != samples.len() {
        return Err(RlhfError::Reward {
            reward: reward.name().to_owned(),
            message: format!("gave {} scores for {} samples", scores.len(), samples.len()),
            hint: Some("a reward gives one number per sample, in their order".into()),
        });
    }
    match scores.iter().position(|score| !score.is_finite()) {
        None => Ok(scores),
        Some(index) => {
            let fault = Fault::new(
                format!("the score is {}, expected a finite number", scores[index]),
                "look at that response: a division by its length, or the logarithm of 0, is the usual cause; a \
                 response that cannot be judged needs a score of its own, 0 say",
            );
            Err(fault.at_sample(reward.name(), index, samples))
        }
    }
}

/// What is wrong with a sample, before its place and the reward's name are known.
#[derive(Debug)]
struct Fault {
    message: String,
    hint: String,
}

impl Fault {
    fn new(message: String, hint: impl Into<String>) -> Self {
        Self { message, hint: hint.into() }
    }

    fn into_error(self, reward: &str) -> RlhfError {
        RlhfError::Reward { reward: reward.to_owned(), message: self.message, hint: Some(self.hint) }
    }

    fn at_sample(mut self, reward: &str, index: usize, samples: &[Sample<'_>]) -> RlhfError {
        let response = samples.get(index).map_or("", |sample| sample.response);
        let place = format!("sample {} of {} (response {})", index + 1, samples.len(), excerpt(response));
        self.message = format!("{place}: {}", self.message);
        self.into_error(reward)
    }
}

/// A text in quotes, its end left out where it is long.
fn excerpt(text: &str) -> String {
    const LONGEST: usize = 60;
    let mut shown: String = text.chars().take(LONGEST).collect();
    if shown.len() < text.len() {
        shown.push_str("...");
    }
    format!("{shown:?}")
}

/// A pattern ready to use, or the fault of `field` in words.
fn compile(field: &str, pattern: &str) -> std::result::Result<Regex, String> {
    Regex::new(pattern).map_err(|error| {
        // A syntax error comes with a drawing of several lines; its last line says it all.
        let text = error.to_string();
        let reason = text.lines().last().unwrap_or_default().trim().trim_start_matches("error: ").to_owned();
        format!("{field} is {}, expected a regular expression: {reason}", excerpt(pattern))
    })
}

/// A configuration error of a single reward.
fn refused(reward: &str, faults: Vec<String>) -> RlhfError {
    RlhfError::Config { place: format!("reward `{reward}`"), faults }
}

/// That a reward's settings have no fault.
fn check(reward: &str, faults: Vec<String>) -> Result<()> {
    if faults.is_empty() { Ok(()) } else { Err(refused(reward, faults)) }
}

#[cfg(test)]
mod testing {
    use super::*;

    /// A sample of a response alone, ended; its row is `fields`.
    pub(super) fn sample<'a>(response: &'a str, fields: &'a Map<String, Value>) -> Sample<'a> {
        Sample { prompt: "q", response, prompt_ids: &[1], response_ids: &[2], is_ended: true, fields }
    }

    /// The fields of a row, from JSON.
    pub(super) fn row(json: &str) -> Map<String, Value> {
        serde_json::from_str(json).expect("an object")
    }

    /// Scores of several responses to one row.
    pub(super) fn scores(reward: &mut dyn Reward, fields: &str, responses: &[&str]) -> Vec<f64> {
        let fields = row(fields);
        let samples: Vec<_> = responses.iter().map(|response| sample(response, &fields)).collect();
        checked_scores(reward, &samples).expect("scores")
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;

    /// Gives what it was made with, whatever it is asked.
    struct Fixed(Vec<f64>);

    impl Reward for Fixed {
        fn name(&self) -> &str {
            "fixed"
        }
        fn score(&mut self, _: &[Sample<'_>]) -> Result<Vec<f64>> {
            Ok(self.0.clone())
        }
    }

    #[test]
    fn a_wrong_count_of_scores_is_refused() {
        let fields = Map::new();
        let samples = [sample("a", &fields), sample("b", &fields)];
        assert_eq!(checked_scores(&mut Fixed(vec![1.0, -2.0]), &samples).expect("good"), [1.0, -2.0]);
        for wrong in [vec![], vec![1.0], vec![1.0; 3]] {
            let count = wrong.len();
            let error = checked_scores(&mut Fixed(wrong), &samples).expect_err("a wrong count");
            assert_eq!(error.to_string(), format!("reward `fixed`: gave {count} scores for 2 samples"));
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn scores_that_are_no_number_name_their_sample() {
        let fields = Map::new();
        let long = "é".repeat(100);
        let samples = [sample("a", &fields), sample(&long, &fields)];
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let error = checked_scores(&mut Fixed(vec![0.0, bad]), &samples).expect_err("no number");
            let text = error.to_string();
            assert!(text.starts_with("reward `fixed`: sample 2 of 2 (response \"ééé"), "{text}");
            assert!(text.contains(&format!("...\"): the score is {bad}")), "{text}");
            assert!(matches!(error, RlhfError::Reward { hint: Some(_), .. }));
        }
    }

    #[test]
    fn a_bad_pattern_is_a_fault_of_one_line() {
        let fault = compile("pattern", "(a").expect_err("unclosed");
        assert_eq!(fault, "pattern is \"(a\", expected a regular expression: unclosed group");
        // Larger than the engine allows: a fault as well, and no crash.
        let fault = compile("pattern", "(((a{1000}){1000}){1000}){1000}").expect_err("too large");
        assert!(fault.contains("expected a regular expression"), "{fault}");
    }
}
