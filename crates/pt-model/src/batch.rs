//! Prompt groups packed on one token axis: the batch of every method.
//!
//! A group is one prompt and n ≥ 1 completions. The prompt's tokens stand once, followed by each completion's;
//! a completion attends to its prompt and causally to itself, and its positions continue from the prompt. There
//! is no padding, and a prompt shared by several completions is computed once.

use crate::{ModelError, Result};
use pt_tensor::{AttentionPlan, Device, Segment, Tensor};
use std::borrow::Borrow;
use std::sync::Arc;

/// One completion of a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Completion {
    /// The tokens, the end of the turn included where there is one.
    pub token_ids: Vec<i64>,
    /// Whether token i is trained or scored; as long as `token_ids`.
    pub is_label: Vec<bool>,
}

impl Completion {
    /// A completion all of whose tokens are labels.
    pub fn new(token_ids: Vec<i64>) -> Self {
        let is_label = vec![true; token_ids.len()];
        Self { token_ids, is_label }
    }
}

/// The unit of every batch: one prompt and n ≥ 1 completions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PromptGroup {
    /// Tokens that all completions share; may be empty.
    pub prompt: Vec<i64>,
    /// The completions.
    pub completions: Vec<Completion>,
}

impl PromptGroup {
    /// A prompt with one completion.
    pub fn single(prompt: Vec<i64>, completion: Completion) -> Self {
        Self { prompt, completions: vec![completion] }
    }

    /// Tokens that the group takes in a batch: the prompt once, each completion once.
    pub fn num_tokens(&self) -> usize {
        self.prompt.len() + self.completions.iter().map(|c| c.token_ids.len()).sum::<usize>()
    }

    /// Labels that have a token before them to be predicted from.
    pub fn num_labels(&self) -> usize {
        self.label_counts().sum()
    }

    /// The same of each completion.
    pub fn label_counts(&self) -> impl Iterator<Item = usize> + '_ {
        let skip = usize::from(self.prompt.is_empty());
        self.completions.iter().map(move |c| c.is_label.iter().skip(skip).filter(|&&is_label| is_label).count())
    }

    /// Tokens of the prompt and its longest completion: what must fit the model's context.
    pub fn longest_sequence(&self) -> usize {
        self.prompt.len() + self.completions.iter().map(|c| c.token_ids.len()).max().unwrap_or(0)
    }
}

/// Packed prompt groups.
#[derive(Debug)]
pub struct PackedBatch {
    /// `[total_tokens]`, i64.
    pub input_ids: Tensor,
    /// `[total_tokens]`, i64; a completion continues from its prompt.
    pub positions: Tensor,
    /// The prompt group that each token belongs to, `[total_tokens]`.
    pub prompt_of_token: Vec<usize>,
    /// Who attends to whom.
    pub plan: Arc<AttentionPlan>,
    /// `[num_labels]`, i64: the token whose hidden state predicts the label.
    pub label_positions: Tensor,
    /// `[num_labels]`, i64: the predicted tokens.
    pub label_ids: Tensor,
    /// The prompt group that each label belongs to, `[num_labels]`.
    pub prompt_of_label: Vec<usize>,
    /// The completion (counted through all groups) that each label belongs to.
    pub label_completion: Vec<i64>,
    /// Completions in all groups.
    pub num_completions: usize,
    /// `[num_completions]`: the last token of each completion (or of its prompt where it is empty).
    pub last_positions: Vec<i64>,
}

impl PackedBatch {
    /// Packs groups, in order.
    ///
    /// # Errors
    /// [`ModelError::Argument`] without groups; [`ModelError::Batch`] for a group without completions, an empty
    /// completion of an empty prompt, or a mask of another length than its tokens.
    pub fn new<G: Borrow<PromptGroup>>(groups: &[G], device: Device) -> Result<Self> {
        if groups.is_empty() {
            return Err(ModelError::Argument {
                what: "groups".into(),
                found: "empty".into(),
                expected: "at least one prompt group".into(),
            });
        }
        let total: usize = groups.iter().map(|group| group.borrow().num_tokens()).sum();
        let mut ids = Vec::with_capacity(total);
        let mut positions = Vec::with_capacity(total);
        let mut prompt_of_token = Vec::with_capacity(total);
        let mut segments = Vec::new();
        let (mut label_positions, mut label_ids, mut label_completion) = (Vec::new(), Vec::new(), Vec::new());
        let mut last_positions = Vec::new();
        for (index, group) in groups.iter().map(Borrow::borrow).enumerate() {
            if group.completions.is_empty() {
                return Err(ModelError::Batch { group: index, reason: "it has no completion".into() });
            }
            // Such a completion has no last token, and nothing to be scored from.
            let is_nothing = |completion: &Completion| group.prompt.is_empty() && completion.token_ids.is_empty();
            if let Some(nothing) = group.completions.iter().position(is_nothing) {
                let reason = format!("completion {nothing} is empty, and so is the prompt");
                return Err(ModelError::Batch { group: index, reason });
            }
            prompt_of_token.extend(std::iter::repeat_n(index, group.num_tokens()));
            let start = ids.len() as i64;
            let prompt_len = group.prompt.len() as i64;
            ids.extend_from_slice(&group.prompt);
            positions.extend(0..prompt_len);
            // One completion and its prompt are one causal run; several share the prompt as a prefix.
            let is_shared = group.completions.len() > 1;
            if is_shared && prompt_len > 0 {
                segments.push(Segment { prefix: start..start, tokens: start..start + prompt_len });
            }
            for completion in &group.completions {
                if completion.token_ids.len() != completion.is_label.len() {
                    return Err(ModelError::Batch {
                        group: index,
                        reason: "is_label and token_ids differ in length".into(),
                    });
                }
                let own = ids.len() as i64;
                let len = completion.token_ids.len() as i64;
                ids.extend_from_slice(&completion.token_ids);
                positions.extend(prompt_len..prompt_len + len);
                if !is_shared {
                    segments.push(Segment { prefix: start..start, tokens: start..own + len });
                } else if len > 0 {
                    segments.push(Segment { prefix: start..start + prompt_len, tokens: own..own + len });
                }
                for (offset, (&id, &is_label)) in completion.token_ids.iter().zip(&completion.is_label).enumerate() {
                    let predictor = match offset {
                        0 if prompt_len == 0 => continue,
                        0 => start + prompt_len - 1,
                        offset => own + offset as i64 - 1,
                    };
                    if is_label {
                        label_positions.push(predictor);
                        label_ids.push(id);
                        label_completion.push(last_positions.len() as i64);
                    }
                }
                last_positions.push(if len > 0 { own + len - 1 } else { start + prompt_len - 1 });
            }
        }
        Ok(Self {
            input_ids: Tensor::from_slice(&ids).to_device(device),
            positions: Tensor::from_slice(&positions).to_device(device),
            prompt_of_label: label_positions.iter().map(|&token: &i64| prompt_of_token[token as usize]).collect(),
            prompt_of_token,
            plan: Arc::new(AttentionPlan::new(segments)),
            label_positions: Tensor::from_slice(&label_positions).to_device(device),
            label_ids: Tensor::from_slice(&label_ids).to_device(device),
            label_completion,
            num_completions: last_positions.len(),
            last_positions,
        })
    }

    /// Tokens in the batch.
    pub fn num_tokens(&self) -> i64 {
        self.input_ids.size()[0]
    }

    /// Labels in the batch.
    pub fn num_labels(&self) -> i64 {
        self.label_ids.size()[0]
    }

    /// Sums values at labels, `[num_labels]`, into one per completion, `[num_completions]`.
    pub fn sum_by_completion(&self, values: &Tensor) -> Tensor {
        let index = Tensor::from_slice(&self.label_completion).to_device(values.device());
        Tensor::zeros([self.num_completions as i64], (values.kind(), values.device())).index_add(0, &index, values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor).unwrap()
    }

    #[test]
    fn a_shared_prompt_stands_once_and_completions_continue_from_it() {
        let group = PromptGroup {
            prompt: vec![1, 2, 3],
            completions: vec![Completion::new(vec![4, 5]), Completion::new(vec![6])],
        };
        let batch = PackedBatch::new(&[group], Device::Cpu).unwrap();
        assert_eq!(ids(&batch.input_ids), [1, 2, 3, 4, 5, 6]);
        assert_eq!(ids(&batch.positions), [0, 1, 2, 3, 4, 3]);
        assert_eq!(ids(&batch.label_positions), [2, 3, 2]);
        assert_eq!(ids(&batch.label_ids), [4, 5, 6]);
        assert_eq!(batch.label_completion, [0, 0, 1]);
        let want = [
            Segment { prefix: 0..0, tokens: 0..3 },
            Segment { prefix: 0..3, tokens: 3..5 },
            Segment { prefix: 0..3, tokens: 5..6 },
        ];
        assert_eq!(batch.plan.segments, want);
    }

    #[test]
    fn a_single_completion_is_one_causal_run() {
        let groups = [
            PromptGroup::single(vec![7], Completion::new(vec![8, 9])),
            PromptGroup::single(vec![], Completion { token_ids: vec![1, 2], is_label: vec![true, true] }),
        ];
        let batch = PackedBatch::new(&groups, Device::Cpu).unwrap();
        assert_eq!(batch.plan.segments.len(), 2);
        assert_eq!(batch.plan.segments[1], Segment { prefix: 3..3, tokens: 3..5 });
        // Nothing stands before the very first token of a group without a prompt, so nothing predicts it.
        assert_eq!(ids(&batch.label_ids), [8, 9, 2]);
        assert_eq!(batch.last_positions, [2, 4]);
        assert_eq!(groups[1].num_labels(), 1);
    }

    #[test]
    fn values_at_labels_sum_by_completion() {
        let group =
            PromptGroup { prompt: vec![1], completions: vec![Completion::new(vec![4, 5]), Completion::new(vec![6])] };
        let batch = PackedBatch::new(&[group], Device::Cpu).unwrap();
        let sums = batch.sum_by_completion(&Tensor::from_slice(&[-1f32, -2., -4.]));
        assert_eq!(Vec::<f32>::try_from(&sums).unwrap(), [-3., -4.]);
    }

    #[test]
    fn a_group_without_completions_is_refused() {
        let error = PackedBatch::new(&[PromptGroup { prompt: vec![1], completions: vec![] }], Device::Cpu).unwrap_err();
        assert_eq!(error.to_string(), "prompt group 0: it has no completion");
        let error = PackedBatch::new::<PromptGroup>(&[], Device::Cpu).unwrap_err();
        assert_eq!(error.to_string(), "`groups` is empty, expected at least one prompt group");
    }

    #[test]
    fn a_completion_without_any_token_before_or_in_it_is_refused() {
        let whole = PromptGroup::single(vec![1], Completion::new(vec![2]));
        let nothing =
            PromptGroup { prompt: vec![], completions: vec![Completion::new(vec![3]), Completion::new(vec![])] };
        let error = PackedBatch::new(&[whole, nothing], Device::Cpu).unwrap_err();
        assert_eq!(error.to_string(), "prompt group 1: completion 1 is empty, and so is the prompt");
        // After a prompt, an empty completion ends where the prompt does.
        let empty = PromptGroup::single(vec![1, 2], Completion::new(vec![]));
        assert_eq!(PackedBatch::new(&[empty], Device::Cpu).unwrap().last_positions, [1]);
    }
}
