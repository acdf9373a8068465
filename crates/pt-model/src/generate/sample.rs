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

    /// Draws among the tokens that top-k, top-p and min-p leave, in transformers' order.
    ///
    /// All three keep the most probable tokens, so the shortest of their cuts decides, and only tokens that can
    /// survive are sorted: those of the top k, those that min-p keeps, and for top-p those that are not in the
    /// tail of n tokens below (1 - p) / n, which together do not weigh what top-p leaves out.
    fn draw(&mut self, scaled: &[f64], log_sum: f64) -> usize {
        let mut candidates: Vec<(usize, f64)> =
            scaled.iter().enumerate().map(|(id, s)| (id, (s - log_sum).exp())).collect();
        // By probability, ties by id: a total order, so the choice does not depend on the sort.
        let order = |a: &(usize, f64), b: &(usize, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if self.top_k > 0 && self.top_k < candidates.len() {
            candidates.select_nth_unstable_by(self.top_k - 1, order);
            candidates.truncate(self.top_k);
        }
        let kept: f64 = candidates.iter().map(|c| c.1).sum();
        if self.top_p < 1.0 || self.min_p > 0.0 {
            let most = candidates.iter().map(|c| c.1).fold(0.0, f64::max);
            let tail = (1.0 - self.top_p) * kept / candidates.len() as f64;
            let least = (most * self.min_p).max(tail.min(most));
            candidates.retain(|c| c.1 >= least);
        }
        if self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0 {
            candidates.sort_unstable_by(order);
        }
        if self.top_p < 1.0 {
            let mut sum = 0.0;
            let needed = candidates.iter().position(|c| {
                sum += c.1 / kept;
                sum >= self.top_p
            });
            candidates.truncate(needed.map_or(candidates.len(), |last| last + 1));
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

    /// The cuts one after another, each over the whole sorted vocabulary, as transformers makes them.
    fn survivors(probabilities: &[f64], config: &GenerateConfig) -> Vec<usize> {
        let mut sorted: Vec<(usize, f64)> = probabilities.iter().copied().enumerate().collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if config.top_k > 0 {
            sorted.truncate(config.top_k);
        }
        let total: f64 = sorted.iter().map(|c| c.1).sum();
        let mut before = 0.0;
        sorted.retain(|c| {
            let keeps = before / total < config.top_p;
            before += c.1;
            keeps
        });
        let least = sorted[0].1 * config.min_p;
        sorted.into_iter().filter(|c| c.1 >= least).map(|c| c.0).collect()
    }

    #[test]
    fn cuts_leave_what_sorting_everything_leaves() {
        // Few tokens, so that thousands of draws meet every survivor; two ties among them.
        let logits: Vec<f32> = (0..12).map(|i| ((i * 7 % 11) as f32 * 0.4).min(3.2)).collect();
        let weights: Vec<f64> = logits.iter().map(|&l| f64::from(l).exp()).collect();
        let total: f64 = weights.iter().sum();
        let probabilities: Vec<f64> = weights.iter().map(|w| w / total).collect();
        for (top_k, top_p, min_p) in [
            (0, 1.0, 0.0),
            (5, 1.0, 0.0),
            (50, 0.7, 0.0),
            (0, 0.55, 0.0),
            (0, 0.93, 0.12),
            (7, 0.8, 0.3),
            (3, 0.99, 0.01),
        ] {
            let config = GenerateConfig { temperature: 1.0, top_k, top_p, min_p, ..Default::default() };
            let mut drawn: Vec<usize> =
                draws(config.clone(), &logits, 4000).into_iter().map(|id| id as usize).collect();
            drawn.sort_unstable();
            drawn.dedup();
            let mut want = survivors(&probabilities, &config);
            want.sort_unstable();
            assert_eq!(drawn, want, "top_k {top_k}, top_p {top_p}, min_p {min_p}");
        }
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
