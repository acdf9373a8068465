//! LoRA on the input embedding, and single rows of it that are trained.

use super::dora::Magnitude;
use crate::base::Embedding;
use crate::{PeftError, Result};
use pt_model::Linear;
use pt_tensor::{DenseWeight, Kind, Tensor, Weight, no_grad};
use std::rc::Rc;

/// The update of the table: s·(B·A)ᵀ, of which a token takes its row.
#[derive(Debug)]
pub(super) struct EmbeddingFactors {
    pub(super) path: String,
    /// `[rank, vocab_size]`, f32.
    pub(super) a: Tensor,
    /// `[hidden_size, rank]`, f32.
    pub(super) b: Tensor,
    /// DoRA's, `[hidden_size]`: PEFT takes the columns of the table for rows of a weight.
    pub(super) magnitude: Option<Magnitude>,
    pub(super) scaling: f64,
    /// The table turned round, `[hidden_size, vocab_size]`, as a weight.
    pub(super) weight: Rc<dyn Weight>,
    table: Tensor,
}

impl EmbeddingFactors {
    /// A, B and m zero.
    pub(super) fn zeros(base: &Embedding, rank: i64, scaling: f64, has_magnitude: bool) -> Result<Self> {
        let (vocab_size, hidden_size) = base.table.size2()?;
        let leaf = |size: [i64; 2]| -> Result<Tensor> {
            Ok(Tensor::f_zeros(size, (Kind::Float, base.table.device()))?.set_requires_grad(true))
        };
        let weight: Rc<dyn Weight> = Rc::new(DenseWeight::new(base.table.tr())?);
        Ok(Self {
            path: base.path.clone(),
            a: leaf([rank, vocab_size])?,
            b: leaf([hidden_size, rank])?,
            magnitude: has_magnitude.then(|| Magnitude::zeros(&weight)).transpose()?,
            scaling,
            weight,
            table: base.table.shallow_clone(),
        })
    }

    /// The trained tensors by the names that files have after the embedding's path.
    pub(super) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut all = vec![("lora_embedding_A", &self.a), ("lora_embedding_B", &self.b)];
        all.extend(self.magnitude.as_ref().map(|magnitude| ("lora_magnitude_vector", &magnitude.vector)));
        all
    }

    fn scale(&self) -> Result<Option<Tensor>> {
        let scale = |magnitude: &Magnitude| magnitude.scale(&self.weight, &self.a, &self.b, self.scaling);
        self.magnitude.as_ref().map(scale).transpose()
    }

    /// Sets DoRA's m to the norms.
    pub(super) fn start_magnitude(&self) -> Result<()> {
        match &self.magnitude {
            Some(magnitude) => magnitude.start(&self.weight, &self.a, &self.b, self.scaling),
            None => Ok(()),
        }
    }

    /// The embeddings of `input_ids` with the update, `[total_tokens, hidden_size]`; PEFT has no dropout here.
    pub(super) fn forward(&self, input_ids: &Tensor, embeddings: &Tensor) -> Result<Tensor> {
        let low = self.a.f_index_select(1, input_ids)?.tr() * self.scaling; // [total_tokens, rank]
        let mut update = low.f_mm(&self.b.tr())?;
        if let Some(scale) = self.scale()? {
            // Of GPT-2 the embeddings have the positions in them, which m does not reach.
            let own = self.table.f_index_select(0, input_ids)?.to_kind(Kind::Float);
            update = update * &scale + own * (scale - 1.0);
        }
        Ok(embeddings + update.to_kind(embeddings.kind()))
    }

    /// The table with the update in it.
    pub(super) fn merged(&self) -> Result<Tensor> {
        let mut new = self.table.to_kind(Kind::Float) + self.b.f_mm(&self.a)?.tr() * self.scaling;
        if let Some(scale) = self.scale()? {
            new *= scale;
        }
        Ok(new.to_kind(self.table.kind()))
    }

    /// A and B of twice the rank, the second half zero: the rank of an adapter that is converted holds for all of it.
    pub(super) fn converted(&self) -> Result<(Tensor, Tensor)> {
        no_grad(|| {
            Ok((
                Tensor::f_cat(&[self.a.detach(), self.a.zeros_like()], 0)?,
                Tensor::f_cat(&[self.b.detach(), self.b.zeros_like()], 1)?,
            ))
        })
    }
}

/// Rows of the embedding that are trained alone, and with them those of an output layer that is tied to it.
#[derive(Debug)]
pub(super) struct TokenRows {
    pub(super) path: String,
    /// `[num_tokens, hidden_size]`, f32, what the rows are replaced by.
    pub(super) rows: Tensor,
    /// Index of an output layer that is tied.
    pub(super) tied_output: Option<usize>,
    /// `[num_tokens]`.
    ids: Tensor,
    /// The place of each token among the rows, or the one after the last, `[vocab_size]`.
    places: Tensor,
    table: Tensor,
}

impl TokenRows {
    /// Rows as the model has them.
    ///
    /// # Errors
    /// [`PeftError::Config`] for an id that the table does not have.
    pub(super) fn copies(base: &Embedding, ids: &[i64], tied_output: Option<usize>) -> Result<Self> {
        let (vocab_size, _) = base.table.size2()?;
        if let Some(id) = ids.iter().find(|id| **id >= vocab_size) {
            return Err(PeftError::Config {
                faults: vec![format!("`trainable_token_indices` has {id}, expected ids below {vocab_size}")],
            });
        }
        let device = base.table.device();
        let own = Tensor::from_slice(ids).to_device(device);
        no_grad(|| {
            let count = ids.len() as i64;
            let places = Tensor::full([vocab_size], count, (Kind::Int64, device));
            let places = places.f_index_copy(0, &own, &Tensor::arange(count, (Kind::Int64, device)))?;
            let rows = base.table.f_index_select(0, &own)?.to_kind(Kind::Float).copy().set_requires_grad(true);
            let (path, table) = (base.path.clone(), base.table.shallow_clone());
            Ok(Self { path, rows, tied_output, ids: own, places, table })
        })
    }

    /// Their name in files, without the prefix.
    pub(super) fn name(&self) -> String {
        format!("{}.token_adapter.trainable_tokens_delta", self.path)
    }

    /// What they differ by from the model's, `[num_tokens, hidden_size]`, f32.
    fn change(&self) -> Result<Tensor> {
        Ok(&self.rows - self.table.f_index_select(0, &self.ids)?.to_kind(Kind::Float))
    }

    /// The embeddings with the rows in place of the model's.
    pub(super) fn forward(&self, input_ids: &Tensor, embeddings: &Tensor) -> Result<Tensor> {
        let change = self.change()?;
        let none = Tensor::zeros([1, change.size()[1]], (Kind::Float, change.device()));
        let places = self.places.f_index_select(0, input_ids)?;
        let change = Tensor::f_cat(&[change, none], 0)?.f_index_select(0, &places)?;
        Ok(embeddings + change.to_kind(embeddings.kind()))
    }

    /// The logits of a tied output layer, `[.., vocab_size]`, with the rows in place of the model's.
    pub(super) fn logits(&self, hidden_states: &Tensor, logits: &Tensor) -> Result<Tensor> {
        let change = hidden_states.f_linear(&self.change()?.to_kind(hidden_states.kind()), None::<Tensor>)?;
        Ok(logits.f_index_add(-1, &self.ids, &change)?)
    }

    /// What [`pt_model::Sites::output`] gives for a tied output layer: \[x, x·Δᵀ\] · \[W, E\]ᵀ, where E puts each row at
    /// its token. The table itself gets no gradient so.
    pub(super) fn output(&self, layer: &Linear, hidden_states: &Tensor) -> Result<(Tensor, Tensor)> {
        let kind = hidden_states.kind();
        let change = hidden_states.f_linear(&self.change()?.to_kind(kind), None::<Tensor>)?;
        let (count, vocab_size) = (self.ids.size()[0], layer.weight.size().0);
        let unit = Tensor::eye(count, (kind, hidden_states.device()));
        let at =
            Tensor::zeros([vocab_size, count], (kind, hidden_states.device())).f_index_copy(0, &self.ids, &unit)?;
        Ok((Tensor::f_cat(&[hidden_states, &change], -1)?, Tensor::f_cat(&[layer.weight.dense()?, at], 1)?))
    }

    /// The table with the rows in it.
    pub(super) fn merged(&self) -> Result<Tensor> {
        Ok(self.table.f_index_copy(0, &self.ids, &self.rows.detach().to_kind(self.table.kind()))?)
    }

    /// The weight of a tied output layer with the rows in it; where it is the table itself, that is written in place.
    pub(super) fn merged_output(&self, layer: &Linear) -> Result<Rc<dyn Weight>> {
        if layer.weight.parameter().is_some_and(|weight| weight.data_ptr() == self.table.data_ptr()) {
            return Ok(Rc::new(DenseWeight::new(self.table.shallow_clone())?));
        }
        let dense = layer.weight.dense()?;
        let new = dense.to_kind(Kind::Float).f_index_add(0, &self.ids, &self.change()?)?;
        Ok(Rc::new(DenseWeight::new(new.to_kind(dense.kind()))?))
    }
}
