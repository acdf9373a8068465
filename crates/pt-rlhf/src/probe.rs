//! Where two passes over the same tokens part: the layer to look at when sampling and training disagree.

use crate::Result;
use pt_model::{BranchSite, CausalLm, GapSite, Linear, PackedBatch, RunOptions, Sites, VirtualTokens};
use pt_tensor::{Kind, LabelLogprobs, Tensor, no_grad};
use std::cell::RefCell;
use std::rc::Rc;

/// How far hidden states may be apart, as a share of the largest: some rounding, no more.
const MAX_SHARE: f64 = 1e-4;

/// The sites of a method, which remembers what the hidden states behind each layer are.
#[derive(Debug)]
struct Probe {
    sites: Rc<dyn Sites>,
    behind_layer: RefCell<Vec<Tensor>>,
}

impl Sites for Probe {
    fn linear(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<Tensor> {
        self.sites.linear(layer, hidden_states)
    }

    fn output(&self, layer: &Linear, hidden_states: &Tensor) -> pt_model::Result<(Tensor, Tensor)> {
        self.sites.output(layer, hidden_states)
    }

    fn embedding(&self, input_ids: &Tensor, embeddings: Tensor) -> pt_model::Result<Tensor> {
        self.sites.embedding(input_ids, embeddings)
    }

    fn branch(&self, site: &BranchSite<'_>, output: Tensor) -> pt_model::Result<Tensor> {
        self.sites.branch(site, output)
    }

    fn gap(&self, site: &GapSite<'_>, hidden_states: Tensor) -> pt_model::Result<Tensor> {
        let hidden_states = self.sites.gap(site, hidden_states)?;
        self.behind_layer.borrow_mut().push(hidden_states.shallow_clone());
        Ok(hidden_states)
    }

    fn num_virtual_tokens(&self) -> usize {
        self.sites.num_virtual_tokens()
    }

    fn virtual_tokens(&self) -> pt_model::Result<Option<VirtualTokens>> {
        self.sites.virtual_tokens()
    }

    fn parameter(&self, path: &str) -> Option<Tensor> {
        self.sites.parameter(path)
    }

    fn check(&self) -> pt_model::Result<()> {
        self.sites.check()
    }
}

/// The layer, counted from 0, behind which two passes over a batch first differ by more than rounding; `None` where they
/// agree throughout.
pub(crate) fn first_difference(model: &CausalLm, sites: &Rc<dyn Sites>, batch: &PackedBatch) -> Result<Option<usize>> {
    let pass = || -> Result<Vec<Tensor>> {
        let probe = Rc::new(Probe { sites: sites.clone(), behind_layer: RefCell::default() });
        let probed: Rc<dyn Sites> = probe.clone();
        no_grad(|| model.label_logprobs(batch, &probed, RunOptions::default(), &LabelLogprobs::default()))?;
        Ok(probe.behind_layer.take())
    };
    let (one, other) = (pass()?, pass()?);
    let differs = |(one, other): (&Tensor, &Tensor)| {
        let largest = |tensor: &Tensor| tensor.to_kind(Kind::Float).abs().max().double_value(&[]);
        let apart = largest(&(one - other));
        apart.is_nan() || apart > MAX_SHARE * largest(one)
    };
    Ok(one.iter().zip(&other).position(differs))
}
