//! Whether a response is as long as it should be.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Reward, Sample, check};
use crate::error::Result;

/// What a length is counted in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LengthUnit {
    /// Tokens of the response, without the one that ends it.
    #[default]
    Tokens,
    /// Unicode characters of its text.
    Characters,
    /// Runs of text between spaces.
    Words,
}

impl LengthUnit {
    fn count(self, sample: &Sample<'_>) -> usize {
        match self {
            Self::Tokens => sample.response_ids.len().saturating_sub(usize::from(sample.is_ended)),
            Self::Characters => sample.response.chars().count(),
            Self::Words => sample.response.split_whitespace().count(),
        }
    }
}

/// A reward of 1 inside a window of lengths, falling to 0 outside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LengthConfig {
    /// Name in metrics; null for `length`.
    pub name: Option<String>,
    /// Factor of the score in the sum of rewards.
    pub weight: f64,
    /// What is counted: `tokens` (without the one that ends the response), `characters`, `words`.
    pub unit: LengthUnit,
    /// Shortest length inside the window.
    pub min: usize,
    /// Longest length inside the window; null for no end.
    pub max: Option<usize>,
    /// How far outside the window the score reaches 0, falling evenly; 0 for at once.
    pub falloff: f64,
}

impl Default for LengthConfig {
    fn default() -> Self {
        Self { name: None, weight: 1.0, unit: LengthUnit::Tokens, min: 0, max: None, falloff: 0.0 }
    }
}

impl LengthConfig {
    /// Every fault, each naming its field, what it is and what was expected.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        match (self.min, self.max) {
            (0, None) => faults.push("min is 0 and max is null, expected one of them: every length is inside".into()),
            (min, Some(max)) if min > max => faults.push(format!("min is {min}, expected at most max, {max}")),
            _ => {}
        }
        if !(self.falloff >= 0.0 && self.falloff.is_finite()) {
            faults.push(format!("falloff is {}, expected at least 0", self.falloff));
        }
        faults
    }

    fn score(&self, length: usize) -> f64 {
        let short = self.min.saturating_sub(length);
        let long = self.max.map_or(0, |max| length.saturating_sub(max));
        let distance = short.max(long) as f64;
        if distance == 0.0 {
            1.0
        } else if distance < self.falloff {
            1.0 - distance / self.falloff
        } else {
            0.0
        }
    }
}

/// Whether the length is in a window; see [`LengthConfig`].
pub struct LengthWindow {
    name: String,
    config: LengthConfig,
}

impl LengthWindow {
    /// Under a name for metrics.
    ///
    /// # Errors
    /// [`RlhfError::Config`](crate::RlhfError::Config) with every fault of the configuration.
    pub fn new(name: &str, config: &LengthConfig) -> Result<Self> {
        check(name, config.faults())?;
        Ok(Self { name: name.to_owned(), config: config.clone() })
    }
}

impl Reward for LengthWindow {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
        Ok(samples.iter().map(|sample| self.config.score(self.config.unit.count(sample))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn window(min: usize, max: Option<usize>, falloff: f64) -> LengthConfig {
        LengthConfig { min, max, falloff, ..LengthConfig::default() }
    }

    #[test]
    fn a_window_without_falloff_is_all_or_nothing() {
        let config = window(2, Some(4), 0.0);
        assert_eq!([0, 1, 2, 3, 4, 5].map(|length| config.score(length)), [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]);
        assert_eq!(window(2, None, 0.0).score(usize::MAX), 1.0);
    }

    #[test]
    fn a_falloff_is_linear_on_both_sides() {
        let config = window(4, Some(6), 4.0);
        let scores = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11].map(|length| config.score(length));
        assert_eq!(scores, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]);
        assert_eq!(window(0, Some(0), 0.5).score(1), 0.0);
        assert_eq!(window(0, Some(0), 1e300).score(usize::MAX), 1.0);
    }

    #[test]
    fn units_count_what_they_say() {
        let fields = row("{}");
        let sample = Sample { response_ids: &[5, 6, 7, 2], ..sample("héllo  du\n", &fields) };
        assert_eq!(LengthUnit::Tokens.count(&sample), 3);
        assert_eq!(LengthUnit::Tokens.count(&Sample { is_ended: false, ..sample }), 4);
        assert_eq!(LengthUnit::Tokens.count(&Sample { response_ids: &[], ..sample }), 0);
        assert_eq!(LengthUnit::Characters.count(&sample), 10);
        assert_eq!(LengthUnit::Words.count(&sample), 2);
        let config = LengthConfig { unit: LengthUnit::Words, ..window(1, Some(2), 0.0) };
        let mut reward = LengthWindow::new("length", &config).expect("good");
        assert_eq!(scores(&mut reward, "{}", &["", "a", "a b", "a b c"]), [0.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn windows_that_say_nothing_are_faults() {
        assert!(window(0, None, 0.0).faults()[0].contains("every length is inside"));
        assert_eq!(window(5, Some(4), 0.0).faults(), ["min is 5, expected at most max, 4"]);
        for falloff in [-1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(window(1, None, falloff).faults(), [format!("falloff is {falloff}, expected at least 0")]);
        }
        assert!(LengthWindow::new("l", &window(0, None, 0.0)).is_err());
    }
}
