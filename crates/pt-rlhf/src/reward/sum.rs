//! Several rewards added up.

use serde_json::{Map, Value};

use super::{Reward, Sample, checked_scores};
use crate::error::{Result, RlhfError};

/// Scores of a sum and of its parts.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// Sum of weight times score, one per sample.
    pub total: Vec<f64>,
    /// Name of each part and its scores before they were weighted, one per sample.
    pub by_name: Vec<(String, Vec<f64>)>,
}

/// Rewards with weights, added up: Σ weight · score.
pub struct WeightedSum {
    name: String,
    parts: Vec<Part>,
}

struct Part {
    name: String,
    weight: f64,
    reward: Box<dyn Reward>,
}

impl WeightedSum {
    /// A sum of nothing, under a name for messages.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), parts: Vec::new() }
    }

    /// Adds a reward under a name of its own; one with weight 0 is shown and does not count.
    pub fn push(&mut self, name: impl Into<String>, weight: f64, reward: Box<dyn Reward>) {
        self.parts.push(Part { name: name.into(), weight, reward });
    }

    /// Names of the parts, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(|part| part.name.as_str())
    }

    /// Scores of the sum and of each part.
    ///
    /// # Errors
    /// Those of [`checked_scores`] for each part; [`RlhfError::Reward`] when a sum overflows.
    pub fn score_parts(&mut self, samples: &[Sample<'_>]) -> Result<Parts> {
        let mut total = vec![0.0; samples.len()];
        let mut by_name = Vec::with_capacity(self.parts.len());
        for part in &mut self.parts {
            let scores = checked_scores(part.reward.as_mut(), samples)?;
            for (sum, score) in total.iter_mut().zip(&scores) {
                *sum += part.weight * score;
            }
            by_name.push((part.name.clone(), scores));
        }
        if let Some(index) = total.iter().position(|sum| !sum.is_finite()) {
            let term = |(part, (name, scores)): (&Part, &(String, Vec<f64>))| {
                format!("{:?} · {name} {:?}", part.weight, scores[index])
            };
            let terms: Vec<_> = self.parts.iter().zip(&by_name).map(term).collect();
            return Err(RlhfError::Reward {
                reward: self.name.clone(),
                message: format!("the sum of sample {} is {}: {}", index + 1, total[index], terms.join(" + ")),
                hint: Some("lower the weights, or clip the scores".into()),
            });
        }
        Ok(Parts { total, by_name })
    }
}

impl Reward for WeightedSum {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
        self.score_parts(samples).map(|parts| parts.total)
    }

    fn check_fields(&self, fields: &Map<String, Value>) -> Result<()> {
        self.parts.iter().try_for_each(|part| part.reward.check_fields(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    /// Length of the response in bytes, times a factor.
    struct Bytes(f64);

    impl Reward for Bytes {
        fn name(&self) -> &str {
            "bytes"
        }
        fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
            Ok(samples.iter().map(|sample| self.0 * sample.response.len() as f64).collect())
        }
        fn check_fields(&self, fields: &Map<String, Value>) -> Result<()> {
            let wrong = || RlhfError::Reward { reward: "bytes".into(), message: "no `key`".into(), hint: None };
            fields.contains_key("key").then_some(()).ok_or_else(wrong)
        }
    }

    #[test]
    fn scores_are_weighted_and_shown_unweighted() {
        let mut inner = WeightedSum::new("inner");
        inner.push("more", 10.0, Box::new(Bytes(1.0)));
        let mut sum = WeightedSum::new("sum");
        sum.push("one", 1.0, Box::new(Bytes(1.0)));
        sum.push("minus", -0.5, Box::new(Bytes(3.0)));
        sum.push("shown", 0.0, Box::new(Bytes(7.0)));
        sum.push("inner", 1.0, Box::new(inner));
        let fields = row("{}");
        let parts = sum.score_parts(&[sample("ab", &fields), sample("", &fields)]).expect("scores");
        assert_eq!(parts.total, [2.0 - 3.0 + 20.0, 0.0]);
        let expected = [("one", 2.0), ("minus", 6.0), ("shown", 14.0), ("inner", 20.0)];
        assert_eq!(parts.by_name, expected.map(|(name, score)| (name.to_owned(), vec![score, 0.0])));
        assert_eq!(sum.names().collect::<Vec<_>>(), ["one", "minus", "shown", "inner"]);
        assert_eq!(scores(&mut sum, "{}", &["ab", ""]), parts.total);
        assert!(sum.check_fields(&row("{\"key\":1}")).is_ok() && sum.check_fields(&fields).is_err());
    }

    #[test]
    fn a_bad_part_is_named_and_so_is_a_sum_that_overflows() {
        let fields = row("{}");
        let samples = [sample("", &fields), sample("a", &fields)];
        let mut sum = WeightedSum::new("sum");
        sum.push("nan", 1.0, Box::new(Bytes(f64::NAN)));
        let error = sum.score_parts(&samples).expect_err("NaN").to_string();
        assert!(error.starts_with("reward `bytes`: sample 1 of 2"), "{error}");
        let mut sum = WeightedSum::new("sum");
        sum.push("large", 1e200, Box::new(Bytes(1e200)));
        let error = sum.score_parts(&samples).expect_err("too large").to_string();
        assert_eq!(error, "reward `sum`: the sum of sample 2 is inf: 1e200 · large 1e200");
    }

    #[test]
    fn a_sum_of_nothing_and_of_no_samples() {
        let fields = row("{}");
        assert_eq!(WeightedSum::new("sum").score_parts(&[sample("a", &fields)]).expect("zeros").total, [0.0]);
        let mut sum = WeightedSum::new("sum");
        sum.push("one", 1.0, Box::new(Bytes(1.0)));
        assert!(sum.score_parts(&[]).expect("nothing").total.is_empty());
    }
}
