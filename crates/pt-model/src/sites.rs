//! Where parameter-efficient methods attach: the named places of a model that a method may change.
//!
//! A model runs over frozen weights and asks a [`Sites`] value at every such place. Policy, reference, reward
//! model and critic are one model run with different `Sites`: the reference is the policy without its adapter.

use crate::Result;
use pt_tensor::{AttentionPlan, DenseWeight, Segment, Tensor, Weight};
use std::rc::Rc;

/// A linear layer and its place: the module path of the Hugging Face checkpoint and a running index.
#[derive(Debug)]
pub struct Linear {
    /// Position among the model's linear layers; methods index their own tables by it.
    pub index: usize,
    /// Module path, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// The weight, `[out_features, in_features]`.
    pub weight: Rc<dyn Weight>,
    /// `[out_features]`, or none.
    pub bias: Option<Tensor>,
    /// Whether the checkpoint stores the transposed weight (GPT-2's Conv1D; PEFT's `fan_in_fan_out`).
    pub is_transposed_in_file: bool,
}

impl Linear {
    /// A layer of a model of one's own, over its tensors: `weight: [out_features, in_features]`, `bias: [out_features]`.
    /// Layers that a method goes on together have the indices 0, 1, 2, ..
    ///
    /// # Errors
    /// When the weight does not have two axes.
    pub fn dense(index: usize, path: impl Into<String>, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let weight = Rc::new(DenseWeight::new(weight)?);
        Ok(Self { index, path: path.into(), weight, bias, is_transposed_in_file: false })
    }

    /// The layer without any method: `[.., in_features]` → `[.., out_features]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(&self, hidden_states: &Tensor) -> Result<Tensor> {
        Ok(self.weight.project(hidden_states, self.bias.as_ref())?)
    }
}

/// The two residual branches of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Branch {
    /// Self-attention and its output projection.
    Attention,
    /// The feed-forward network.
    Mlp,
}

/// A residual branch, and what a method finds there.
#[derive(Debug, Clone, Copy)]
pub struct BranchSite<'a> {
    /// Which of the layer's two.
    pub branch: Branch,
    /// The layer, counted from 0.
    pub layer: usize,
    /// The hidden states that the branch's output will be added to, `[tokens, hidden_size]`.
    pub residual: &'a Tensor,
    /// What the branch read: `residual` after the norm.
    pub input: &'a Tensor,
}

/// Tokens that no text has, before every sequence of a batch. They are the same for all of its sequences, so they are
/// computed once and every sequence attends to them.
#[derive(Debug)]
pub enum VirtualTokens {
    /// Their embeddings, `[n, hidden_size]`: they run through the layers as other tokens do (prompt tuning).
    Embeddings(Tensor),
    /// Their keys and values in every layer, `[n, num_kv_heads, head_dim]` each, the keys as attention reads them: no
    /// position is worked into them (prefix tuning).
    KeysValues(Vec<(Tensor, Tensor)>),
}

/// Rows of hidden states in their sequences: which stands behind which.
///
/// A completion continues from its prompt, so rows of several completions may stand behind one row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenOrder {
    /// The row before each in its sequence; none at a sequence's start, or where that row is out of reach.
    pub previous: Vec<Option<usize>>,
    /// Position of each row in its sequence.
    pub positions: Vec<i64>,
    /// The rows that are the tokens of this pass, in their order; none where all rows are.
    pub own: Option<Vec<usize>>,
}

impl TokenOrder {
    /// The order of a packed batch.
    pub(crate) fn of(plan: &AttentionPlan) -> Self {
        let (mut previous, mut positions) = (Vec::new(), Vec::new());
        // Common tokens with keys and values only have no row; those with rows are a sequence of their own here.
        let ahead = plan.ahead();
        for Segment { prefix, tokens } in &plan.segments {
            let start = (!prefix.is_empty()).then(|| (prefix.end - ahead - 1) as usize);
            for (offset, token) in tokens.clone().enumerate() {
                previous.push(if offset == 0 { start } else { Some((token - ahead - 1) as usize) });
                positions.push(prefix.end - prefix.start + offset as i64);
            }
        }
        Self { previous, positions, own: None }
    }
}

/// What a layer has read of the tokens of a pass and of those before them.
#[derive(Debug)]
pub struct Past {
    /// `[rows, hidden_size]`
    pub rows: Tensor,
    /// How the rows follow each other; the same value in every layer of a pass.
    pub order: Rc<TokenOrder>,
}

impl Past {
    pub(crate) fn shared(&self) -> Self {
        Self { rows: self.rows.shallow_clone(), order: self.order.clone() }
    }
}

/// The tokens of a forward pass, for methods that look back over a sequence.
pub trait Tokens {
    /// What layer `layer` has read, `input: [tokens, hidden_size]` of this pass among it, with at least the `reach` tokens
    /// before each of this pass where there are so many. With a key/value cache the tokens before come out of what
    /// earlier passes left; a method asks for the same reach in every pass.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn past(&self, layer: usize, input: &Tensor, reach: usize) -> Result<Past>;
}

/// The gap behind a layer, and what a method finds there.
#[derive(Clone, Copy)]
pub struct GapSite<'a> {
    /// The layer, counted from 0.
    pub layer: usize,
    /// What the layer read, `[tokens, hidden_size]`.
    pub input: &'a Tensor,
    /// The tokens and those before them.
    pub tokens: &'a dyn Tokens,
}

impl std::fmt::Debug for GapSite<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GapSite").field("layer", &self.layer).field("input", self.input).finish_non_exhaustive()
    }
}

/// What a method does at each place; the defaults leave the model as it is.
///
/// Law: a method at its neutral start (LoRA with B = 0, say) gives the values of [`Bare`].
pub trait Sites: std::fmt::Debug {
    /// A linear layer: `[.., in_features]` → `[.., out_features]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> Result<Tensor> {
        layer.forward(hidden_states)
    }

    /// What the output layer scores labels with: states `[num_labels, n]` and a weight `[vocab_size, n]` whose product
    /// is what [`linear`](Self::linear) gives for `hidden_states: [num_labels, hidden_size]`. Log-probs at labels pass
    /// over the weight in tiles and never ask for that product whole. An output layer has no bias.
    ///
    /// n is `hidden_size`, or more: a low-rank update x·Wᵀ + (x·Aᵀ)·Bᵀ is \[x, x·Aᵀ\] · \[W, B\]ᵀ, which rounds
    /// nothing that the two products do not.
    ///
    /// # Errors
    /// When the shapes do not fit, or the weight cannot be decoded.
    fn output(&self, layer: &Linear, hidden_states: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((hidden_states.shallow_clone(), layer.weight.dense()?))
    }

    /// The input embedding, `[total_tokens, hidden_size]`, for `input_ids: [total_tokens]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn embedding(&self, _input_ids: &Tensor, embeddings: Tensor) -> Result<Tensor> {
        Ok(embeddings)
    }

    /// The output of a residual branch, `[tokens, hidden_size]`, before it is added to the residual.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn branch(&self, _site: &BranchSite<'_>, output: Tensor) -> Result<Tensor> {
        Ok(output)
    }

    /// The hidden states between a layer and the next, `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn gap(&self, _site: &GapSite<'_>, hidden_states: Tensor) -> Result<Tensor> {
        Ok(hidden_states)
    }

    /// How many virtual tokens stand before every sequence. They take the first positions, and room in the context; the
    /// tokens of a sequence come after them.
    fn num_virtual_tokens(&self) -> usize {
        0
    }

    /// Those tokens, with their graph, where there are any. Asked once a forward pass; their kind does not matter.
    ///
    /// # Errors
    /// When they cannot be computed.
    fn virtual_tokens(&self) -> Result<Option<VirtualTokens>> {
        Ok(None)
    }

    /// A replacement for a whole parameter outside the linear layers, by its path (`model.embed_tokens.weight`, a norm's
    /// weight or bias): how `modules_to_save` takes effect.
    fn parameter(&self, _path: &str) -> Option<Tensor> {
        None
    }

    /// What stands in for these sites in one run over tokens of which the i-th belongs to prompt `prompt_of_token[i]` of
    /// the batch, where prompts have methods of their own; `None`, where all have this one.
    ///
    /// # Errors
    /// When a prompt has no method that is known, or methods cannot share a batch.
    fn routed(&self, _prompt_of_token: &[usize]) -> Result<Option<Rc<dyn Sites>>> {
        Ok(None)
    }

    /// The fault that a site found which cannot give one, [`parameter`](Self::parameter), unless another site gave it meanwhile.
    ///
    /// # Errors
    /// That fault.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// Switches on or off what is random in training only (dropout), off at first; returns whether it was on.
    fn set_training(&self, _is_training: bool) -> bool {
        false
    }
}

/// The model as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bare;

impl Sites for Bare {}
