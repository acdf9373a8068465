//! Whether a response has the form that was asked for.

use schemars::JsonSchema;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::{Reward, Sample, check};
use crate::error::Result;

/// A reward of 1 where the response has a form, else 0, or the share of what it fulfils.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FormatConfig {
    /// Name in metrics; null for `format`.
    pub name: Option<String>,
    /// Factor of the score in the sum of rewards.
    pub weight: f64,
    /// Texts that stand in the response in this order, anything between them: `["<think>", "</think>", "<answer>",
    /// "</answer>"]`.
    pub parts: Vec<String>,
    /// Whether each part may stand there only as often as it is listed.
    pub once: bool,
    /// Whether the response has to begin with the first part and end with the last, space aside.
    pub anchored: bool,
    /// Whether the response has to be valid JSON.
    pub json: bool,
    /// Whether the model has to have ended the response itself, before it was cut at the longest length.
    pub ended: bool,
    /// Score the share of the demands that are met (each part is one) and not all or nothing.
    pub partial: bool,
}

impl Default for FormatConfig {
    fn default() -> Self {
        Self {
            name: None,
            weight: 1.0,
            parts: Vec::new(),
            once: true,
            anchored: false,
            json: false,
            ended: false,
            partial: false,
        }
    }
}

impl FormatConfig {
    /// Every fault, each naming its field, what it is and what was expected.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.parts.is_empty() && self.anchored {
            faults.push("anchored is true and parts is empty, expected parts to begin and end with".into());
        } else if self.parts.is_empty() && !self.json && !self.ended {
            faults.push("parts is empty, expected at least one part, or `json` or `ended`".into());
        }
        for (index, part) in self.parts.iter().enumerate() {
            if part.trim().is_empty() {
                faults.push(format!("parts[{index}] is {part:?}, expected a text"));
            }
        }
        faults
    }

    /// How many demands are met, and how many there are (at least one, where there are no faults).
    fn met(&self, sample: &Sample<'_>) -> (usize, usize) {
        let response = sample.response;
        let mut demands: Vec<bool> = Vec::new();
        let mut rest = response;
        for part in &self.parts {
            // The first place that fits leaves the most room for the parts that follow.
            let after = rest.find(part.as_str()).and_then(|start| rest.get(start + part.len()..));
            demands.push(after.is_some());
            rest = after.unwrap_or(rest);
        }
        if let (Some(first), Some(last)) = (self.parts.first(), self.parts.last()) {
            if self.once {
                let listed = |part: &String| self.parts.iter().filter(|other| *other == part).count();
                demands.push(self.parts.iter().all(|part| response.matches(part.as_str()).count() <= listed(part)));
            }
            if self.anchored {
                let text = response.trim();
                demands.push(text.starts_with(first.trim_start()) && text.ends_with(last.trim_end()));
            }
        }
        if self.json {
            demands.push(serde_json::from_str::<IgnoredAny>(response).is_ok());
        }
        if self.ended {
            demands.push(sample.is_ended);
        }
        (demands.iter().filter(|is_met| **is_met).count(), demands.len())
    }
}

/// Whether a response has a form; see [`FormatConfig`].
pub struct FormatCheck {
    name: String,
    config: FormatConfig,
}

impl FormatCheck {
    /// Under a name for metrics.
    ///
    /// # Errors
    /// [`RlhfError::Config`](crate::RlhfError::Config) with every fault of the configuration.
    pub fn new(name: &str, config: &FormatConfig) -> Result<Self> {
        check(name, config.faults())?;
        Ok(Self { name: name.to_owned(), config: config.clone() })
    }
}

impl Reward for FormatCheck {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
        let score = |sample: &Sample<'_>| {
            let (met, all) = self.config.met(sample);
            if self.config.partial { met as f64 / all.max(1) as f64 } else { f64::from(met == all) }
        };
        Ok(samples.iter().map(score).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    const GOOD: &str = "<think>2+2</think>\n<answer>4</answer>";

    fn tags() -> FormatConfig {
        let parts = ["<think>", "</think>", "<answer>", "</answer>"].map(str::to_owned).to_vec();
        FormatConfig { parts, ..FormatConfig::default() }
    }

    fn check(config: &FormatConfig, responses: &[&str]) -> Vec<f64> {
        scores(&mut FormatCheck::new("format", config).expect("good"), "{}", responses)
    }

    #[test]
    fn parts_stand_in_their_order() {
        let wrong_order = "<answer>4</answer><think>2+2</think>";
        let responses = [GOOD, "<think>2+2</think>4", wrong_order, "", "so: <think></think><answer></answer>!"];
        assert_eq!(check(&tags(), &responses), [1.0, 0.0, 0.0, 0.0, 1.0]);
        let listed_twice = FormatConfig { parts: vec!["a".into(), "b".into(), "a".into()], ..FormatConfig::default() };
        assert_eq!(check(&listed_twice, &["aba", "ab", "abab", "bab"]), [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn repeated_parts_are_refused_unless_that_is_allowed() {
        let twice = format!("{GOOD}{GOOD}");
        assert_eq!(check(&tags(), &[&twice]), [0.0]);
        assert_eq!(check(&FormatConfig { once: false, ..tags() }, &[&twice]), [1.0]);
    }

    #[test]
    fn anchored_parts_begin_and_end_the_response() {
        let config = FormatConfig { anchored: true, ..tags() };
        let (padded, before, after) = (format!(" {GOOD}\n"), format!("so {GOOD}"), format!("{GOOD} done"));
        assert_eq!(check(&config, &[GOOD, &padded, &before, &after]), [1.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn json_is_one_value_however_deep() {
        let config = FormatConfig { json: true, ..FormatConfig::default() };
        let deep = "[".repeat(100_000);
        assert_eq!(
            check(&config, &[" {\"a\": [1, null]}\n", "3", "{\"a\": }", "{} {}", "", &deep]),
            [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        );
    }

    #[test]
    fn an_end_can_be_asked_for_and_demands_met_in_part() {
        let fields = row("{}");
        let config = FormatConfig { ended: true, partial: true, ..tags() };
        let mut reward = FormatCheck::new("format", &config).expect("good");
        let cut = Sample { is_ended: false, ..sample("<think>2+2</think>", &fields) };
        // Two parts of four, and nothing stands twice; the end is missing.
        assert_eq!(reward.score(&[cut, sample(GOOD, &fields)]).expect("scores"), [3.0 / 6.0, 1.0]);
        let strict = FormatConfig { ended: true, ..FormatConfig::default() };
        let mut reward = FormatCheck::new("format", &strict).expect("good");
        assert_eq!(reward.score(&[cut, sample("", &fields)]).expect("scores"), [0.0, 1.0]);
    }

    #[test]
    fn a_format_that_asks_nothing_is_a_fault() {
        assert_eq!(FormatConfig::default().faults().len(), 1);
        assert!(FormatConfig { anchored: true, json: true, ..Default::default() }.faults()[0].contains("anchored"));
        let config = FormatConfig { parts: vec!["a".into(), " ".into()], ..FormatConfig::default() };
        assert_eq!(config.faults(), ["parts[1] is \" \", expected a text"]);
        assert!(FormatCheck::new("f", &config).is_err());
    }
}
