//! Choosing a token from logits.

use super::GenerateConfig;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::HashSet;

/// The choice rule of one row, with its own random generator.
pub(super) struct Sampler {
    temperature: f64,
    top_k: usize,
    top_p: f64,
    min_p: f64,
    repetition_penalty: f64,
    generator: StdRng,
}

impl Sampler {
    pub(super) fn new(config: &GenerateConfig, prompt: u64, sample: u64) -> Self {
        let mut seed = [0u8; 32];
        for (slot, value) in seed.chunks_exact_mut(8).zip([config.seed, prompt, sample, 0]) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        Self {
            temperature: config.temperature,
            top_k: config.top_k,
            top_p: config.top_p,
            min_p: config.min_p,
            repetition_penalty: config.repetition_penalty,
            generator: StdRng::from_seed(seed),
        }
    }

    /// The token and its log-prob in nats under softmax(logits / temperature), before any token is ruled out.
    pub(super) fn sample<'a>(&mut self, mut logits: Vec<f32>, context: impl Iterator<Item = &'a i64>) -> (i64, f32) {
        if self.repetition_penalty != 1.0 {
            let penalty = self.repetition_penalty as f32;
            for &id in context.collect::<HashSet<_>>() {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                }
            }
        }
        let temperature = if self.temperature == 0.0 { 1.0 } else { self.temperature };
        let scaled: Vec<f64> = logits.iter().map(|&logit| f64::from(logit) / temperature).collect();
        let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_sum = max + scaled.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
        let token = if self.temperature == 0.0 {
            // The first of equals, as argmax has it.
            scaled.iter().position(|&s| s == max).unwrap_or(0)
        } else {
            self.draw(&scaled, log_sum)
        };
        (token as i64, (scaled[token] - log_sum) as f32)
    }

    fn draw(&mut self, scaled: &[f64], log_sum: f64) -> usize {
        let mut candidates: Vec<(usize, f64)> =
            scaled.iter().enumerate().map(|(id, s)| (id, (s - log_sum).exp())).collect();
        let is_cut = self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0;
        if is_cut {
            // By probability, ties by id: a total order, so the choice does not depend on the sort.
            candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            if self.top_k > 0 {
                candidates.truncate(self.top_k);
            }
            let kept: f64 = candidates.iter().map(|c| c.1).sum();
            if self.top_p < 1.0 {
                let mut sum = 0.0;
                let needed = candidates.iter().position(|c| {
                    sum += c.1 / kept;
                    sum >= self.top_p
                });
                candidates.truncate(needed.map_or(candidates.len(), |last| last + 1));
            }
            let least = candidates.first().map_or(0.0, |c| c.1 * self.min_p);
            candidates.retain(|c| c.1 >= least);
        }
        let total: f64 = candidates.iter().map(|c| c.1).sum();
        let mut left = self.generator.random::<f64>() * total;
        for (id, probability) in &candidates {
            left -= probability;
            if left < 0.0 {
                return *id;
            }
        }
        candidates.last().map_or(0, |c| c.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(config: GenerateConfig, logits: &[f32], count: u64) -> Vec<i64> {
        (0..count).map(|s| Sampler::new(&config, 0, s).sample(logits.to_vec(), [].iter()).0).collect()
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_most_probable() {
        assert_eq!(draws(GenerateConfig::default(), &[0.0, 2.0, 2.0], 3), [1, 1, 1]);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let config = GenerateConfig { temperature: 1.0, ..Default::default() };
        let drawn = draws(config, &[0.0, 3f32.ln()], 4000);
        let share = drawn.iter().sum::<i64>() as f64 / 4000.0;
        assert!((share - 0.75).abs() < 0.03, "{share}");
    }

    #[test]
    fn top_k_top_p_and_min_p_rule_tokens_out() {
        let logits = [8f32.ln(), 4f32.ln(), 2f32.ln(), 1f32.ln()];
        let base = GenerateConfig { temperature: 1.0, ..Default::default() };
        let highest = |config: GenerateConfig| draws(config, &logits, 400).into_iter().max().unwrap();
        assert_eq!(highest(GenerateConfig { top_k: 2, ..base.clone() }), 1);
        assert_eq!(highest(GenerateConfig { top_p: 0.75, ..base.clone() }), 1);
        assert_eq!(highest(GenerateConfig { min_p: 0.2, ..base.clone() }), 2);
        assert_eq!(highest(base), 3);
    }

    #[test]
    fn the_repetition_penalty_moves_logits_towards_the_unlikely() {
        let config = GenerateConfig { repetition_penalty: 2.0, ..Default::default() };
        assert_eq!(Sampler::new(&config, 0, 0).sample(vec![1.5, 1.0], [0].iter()).0, 1);
        assert_eq!(Sampler::new(&config, 0, 0).sample(vec![-1.0, -1.5], [0].iter()).0, 1);
    }

    #[test]
    fn logprobs_are_those_before_tokens_are_ruled_out() {
        let config = GenerateConfig { temperature: 1.0, top_k: 1, ..Default::default() };
        let (token, logprob) = Sampler::new(&config, 0, 0).sample(vec![3f32.ln(), 0.0], [].iter());
        assert_eq!(token, 0);
        assert!((logprob - 0.75f32.ln()).abs() < 1e-6);
    }
}
