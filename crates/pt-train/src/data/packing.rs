//! Batches: which rows make up each optimizer step, in an order that can be continued.
//!
//! Groups are packed by concatenation, so a batch has no padding and a step may be split into micro-batches by
//! tokens at will: the loss is normalised by the trained tokens of the whole window, and the gradient does not
//! depend on the split. An epoch's order depends on the seed and the epoch alone, so a [`Cursor`] of two numbers
//! continues it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Result, TrainError};
use crate::objective::Example;

/// How rows are taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BatchConfig {
    /// Rows a micro-batch.
    pub batch_size: usize,
    /// Micro-batches an optimizer step.
    pub accumulation: usize,
    /// Most tokens a micro-batch; one that would hold more is split, a single longer row goes alone.
    pub max_tokens: Option<usize>,
    /// Seed of the order.
    pub seed: u64,
    /// Take the rows in a new order each epoch; otherwise as they stand.
    pub shuffle: bool,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self { batch_size: 8, accumulation: 1, max_tokens: None, seed: 0, shuffle: true }
    }
}

impl BatchConfig {
    /// Rows of one optimizer step; more than there can be where the product is beyond numbers.
    pub fn rows_per_step(&self) -> usize {
        self.batch_size.saturating_mul(self.accumulation)
    }
}

/// Place in the endless sequence of windows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Epoch from 0.
    pub epoch: u64,
    /// Rows of that epoch already handed out.
    pub row: usize,
}

/// Hands out the windows of one optimizer step each, epoch after epoch.
///
/// Each row comes exactly once an epoch; the last window of an epoch may be smaller.
#[derive(Clone, Debug)]
pub struct Batches<E> {
    examples: Vec<E>,
    config: BatchConfig,
    cursor: Cursor,
    /// The order of `cursor.epoch`.
    order: Vec<usize>,
}

impl<E: Example> Batches<E> {
    /// Starts at the first row of epoch 0.
    ///
    /// # Errors
    /// [`TrainError::Config`] when there are no examples or a size is 0.
    pub fn new(examples: Vec<E>, config: BatchConfig) -> Result<Self> {
        let fault =
            |field: &str, message: &str| Err(TrainError::Config { place: field.into(), message: message.into() });
        if examples.is_empty() {
            return fault("data", "holds no rows to batch");
        }
        if config.batch_size == 0 {
            return fault("batch_size", "is 0, expected at least 1");
        }
        if config.accumulation == 0 {
            return fault("accumulation", "is 0, expected at least 1");
        }
        if config.max_tokens == Some(0) {
            return fault("max_tokens", "is 0, expected at least 1, or null for no limit");
        }
        let order = epoch_order(examples.len(), &config, 0);
        Ok(Self { examples, config, cursor: Cursor::default(), order })
    }

    /// The next window: its micro-batches, each a list of examples to pack.
    pub fn next_window(&mut self) -> Vec<Vec<&E>> {
        let window = self.next_indices();
        window.into_iter().map(|rows| rows.into_iter().map(|row| &self.examples[row]).collect()).collect()
    }

    /// As [`Self::next_window`], as indices into the examples.
    pub fn next_indices(&mut self) -> Vec<Vec<usize>> {
        let start = self.cursor.row;
        let end = start.saturating_add(self.config.rows_per_step()).min(self.order.len());
        let split = |rows: &[usize]| {
            split_by_tokens(rows, self.config.max_tokens, |row| self.examples[row].group().num_tokens())
        };
        let window = self.order[start..end].chunks(self.config.batch_size).flat_map(split).collect();
        self.cursor.row = end;
        if end == self.order.len() {
            self.cursor = Cursor { epoch: self.cursor.epoch + 1, row: 0 };
            self.order = epoch_order(self.examples.len(), &self.config, self.cursor.epoch);
        }
        window
    }

    /// Where the next window starts.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Continues from a saved place.
    ///
    /// # Errors
    /// [`TrainError::Config`] when the place lies past the rows: the data changed since it was saved.
    pub fn seek(&mut self, cursor: Cursor) -> Result<()> {
        if cursor.row >= self.examples.len() {
            return Err(TrainError::Config {
                place: "checkpoint".into(),
                message: format!(
                    "is at row {} of an epoch, the data has {} rows: it changed since the run began",
                    cursor.row,
                    self.examples.len()
                ),
            });
        }
        if cursor.epoch != self.cursor.epoch {
            self.order = epoch_order(self.examples.len(), &self.config, cursor.epoch);
        }
        self.cursor = cursor;
        Ok(())
    }

    /// Windows, so optimizer steps, of one epoch.
    pub fn windows_per_epoch(&self) -> usize {
        self.examples.len().div_ceil(self.config.rows_per_step())
    }

    /// Epochs done, with the part of the current one.
    pub fn epochs_done(&self) -> f64 {
        self.cursor.epoch as f64 + self.cursor.row as f64 / self.examples.len() as f64
    }
}

/// Splits rows into runs of at most `max_tokens`, in order; a single longer row goes alone.
///
/// For evaluation sets and score files too, where rows are taken in order.
pub fn split_by_tokens(
    rows: &[usize],
    max_tokens: Option<usize>,
    tokens_of: impl Fn(usize) -> usize,
) -> Vec<Vec<usize>> {
    let limit = max_tokens.unwrap_or(usize::MAX);
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut held = 0_usize;
    for &row in rows {
        let tokens = tokens_of(row);
        match batches.last_mut() {
            Some(batch) if held.saturating_add(tokens) <= limit => {
                batch.push(row);
                held += tokens;
            }
            _ => {
                batches.push(vec![row]);
                held = tokens;
            }
        }
    }
    batches
}

/// The order of an epoch over `rows` rows, by the seed and the epoch alone.
///
/// Fisher-Yates over SplitMix64, written out here: a run must resume to the same order whatever version of a
/// random number library it is built with.
pub fn epoch_order(rows: usize, config: &BatchConfig, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..rows).collect();
    if config.shuffle {
        let mut state = split_mix(&mut (config.seed ^ split_mix(&mut epoch.wrapping_add(0x5851_F42D_4C95_7F2D))));
        for last in (1..rows).rev() {
            // The high half of a 64 x 64 product is uniform to within rows / 2^64.
            let pick = (u128::from(split_mix(&mut state)) * (last as u128 + 1)) >> 64;
            order.swap(last, pick as usize);
        }
    }
    order
}

/// One draw of SplitMix64 (Steele, Lea and Flood 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use pt_model::Completion;
    use pt_model::PromptGroup;

    fn groups(lengths: &[usize]) -> Vec<PromptGroup> {
        lengths.iter().map(|&length| PromptGroup::single(vec![1; length], Completion::new(vec![2]))).collect()
    }

    fn batches(lengths: &[usize], config: BatchConfig) -> Batches<PromptGroup> {
        Batches::new(groups(lengths), config).expect("a good configuration")
    }

    #[test]
    fn split_mix_draws_the_published_sequence() {
        let mut state = 1_234_567;
        let draws: Vec<u64> = (0..3).map(|_| split_mix(&mut state)).collect();
        assert_eq!(draws, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn epochs_differ_and_seeds_differ() {
        let config = BatchConfig::default();
        let order = |epoch, seed| epoch_order(50, &BatchConfig { seed, ..config.clone() }, epoch);
        assert_ne!(order(0, 0), order(1, 0));
        assert_ne!(order(0, 0), order(0, 1));
        assert_eq!(order(3, 7), order(3, 7));
    }

    #[test]
    fn windows_split_by_rows_and_by_tokens() {
        let config = BatchConfig { batch_size: 2, accumulation: 2, max_tokens: Some(8), shuffle: false, seed: 0 };
        let mut batches = batches(&[3, 3, 5, 5, 20], config);
        assert_eq!(batches.windows_per_epoch(), 2);
        assert_eq!(batches.next_indices(), [vec![0, 1], vec![2], vec![3]]);
        assert_eq!(batches.next_indices(), [vec![4]]);
        assert_eq!(batches.cursor(), Cursor { epoch: 1, row: 0 });
        assert_eq!(batches.next_window()[0].len(), 2);
    }

    #[test]
    fn sizes_beyond_numbers_take_all_rows() {
        let config = BatchConfig { batch_size: usize::MAX, accumulation: 3, shuffle: false, ..BatchConfig::default() };
        let mut batches = batches(&[1, 1, 1], config);
        assert_eq!(batches.windows_per_epoch(), 1);
        batches.seek(Cursor { epoch: 0, row: 1 }).expect("a row of the data");
        assert_eq!(batches.next_indices(), [vec![1, 2]]);
    }

    #[test]
    fn zero_sizes_and_foreign_cursors_are_refused() {
        assert!(Batches::<PromptGroup>::new(Vec::new(), BatchConfig::default()).is_err());
        assert!(Batches::new(groups(&[1]), BatchConfig { batch_size: 0, ..BatchConfig::default() }).is_err());
        assert!(Batches::new(groups(&[1]), BatchConfig { max_tokens: Some(0), ..BatchConfig::default() }).is_err());
        assert!(batches(&[1, 1], BatchConfig::default()).seek(Cursor { epoch: 0, row: 2 }).is_err());
    }

    proptest! {
        #[test]
        fn an_epoch_covers_each_row_once_within_the_budget(
            lengths in prop::collection::vec(1usize..30, 1..60),
            batch_size in 1usize..9, accumulation in 1usize..4, max_tokens in prop::option::of(1usize..80), seed: u64,
        ) {
            let mut batches = batches(&lengths, BatchConfig { batch_size, accumulation, max_tokens, seed, shuffle: true });
            for epoch in 0..2 {
                let mut seen = Vec::new();
                let mut windows = 0;
                while batches.cursor().epoch == epoch {
                    for batch in batches.next_indices() {
                        let tokens: usize = batch.iter().map(|&row| lengths[row] + 1).sum();
                        prop_assert!(batch.len() <= batch_size);
                        prop_assert!(batch.len() == 1 || tokens <= max_tokens.unwrap_or(usize::MAX));
                        seen.extend(batch);
                    }
                    windows += 1;
                }
                prop_assert_eq!(windows, batches.windows_per_epoch());
                seen.sort_unstable();
                prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            }
        }

        #[test]
        fn a_restored_cursor_continues_the_same_sequence(rows in 1usize..40, batch_size in 1usize..9, before in 0usize..30, seed: u64) {
            let lengths = vec![1; rows];
            let config = BatchConfig { batch_size, seed, ..BatchConfig::default() };
            let mut straight = batches(&lengths, config.clone());
            for _ in 0..before {
                straight.next_indices();
            }
            let saved = serde_json::to_string(&straight.cursor()).expect("serialises");
            let mut resumed = batches(&lengths, config);
            resumed.seek(serde_json::from_str(&saved).expect("parses")).expect("same data");
            for _ in 0..20 {
                prop_assert_eq!(straight.next_indices(), resumed.next_indices());
            }
        }
    }
}
