//! Whether a regular expression matches a response.

use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Reward, Sample, compile, refused};
use crate::error::Result;

/// A reward by whether a regular expression matches the response.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PatternConfig {
    /// Name in metrics; null for `pattern`.
    pub name: Option<String>,
    /// Factor of the score in the sum of rewards.
    pub weight: f64,
    /// The expression, in the syntax of Rust's `regex` (no look-around, no back-references); `(?i)` for either case,
    /// `(?s)` for a point that matches line ends.
    pub pattern: String,
    /// Whether it has to match the whole response and not only a part of it.
    pub whole: bool,
    /// Score where it matches.
    pub matched: f64,
    /// Score where it does not.
    pub unmatched: f64,
}

impl Default for PatternConfig {
    fn default() -> Self {
        Self { name: None, weight: 1.0, pattern: String::new(), whole: false, matched: 1.0, unmatched: 0.0 }
    }
}

impl PatternConfig {
    /// Every fault, each naming its field, what it is and what was expected.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.pattern.is_empty() {
            faults.push("pattern is empty, expected a regular expression".into());
        }
        faults.extend(self.regex().err());
        for (field, value) in [("matched", self.matched), ("unmatched", self.unmatched)] {
            if !value.is_finite() {
                faults.push(format!("{field} is {value}, expected a finite number"));
            }
        }
        faults
    }

    fn regex(&self) -> std::result::Result<Regex, String> {
        // Alone first: `a)|(b` is no expression, though it would be one inside a group.
        let alone = compile("pattern", &self.pattern)?;
        if self.whole { compile("pattern", &format!(r"\A(?:{})\z", self.pattern)) } else { Ok(alone) }
    }
}

/// Whether a regular expression matches; see [`PatternConfig`].
pub struct PatternMatch {
    name: String,
    regex: Regex,
    matched: f64,
    unmatched: f64,
}

impl PatternMatch {
    /// Under a name for metrics.
    ///
    /// # Errors
    /// [`RlhfError::Config`](crate::RlhfError::Config) with every fault of the configuration.
    pub fn new(name: &str, config: &PatternConfig) -> Result<Self> {
        let faults = config.faults();
        match config.regex() {
            Ok(regex) if faults.is_empty() => {
                Ok(Self { name: name.to_owned(), regex, matched: config.matched, unmatched: config.unmatched })
            }
            _ => Err(refused(name, faults)),
        }
    }
}

impl Reward for PatternMatch {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
        let score = |sample: &Sample<'_>| {
            if self.regex.is_match(sample.response) { self.matched } else { self.unmatched }
        };
        Ok(samples.iter().map(score).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn pattern(config: PatternConfig) -> PatternMatch {
        PatternMatch::new("pattern", &config).expect("good")
    }

    #[test]
    fn it_matches_anywhere_or_the_whole() {
        let config = PatternConfig { pattern: "a|ab".into(), ..PatternConfig::default() };
        assert_eq!(scores(&mut pattern(config.clone()), "{}", &["xaby", "b", ""]), [1.0, 0.0, 0.0]);
        let whole = PatternConfig { whole: true, ..config };
        assert_eq!(scores(&mut pattern(whole), "{}", &["a", "ab", "abc", "xa", "a\n"]), [1.0, 1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn both_values_can_be_chosen() {
        let config = PatternConfig { pattern: "(?i)sorry".into(), matched: -1.0, unmatched: 0.5, ..Default::default() };
        assert_eq!(scores(&mut pattern(config), "{}", &["Sorry!", "fine"]), [-1.0, 0.5]);
    }

    #[test]
    fn bad_patterns_and_values_are_faults() {
        for bad in ["", "(", "a)|(b", "(?x) a # no end", "\\p{Nothing}"] {
            let config = PatternConfig { pattern: bad.into(), whole: true, ..PatternConfig::default() };
            assert!(!config.faults().is_empty(), "{bad}");
            assert!(PatternMatch::new("p", &config).is_err(), "{bad}");
        }
        let config = PatternConfig { pattern: "(".into(), matched: f64::NAN, ..PatternConfig::default() };
        let error = PatternMatch::new("p", &config).err().expect("refused").to_string();
        assert!(error.contains("unclosed group; matched is NaN, expected a finite number"), "{error}");
    }

    #[test]
    fn a_pattern_that_backtracks_elsewhere_takes_linear_time_here() {
        let config = PatternConfig { pattern: "(a+)+b".into(), whole: true, ..PatternConfig::default() };
        assert_eq!(scores(&mut pattern(config), "{}", &[&"a".repeat(20_000)]), [0.0]);
    }
}
