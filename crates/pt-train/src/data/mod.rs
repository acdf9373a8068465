//! Data sets: reading rows, turning them into prompt groups, checking them before a run, and batching.
//!
//! The way of a row: a file becomes [`Row`]s ([`formats`]), a row becomes a [`PromptGroup`] with labels on
//! the assistant's tokens only ([`groups`]), a set is examined before any step is taken ([`checks`]), and
//! [`Batches`] hands out windows of groups in an order that a saved cursor can continue ([`packing`]).
//!
//! Rows that judge completions become [`PreferenceGroup`]s ([`preferences`]), with checks of their own beside the shared
//! ones ([`preference_checks`]).
//!
//! Rows that only ask are read beside all their other fields, which are for whoever scores the answers ([`prompts`]).
//!
//! Nothing here touches tensors or a particular tokenizer: [`Encode`] is all that is asked of one.

pub mod checks;
pub mod formats;
pub mod groups;
pub mod packing;
pub mod preference_checks;
mod preference_rows;
pub mod preferences;
pub mod prompts;

pub use checks::{Preflight, PreflightSummary, Rendering, SourceSummary, overlap, preflight, render_example};
pub use formats::{Message, ReadOptions, Row, RowContent, Text, read_rows, read_source};
pub use groups::{DataConfig, Fit, OnEmpty, TooLong, TrainTurns, fit, row_to_group};
pub use packing::{BatchConfig, Batches, Cursor};
pub use preference_checks::{
    PreferencePreflight, PreferenceSource, PreferenceSummary, preference_preflight, prompt_overlap, render_preference,
};
pub use preferences::{
    HeldOut, Judgement, Pair, PreferenceGroup, Scores, join_labels, row_to_preference, split_by_prompt,
};
pub use prompts::read_prompts;
pub use pt_model::{Completion, PromptGroup};

use serde_json::Value;

/// What a data set asks of a tokenizer and its chat template.
///
/// Errors are the implementor's own words; this crate adds the row.
pub trait Encode {
    /// Token ids of `text`, special tokens in the text recognised, none added.
    fn encode(&self, text: &str) -> Result<Vec<i64>, String>;
    /// Text of the ids, special tokens shown.
    fn decode(&self, token_ids: &[i64]) -> String;
    /// The chat template's rendering of a conversation.
    fn render(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, String>;
    /// Ids that end a turn; the first is the one appended to plain completions.
    fn stop_ids(&self) -> &[i64];
    /// Id put before plain text, for tokenizers that do so themselves in other libraries.
    fn bos_id(&self) -> Option<i64> {
        None
    }
    /// Token ids of text that no template rendered: [`bos_id`](Self::bos_id) first, unless the text spells it out.
    fn encode_plain(&self, text: &str) -> Result<Vec<i64>, String> {
        let mut token_ids = self.encode(text)?;
        if let Some(bos_id) = self.bos_id().filter(|bos_id| token_ids.first() != Some(bos_id)) {
            token_ids.insert(0, bos_id);
        }
        Ok(token_ids)
    }
}
