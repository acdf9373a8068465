//! Preference rows as the trainer takes them.

use crate::{DpoError, Loss, LossConfig, Result};
use pt_train::data::{PreferenceGroup, PromptGroup};
use pt_train::objective::Example;

/// A preference row with what the losses need beside it.
#[derive(Clone, Debug)]
pub struct DpoExample {
    /// The prompt, its completions, and what was judged of them.
    pub preference: PreferenceGroup,
    /// KTO's point of reference: this prompt with a completion of another one.
    pub mismatched: Option<PromptGroup>,
    /// The reference's log-probs of the scored tokens, where they were computed once.
    pub reference: Option<ReferenceLogprobs>,
}

/// Log-probs under the reference, nats, one for each scored token, completion by completion.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReferenceLogprobs {
    /// Of the completions.
    pub completions: Vec<f32>,
    /// Of the mismatched completion; empty without one.
    pub mismatched: Vec<f32>,
}

impl DpoExample {
    /// Takes checked rows of at most `max_length` tokens; for KTO each is paired with a completion of the next one that
    /// has another prompt, as in its paper, cut to the room that `max_length` leaves.
    ///
    /// Labelled rows of one prompt are best [joined](pt_train::data::join_labels) first.
    ///
    /// # Errors
    /// [`DpoError::OnePrompt`] for KTO when all rows have the same prompt.
    pub fn from_groups(groups: Vec<PreferenceGroup>, loss: &LossConfig, max_length: usize) -> Result<Vec<Self>> {
        let mut mismatched: Vec<Option<PromptGroup>> = vec![None; groups.len()];
        if loss.loss_type.contains(&Loss::Kto) {
            let prompt = |row: usize| &groups[row].group.prompt;
            // The next row with another prompt, from the last row to the first: the neighbour, or the neighbour's where the
            // two share a prompt. The last row's is looked for from the front.
            let missing = || DpoError::OnePrompt { num_rows: groups.len() };
            let mut next = 0;
            for row in (0..groups.len()).rev() {
                if row + 1 == groups.len() {
                    next = (0..row).find(|other| prompt(*other) != prompt(row)).ok_or_else(missing)?;
                } else if prompt(row + 1) != prompt(row) {
                    next = row + 1;
                }
                let mut completion = groups[next].group.completions[0].clone();
                let room = max_length.saturating_sub(prompt(row).len());
                completion.token_ids.truncate(room);
                completion.is_label.truncate(room);
                mismatched[row] = Some(PromptGroup::single(prompt(row).clone(), completion));
            }
        }
        let example = |(preference, mismatched)| Self { mismatched, preference, reference: None };
        Ok(groups.into_iter().zip(mismatched).map(example).collect())
    }
}

impl Example for DpoExample {
    fn group(&self) -> &PromptGroup {
        &self.preference.group
    }

    fn digest(&self, sink: &mut dyn FnMut(&[u8])) {
        self.preference.digest(sink);
    }
}
