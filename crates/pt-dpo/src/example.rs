//! Preference rows as the trainer takes them.

use crate::LossConfig;
use pt_train::data::{Completion, PreferenceGroup, PromptGroup};
use pt_train::objective::Example;

/// A preference row with what the losses need beside it.
#[derive(Clone, Debug)]
pub struct DpoExample {
    /// The prompt, its completions, and what was judged of them.
    pub preference: PreferenceGroup,
    /// KTO's point of reference: this prompt with a completion of the next row.
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
    /// Takes checked rows; for KTO each is paired with a completion of the next one, as in its paper.
    pub fn from_groups(groups: Vec<PreferenceGroup>, loss: &LossConfig) -> Vec<Self> {
        let needs_mismatch = loss.loss_type.contains(&crate::Loss::Kto);
        let next: Vec<Completion> = match needs_mismatch {
            true => (1..=groups.len()).map(|next| groups[next % groups.len()].group.completions[0].clone()).collect(),
            false => vec![],
        };
        let mismatched = |index: usize, group: &PreferenceGroup| {
            next.get(index).map(|completion| PromptGroup::single(group.group.prompt.clone(), completion.clone()))
        };
        let example = |(index, preference): (usize, PreferenceGroup)| Self {
            mismatched: mismatched(index, &preference),
            preference,
            reference: None,
        };
        groups.into_iter().enumerate().map(example).collect()
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
